"""What the ``model`` section of a YAML file may say. Importing this costs nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from evlgen.config.schema import (
    AtLeast,
    AtMost,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Registered,
)

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8"]


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
    """How the frames of a video become one set of visual tokens (`vision.temporal`).

    Args:
        form: ``average``: attention over the frames inside every block of the encoder, as the paper states
            it (a still video is exactly the image model); ``residual``: the same as published code and
            checkpoints compute it; ``mean``: the mean of the frames' tokens; ``concat``: the tokens of all
            frames in a row; ``each``: the connector reads every frame by itself, and their soft prompts stand
            in a row, as InstructBLIP's do.
    """

    form: Literal["average", "residual", "mean", "concat", "each"] = "average"


@dataclasses.dataclass(frozen=True)
class TilesConfig:
    """Images of high resolution are cut into tiles of ``image_size`` (`vision.tiles`); see
    `evlgen.models.tiles`.

    Args:
        max: tiles of an image at most; their grid follows its proportions and its size.
        overview: whether the whole image, made as small as a tile, stands before them.
        join: ``after``: the connector reads each tile by itself, and their soft prompts stand in a row;
            ``before``: it reads the tokens of all at once (a TomeFormer: ``r_per_image: true``).
        row_markers: whether a learned soft prompt stands behind each row of tiles.
    """

    max: PositiveInt = 4
    overview: bool = True
    join: Literal["after", "before"] = "after"
    row_markers: bool = False


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The frozen vision encoder.

    Args:
        name: a registered vision encoder (``eva_clip_g``) or any timm model name.
        image_size: side of the square images, in pixels; a multiple of the patch size.
        pretrained: true for the published weights, a path or URL of weights, false for random ones.
        freeze: no gradients, eval mode, not in checkpoints.
        precision: type frozen weights are kept and computed in (trained ones: float32); ``auto`` is bf16
            where the device has it; ``fp8``: linear layers in float8, the rest in bf16 (NVIDIA cards from
            compute capability 8.9 on).
        grad_checkpoint: recompute activations in the backward pass, where something in the encoder is
            trained; ``offload`` also keeps what is recomputed from in the CPU's memory. By torch, or, with
            ``fairscale`` and ``fairscale_offload``, by fairscale's ``checkpoint_wrapper`` as in LAVIS (not
            under autocast).
        drop_path_rate: stochastic depth while training (for ``freeze: false``).
        temporal: for videos; null for a model of images.
        tiles: for images of high resolution; null: an image is resized to one square.
        tome_r: pairs of tokens that merge in each block of a frozen encoder; 0 is off.
        norm_eps: epsilon of the trained LayerNorm between the encoder and the connector; null leaves that
            norm out, as LLaVA does.
        kwargs: handed to ``timm.create_model``.
    """

    name: str = "eva_clip_g"
    image_size: Annotated[int, AtLeast(1), AtMost(4096)] = 224
    pretrained: bool | str = True
    freeze: bool = True
    precision: Precision = "auto"
    grad_checkpoint: bool | Literal["offload", "fairscale", "fairscale_offload"] = False
    drop_path_rate: Fraction = 0.0
    temporal: TemporalConfig | None = None
    tiles: TilesConfig | None = None
    tome_r: NonNegativeInt = 0
    norm_eps: PositiveFloat | None = 1e-5
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021) on a frozen language model, by peft: they are trained and saved.

    Args:
        r: their rank.
        alpha: their output is scaled by alpha / r.
        dropout: on their input.
        target_modules: names of the layers that get one; null: peft's choice for the model.
    """

    r: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Fraction = 0.0
    target_modules: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class SoftPromptMergingConfig:
    """The most similar soft prompts of an image become one behind a layer of the language model, whose other
    layers then read fewer; see `evlgen.models.language.soft_prompt_merging`.

    Args:
        layer: after how many of its layers.
        r: how many fewer there are then: a number, or a fraction such as 0.5; at least two are left.
    """

    layer: PositiveInt
    r: NonNegativeInt | Fraction


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """The frozen language model.

    Args:
        name: Hugging Face hub id, local folder, or a ``.gguf`` file.
        kind: a registered language model: how text is put before and after it (``opt``, ``vicuna``,
            ``causal``, ``seq2seq``); null: the one that fits the architecture and the model's own config.
        freeze: no gradients, eval mode, not in checkpoints.
        precision: type frozen weights are kept and computed in (trained ones: float32); ``auto`` is bf16
            where the device has it; ``fp8``: linear layers in float8, the rest in bf16 (NVIDIA cards from
            compute capability 8.9 on).
        quantization: keep frozen weights in 8 or 4 bits (bitsandbytes, a GPU).
        chat_template: put prompts into the tokenizer's own chat template; or the name of one of this package
            (``vicuna_v1``, ``chatml``, ``question_answer``), or a Jinja file. Conversations always have one:
            this, else the tokenizer's own, else ``question_answer``.
        lora: adapters that are trained; null for none.
        tome: soft prompts merge inside the model; null: they do not.
        pack: put the samples of a batch one behind the other into fewer, longer rows, each without a view of
            the others: the same losses with less padding. Captions of an image that are learned together
            (``captions_together``) always are.
    """

    name: str = "facebook/opt-2.7b"
    kind: Annotated[str, Registered("language_model")] | None = None
    freeze: bool = True
    precision: Precision = "auto"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    chat_template: bool | str = False
    lora: LoraConfig | None = None
    tome: SoftPromptMergingConfig | None = None
    pack: bool = False


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig:
    """What stands around a connector's output, so that it does not become constant; see
    `evlgen.models.soft_prompts`.

    Args:
        scale: the part that depends on the image at the start, as a fraction of the word embeddings' scale.
    """

    scale: PositiveFloat = 0.4


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What generation does where the caller does not say otherwise; null: as the architecture does.

    Args:
        length_penalty: exponent on the length in the beams' scores of a caption.
        answer_length_penalty: the same of an answer.
        repetition_penalty: divides the scores of tokens already written; 1 is off.
        consensus: captions sampled for each image besides, so that the one is written that is most like the
            others; null: none.
    """

    length_penalty: float | None = None
    answer_length_penalty: float | None = None
    repetition_penalty: PositiveFloat | None = None
    consensus: NonNegativeInt | None = None


