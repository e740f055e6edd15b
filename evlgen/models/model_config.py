"""What the ``model`` section of a YAML file may say. Importing this costs nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from evlgen.common.schema import AtLeast, AtMost, PositiveInt, Registered, Share

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclasses.dataclass
class VisionConfig:
    """The frozen vision encoder.

    Args:
        name: a registered vision encoder (``eva_clip_g``) or any timm model name.
        image_size: side of the square pictures, in pixels; a multiple of the patch size.
        pretrained: true for the published weights, a path or URL of weights, false for random ones.
        freeze: no gradients, eval mode, not in checkpoints.
        precision: type frozen weights are kept and computed in (trained ones: float32); ``auto`` is bf16
        where the device has it. grad_checkpoint: recompute activations in the backward pass (for ``freeze:
        false``). drop_path_rate: stochastic depth while training (for ``freeze: false``).
        kwargs: handed to ``timm.create_model``.
    """

    name: str = "eva_clip_g"
    image_size: Annotated[int, AtLeast(1), AtMost(4096)] = 224
    pretrained: bool | str = True
    freeze: bool = True
    precision: Precision = "auto"
    grad_checkpoint: bool = False
    drop_path_rate: Share = 0.0
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LanguageConfig:
    """The frozen language model.

    Args:
        name: Hugging Face hub id or local folder.
        freeze: no gradients, eval mode, not in checkpoints.
        precision: type frozen weights are kept and computed in (trained ones: float32); ``auto`` is bf16
            where the device has it.
    """

    name: str = "facebook/opt-2.7b"
    freeze: bool = True
    precision: Precision = "auto"


@dataclasses.dataclass
class ModelConfig:
    """The ``model`` section.

    Args:
        arch: a registered model.
        model_type: one of the architecture's types: its default YAML is the layer below this one.
        checkpoint: folder, file or URL, own or published, loaded over the parts.
        vision, connector, language: the three parts. ``connector`` is ``name`` and that connector's
        parameters. prompt: the text before every caption, in training and generation (BLIP-2: "a photo of").
        max_txt_len: text tokens read at most.
    """

    arch: Annotated[str, Registered("model")]
    model_type: str | None = None
    checkpoint: str | None = None
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    connector: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "tomeformer"})
    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    prompt: str = ""
    max_txt_len: PositiveInt = 32
