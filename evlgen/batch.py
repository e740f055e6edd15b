"""The keys of a batch: what datasets give, tasks prepare and models read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


class Batch(TypedDict, total=False):
    """B samples. Every key is optional; a task or model names those that it needs. A dataset may give further
    keys, for a task or model of its own."""

    # ---- what is seen
    image: Tensor  # images [B, 3, H, W], float, normalised; videos [B, 3, T, H, W]
    visual_tokens: (
        Tensor  # in place of `image`: the frozen encoder's tokens [B, N, C_vision], computed earlier
    )
    images: Sequence[
        Sequence[Tensor]
    ]  # in place of `image`: none or several of each sample, see `messages`; or tokens [N, C_vision] of each

    # ---- what is read and learned
    text_input: list[str]  # B texts to learn, or questions; N texts with `num_texts`
    text_output: list[str]  # as many texts to learn behind `text_input`, which is then only read
    text_tokens: list[list[int]]  # in place of `text_input`: token ids of texts that the model wrote
    num_texts: list[int]  # B counts, whose sum is N: how many of the N texts belong to each image
    text_weights: Sequence[float] | Tensor  # [N], of each text's loss
    messages: Sequence[
        Sequence[Any]
    ]  # B conversations, whose turns show the `images` (`evlgen.processors.turns`)
    segments: Sequence[
        Sequence[Any]
    ]  # B sequences of `Read`, `Learn` and `Visual` (`evlgen.models.language`)

    # ---- what generation reads
    prompt: str | list[str]  # to continue, one for all images or one for each
    instruction: list[str]  # what InstructBLIP reads of each image, if neither question nor prompt
    ocr_tokens: list[list[str]]  # words read in each image
    choices: list[list[str]]  # answers to choose from, of each question
    answers: list[list[str]]  # several people's answers to each question,
    weights: list[list[float]]  # and how much each counts

    # ---- what samples are known by
    image_id: list[Any]  # numbers or texts; those of the references
    question_id: list[Any]
    instance_id: list[Any]  # the sample's place in its dataset
    sample_id: list[str]  # its name in reports
    dataset: list[str]  # the dataset it is from, where several are mixed
    skipped: list[Any]  # samples that could not be read, and are not among the B


#: A batch whose keys are not known beforehand.
AnyBatch = Batch | Mapping[str, Any]