@dataclasses.dataclass(frozen=True)
class ArchitectureConfig:
    """What the ``model`` section says of every architecture.

    Args:
        arch: a registered model.
        model_type: one of the architecture's types: its default YAML is the layer below this one.
        checkpoint: folder, file or URL, own or published, loaded over the parts.
        vision: the vision encoder.
        connector: ``name`` and that connector's parameters.
        prompt: the text before every caption, in training and generation (BLIP-2: "a photo of").
        max_txt_len: text tokens read at most.
    """

    arch: Annotated[str, Registered("model")]
    model_type: str | None = None
    checkpoint: str | None = None
    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    connector: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "tomeformer"})
    prompt: str = ""
    max_txt_len: PositiveInt = 32


@dataclasses.dataclass(frozen=True)
class ModelConfig(ArchitectureConfig):
    """The ``model`` section of a vision encoder, a connector and a language model.

    Args:
        language: the language model.
        soft_prompts: what is added around the connector's output; null, as published: nothing.
        max_output_txt_len: tokens of ``text_output`` learned at most, where a model reads input and output
            apart (Vicuna, T5); null: as many as ``max_txt_len``.
        max_sequence_len: positions of a conversation that is learned, at most, those of its soft prompts
            included (and no more than the language model has).
        generation: defaults of generation.
    """

    language: LanguageConfig = dataclasses.field(default_factory=LanguageConfig)
    soft_prompts: SoftPromptConfig | None = None
    max_output_txt_len: PositiveInt | None = None
    max_sequence_len: PositiveInt = 2048
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
