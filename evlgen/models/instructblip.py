"""InstructBLIP: a second stage whose Q-Former also reads the instruction.

Dai et al., *InstructBLIP: Towards General-purpose Vision-Language Models with Instruction Tuning*, 2023
(arXiv 2305.06500), section 3.2: the words of the instruction go through the Q-Former beside the queries, so
that these take from the image what is asked for. The language model reads the instruction as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.registry import registry
from evlgen.config.model_config import ModelConfig
from evlgen.config.schema import PositiveInt
from evlgen.models.blip2_stage1 import TextConfig
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_text import QFormerText, QFormerTokenizer, encode_multimodal
from evlgen.models.language.segments import SoftPrompts
from evlgen.models.ops import use_fast_linear
from evlgen.models.pixels import with_pixels
from evlgen.models.prompts import ask
from evlgen.models.sequences import is_sequence
from evlgen.models.vlm import VLM
from evlgen.models.writing import count_images


@dataclasses.dataclass(frozen=True)
class InstructConfig(ModelConfig):
    """The ``model`` section of InstructBLIP.

    Args:
        text: how the Q-Former reads the instruction.
        max_txt_len, max_output_txt_len: as published, the former of both tokenizers.
    """

    connector: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "qformer"})
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    max_txt_len: PositiveInt = 128
    max_output_txt_len: PositiveInt | None = 256


class InstructBLIP(VLM):
    """A `VLM` whose Q-Former reads the instruction: the question, of samples with ``text_output`` their
    ``text_input``, else the prompt."""

    CONFIG = InstructConfig
    connector: QFormer
    text: QFormerText
    text_tokenizer: QFormerTokenizer

    @classmethod
    def from_parts_config(cls, cfg: InstructConfig, device: torch.device) -> InstructBLIP:  # type: ignore[override]  # a config of its own kind
        """Builds the parts. Raises `ConfigError` for a connector other than a Q-Former."""
        name = cfg.connector.get("name")
        if not issubclass(registry.get_connector_class(name or "tomeformer"), QFormer):
            raise ConfigError(
                f"model.connector.name is '{name}': {cfg.arch} has a qformer, which reads the instruction."
            )
        tokenizer = QFormerTokenizer(cfg.text.tokenizer, cfg.max_txt_len, keep_end=True)
        model = cast(InstructBLIP, super().from_parts_config(cfg, device))
        if model.tiling is not None:
            raise ConfigError(f"model.vision.tiles: {cfg.arch} reads an image as a whole. Leave it out.")
        num_positions = cfg.text.max_position_embeddings or model.connector.sizes.max_position_embeddings
        if cfg.max_txt_len > num_positions:
            raise ConfigError(
                f"model.max_txt_len is {cfg.max_txt_len}, and the Q-Former's text has {num_positions} "
                "positions. Lower it, or raise model.text.max_position_embeddings."
            )
        model.text_tokenizer = tokenizer
        model.text = QFormerText(model.connector, len(tokenizer), num_positions, writes=False)
        use_fast_linear(model.text)
        return model

    @classmethod
    def _hub_parts(cls, cfg: InstructConfig) -> dict[str, str]:  # type: ignore[override]  # as above
        return {**super()._hub_parts(cfg), "tokenizer": cfg.text.tokenizer}

    def soft_prompts(self, samples: Batch) -> Tensor:
        """As of `VLM`; ``instruction`` list[str], one for each image, is what the Q-Former reads where it is
        another than the question or the prompt.

        Raises:
            DataError: several texts of one image: each would need soft prompts of its own.
            ConfigError: samples that are sequences.
        """
        if "images" in samples:
            return cast(Tensor, self.sequence_prompts(samples))
        tokens = self.image_tokens(samples)
        texts = self._instructions(samples, len(tokens))
        frames = self._frames_apart(tokens)
        ids = self.text_tokenizer(texts).to(tokens.device)
        ids = ids.repeat_interleave(len(frames) // len(tokens), 0)
        visual = self.connector.keys_values(self._normed(frames))
        queries = encode_multimodal(self.connector, self.text, ids, ids != self.text_tokenizer.pad, visual)
        return self._in_rows(self._with_head(self.connector.project(queries)), len(tokens))

    def sequence_prompts(self, samples: Batch) -> SoftPrompts:
        """Raises `ConfigError`: a Q-Former that reads one instruction."""
        raise ConfigError(
            f"{type(self).__name__} answers one question about one image, and a conversation was given "
            "to it. Take an architecture whose connector reads images alone, such as blip2_vicuna."
        )

    def rank_answers(
        self,
        samples: Batch,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        prompt: str = "",
        num_candidates: int | None = None,
    ) -> list[str]:
        samples = with_pixels(self, samples)
        count = count_images(samples)
        asked: Batch = {**samples, "instruction": ask(prompt, samples, count)}
        return super().rank_answers(asked, candidates, prompt, num_candidates)

    def _continue(self, samples: Batch, prompts: list[str], **options) -> list[str]:
        return super()._continue({**samples, "instruction": prompts}, prompts, **options)

    def _instructions(self, samples: Batch, count: int) -> list[str]:
        if any(n != 1 for n in samples.get("num_texts", ())):
            raise DataError(
                "an image has several texts, and the Q-Former reads the question of each: give every "
                "question an image of its own (captions_together: false)."
            )
        if is_sequence(samples):
            self.sequence_prompts(samples)
        if "instruction" in samples:
            return list(samples["instruction"])
        if "text_output" in samples:
            return list(samples["text_input"])
        return self._prompts(samples, count)
