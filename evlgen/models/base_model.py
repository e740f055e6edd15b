"""What every registered model offers the runner and tasks: building from a config, a loss, texts, and what of
it is trained. What only some models offer is in `evlgen.models.protocols`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from evlgen.batch import Batch
from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.common.registry import registry
from evlgen.config.config import load_model_config, load_model_file
from evlgen.config.consent import Consent, check_addresses
from evlgen.config.lavis import own_names
from evlgen.config.model_config import ArchitectureConfig, ModelConfig, VisionConfig
from evlgen.config.schema import build_dataclass, to_plain
from evlgen.files.digests import check_digests
from evlgen.models import checkpoint_io
from evlgen.models.ops import cuda_graphs
from evlgen.models.protocols import NotOffered
from evlgen.models.text_lengths import TextLengths
from evlgen.models.vision import vision_encoder_class
from evlgen.weights.checkpoints import CONFIG_FILE
from evlgen.weights.needed import MissingAsset

logger = logging.getLogger(__name__)


class BaseModel(nn.Module):
    """Base class of registered models.

    A subclass defines `from_parts_config`, `forward` and `generate`.

    Attributes:
        MODEL_TYPES: type name -> its default YAML, relative to the package (or absolute, for plugins).
        DEFAULT_MODEL_TYPE: the type that is meant when none is named.
        CONFIG: dataclass of the ``model`` section.
        LANGUAGE_MODEL: the kind of language model, where the architecture names one.
        TEMPORAL: the form of a video architecture whose YAML names none (`TemporalConfig`).
        LACKS: why the architecture does not have a method that others have, by the method's name; what to do
            instead.
        prompt: the text before every caption.
    """

    MODEL_TYPES: ClassVar[dict[str, str]] = {}
    DEFAULT_MODEL_TYPE: ClassVar[str | None] = None
    CONFIG: ClassVar[type] = ModelConfig
    LANGUAGE_MODEL: ClassVar[str | None] = None
    TEMPORAL: ClassVar[str | None] = None
    LACKS: ClassVar[Mapping[str, str]] = {}

    cfg: ModelConfig
    prompt: str = ""
    _trained_earlier: frozenset[str] = frozenset()  # see `saved_state_dict`
    _before_rounding: Mapping[str, Tensor] = {}  # of those, what the model has in float8

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
        folder = checkpoint_io.pretrained_folder(
            str(name), cls.MODEL_TYPES, revision, token, local_files_only
        )
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
    def check_room(
        cls, cfg: Any, prompt: str | None, num_new: int, learns: bool, num_frames: int = 1
    ) -> None:
        """Raises `ConfigError` where the longest texts that the settings allow are more than the model of a
        config can read, as far as that is known without its weights. See `LanguageModel.check_room`.

        Args:
            num_frames: of a video at most.
        """

    def __getattr__(self, name: str) -> Any:
        if name in self.LACKS:
            raise NotOffered(self.LACKS[name])
        return super().__getattr__(name)

    def forward(self, samples: Batch) -> dict[str, Any]:
        """The training loss of a batch: ``{"loss": scalar}``, a mean.

        ``num_tokens``, if given, says of how many tokens, so that the batches of several processes weigh as
        one batch of all would; without it they weigh by their samples.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(samples)")

    def generate(self, samples: Batch, *args: Any, **options: Any) -> list[str]:
        """One text for each sample."""
        raise NotImplementedError(f"{type(self).__name__} must define generate(samples)")

    def encoded(self, samples: Batch) -> Batch:
        """Samples that will be read more than once, with what need not be computed again."""
        return samples

    def not_learnable(self, samples: Batch) -> dict[int, str]:
        """The samples of a batch, as `forward` reads them, that leave nothing to learn, and why: such as a
        question that takes all tokens there may be."""
        return {}

    def not_answerable(self, samples: Batch, num_new: int) -> dict[int, str]:
        """The conversations of a batch behind which the model cannot write ``num_new`` tokens, and why."""
        return {}

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
        if mode:
            cuda_graphs.forget(self)  # training needs their memory
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

    def saved_state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds: `trained_state_dict`, and the weights of frozen parts that an earlier
        checkpoint had trained, which nothing else holds; those in float8 as that checkpoint had them."""
        earlier = {
            name: value.detach() for name, value in self.state_dict().items() if name in self._trained_earlier
        }
        return {**self.trained_state_dict(), **earlier, **self._before_rounding}

    def load_checkpoint(self, path: str | Path) -> checkpoint_io.LoadReport:
        """Loads weights over the parts: an own folder or file, or a published ``.pth``; local, URL,
        ``evlgen://``, or ``hf://user/name`` on the hub.

        Says in the log what was loaded, missing and unexpected. Weights that the connector names in its class
        attribute ``SPARE_WEIGHTS`` (prefixes) are those of an earlier stage, and left out; those of
        ``SPARE_TEXT`` only with weights of all its ``FIRST_STAGE``.

        Raises:
            CheckpointError: nothing there, damaged, refused, another shape, or another architecture's
                weights; another temporal form; adapters or temporal weights without a place.
        """
        report = checkpoint_io.load_checkpoint(self, self.trained_state_dict(), path)
        self._trained_earlier = self._trained_earlier.union(report.frozen)
        self._before_rounding = {**self._before_rounding, **report.rounded}
        return report

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Writes the trained weights (`saved_state_dict`) and the config into a folder that `from_pretrained`
        reads. Other files that are in it stay.

        Args:
            dtype: of the matrices in the file, such as ``torch.bfloat16``, which takes half the room; None:
                as they are. They are read back into the type the model computes in.
        """
        weights = checkpoint_io.in_dtype(self.saved_state_dict(), dtype)
        return checkpoint_io.write_pretrained(path, functools.partial(self.save_weights, weights=weights))

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
        weights = self.saved_state_dict() if weights is None else weights
        checkpoint_io.write_weights(folder, weights, dataclasses.asdict(self.cfg))


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


def _names_of(cls: type[BaseModel]) -> list[str]:
    return [name for name in registry.list_models() if registry.get_model_class(name) is cls]
