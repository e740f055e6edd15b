"""Vicuna and other LLaMA models as readers of soft prompts, with the text conventions of LAVIS's
``blip2_vicuna_instruct`` and of EVL_Gen.

Dai et al., *InstructBLIP*, 2023. Input and output are tokenised apart and joined behind the soft prompts:
``</s> input output </s>``; the output with its ``</s>`` is learned. ``</s>`` starts a text, ends it, and
stands for what is unknown; ``[PAD]`` is added to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.models.language.causal import CausalLanguageModel
from evlgen.models.language.segments import Tokens


@registry.register_language_model("vicuna")
class VicunaLanguageModel(CausalLanguageModel):
    """Any LLaMA by hub id or folder, its tokenizer as ``tokenizer.json`` or as ``tokenizer.model``."""

    KIND = "vicuna"
    END, PAD = "</s>", "[PAD]"
    START_FIRST = False

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llama"

    def _to_learn(self, text_in: list[str], text_out: list[str] | None) -> list[Tokens]:
        return [self._sample(*texts) for texts in self._split(text_in, text_out)]

    def _sample(self, read: str, learned: str) -> Tokens:
        # as published both have a start token, which the output loses, and what is too long loses words at
        # the far end: the input its first, the output its last, the end token with them
        end = self.end_token_ids[0]
        words = self._last(self._token_ids(read), self.max_txt_len - 1)
        (output,) = self._to_answer([learned], "")
        return Tokens([], [end, *words], output)

    def _gap_after(self, prompt: str) -> str:
        return ""

    def _to_answer(self, texts: list[str], gap: str) -> list[list[int]]:
        end = self.end_token_ids[0]
        return [[*ids, end][: self.max_output_txt_len - 1] for ids in self._plain_text.batch(texts)]

    def _to_continue(self, prompt: str) -> Tokens:
        return Tokens([], [self.end_token_ids[0], *self._token_ids(prompt)], [])

    def _find_ends(self) -> list[int]:
        return [self.tokenizer.eos_token_id]

    def _prepare_tokenizer(self) -> None:
        if self.END not in self.tokenizer.get_vocab():
            raise ConfigError(
                f"the tokenizer of model.language.name '{self.name}' has no token {self.END}, with which "
                "Vicuna's texts begin and end. Set model.language.kind: causal, which takes what a tokenizer "
                "has."
            )
        self.tokenizer.add_special_tokens(
            {"bos_token": self.END, "eos_token": self.END, "unk_token": self.END, "pad_token": self.PAD}
        )

    @torch.no_grad()
    def _prepare_model(self) -> None:
        super()._prepare_model()
        before = self.model.get_input_embeddings().weight.shape[0]
        if len(self.tokenizer) <= before:
            return
        self.model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        for layer in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[:before].float().mean(0).to(layer.weight.dtype)
