"""What a training run costs, before it is started: memory by part, operations, hours.

The model is built without its weights, on torch's meta device, and takes one training step there: the same
code as in training, of which torch counts the operations and the tensors that are kept for the backward pass.
Nothing is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evlgen.common.errors import ConfigError
from evlgen.common.precision import DTYPES, dtype_of, resolve_precision
from evlgen.common.registry import registry
from evlgen.config.model_config import ArchitectureConfig, ModelConfig
from evlgen.models.connectors import ConnectorInputs
from evlgen.models.language import build_language_model
from evlgen.models.language.in_parts import num_parts
from evlgen.models.language.segments import num_positions
from evlgen.models.ops import FP8
from evlgen.models.soft_prompts import SoftPromptHead
from evlgen.models.tiles import Tiling
from evlgen.models.vision import build_vision_encoder
from evlgen.models.vlm import VLM
from evlgen.weights.hub import with_settings

PARTS = ("vision", "connector", "language")
#: Of the rate of large matrix products, what whole training steps reach: 0.37 to 0.59 on an H200, a Xeon with
#: AMX and a Zen 3 (benchmarks/README.md).
REACHED = 0.5
_TRAINED_BYTES = 4 + 4 + 8  # a trained weight in float32, its gradient, AdamW's two moments
# torch before 2.8 does not count it
_COUNTED = {torch.ops.aten._scaled_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.56}  # a weight of a linear layer, with the scales of its blocks


class PartCost(NamedTuple):
    """One part of a model.

    Attributes:
        frozen, trained: weights.
        bytes: of its weights, their gradients, the optimizer's moments and their average.
        forward: multiply-accumulate operations of one sample's forward pass.
    """

    frozen: int
    trained: int
    bytes: int
    forward: int


class Estimate(NamedTuple):
    """A training step.

    Attributes:
        parts: by name.
        num_soft_prompts, num_text_tokens: of a sample; tokens that are learned.
        flops: operations of a sample's forward and backward pass.
        flops_kept: the same where the vision encoder's tokens are kept (``run.cache_vision``).
        kept_bytes: tensors that are kept for the backward pass, and its largest gradient, of a sample, but
            for ``language_bytes``, those that the language model's layers keep.
        positions: that the language model reads of a sample.
        positions_at_once: those of which its layers keep tensors at a time; None: of all of a batch.
    """

    parts: dict[str, PartCost]
    num_soft_prompts: int
    num_text_tokens: int
    flops: int
    flops_kept: int
    kept_bytes: int
    language_bytes: int = 0
    positions: int = 0
    positions_at_once: int | None = None

    def kept(self, batch_size: int) -> int:
        """Bytes of the tensors of a batch at the peak of a step."""
        total = batch_size * self.positions
        parts = 1 if self.positions_at_once is None else num_parts(total, self.positions_at_once)
        return batch_size * self.kept_bytes + math.ceil(batch_size / parts) * self.language_bytes

    def memory(self, batch_size: int) -> int:
        """Bytes at the peak of a step, without what libraries themselves take."""
        return sum(part.bytes for part in self.parts.values()) + self.kept(batch_size)


def estimate(
    cfg: ArchitectureConfig,
    precision: str = "auto",
    text_tokens: int = 16,
    num_texts: int = 1,
    num_frames: int = 1,
    has_average: bool = False,
) -> Estimate:
    """The cost of a training step.

    Args:
        cfg: of an architecture of three parts.
        precision: what trained parts compute in, and frozen ones where they say ``auto``; ``auto``: as this
            machine computes.
        text_tokens: about so many tokens in a text.
        num_texts: texts of a sample's image; more than one as with ``captions_together``.
        num_frames: of a video, for an architecture of videos.
        has_average: of the trained weights (``run.ema_decay``).

    Raises:
        ConfigError: an architecture without the three parts; see `build_language_model` for the rest.
        CheckpointError: the language model's configuration is not here and cannot be fetched.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(precision, device)
    if not isinstance(cfg, ModelConfig) or not issubclass(registry.get_model_class(cfg.arch), VLM):
        raise ConfigError(
            f"model.arch {cfg.arch} is not made of a vision encoder, a connector and a language model: what "
            "a step of it costs is not known beforehand."
        )
    model = _without_weights(cfg, precision)
    language, texts = model.language, [" ".join(["a"] * text_tokens)] * num_texts
    in_parts = language.goes_in_parts()
    at_once = language.positions_at_once if in_parts else None
    language.positions_at_once = sys.maxsize  # below, what a sample keeps is told from two whole batches
    batch = {size: _step(model, cfg, size, texts, num_frames) for size in (8, 16)}
    step = batch[16]
    halved = 0.5 if precision != "fp32" else 1.0  # of what trained parts keep, under autocast
    kept = {
        part: (step.kept[part] - batch[8].kept[part]) / 8 * (halved if part == "connector" else 1.0)
        for part in (*PARTS, "logits")
    }
    parts = {
        name: _cost(module, cfg, name, step.forward[name] // 32, has_average)
        for name, module in (("vision", model.vision), ("connector", model), ("language", model.language))
    }
    rows = language.to_learn(texts) if in_parts else []
    of_vision = step.forward["vision"] // 16
    return Estimate(
        parts,
        step.num_soft_prompts,
        step.num_text_tokens // 16,
        step.flops // 16,
        step.flops // 16 - of_vision,
        int(sum(kept.values()) - kept["language"]),
        int(kept["language"]),
        step.num_soft_prompts + sum(num_positions(row, []) for row in rows),
        at_once,
    )


class _Step(NamedTuple):
    forward: dict[str, int]
    flops: int
    kept: dict[str, int]
    num_soft_prompts: int
    num_text_tokens: int


def _step(model: VLM, cfg: ModelConfig, batch_size: int, texts: list[str], num_frames: int) -> _Step:
    """A forward and a backward pass, counted."""
    frames = (num_frames,) if model.temporal else ()
    side = cfg.vision.image_size
    height = side if model.tiling is None else side * model.tiling.max  # an image of the most tiles
    image = torch.empty(batch_size, 3, *frames, height, side, device="meta")
    counts = {"num_texts": [len(texts)] * batch_size} if len(texts) > 1 else {}
    samples = {"image": image, "text_input": texts * batch_size, **counts}
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept, alive, inside = dict.fromkeys((*PARTS, "logits"), 0), [], ["vision"]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            weights.add(storage._cdata)
            alive.append(tensor)  # so that no other storage gets its address
            vocabulary = tensor.shape[-1:] == (model.language.model.config.get_text_config().vocab_size,)
            kept["logits" if vocabulary else inside[0]] += storage.nbytes() * (2 if vocabulary else 1)
        return tensor

    prompts: list[Tensor] = []

    def enter(*_: Any) -> None:
        inside[0] = "connector"

    def leave(_: nn.Module, __: Any, output: Tensor) -> None:
        inside[0] = "language"
        prompts.append(output)

    handles = [
        model.connector.register_forward_pre_hook(enter),
        model.connector.register_forward_hook(leave),
    ]
    try:
        with (
            FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            _masks_by_shape(),
        ):
            out = model(samples)
            by_module = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
            vision, connector = _counted(by_module, "vision"), _counted(by_module, "connector")
            forward = counter.get_total_flops()
            out["loss"].backward()
            total = counter.get_total_flops()
    finally:
        for handle in handles:
            handle.remove()
    of_parts = {"vision": vision, "connector": connector, "language": forward - vision - connector}
    num_soft_prompts = prompts[0][..., 0].numel() // batch_size
    return _Step(of_parts, total, kept, num_soft_prompts, out["num_tokens"])


def _counted(counts: dict[str, int], part: str) -> int:
    return next((count for name, count in counts.items() if name.split(".")[1:] == [part]), 0)


def _cost(module: nn.Module, cfg: ModelConfig, name: str, forward: int, has_average: bool) -> PartCost:
    own = {
        "connector": lambda key: not key.startswith(("vision.", "language.")),
    }.get(name, lambda key: True)
    weights = [weight for key, weight in module.named_parameters() if own(key)]
    frozen = [weight for weight in weights if not weight.requires_grad]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    held = sum(weight.numel() * weight.element_size() for weight in frozen)
    if name == "language" and cfg.language.quantization != "none":
        linear = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        size = frozen[0].element_size()
        embedding = module.model.get_output_embeddings()
        linear -= embedding.weight.numel() if embedding is not None else 0  # is left as it is
        held -= int(linear * (size - _QUANTIZED_BYTES[cfg.language.quantization]))
    trained_bytes = trained * (_TRAINED_BYTES + 4 * has_average)
    return PartCost(sum(weight.numel() for weight in frozen), trained, held + trained_bytes, forward)


def _without_weights(cfg: ModelConfig, precision: str) -> VLM:
    cls = registry.get_model_class(cfg.arch)
    meta = torch.device("meta")
    own: dict[str, Any] = {
        part: precision for part in ("vision", "language") if getattr(cfg, part).precision == "auto"
    }
    vision_cfg = dataclasses.replace(cfg.vision, pretrained=False, grad_checkpoint=False)
    language_cfg = dataclasses.replace(cfg.language, name=_described(cfg.language.name), quantization="none")
    vision_cfg = dataclasses.replace(vision_cfg, precision=own.get("vision", vision_cfg.precision))
    language_cfg = dataclasses.replace(language_cfg, precision=own.get("language", language_cfg.precision))
    temporal = cfg.vision.temporal.form if cfg.vision.temporal else cls.TEMPORAL
    settings = dict(cfg.connector)
    connector_class = registry.get_connector_class(settings.pop("name", "tomeformer"))
    with meta:
        vision = build_vision_encoder(vision_cfg, meta, temporal)
        language = build_language_model(
            dataclasses.replace(cfg, language=language_cfg), cls.LANGUAGE_MODEL, meta
        )
        connector = connector_class.build(ConnectorInputs.behind(vision, language.embed_dim, 1.0), **settings)
        head: dict[str, Any] = {}  # subclasses may not know it
        if cfg.soft_prompts is not None:
            count = connector.num_soft_prompts(vision.num_tokens)
            head["prompt_head"] = SoftPromptHead(count, language.embed_dim, 1.0, cfg.soft_prompts.scale)
        frozen = (cfg.vision.freeze, cfg.language.freeze)
        model = cls(vision, connector, language, cfg.prompt, *frozen, temporal, **head)
        model.set_norm(cfg.vision.norm_eps)
        model.tiling = Tiling.build(cfg, vision, language.embed_dim, 1.0, temporal)
    if cfg.language.freeze:  # transformers makes it in the type that its configuration names
        for weight in language.parameters():
            if not weight.requires_grad and weight.dtype != FP8:
                weight.data = weight.data.to(dtype_of(language_cfg.precision))
    return model.to(meta).train()


def _described(name: str) -> str:
    """Where the configuration and the tokenizer of a language model are."""
    found = with_settings(name)
    if found is None:
        raise ConfigError(
            f"model.language.name '{name}' is not on this machine, and its configuration could not be "
            "fetched. Name a folder with its config.json and tokenizer."
        )
    return found


@contextlib.contextmanager
def _masks_by_shape() -> Iterator[None]:
    """transformers looks into position ids for sequences in a row, unless it is traced; here they have no
    values."""
    from transformers import masking_utils

    known = getattr(masking_utils, "is_tracing", None)
    if known is None:  # a release that does not look
        yield
        return
    masking_utils.is_tracing = lambda *_: True
    try:
        yield
    finally:
        masking_utils.is_tracing = known


def measured_rate(precision: str = "auto", seconds: float = 0.5) -> float:
    """Operations a second of matrix products of this machine, as large as a small language model's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[resolve_precision(precision, device)]
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (a @ b).sum().item()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            c = a @ b
        c[0, 0].item()
        count += 4
    return count * 2 * size**3 / (time.perf_counter() - start)
