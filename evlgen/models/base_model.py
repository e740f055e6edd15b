"""What every registered model offers: building from a config, loading, saving, and the samples interface."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from evlgen.common.errors import CheckpointError, ConfigError, EVLGenError, did_you_mean
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config, load_model_file
from evlgen.config.consent import Consent, check_addresses
from evlgen.config.lavis import own_names
from evlgen.config.model_config import ArchitectureConfig, ModelConfig, VisionConfig
from evlgen.config.named_code import check_named
from evlgen.config.schema import build_dataclass, to_plain
from evlgen.config.yaml_io import read_yaml
from evlgen.files.digests import DIGESTS_FILE, check_digests
from evlgen.files.io import make_readable, resolve, write_atomically
from evlgen.models.published.checkpoints import is_published, to_own_names
from evlgen.models.text_lengths import TextLengths
from evlgen.models.vision import vision_encoder_class
from evlgen.weights.checkpoints import CONFIG_FILE, WEIGHTS_FILE, write_folder
from evlgen.weights.hub import looks_like_path
from evlgen.weights.hub_checkpoints import HUB_PREFIX, fetch_checkpoint, is_hub_id
from evlgen.weights.weights import read_weights

logger = logging.getLogger(__name__)

_ADAPTER, _TEMPORAL = ".lora_", ".temporal_merge."  # in the names of weights
_WITHOUT = "model.checkpoint: null starts without it."
_SAVED_CONFIG = "the config.yaml beside the weights says"
_HEAD, _NORM = "prompt_head.", "ln_vision."
# What gives learned weights a place that have none.
_PLACES = {
    _ADAPTER: "it is of adapters in the language model. Set model.language.lora to what they were trained "
    f"with (r, alpha, target_modules: {_SAVED_CONFIG})",
    _TEMPORAL: "it is of attention over the frames. Set model.vision.temporal.form to what it was trained "
    f"with ({_SAVED_CONFIG}; published weights: residual), and model.vision to the same encoder",
    _NORM: "it is of the LayerNorm after the vision encoder. Set model.vision.norm_eps to what "
    f"{_SAVED_CONFIG}",
    _HEAD: f"it is of what stands around the soft prompts. Set model.soft_prompts to what {_SAVED_CONFIG}",
}
_READS_TEXT = (
    "it is of a Q-Former that reads the question too, as InstructBLIP's does, and model.connector reads "
    "images only. Take BLIP-2's weights, of the first stage or of the second"
)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a checkpoint gave: names of weights loaded, missing from it, and in it without a place in the
    model."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


class MissingAsset(NamedTuple):
    """Something a config needs and this machine lacks: what, why with the remedy, and whether it would be
    downloaded by itself where there is a connection."""

    what: str
    why: str | None  # None: it is here
    fetchable: bool


class BaseModel(nn.Module):
    """Base class of registered models.

    A subclass defines `from_parts_config`, `forward` and `generate`.

    Attributes:
        MODEL_TYPES: type name -> its default YAML, relative to the package (or absolute, for plugins).
        DEFAULT_MODEL_TYPE: the type that is meant when none is named.
        CONFIG: dataclass of the ``model`` section.
    """

    MODEL_TYPES: ClassVar[dict[str, str]] = {}
    DEFAULT_MODEL_TYPE: ClassVar[str | None] = None
    CONFIG: ClassVar[type] = ModelConfig

    cfg: ModelConfig

    @classmethod
    def from_config(
        cls,
        cfg: ArchitectureConfig | Mapping[str, Any] | DictConfig | str | Path,
        device: str | torch.device = "cpu",
    ):
        """Builds the model a config describes and loads its ``checkpoint`` over the parts.

        Args:
            cfg: the ``model`` section, built (`CONFIG`) or not, a whole config that has one, or the path of a
                YAML file that has one (relative paths in it are looked up beside that file first).
            device: the device it will run on; decides what ``precision: auto`` means. The model itself stays
                on CPU, but for quantised weights, which are put there as they are read.

        Raises:
            ConfigError: the section is another architecture's; and see the parts.
            CheckpointError: see the parts and `load_checkpoint`.
        """
        if isinstance(cfg, str | Path):
            cfg = load_model_file(cfg)
        if isinstance(cfg, cls.CONFIG):
            _check_arch(cls, vars(cfg))
            config: Any = cfg
        else:
            section = dataclasses.asdict(cfg) if dataclasses.is_dataclass(cfg) else to_plain(cfg)
            section = section.get("model", section)
            _check_arch(cls, section)
            config = build_dataclass(cls.CONFIG, section, path="model")
        try:
            model = cls.from_parts_config(config, torch.device(device))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model.cfg = config
        if config.checkpoint:
            model.load_checkpoint(config.checkpoint)
        return model.eval()

    @classmethod
    def from_parts_config(cls, cfg: Any, device: torch.device):
        """Builds the model without its checkpoint."""
        raise NotImplementedError(f"{cls.__name__} must define from_parts_config(cfg, device)")

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        allow_downloads: bool | Consent = False,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ):
        """Loads a model from a folder made by `save_pretrained`, a hub id of such a folder, or a model type's
        name. A folder or hub id may also be of BLIP-2 or LLaVA in transformers' format, which is converted
        once.

        Args:
            allow_downloads: whether addresses in the folder's ``config.yaml`` may be fetched, or a function
                that is asked. Hub ids in it, and the published weights of a named encoder, are named in a
                warning before they are fetched.
            revision: of a hub id: a branch, tag or commit.
            token: for a private repository on the hub; None: the one of ``hf auth login`` or ``HF_TOKEN``.
            local_files_only: of a hub id: take what was fetched earlier, without asking the hub.

        Raises:
            CheckpointError: no such folder; an address that may not be fetched; a repository on the hub that
                may not be read; and see `from_config`.
            EVLGenError: a repository on the hub needs plugins that the user has not named.
        """
        if str(name) in cls.MODEL_TYPES:
            arch = next(arch for arch in _names_of(cls))
            return cls.from_config(load_model_config(arch, str(name)), device)
        folder = _pretrained_folder(str(name), cls, revision, token, local_files_only)
        try:
            check_digests(folder, [CONFIG_FILE])
        except CheckpointError as error:  # weights are refused, but people do edit this file
            logger.warning("%s: %s.", folder, error)
        section = {**to_plain(load_model_file(folder / CONFIG_FILE)), "checkpoint": str(folder)}
        _check_arch(cls, section)
        check_addresses(section, folder / CONFIG_FILE, allow_downloads)
        for item in cls.missing(build_dataclass(cls.CONFIG, section, path="model")):
            if item.fetchable:
                logger.warning("%s, named in %s, is not here: fetching it", item.what, folder / CONFIG_FILE)
        return cls.from_config(section, device)

    @classmethod
    def processor_defaults(cls, cfg: Any) -> dict[str, dict[str, Any]]:
        """What the processors of datasets take from the model a config describes, where the YAML does not say
        otherwise: by section (``vis_processor``, ``text_processor``) parameter -> value. Builds nothing."""
        vision, prompt = getattr(cfg, "vision", None), getattr(cfg, "prompt", "")
        found: dict[str, dict[str, Any]] = {"text_processor": {"prompt": f"{prompt} "} if prompt else {}}
        if isinstance(vision, VisionConfig):  # a plugin's `CONFIG` may have another vision encoder, or none
            normalisation = vision_encoder_class(vision.name).normalisation(vision.name)
            tiles = {} if vision.tiles is None else {"max_tiles": vision.tiles.max}
            found["vis_processor"] = {"image_size": vision.image_size, **normalisation, **tiles}
        return found

    @classmethod
    def missing(cls, cfg: Any) -> list[MissingAsset]:
        """What the config needs and this machine lacks. Loads nothing."""
        return []

    @classmethod
    def text_lengths(cls, cfg: Any) -> TextLengths | None:
        """What measures texts as the model a config describes would read them, without its weights; None
        where its tokenizer is not on this machine, or nothing is known of its texts."""
        return None

    @classmethod
    def check_room(cls, cfg: Any, prompt: str | None, num_new: int, learns: bool) -> None:
        """Raises `ConfigError` where the longest texts that the settings allow are more than the model of a
        config can read, as far as that is known without its weights. See `LanguageModel.check_room`."""

    def forward(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The training loss of a batch: ``{"loss": scalar}``, a mean.

        ``num_tokens``, if given, says of how many tokens, so that the batches of several processes weigh as
        one batch of all would; without it they weigh by their samples.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(samples)")

    def generate(self, samples: dict[str, Any], **options) -> list[str]:
        """One text for each sample."""
        raise NotImplementedError(f"{type(self).__name__} must define generate(samples)")

    def generate_tokens(self, samples: dict[str, Any], **options) -> list[list[int]]:
        """As `generate`, the tokens of each text; see `VLM.generate_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must define generate_tokens(samples)")

    def texts(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `generate_tokens`."""
        raise NotImplementedError(f"{type(self).__name__} must define texts(tokens)")

    def encoded(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Samples that will be read more than once, with what need not be computed again."""
        return samples

    def not_learnable(self, samples: dict[str, Any]) -> dict[int, str]:
        """The samples of a batch, as `forward` reads them, that leave nothing to learn, and why: such as a
        question that takes all tokens there may be."""
        return {}

    def predict_answers(self, samples: dict[str, Any], **options) -> list[str]:
        """One short answer for each sample's question."""
        raise NotImplementedError(f"{type(self).__name__} must define predict_answers(samples)")

    def answer_turns(self, samples: dict[str, Any], **options) -> list[str]:
        """The assistant's next turn of each sample's conversation; see `VLM.answer_turns`."""
        raise NotImplementedError(f"{type(self).__name__} must define answer_turns(samples)")

    def rank_answers(self, samples: dict[str, Any], candidates: Any, **options) -> list[str]:
        """The best of several given answers to each sample's question; see `VLM.rank_answers`."""
        raise NotImplementedError(f"{type(self).__name__} must define rank_answers(samples, candidates)")

    def soft_prompts(self, samples: dict[str, Any]) -> Tensor:
        """What the language model reads of the images, [B, M, C_language]."""
        raise NotImplementedError(f"{type(self).__name__} must define soft_prompts(samples)")

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def frozen_modules(self) -> list[nn.Module]:
        """The modules that are frozen: no gradients, always in eval mode, not in checkpoints."""
        return []

    def trained_modules(self) -> list[nn.Module]:
        """Modules inside `frozen_modules` that are trained nonetheless: adapters, temporal attention."""
        return []

    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate by the start of weights' names, where a part needs another rate than
        the rest; those of ``run.lr_scale`` come first."""
        return {}

    def train(self, mode: bool = True):
        """Training mode for what is trained; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        for module in self.trained_modules():
            module.train(mode)
        return self

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights that are trained, by name, and what else parts that are not frozen keep, such as
        buffers."""
        weights = dict(self.named_parameters(remove_duplicate=False))
        owners = dict(self.named_modules(remove_duplicate=False))
        frozen = {id(m) for part in self.frozen_modules() for m in part.modules()}
        frozen -= {id(m) for part in self.trained_modules() for m in part.modules()}
        state: dict[str, Tensor] = {}
        known: set[int] = set()
        for name, value in self.state_dict(keep_vars=True).items():
            # quantised layers keep more than parameters and buffers: those go by their module
            is_weight = name in weights
            learned = weights[name].requires_grad if is_weight else id(_owner(name, owners)) not in frozen
            if learned and id(value) not in known:  # tied weights once
                known.add(id(value))
                state[name] = value.detach()
        return state

    def load_checkpoint(self, path: str | Path) -> LoadReport:
        """Loads weights over the parts: an own folder or file, or a published ``.pth``; local, URL,
        ``evlgen://``, or ``hf://user/name`` on the hub.

        Says in the log what was loaded, missing and unexpected. Weights that the connector names in its class
        attribute ``SPARE_WEIGHTS`` (prefixes) are those of an earlier stage, and left out; those of
        ``SPARE_TEXT`` only with weights of all its ``FIRST_STAGE``.

        Raises:
            CheckpointError: nothing there, damaged, refused, another shape, or another architecture's
                weights; another temporal form; adapters or temporal weights without a place.
        """
        file = checkpoint_path(path) if str(path).startswith(HUB_PREFIX) else resolve(path)
        state = read_weights(file)
        self._check_temporal_form(path, file, state)
        state = to_own_names(state)
        own = self.state_dict()
        wanted = self.trained_state_dict()
        _check_shapes(path, state, own)
        loaded = sorted(set(state) & set(own))
        missing = sorted(set(wanted) - set(state))
        spare, unexpected = self._without_place(set(state) - set(own), set(state))
        self._check_places(path, unexpected)
        layers = {k for k in wanted if k.startswith("connector.layers.")}
        is_other = (missing and unexpected) or any(k.startswith("connector.") for k in unexpected)
        if is_other or not set(loaded) & set(wanted) or 0 < len(layers & set(missing)) < len(layers):
            raise CheckpointError(
                f"{path} is a checkpoint of another architecture: it lacks {_some(missing)} and brings "
                f"{_some(unexpected)}. "
                "Check model.arch and model.connector."
            )
        if missing and all(name.startswith((_HEAD, "connector.proj_residual.")) for name in missing):
            raise CheckpointError(
                f"{path} was trained without {_some(missing)}, and gives other texts with it. Set "
                f"model.soft_prompts: null and model.connector.residual: false; {_WITHOUT}"
            )
        if missing and all(name.startswith(_NORM) for name in missing):
            raise CheckpointError(
                f"{path} was trained without {_some(missing)}, and gives other texts with it. Set "
                f"model.vision.norm_eps: null; {_WITHOUT}"
            )
        self.load_state_dict({k: state[k] for k in loaded}, strict=False)
        logger.info("%s: %d weights loaded", path, len(loaded))
        if spare:
            logger.info("%s: %d weights of an earlier stage are left out: %s", path, len(spare), _some(spare))
        if missing:
            logger.warning(
                "%s: %d weights were not in it and keep their start values: %s",
                path,
                len(missing),
                _some(missing),
            )
        if unexpected:
            logger.warning(
                "%s: %d weights have no place in this model: %s", path, len(unexpected), _some(unexpected)
            )
        return LoadReport(loaded, missing, unexpected)

    def _without_place(self, names: set[str], all_names: set[str]) -> tuple[list[str], list[str]]:
        """Weights that the model has no place for: those that are left out on purpose, and the others.

        Args:
            names: without a place.
            all_names: of the checkpoint.
        """
        connector = getattr(self, "connector", None)
        prefixes = tuple(getattr(connector, "SPARE_WEIGHTS", ()))
        marks = getattr(connector, "FIRST_STAGE", ())
        if all(any(f"{name}.".startswith(mark) for name in all_names) for mark in marks):
            prefixes += tuple(getattr(connector, "SPARE_TEXT", ()))
        spare = {name for name in names if f"{name}.".startswith(prefixes)}
        return sorted(spare), sorted(names - spare)

    def _check_temporal_form(self, path: str | Path, file: str | Path, state: dict[str, Tensor]) -> None:
        """Attention over the frames has the same weights in both of its forms, and means another thing in
        each: raises `CheckpointError` where the model's is not the checkpoint's.

        Args:
            path: what the user named.
            file: where that is.
            state: under the names it has there.
        """
        if not hasattr(self, "temporal") or not any(_TEMPORAL in name for name in state):
            return
        is_theirs = is_published(state)
        trained = "residual" if is_theirs else _temporal_form_beside(Path(file))
        if trained not in (None, self.temporal):
            raise CheckpointError(
                f"{path} was trained with model.vision.temporal.form: {trained}"
                f"{', as all published weights of clips' if is_theirs else ''}, and this model has "
                f"{self.temporal or 'none'}, where they mean another thing. Set model.vision.temporal.form: "
                f"{trained}; {_WITHOUT}"
            )

    def _check_places(self, path: str | Path, unexpected: list[str]) -> None:
        """Raises `CheckpointError` for learned weights that a key of the config would give a place."""
        if any(name.startswith("connector.") for name in unexpected):
            return  # of another architecture altogether
        text = tuple(getattr(getattr(self, "connector", None), "SPARE_TEXT", ()))
        for name in unexpected:
            why = next((why for mark, why in _PLACES.items() if mark in name), None)
            why = _READS_TEXT if name.startswith(text) else why
            if why:
                raise CheckpointError(f"{path} holds {name}, which has no place here: {why}; {_WITHOUT}")

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes the trained weights and the config into a folder that `from_pretrained` reads. Other files
        that are in it stay.

        Args:
            dtype: of the matrices in the file, such as ``torch.bfloat16``, which takes half the room; None:
                as they are. They are read back into the type the model computes in.
        """
        folder = Path(path).expanduser().absolute()
        weights = self.trained_state_dict()
        if dtype is not None:
            weights = {
                k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in weights.items()
            }
        if not folder.exists():
            return write_folder(folder, functools.partial(self.save_weights, weights=weights))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.") as temporary:
            self.save_weights(Path(temporary), weights)
            (folder / DIGESTS_FILE).unlink(missing_ok=True)  # of the files that are replaced
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(temporary) / name, folder / name)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Checkpoint of evlgen",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        **prepare: Any,
    ) -> str:
        """Puts the trained weights, the config and a card on the Hugging Face hub, where `from_pretrained`
        finds them. To publish a run with its scores, ``evlgen push`` takes the run's folder.

        Args:
            repo_id: ``user/name``; the repository is made where there is none.
            private: whether a repository that is made here is private; None: as the user's settings say.
            token: with the right to write; None: the one of ``hf auth login`` or ``HF_TOKEN``.
            branch: to push to, made where there is none; None: main.
            create_pr: open a pull request instead.
            prepare: ``licence`` and ``text`` of the card; ``with_parts=True`` to copy frozen parts that lie
                on this machine alone; ``options``, such as ``["model.language.name=facebook/opt-2.7b"]``.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: a part that only this machine has; no token, no right to write, no connection.
        """
        from evlgen.models.publishing.publish import publish

        with tempfile.TemporaryDirectory(prefix="evlgen-push-") as temporary:
            return publish(
                self.save_pretrained(Path(temporary) / "checkpoint"),
                repo_id,
                message=commit_message,
                private=private,
                token=token,
                branch=branch,
                create_pr=create_pr,
                **prepare,
            )

    def save_weights(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes ``model.safetensors`` and ``config.yaml`` into an existing folder.

        Args:
            weights: those to write; None for those that are trained, as they are now.
        """
        from safetensors.torch import save_file

        weights = self.trained_state_dict() if weights is None else weights
        state = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        make_readable(folder / WEIGHTS_FILE)
        section = {**dataclasses.asdict(self.cfg), "checkpoint": None}
        write_atomically(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create({"model": section})))


def _owner(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The innermost module a key of a state dict belongs to."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return modules[name]


def _check_arch(cls: type[BaseModel], section: Any) -> None:
    """Raises `ConfigError` where a section is of an architecture that another class is registered for."""
    arch = section.get("arch") if isinstance(section, Mapping) else None
    arch = own_names(arch, None)[0] if isinstance(arch, str) else None
    if not registry.has("model", arch):
        return  # none named; or unknown, which the section's own check says
    right = registry.get_model_class(arch)
    # by name: a plugin that is loaded again makes its classes again
    if not any((c.__module__, c.__qualname__) == (right.__module__, right.__qualname__) for c in cls.__mro__):
        raise ConfigError(
            f"model.arch is {arch}, whose class is {right.__name__}, and it was given to {cls.__name__}. "
            f'Use {right.__name__}, or registry.get_model_class("{arch}").'
        )


def _temporal_form_beside(weights: Path) -> str | None:
    """The temporal form that the ``config.yaml`` beside weights says; None where it says nothing."""

    file = (weights.parent if weights.name == WEIGHTS_FILE else weights) / CONFIG_FILE
    if not os.path.isfile(file):
        return None
    try:
        section = load_model_file(file)
        architecture = registry.get_model_class(section.arch)
    except EVLGenError as error:  # a plugin's that is not loaded, or of another version
        logger.warning("%s cannot be read, so the temporal form is not compared: %s", file, error)
        return None
    form = OmegaConf.select(section, "vision.temporal.form")
    return form or getattr(architecture, "TEMPORAL", None)


def _names_of(cls: type[BaseModel]) -> list[str]:

    return [name for name in registry.list_models() if registry.get_model_class(name) is cls]


def checkpoint_path(name: str | Path) -> Path:
    """What a user names as a checkpoint, on this machine: fetched where it is ``user/name`` on the hub.

    Raises:
        CheckpointError: it is neither here nor on the hub, or may not be read.
        EVLGenError: it is from the hub and needs plugins that the user has not named.
    """
    name = str(name)
    path = None if name.startswith(HUB_PREFIX) else Path(resolve(name))
    if path is not None and (os.path.lexists(path) or not is_hub_id(name)):
        return _own_folder(path)
    try:
        folder = fetch_checkpoint(name)
    except CheckpointError as error:
        place = "" if path is None else f"there is no checkpoint at {path}, and on the hub: "
        raise CheckpointError(f"{place}{error}") from error
    return _own_folder(folder, name)


def _own_folder(folder: Path, from_hub: str | None = None) -> Path:
    """A checkpoint's folder, converted where it is in transformers' format.

    Args:
        from_hub: its name there, where that is where it is from: then it may ask for no plugins.
    """
    if os.path.isfile(folder / CONFIG_FILE):
        if from_hub is not None:
            plugins = read_yaml(folder / CONFIG_FILE).get("plugins") or []
            check_named(map(str, plugins if isinstance(plugins, list) else [plugins]), from_hub)
        return folder
    if not os.path.isfile(folder / "config.json"):
        return folder
    from evlgen.models.published.transformers_format import own_folder

    return own_folder(folder)


def _pretrained_folder(
    name: str, cls: type[BaseModel], revision: str | None, token: str | None, local_files_only: bool
) -> Path:
    folder = _own_folder(Path(resolve(name)))
    if os.path.isfile(folder / CONFIG_FILE):
        if revision is not None:
            raise CheckpointError(f"{folder} is a folder here, and a revision is of a repository on the hub.")
        return folder
    if os.path.exists(folder) or looks_like_path(name):
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: it was not written by save_pretrained.")
    try:
        folder = fetch_checkpoint(name, revision, token, local_files_only)
    except CheckpointError as error:
        raise CheckpointError(
            f"'{name}' is no folder, no model type ({', '.join(cls.MODEL_TYPES)}), and {error}"
            f"{did_you_mean(name, cls.MODEL_TYPES)}"
        ) from error
    return _own_folder(folder, name)


def _check_shapes(path: str | Path, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    wrong = [k for k in state if k in own and state[k].shape != own[k].shape]
    if wrong:
        key = wrong[0]
        raise CheckpointError(
            f"{path} does not fit: {key} has shape {tuple(state[key].shape)}, the model's is "
            f"{tuple(own[key].shape)}"
            f"{f' ({len(wrong)} such weights)' if len(wrong) > 1 else ''}. Check model.vision, "
            f"model.connector, model.language; {_WITHOUT}"
        )


def _some(names: list[str]) -> str:
    return (
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        if names
        else "nothing"
    )
