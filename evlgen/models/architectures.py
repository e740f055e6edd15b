"""The EVL_Gen architectures: a TomeFormer between a frozen vision encoder and a frozen language model."""

from __future__ import annotations

from typing import ClassVar

from evlgen.common.registry import registry
from evlgen.models.vlm import VLM


@registry.register_model("evlgen_opt")
class EvlgenOPT(VLM):
    """EVL_Gen with OPT (Jian et al., ACL 2024)."""

    LANGUAGE_MODEL = "opt"
    DEFAULT_MODEL_TYPE = "shapes"
    MODEL_TYPES: ClassVar[dict[str, str]] = {
        "shapes": "configs/models/evlgen_opt/shapes.yaml",
        "pretrain_opt2.7b": "configs/models/evlgen_opt/pretrain_opt2.7b.yaml",
        "pretrain_opt6.7b": "configs/models/evlgen_opt/pretrain_opt6.7b.yaml",
        "caption_coco_opt2.7b": "configs/models/evlgen_opt/caption_coco_opt2.7b.yaml",
    }
