"""The registered architectures: EVL_Gen's, and BLIP-2's as the yardstick. Each names its parts, no more."""

from __future__ import annotations

from typing import ClassVar

from evlgen.common.registry import registry
from evlgen.config.model_config import GenerationConfig
from evlgen.models.blip2_stage1 import Blip2Stage1  # noqa: F401  registers `blip2`
from evlgen.models.instructblip import InstructBLIP
from evlgen.models.vlm import VLM

# lavis/models/blip2_models: blip2_vicuna_instruct.py, of which EVLGen's models have it; blip2_t5.py
_OF_VICUNA = GenerationConfig(length_penalty=1.0, answer_length_penalty=0.0, repetition_penalty=1.5)
_OF_T5 = GenerationConfig(length_penalty=1.0, answer_length_penalty=-1.0, repetition_penalty=1.0)


def _types(arch: str, *names: str) -> dict[str, str]:
    """The model types of an architecture and their default YAML."""
    return {name: f"configs/models/{arch}/{name}.yaml" for name in names}


@registry.register_model("evlgen_opt")
class EvlgenOPT(VLM):
    """EVL_Gen with OPT (Jian et al., ACL 2024)."""

    LANGUAGE_MODEL = "opt"
    DEFAULT_MODEL_TYPE = "shapes"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types(
        "evlgen_opt", "shapes", "pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b"
    )


@registry.register_model("evlgen_vicuna")
class EvlgenVicuna(VLM):
    """EVL_Gen with Vicuna, or another LLaMA."""

    LANGUAGE_MODEL = "vicuna"
    GENERATION = _OF_VICUNA
    DEFAULT_MODEL_TYPE = "pretrain_vicuna7b"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types("evlgen_vicuna", "pretrain_vicuna7b", "pretrain_vicuna13b")


@registry.register_model("evlgen_causal")
class EvlgenCausal(VLM):
    """EVL_Gen with any causal language model of transformers, text put before and after it as its own
    tokenizer does."""

    LANGUAGE_MODEL = "causal"
    DEFAULT_MODEL_TYPE = "smollm2_135m"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types("evlgen_causal", "smollm2_135m")


@registry.register_model("evlgen_video_opt")
class EvlgenVideoOPT(VLM):
    """EVL_Gen for videos with OPT: attention over the frames inside the vision encoder."""

    LANGUAGE_MODEL = "opt"
    TEMPORAL = "average"
    DEFAULT_MODEL_TYPE = "shapes"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types(
        "evlgen_video_opt", "shapes", "pretrain_opt2.7b", "pretrain_opt6.7b"
    )


@registry.register_model("evlgen_video_vicuna")
class EvlgenVideoVicuna(VLM):
    """EVL_Gen for videos with Vicuna."""

    LANGUAGE_MODEL = "vicuna"
    GENERATION = _OF_VICUNA
    TEMPORAL = "average"
    DEFAULT_MODEL_TYPE = "pretrain_vicuna7b"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types(
        "evlgen_video_vicuna", "pretrain_vicuna7b", "pretrain_vicuna13b"
    )


@registry.register_model("blip2_opt")
class Blip2OPT(VLM):
    """BLIP-2's second stage with OPT (Li et al., 2023, arXiv 2301.12597)."""

    LANGUAGE_MODEL = "opt"
    DEFAULT_MODEL_TYPE = "pretrain_opt2.7b"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types(
        "blip2_opt",
        *("shapes", "pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b"),
    )


@registry.register_model("blip2_vicuna")
class Blip2Vicuna(VLM):
    """BLIP-2's second stage with Vicuna."""

    LANGUAGE_MODEL = "vicuna"
    GENERATION = _OF_VICUNA
    DEFAULT_MODEL_TYPE = "pretrain_vicuna7b"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types("blip2_vicuna", "pretrain_vicuna7b", "pretrain_vicuna13b")


@registry.register_model("blip2_t5")
class Blip2T5(VLM):
    """BLIP-2's second stage with FlanT5."""

    LANGUAGE_MODEL = "seq2seq"
    GENERATION = _OF_T5
    DEFAULT_MODEL_TYPE = "pretrain_flant5xl"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types(
        "blip2_t5", "pretrain_flant5xl", "pretrain_flant5xxl", "caption_coco_flant5xl"
    )


@registry.register_model("blip2_vicuna_instruct")
class Blip2VicunaInstruct(InstructBLIP):
    """InstructBLIP with Vicuna."""

    LANGUAGE_MODEL = "vicuna"
    GENERATION = _OF_VICUNA
    DEFAULT_MODEL_TYPE = "vicuna7b"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types("blip2_vicuna_instruct", "vicuna7b", "vicuna13b")


@registry.register_model("blip2_t5_instruct")
class Blip2T5Instruct(InstructBLIP):
    """InstructBLIP with FlanT5."""

    LANGUAGE_MODEL = "seq2seq"
    GENERATION = _OF_T5
    DEFAULT_MODEL_TYPE = "flant5xl"
    MODEL_TYPES: ClassVar[dict[str, str]] = _types("blip2_t5_instruct", "flant5xl", "flant5xxl")
