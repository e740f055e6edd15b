"""Any timm model as vision encoder, transformer or convolutional net, and EVA-CLIP-g as BLIP-2 uses it."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from typing import Any, ClassVar

import timm
import torch
from accelerate import init_empty_weights
from timm.layers import resample_abs_pos_embed
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError, ConfigError, EVLGenError, did_you_mean
from evlgen.common.memory import check_fits
from evlgen.common.registry import registry
from evlgen.files.io import resolve
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.checkpointing import FairscaleCheckpoints, checkpoint_blocks, offloaded
from evlgen.models.vision.efficientnet import efficientnet_to_timm, is_efficientnet_pytorch
from evlgen.models.vision.merging import Merging, merge_in_blocks, num_merged_tokens
from evlgen.models.vision.temporal import recompute_contextual_blocks
from evlgen.weights.hub import files_on_hub
from evlgen.weights.needed import ENCODER_WEIGHTS, missing_encoder
from evlgen.weights.weights import check_finite, read_weights, weights_only

logger = logging.getLogger(__name__)

_MOST_LAYERS, _MOST = 512, 65536  # in kwargs


@registry.register_vision_encoder("timm")
class TimmEncoder(VisionEncoder):
    """A timm model without its head: all tokens of a transformer's last block, or each place of a
    convolutional net's last feature map, row by row.

    Args:
        name: timm model name, ``vit_base_patch16_224`` or with a tag, ``vit_base_patch16_clip_224.openai``.
        image_size: side of the images, in pixels; a multiple of the patch size.
        pretrained: true for timm's own weights, a path or URL of a file with this model's weights, false for
            random.
        dtype: type of the weights.
        drop_path_rate: stochastic depth while training.
        kwargs: further arguments of ``timm.create_model``; of a model with feature maps also
            ``out_indices``, one number: the level whose map is read, as timm counts them, from 0 or, as -2,
            from the end.

    Raises:
        ConfigError: no such timm model, an argument it does not take, an image size the patches do not
        divide, no such level. CheckpointError: the weights are missing, damaged or of other shapes.
    """

    TIMM_NAME: ClassVar[str | None] = None  # the model to create where `name` is a registered one
    DEFAULTS: ClassVar[dict[str, Any]] = {}  # arguments of timm.create_model
    WEIGHTS_URL: ClassVar[str | None] = None  # what `pretrained: true` means; None: timm's own
    ANTIALIAS: ClassVar[bool] = True  # of resampled positions, as timm does it

    def __init__(
        self,
        name: str,
        image_size: int = 224,
        pretrained: bool | str = True,
        dtype: torch.dtype = torch.float32,
        drop_path_rate: float = 0.0,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        source = self.WEIGHTS_URL if pretrained is True else pretrained
        arguments = {**self.DEFAULTS, **(kwargs or {})}
        if "features_only" in arguments:
            raise ConfigError(
                "model.vision.kwargs.features_only: leave it out. The last level's features are read; "
                "out_indices names another level."
            )
        level = arguments.pop("out_indices", None)
        self.trunk = _create(
            self.TIMM_NAME or name,
            pretrained=source is None,
            empty=isinstance(source, str),
            img_size=image_size,
            **({"drop_path_rate": drop_path_rate} if drop_path_rate else {}),
            **arguments,
        )
        self._check_image_size(name, image_size)
        self.level = _keep_up_to_level(self.trunk, name, level)
        _drop_heads(self.trunk)
        if isinstance(source, str):
            self._load(source, dtype)
        self.trunk.to(dtype)
        if pretrained is not False:
            what = f"model.vision.pretrained: {source or name}, read as {dtype}, is refused"
            check_finite(self.trunk.state_dict(), what)
        self.image_size = image_size
        self.num_prefix_tokens = getattr(self.trunk, "num_prefix_tokens", 0)
        data = self.trunk.pretrained_cfg
        self.image_mean, self.image_std = tuple(data["mean"]), tuple(data["std"])
        self.offloads = False
        self.fairscale: FairscaleCheckpoints | None = None
        self.merging: Merging | None = None
        self.channels_last = False
        self._measure_tokens(name)

    def checkpoint(self, offload: bool) -> None:
        """See `VisionEncoder.checkpoint`. Raises `ConfigError` where timm's model does not offer it."""
        if not recompute_contextual_blocks(self):
            checkpoint_blocks(self.trunk)
        self.offloads = offload

    def checkpoint_with_fairscale(self, offload: bool) -> None:
        """See `VisionEncoder.checkpoint_with_fairscale`. Raises as `FairscaleCheckpoints`."""
        self.fairscale = FairscaleCheckpoints(self.trunk, offload)

    def merge_tokens(self, r: int) -> None:
        """See `VisionEncoder.merge_tokens`. Raises `ConfigError` for other than plain vision transformers."""
        self.merging = merge_in_blocks(self.trunk, r)
        protected = self.merging.num_protected
        self.num_tokens = num_merged_tokens(self.num_tokens, r, len(self.trunk.blocks), protected)
        self.num_prefix_tokens = protected  # registers are merged and moved like any other token

    @classmethod
    def missing(cls, pretrained: bool | str) -> str | None:
        """Why the weights are not on this machine, with the remedy; None when they are or can be asked of
        timm."""
        return missing_encoder(cls.WEIGHTS_URL if pretrained is True else pretrained)

    @classmethod
    def normalisation(cls, name: str) -> dict[str, list[float]]:
        """``mean`` and ``std`` of the pixels a model of this name reads; builds nothing. Empty for an unknown
        name."""
        try:
            cfg = timm.get_pretrained_cfg(cls.TIMM_NAME or name, allow_unregistered=False)
        except RuntimeError:  # an unknown tag, which `_create` refuses
            return {}
        return {} if cfg is None else {"mean": list(cfg.mean), "std": list(cfg.std)}

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N, C]."""
        if self.fairscale is not None:
            self.fairscale.check(self.trunk, pixels.device)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with offloaded(pixels.device) if self.offloads else contextlib.nullcontext():
            return _tokens_of(self._feature_map(pixels))

    def forward_details(self, pixels: Tensor) -> dict[str, Tensor]:
        """The forward pass with its insides, for images and tests.

        Returns:
            ``tokens`` [B, N, C]; ``merge_map`` [B, num_input_tokens]: the output token each prefix token and
            patch ended in, by itself where nothing merges.
        """
        tokens = self.forward(pixels)
        merge_map = None if self.merging is None else self.merging.merge_map
        if merge_map is None:
            merge_map = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return {"tokens": tokens, "merge_map": merge_map}

    def _check_image_size(self, name: str, image_size: int) -> None:
        patch_embed = getattr(self.trunk, "patch_embed", None)
        patch = getattr(patch_embed, "patch_size", 1)
        patch = patch if isinstance(patch, int) else patch[0]
        if image_size % patch:
            near = max(patch, round(image_size / patch) * patch)
            raise ConfigError(
                f"model.vision.image_size {image_size} is no multiple of {name}'s patch size {patch}; "
                f"{near} is the nearest."
            )

    @torch.no_grad()
    def _measure_tokens(self, name: str) -> None:
        """Notes the number, the grid and the channels of the tokens. Raises `ConfigError` for a model that
        gives none."""
        patch_embed = getattr(self.trunk, "patch_embed", None)
        grid = getattr(patch_embed, "grid_size", None)
        if hasattr(self.trunk, "num_prefix_tokens") and grid:  # a plain transformer keeps all its tokens
            self.embed_dim = self.trunk.num_features
            self.grid_size = tuple(grid)
            self.num_tokens = math.prod(grid) + self.num_prefix_tokens
            return
        if any(isinstance(module, nn.BatchNorm2d) for module in self.trunk.modules()):
            # convolutions on a CPU take 0.6 of the time with the channels last
            self.channels_last = True
            self.trunk.to(memory_format=torch.channels_last)
        was_training, weight = self.trunk.training, next(self.trunk.parameters())
        self.trunk.eval()
        side = self.image_size
        try:
            features = self._feature_map(torch.zeros(1, 3, side, side, dtype=weight.dtype))
            if not isinstance(features, Tensor) or features.ndim not in (3, 4):
                raise TypeError("it gives neither a feature map nor one row of tokens")
        except Exception as error:  # timm's models check little of what they read
            cause = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ConfigError(
                f"model.vision.name '{name}' cannot be read as visual tokens of images of {side} x {side} "
                f"pixels: {cause}. Set another model.vision.image_size, or take another model, such as "
                "vit_base_patch16_224."
            ) from error
        self.trunk.train(was_training)
        if features.ndim == 4:
            rows, columns = features.shape[2:]
            self.grid_size = rows, columns
        self.num_tokens, self.embed_dim = _tokens_of(features).shape[1:]

    def _feature_map(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> tokens [B, N, C], or a feature map [B, C, h, w]."""
        if self.level is not None:
            (features,) = self.trunk.forward_intermediates(
                pixels, indices=[self.level], stop_early=True, intermediates_only=True
            )
            return features
        features = self.trunk.forward_features(pixels)
        is_map = isinstance(features, Tensor) and features.ndim == 4
        if is_map and features.shape[-1] == self.trunk.num_features != features.shape[1]:
            return features.permute(0, 3, 1, 2)  # a Swin's [B, h, w, C]
        return features

    def _load(self, source: str, dtype: torch.dtype) -> None:
        state = self._adapt(read_weights(resolve(source)))
        own = self.trunk.state_dict()
        missing = sorted(set(own) - set(state))
        if missing:
            raise CheckpointError(
                f"{source} lacks {len(missing)} of the {len(own)} weights of {type(self.trunk).__name__}, "
                f"for instance {missing[0]}: these are another model's weights."
            )
        for key, value in own.items():
            if state[key].shape != value.shape:
                raise CheckpointError(
                    f"{source}: {key} has shape {tuple(state[key].shape)}, the vision encoder needs "
                    f"{tuple(value.shape)}. "
                    "Check model.vision.name and model.vision.kwargs."
                )
        # one tensor after the other, so that the memory-mapped file and the model never stand in RAM together
        self.trunk.load_state_dict({k: state[k].to(dtype) for k in own}, assign=True)

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights as published -> weights of `trunk`: prefix off, positions resampled to the image size."""
        state = {k.removeprefix("visual_encoder.").removeprefix("trunk."): v for k, v in state.items()}
        state = _to_timm(state, self.trunk)
        own = getattr(self.trunk, "pos_embed", None)
        given = state.get("pos_embed")
        if own is not None and given is not None and _is_other_grid(given, own):
            has_no_class = getattr(self.trunk, "no_embed_class", False)
            state["pos_embed"] = resample_abs_pos_embed(
                given.float(),
                new_size=list(self.trunk.patch_embed.grid_size),
                num_prefix_tokens=0 if has_no_class else self.trunk.num_prefix_tokens,
                antialias=self.ANTIALIAS,
            )
        return state


@registry.register_vision_encoder("eva_clip_g")
class EvaClipG(TimmEncoder):
    """EVA-CLIP-g as BLIP-2 uses it (Li et al., 2023, section 4.1): the second last layer's tokens, so 39 of
    40 blocks and no final norm. Reads the published ``eva_vit_g.pth``."""

    TIMM_NAME = "eva_giant_patch14_clip_224"
    DEFAULTS: ClassVar[dict[str, Any]] = {"depth": 39, "use_post_transformer_norm": False}
    WEIGHTS_URL = ENCODER_WEIGHTS["eva_clip_g"]
    ANTIALIAS = False  # LAVIS, interpolate_pos_embed of models/eva_vit.py


@registry.register_vision_encoder("clip_L")
class ClipL(TimmEncoder):
    """OpenAI's CLIP ViT-L/14 as BLIP-2 uses it (Li et al., 2023, section 4.1): the second last layer's
    tokens, so 23 of 24 blocks and no final norm. Reads the published ``clip_vit_L.pth`` (OpenAI's names) and
    timm's layout."""

    TIMM_NAME = "vit_large_patch14_clip_quickgelu_224.openai"
    DEFAULTS: ClassVar[dict[str, Any]] = {"depth": 23, "final_norm": False}
    WEIGHTS_URL = ENCODER_WEIGHTS["clip_L"]
    ANTIALIAS = False  # LAVIS, interpolate_pos_embed of models/clip_vit.py

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {key.removeprefix("visual_encoder."): value for key, value in state.items()}
        return super()._adapt(openai_to_timm(state))


# OpenAI's names of CLIP's image tower -> timm's
_OPENAI_NAMES = (
    ("conv1.", "patch_embed.proj."),
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    (".attn.in_proj_", ".attn.qkv."),
    (".attn.out_proj.", ".attn.proj."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def openai_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's image tower under OpenAI's names, alone or within a whole CLIP (``visual.*``) -> under timm's.
    Weights under other names are returned as they are."""
    if "visual.class_embedding" in state:
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    if not {"class_embedding", "positional_embedding"} <= set(state):
        return state
    out = {
        "cls_token": state["class_embedding"].view(1, 1, -1),
        "pos_embed": state["positional_embedding"].unsqueeze(0),
    }
    for key, value in state.items():
        if key not in ("class_embedding", "positional_embedding"):
            for theirs, ours in _OPENAI_NAMES:
                key = key.replace(theirs, ours)
            out[key] = value
    return out


def _to_timm(state: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """Weights as their authors published them -> in timm's layout, by the conversion timm has for the model;
    as they are where they have all its names, or where that conversion does not know them either."""
    if is_efficientnet_pytorch(state) and hasattr(trunk, "blocks"):
        return efficientnet_to_timm(state, trunk)
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if convert is None or set(trunk.state_dict()) <= set(state):
        return state
    try:
        return convert(dict(state), trunk)
    except Exception:  # other weights, or damaged ones: whoever asked compares names and shapes
        return state


def _tokens_of(features: Tensor) -> Tensor:
    """A feature map [B, C, h, w] -> its places row by row, [B, h * w, C]; tokens as they are."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def _keep_up_to_level(trunk: nn.Module, name: str, level: Any) -> int | None:
    """Takes away what comes after a level of feature maps; its number, counted from 0, or None for none.

    Raises:
        ConfigError: no such level; or the model has none.
    """
    if level is None:
        return None
    if isinstance(level, list | tuple) and len(level) == 1:
        (level,) = level
    if hasattr(trunk, "num_prefix_tokens") or not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(
            f"model.vision.kwargs.out_indices: {name} has no levels of feature maps. To read an earlier "
            "block of a transformer, set kwargs.depth."
        )
    count = len(trunk.feature_info)
    if isinstance(level, bool) or not isinstance(level, int) or not -count <= level < count:
        raise ConfigError(
            f"model.vision.kwargs.out_indices: {level!r:.60} is not one number from {-count} to {count - 1}, "
            f"the levels of {name}."
        )
    level %= count
    trunk.prune_intermediate_layers([level])
    return level


def _drop_heads(trunk: nn.Module) -> None:
    """What comes after the tokens goes, so that it takes no memory, no weights and no gradients. timm builds
    it even without classes: the attention pooling of a SigLIP is an eighth of its ViT-B."""
    heads = ("conv_head", "norm_head") if isinstance(trunk, MobileNetV3) else ()
    for name in ("attn_pool", "fc_norm", "head", "head_dist", *heads):
        if isinstance(getattr(trunk, name, None), nn.Module):
            setattr(trunk, name, nn.Identity())


def _is_other_grid(given: Tensor, own: Tensor) -> bool:
    """Whether a position table differs from the model's in its number of tokens alone, so that it can be
    resampled."""
    alike = given.ndim == own.ndim == 3 and given.shape[0] == 1 and given.shape[2] == own.shape[2]
    return alike and given.shape[1] != own.shape[1]


def _create(name: str, pretrained: bool, empty: bool, **kwargs: Any) -> nn.Module:
    if not timm.is_model(name):
        registered = registry.list_vision_encoders()
        known = [*registered, *dict.fromkeys(n.split(".")[0] for n in timm.list_models(pretrained=False))]
        raise ConfigError(
            f"model.vision.name '{name}' is neither a registered vision encoder "
            f"({', '.join(registered)}) nor a timm model.{did_you_mean(name, known)}"
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(
            f"model.vision.name '{name}': timm has the weights {', '.join(tagged) or 'of none'}."
            f"{did_you_mean(name, tagged)}"
        ) from None
    _check_kwargs(kwargs)
    try:
        with init_empty_weights(include_buffers=False):
            model, kwargs = _build(name, kwargs)
        if empty:
            return model
        check_fits(sum(p.numel() for p in model.parameters()), f"model.vision ({name})")
        if pretrained:
            logger.info("%s: timm's weights, fetched from %s unless they are here", name, _origin(model))
            kwargs |= _without_asking_again(name, model)
        with torch.no_grad(), weights_only():
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except EVLGenError:
        raise
    except TypeError as error:
        raise ConfigError(f"model.vision.kwargs do not fit timm's {name}: {error}") from error
    except Exception as error:  # timm's models check little of what they are given
        cause = (str(error).splitlines() or [""])[0] or type(error).__name__
        if pretrained:
            raise _not_fetched(name, cause) from error
        raise ConfigError(f"model.vision: timm cannot build {name} ({cause})") from error


def _not_fetched(name: str, cause: object) -> CheckpointError:
    return CheckpointError(
        f"timm could not get the weights of {name} ({cause}). Download them where there is a connection and "
        "set model.vision.pretrained to the file, or to false for random weights."
    )


def _without_asking_again(name: str, model: nn.Module) -> dict[str, Any]:
    """What has timm read its weights from the Hugging Face cache, where they are in it, without a word to the
    hub. Where they are not, the hub is asked once here: timm would ask again and again for a minute.

    Raises:
        CheckpointError: the hub has to give them and does not.
    """
    from huggingface_hub import try_to_load_from_cache

    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not cfg.get("hf_hub_id") or cfg.get("file") or cfg.get("state_dict"):
        return {}
    hub_id, _, revision = cfg["hf_hub_id"].partition("@")
    names = [cfg.get("hf_hub_filename") or "model.safetensors", "pytorch_model.bin"]
    found = (try_to_load_from_cache(hub_id, file, revision=revision or None) for file in names)
    here = next((path for path in found if isinstance(path, str)), None)
    if here is None:
        try:
            files_on_hub(hub_id)
        except CheckpointError as error:
            raise _not_fetched(name, error) from error
    return {"pretrained_cfg_overlay": {"file": here}} if here and not cfg.get("custom_load") else {}


def _build(name: str, kwargs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments it takes: convolutional nets read any size and are told none."""
    try:
        return timm.create_model(name, num_classes=0, **kwargs), kwargs
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
    kwargs = {key: value for key, value in kwargs.items() if key != "img_size"}
    return timm.create_model(name, num_classes=0, **kwargs), kwargs


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    """Raises `ConfigError` for arguments through which timm would read other files than
    ``model.vision.pretrained``, and for numbers no model has."""
    for key, value in kwargs.items():
        if key.startswith("pretrained") or key == "checkpoint_path":
            raise ConfigError(
                f"model.vision.kwargs.{key} is refused: weights are named in model.vision.pretrained, and "
                "read from there without running anything they hold."
            )
        most = _MOST_LAYERS if key.startswith("depth") else _MOST
        if any(number > most for number in _whole_numbers(value)):
            raise ConfigError(f"model.vision.kwargs.{key}: {value!r:.60} is more than {most}.")


def _origin(model: nn.Module) -> str:
    """Where timm gets a model's weights."""
    cfg = model.pretrained_cfg
    return cfg.get("hf_hub_id") or cfg.get("url") or "nowhere"


def _whole_numbers(value: Any) -> list[int]:
    if isinstance(value, list | tuple):
        return [number for item in value for number in _whole_numbers(item)]
    return [value] if isinstance(value, int) else []
