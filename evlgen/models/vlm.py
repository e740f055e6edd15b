"""Vision encoder -> connector -> language model: the one place where the three meet.

From an image to the loss of a text about it, top to bottom: `VLM.forward`, `VLM.soft_prompts`, `VLM.encode`.
How the parts are built is above that, samples with several images or texts below it; what writes texts is in
`evlgen.models.writing` and `evlgen.models.chatting`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence, Sized
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.precision import without_autocast
from evlgen.common.registry import registry
from evlgen.config.model_config import GenerationConfig, ModelConfig
from evlgen.models import room, sequences
from evlgen.models.chatting import Chatting
from evlgen.models.connectors.base import Connector, ConnectorInputs
from evlgen.models.language import CausalLanguageModel, LanguageModel, build_language_model
from evlgen.models.language.segments import Row, SoftPrompts
from evlgen.models.ops import FP8, cuda_graphs, plain_dtype
from evlgen.models.prompts import texts_to_learn
from evlgen.models.soft_prompts import SoftPromptHead
from evlgen.models.text_lengths import TextLengths
from evlgen.models.tiles import Tiling, as_prompts
from evlgen.models.vision import build_vision_encoder
from evlgen.models.vision.base import VisionEncoder
from evlgen.models.vision.temporal import pool_frames
from evlgen.models.writing import count_images
from evlgen.weights.needed import MissingAsset, language_parts, with_small_parts

logger = logging.getLogger(__name__)

_RECORDED_IMAGES = 16  # images whose encoding is recorded as a CUDA graph at most: more keep a card busy


class VLM(Chatting):
    """A visually conditioned language model. An architecture is a registered subclass that names its language
    model.

    Args:
        vision: pixels [B, 3, H, W] -> visual tokens [B, N, C_vision].
        connector: visual tokens -> soft prompts [B, M, C_language].
        language: reads soft prompts and text.
        prompt: the text before every caption.
        freeze_vision, freeze_language: what is not trained, but for the parts' own `trained_modules`.
        prompt_head: what is added around the connector's output; None: nothing.
        temporal: how the frames of a video become one set of visual tokens, see `TemporalConfig`; None for a
            model of images.
    """

    LANGUAGE_MODEL: ClassVar[str]

    connector: Connector
    prompt_head: SoftPromptHead | None

    def __init__(
        self,
        vision: VisionEncoder,
        connector: Connector,
        language: LanguageModel,
        prompt: str = "",
        freeze_vision: bool = True,
        freeze_language: bool = True,
        temporal: str | None = None,
        prompt_head: SoftPromptHead | None = None,
    ) -> None:
        super().__init__(vision, freeze_vision)
        self.temporal = temporal
        self.connector = connector
        self.prompt_head = prompt_head
        self.tiling: Tiling | None = None
        self.language = language
        self.freezes_language = freeze_language
        self.prompt = prompt
        self.generation = GenerationConfig()
        self.max_sequence_len = ModelConfig.max_sequence_len
        self.freeze_parts()

    # ---- building

    @classmethod
    def from_parts_config(cls, cfg: ModelConfig, device: torch.device) -> VLM:
        """Builds the three parts a config names. See `ModelConfig`."""
        connector_args = dict(cfg.connector)
        connector_class = registry.get_connector_class(connector_args.pop("name", "tomeformer"))
        temporal = cls._temporal_of(cfg)
        vision = build_vision_encoder(cfg.vision, device, temporal)
        language = build_language_model(cfg, cls.LANGUAGE_MODEL, device)
        embedding_rms = language.embedding_rms()
        connector = connector_class.build(
            ConnectorInputs.behind(vision, language.embed_dim, embedding_rms), **connector_args
        )
        head: dict[str, Any] = {}  # subclasses may not know it
        if cfg.soft_prompts is not None:
            count = connector.num_soft_prompts(vision.num_tokens)
            scale = cfg.soft_prompts.scale
            head["prompt_head"] = SoftPromptHead(count, language.embed_dim, embedding_rms, scale)
        frozen = (cfg.vision.freeze, cfg.language.freeze)
        model = cls(vision, connector, language, cfg.prompt, *frozen, temporal, **head)
        model.set_norm(cfg.vision.norm_eps)
        model.tiling = Tiling.build(cfg, vision, language.embed_dim, embedding_rms, temporal)
        if model.tiling is not None and not isinstance(language, CausalLanguageModel):
            raise ConfigError(
                "model.vision.tiles: images have different numbers of soft prompts, which needs a decoder. "
                "Set model.language.name to one."
            )
        model.generation = cfg.generation
        model.max_sequence_len = cfg.max_sequence_len
        model._log_parts()
        return model

    @classmethod
    def missing(cls, cfg: ModelConfig) -> list[MissingAsset]:
        """Weights the config names that are not on this machine."""
        named = (cfg.vision.pretrained, *cls._hub_parts(cfg).values())
        return with_small_parts(super().missing(cfg), named)

    @classmethod
    def _hub_parts(cls, cfg: ModelConfig) -> dict[str, str]:
        return language_parts(cfg.language.name, cfg.connector.get("init"))

    @classmethod
    def text_lengths(cls, cfg: ModelConfig) -> TextLengths | None:
        return room.text_lengths(cfg, cls.LANGUAGE_MODEL, cls._temporal_of(cfg))

    @classmethod
    def check_room(
        cls, cfg: ModelConfig, prompt: str | None, num_new: int, learns: bool, num_frames: int = 1
    ) -> None:
        temporal = cls._temporal_of(cfg)
        room.check_room(cfg, cls.LANGUAGE_MODEL, temporal, prompt, num_new, learns, num_frames)

    @classmethod
    def _temporal_of(cls, cfg: ModelConfig) -> str | None:
        return cfg.vision.temporal.form if cfg.vision.temporal else cls.TEMPORAL

    def frozen_modules(self) -> list[nn.Module]:
        return [*super().frozen_modules(), *([self.language] if self.freezes_language else [])]

    def trained_modules(self) -> list[nn.Module]:
        return [module for part in self.frozen_modules() for module in part.trained_modules()]

    def lr_scales(self) -> dict[str, float]:
        found = {f"connector.{key}": factor for key, factor in self.connector.lr_scales().items()}
        if self.prompt_head is not None:
            found |= {f"prompt_head.{key}": factor for key, factor in self.prompt_head.lr_scales().items()}
        return found

    # ---- from an image to the loss

    def forward(self, samples: Batch) -> dict[str, Any]:
        """The next-token loss of a batch.

        Args:
            samples: ``image`` [B, 3, H, W], of a video [B, 3, T, H, W] (or ``visual_tokens``, see
                `soft_prompts`); ``text_input`` list[str] to learn; with ``text_output`` list[str] that is
                learned and ``text_input`` only read. ``num_texts`` list[int]: how many of the N texts belong
                to each image, whose soft prompts are then read once for all of them; without it, one. With
                ``text_weights`` [N], one for each text, the loss is the weighted sum of the texts' negated
                log-likelihoods, by image. ``text_tokens``, N texts of `generate_tokens`, may stand in place
                of ``text_input``.

                Samples that are sequences have ``segments`` in place of all these, a list of `Read`, `Learn`
                and `Visual` for each, or ``messages``, a conversation for each (`evlgen.processors.turns`);
                and ``images``: the images [3, H, W] and videos [3, T, H, W] of each, none, one or several,
                in the order of their places, or, instead of these, tokens [N, C_vision] that `encode` gave
                earlier. Without ``images``, ``image`` has one for each.

        Returns:
            ``loss``: scalar, float32; ``num_tokens``: how many tokens it is the mean of, and with
            ``text_weights`` how many images, or sequences.
        """
        if "text_weights" in samples:
            return self._weighted_loss(samples)
        if sequences.is_sequence(samples):
            return self._sequences_loss(samples)
        soft_prompts = self.soft_prompts(samples)
        counts = _text_counts(samples, len(soft_prompts))
        with without_autocast(soft_prompts.device):  # a frozen part computes in the type of its weights
            loss, num_tokens = self.language.loss(
                soft_prompts, samples["text_input"], samples.get("text_output"), **_several(counts)
            )
        return {"loss": loss, "num_tokens": num_tokens}

    def soft_prompts(self, samples: Batch) -> Tensor:
        """``image`` [B, 3, H, W] or [B, 3, T, H, W], or in its place ``visual_tokens`` [B, N, C_vision] that
        `encode` gave earlier -> soft prompts [B, M, C_language]. Of ``images`` see `sequence_prompts`."""
        if "images" in samples:
            return cast(Tensor, self.sequence_prompts(samples))
        if self.tiling is not None and "image" in samples:
            return cast(Tensor, self._tiled([*samples["image"]]))
        return self._to_prompts(self.image_tokens(samples))

    def _to_prompts(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens [B, N, C_vision] -> [B, M, C_language]."""
        frames = self._frames_apart(tokens)
        return self._in_rows(self._with_head(self.connector(self._normed(frames))), len(tokens))

    def _frames_apart(self, tokens: Tensor) -> Tensor:
        """With ``temporal: each`` the tokens of videos [B, T * N, C] -> of their frames [B * T, N, C], those
        of a video in a row; else what was given."""
        return (
            tokens.unflatten(1, (-1, self.vision.num_tokens)).flatten(0, 1)
            if self.temporal == "each"
            else tokens
        )

    def _in_rows(self, prompts: Tensor, num_videos: int) -> Tensor:
        """The soft prompts of frames [B * T, M, C] -> of ``num_videos`` videos [B, T * M, C]."""
        return prompts if len(prompts) == num_videos else prompts.unflatten(0, (num_videos, -1)).flatten(1, 2)

    def _prompts_to_continue(self, samples: Batch) -> Tensor:
        """`soft_prompts` for generation: of a few images by a CUDA graph where that is possible."""
        image = samples.get("image")
        is_own = type(self).soft_prompts is VLM.soft_prompts and self.temporal is None and not self.tiling
        is_plain = isinstance(image, Tensor) and image.ndim == 4 and len(image) <= _RECORDED_IMAGES
        if not (is_own and is_plain) or self.training or {"images", "visual_tokens"} & {*samples}:
            return self.soft_prompts(samples)
        self._check_image(samples["image"])
        pixels = samples["image"].to(self.device)

        def make() -> cuda_graphs.RecordedCall:
            return cuda_graphs.RecordedCall(lambda x: self.soft_prompts({"image": x}), pixels)

        with cuda_graphs.recorded(self, pixels.device, (pixels.shape, pixels.dtype), make) as call:
            return self.soft_prompts({**samples, "image": pixels}) if call is None else call(pixels)

    def _with_head(self, prompts: Tensor) -> Tensor:
        return prompts if self.prompt_head is None else self.prompt_head(prompts)

    def encode(self, image: Tensor) -> Tensor:
        """The encoder's own tokens, in the type its weights are kept in.

        Where the encoder is frozen they are the same at every step, and may be kept: see
        `evlgen.vision_cache.cache`.

        Args:
            image: [B, 3, H, W], or videos [B, 3, T, H, W] where the model is one of videos; to such a model a
                image is a video of one frame. Or Pillow images, see `generate`.

        Returns:
            [B, N, C_vision]; with ``temporal: concat`` or ``each`` [B, T * N, C_vision].

        Raises:
            ConfigError: videos for a model of images.
            DataError: images of another size, another number of dimensions, videos without a frame.
        """
        pixels = self._pixels(image)
        if pixels.ndim == 4:
            return self.encode_frames(pixels)
        num_frames = pixels.shape[2]
        tokens = self.encode_frames(pixels.transpose(1, 2).flatten(0, 1), num_frames)  # [B * T, 3, H, W]
        return tokens if num_frames == 1 else pool_frames(tokens, num_frames, str(self.temporal))

    def _check_image(self, image: Tensor) -> None:
        """As of `VisionModel`; and raises `ConfigError` for videos where the model is one of images."""
        super()._check_image(image)
        if image.ndim == 5 and self.temporal is None:
            raise ConfigError(
                "this is a model of images, and a video was given to it. Set model.vision.temporal: "
                "{form: average}, or take an architecture of videos, such as evlgen_video_opt."
            )
        if image.ndim == 5 and image.shape[2] == 0:
            raise DataError(f"image has shape {list(image.shape)}: a video needs at least one frame.")

    # ---- the losses of single texts

    def sample_losses(self, samples: Batch, soft_prompts: Tensor | None = None) -> dict[str, Tensor]:
        """As `forward`, of each text by itself.

        Args:
            samples: as in `forward`; N texts with ``num_texts``, else one for each image. With
                ``text_tokens`` also ``prompt``, as in `generate`.
            soft_prompts: of the images, [B, M, C_language], where they are known already; ``samples`` then
                needs no pixels.

        Returns:
            ``losses``: [N], float32, the sum over each text's tokens: its negated log-likelihood;
            ``num_tokens``: [N].

        Raises:
            DataError: the texts are not as many as the images, or as ``num_texts`` says.
        """
        if sequences.is_sequence(samples):
            given = self.sequence_prompts(samples) if soft_prompts is None else soft_prompts
            rows, prompts = self._rows(samples, given)
            with without_autocast(self.device):
                losses, num_tokens = self.language.rows_losses(prompts, rows)
            return {"losses": losses, "num_tokens": num_tokens}
        soft_prompts = self.soft_prompts(samples) if soft_prompts is None else soft_prompts
        counts = _text_counts(samples, len(soft_prompts))
        with without_autocast(soft_prompts.device):
            if "text_tokens" in samples:
                losses, num_tokens = self.language.token_losses(
                    soft_prompts, self._starts(samples, counts), samples["text_tokens"], **_several(counts)
                )
            else:
                losses, num_tokens = self.language.sample_losses(
                    soft_prompts, samples["text_input"], samples.get("text_output"), **_several(counts)
                )
        return {"losses": losses, "num_tokens": num_tokens}

    def _weighted_loss(self, samples: Batch) -> dict[str, Any]:
        """What `forward` gives for texts that weigh differently, such as the answers of several people."""
        weights = torch.as_tensor(samples["text_weights"], dtype=torch.float32)
        weights = weights.to(self.device, non_blocking=True)
        is_own = type(self).sample_losses is VLM.sample_losses
        if is_own and self.language.goes_in_parts():
            rows, soft_prompts, several = self._to_learn(samples)
            _check_length("text_weights", weights, len(rows), "texts")
            with without_autocast(self.device):
                total = self.language.weighted_loss(soft_prompts, rows, weights, **several)
        else:
            losses = self.sample_losses(samples)["losses"]
            _check_length("text_weights", weights, len(losses), "texts")
            total = (weights * losses).sum()
        is_sequence = sequences.is_sequence(samples)
        count = sequences.num_sequences(samples) if is_sequence else count_images(samples)
        return {"loss": total / count, "num_tokens": count}

    def _to_learn(self, samples: Batch) -> tuple[Sequence[Row], SoftPrompts, dict[str, list[int]]]:
        """The rows of a batch's texts, the soft prompts of its images, and ``num_texts`` where an image has
        several."""
        if sequences.is_sequence(samples):
            return *self._rows(samples, self.sequence_prompts(samples)), {}
        soft_prompts = self.soft_prompts(samples)
        counts = _text_counts(samples, len(soft_prompts))
        if "text_tokens" in samples:
            rows = self.language.tokens_to_learn(self._starts(samples, counts), samples["text_tokens"])
        else:
            rows = self.language.to_learn(samples["text_input"], samples.get("text_output"))
        return rows, soft_prompts, _several(counts)

    def _starts(self, samples: Batch, counts: list[int]) -> list[str]:
        """The prompt that each text of ``text_tokens`` was written after."""
        pairs = zip(self._prompts(samples, len(counts)), counts, strict=True)
        return [prompt for prompt, count in pairs for _ in range(count)]

    # ---- samples with none or several images

    def _sequences_loss(self, samples: Batch) -> dict[str, Any]:
        rows, soft_prompts = self._rows(samples, self.sequence_prompts(samples))
        with without_autocast(self.device):
            loss, num_tokens = self.language.rows_loss(soft_prompts, rows)
        return {"loss": loss, "num_tokens": num_tokens}

    def _rows(self, samples: Batch, soft_prompts: SoftPrompts) -> tuple[list[Row], SoftPrompts]:
        return sequences.rows_to_learn(self.language, samples, soft_prompts, self._most_positions)

    def sequence_prompts(self, samples: Batch) -> SoftPrompts:
        """The soft prompts of all images and videos of samples that are sequences, in their order: [K, M,
        C_language], or K tensors [M, C_language] where the numbers differ.

        Without any image, K is 0, and all that is trained takes part all the same, as DDP and a
        standardisation over processes want it.
        """
        if "images" not in samples and sequences.has_image(samples):
            return self.soft_prompts(samples)
        device = self.device
        images = [i.to(device, non_blocking=True) for of_one in samples.get("images", []) for i in of_one]
        if images:
            return self._connect(self._encode_each(images)) if self.tiling is None else self._tiled(images)
        size = self.vision.image_size
        learns = any(p.requires_grad for p in self.vision.parameters())
        tokens = (
            self.encode(torch.zeros(1, 3, size, size, device=self.device))
            if learns
            else torch.zeros(1, self.vision.num_tokens, self.vision.embed_dim, device=self.device)
        )
        prompts = self._with_head(self.connector(self._normed(tokens))[:0])
        marker = None if self.tiling is None else self.tiling.marker
        return prompts if marker is None else prompts + marker

    def _encode_each(self, images: list[Tensor]) -> list[Tensor]:
        """The tokens [N, C_vision] of images and videos of any lengths, those of one shape together; what is
        tokens already stays as it is."""
        found: dict[int, Tensor] = {}
        for places in _alike(images):
            stacked = torch.stack([images[place] for place in places])
            tokens = stacked if stacked.ndim == 3 else self.encode(stacked)
            found.update(zip(places, tokens, strict=True))
        return [found[place] for place in range(len(images))]

    def _connect(self, tokens: list[Tensor]) -> SoftPrompts:
        """Soft prompts of the tokens of `_encode_each`."""
        groups = _alike(tokens)
        prompts = [self._to_prompts(torch.stack([tokens[place] for place in places])) for places in groups]
        if len(groups) == 1:
            return prompts[0]
        found: dict[int, Tensor] = {}
        for places, of_group in zip(groups, prompts, strict=True):
            found.update(zip(places, of_group, strict=True))
        return [found[place] for place in range(len(tokens))]

    def _tiled(self, images: Sequence[Tensor]) -> SoftPrompts:
        """The soft prompts of images [3, H, W] that are grids of tiles; see `Tiling`."""
        assert self.tiling is not None
        device = self.device
        views = [self.tiling.cut(image.to(device, non_blocking=True)) for image in images]
        counts = [len(of_one) for of_one in views]
        tokens = self.encode_frames(torch.cat(views).to(plain_dtype(self.vision)), 1)  # [V, N, C]
        if self.tiling.join == "before":
            return as_prompts(self._connect([of_one.flatten(0, 1) for of_one in tokens.split(counts)]))
        grids = [self.tiling.grid_of(image.shape) for image in images]
        parts = zip(self._to_prompts(tokens).split(counts), grids, strict=True)
        return as_prompts([self.tiling.joined(prompts, grid) for prompts, grid in parts])

    def encoded(self, samples: Batch) -> Batch:
        return samples if self.tiling is not None else super().encoded(samples)

    @property
    def _most_positions(self) -> int:
        return min(self.max_sequence_len, self.language.max_positions or self.max_sequence_len)

    # ---- samples that leave nothing to learn

    def not_learnable(self, samples: Batch) -> dict[int, str]:
        if sequences.is_sequence(samples):
            room = self.num_soft_prompts, self._most_positions
            return sequences.not_learnable(self.language, samples, *room)
        if "text_output" not in samples:
            return {}
        lost = self.language.without_answer(samples["text_input"], samples["text_output"])
        if not lost:
            return {}
        counts = samples.get("num_texts", [1] * len(samples["text_input"]))
        sample_of = [sample for sample, count in enumerate(counts) for _ in range(count)]
        lost_of = Counter(sample_of[place] for place in lost)
        limit = self.language.max_txt_len
        why = f"its question takes all {limit} tokens of model.max_txt_len: nothing of an answer is left"
        return {sample: why for sample, count in lost_of.items() if count == counts[sample]}

    def not_answerable(self, samples: Batch, num_new: int) -> dict[int, str]:
        return sequences.not_answerable(self.language, samples, self.num_soft_prompts, num_new)

    def num_soft_prompts(self, image: Tensor) -> int:
        """The soft prompts of an image [3, H, W], a video [3, T, H, W], or of tokens [N, C_vision]."""
        if self.tiling is not None:
            num_tokens = self.vision.num_tokens
            return self.tiling.num_soft(
                image.shape, lambda n: self.connector.num_soft_prompts(n * num_tokens)
            )
        frames = image.shape[1] if image.ndim == 4 else 1
        if image.ndim == 2:
            frames = len(image) // self.vision.num_tokens
        if self.temporal == "each":
            return frames * self.connector.num_soft_prompts(self.vision.num_tokens)
        return self.connector.num_soft_prompts(
            self.vision.num_tokens * (frames if self.temporal == "concat" else 1)
        )

    def _log_parts(self) -> None:
        parts: dict[str, tuple[nn.Module, bool]] = {
            "vision": (self.vision, self.freezes_vision),
            "connector": (self.connector, False),
            "language": (self.language, self.freezes_language),
        }
        for name, (part, is_frozen) in parts.items():
            weights = list(part.parameters())
            learned = sum(p.numel() for p in weights if p.requires_grad)
            logger.info(
                "%s: %.3g million weights, %s%s, %s%s",
                name,
                sum(p.numel() for p in weights) / 1e6,
                "frozen" if is_frozen else "trained",
                f", but for {learned / 1e6:.3g} million" if is_frozen and learned else "",
                str(plain_dtype(part)).removeprefix("torch."),
                ", linear layers in float8" if any(p.dtype == FP8 for p in weights) else "",
            )


def _check_length(key: str, values: Sized, count: int, what: str) -> None:
    """Raises `DataError` unless a sample's key has ``count`` values."""
    if len(values) != count:
        raise DataError(f"'{key}' has {len(values)} values, and there are {count} {what}.")


def _text_counts(samples: Batch, num_images: int) -> list[int]:
    """How many texts each image has. Raises `DataError` where there are no texts, or not as many."""
    if "text_tokens" not in samples:
        texts_to_learn(samples)
    counts = samples.get("num_texts", [1] * num_images)
    _check_length("num_texts", counts, num_images, "images")
    texts: dict[str, Any] = {**samples}
    for key in ("text_input", "text_output", "text_tokens"):
        if key in texts:
            _check_length(key, texts[key], sum(counts), "texts, by num_texts or one an image")
    return counts


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The places of tensors of the same shape, those of the first shape first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(place)
    return list(groups.values())


def _several(counts: list[int]) -> dict[str, Any]:
    """The argument ``num_texts`` of a language model, where an image has several."""
    return {} if all(count == 1 for count in counts) else {"num_texts": counts}
