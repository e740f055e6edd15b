"""OPT as reader of soft prompts, with the text conventions of BLIP-2 and EVL_Gen.

Zhang et al., *OPT: Open Pre-trained Transformer Language Models*, 2022. A text is tokenised with its leading
``</s>``, right padded and truncated; it ends in a newline, and so does generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.models.language.causal import CausalLanguageModel
from evlgen.models.language.segments import Segment, Tokens
from evlgen.processors.turns import Turn


@registry.register_language_model("opt")
class OPTLanguageModel(CausalLanguageModel):
    """Any OPT by hub id or folder. What is learned of a text is all of it but the prompt's tokens; with a
    ``text_out``, what follows the tokens of ``text_in`` in both as one text."""

    KIND = "opt"
    END = "\n"
    START_FIRST = False

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "opt"

    def _to_learn(self, text_in: list[str], text_out: list[str] | None) -> list[Tokens]:
        if text_out is None:
            # a blank at the prompt's end is part of the next word's token, which is learned
            prompt = self.prompt.rstrip()
            return [self._sample(text, prompt if self._begins_with_prompt(text) else "") for text in text_in]
        return [self._sample(f"{a} {b}".strip(), a) for a, b in zip(text_in, text_out, strict=True)]

    def row_of_turns(self, turns: Sequence[Turn], answers_next: bool = False) -> list[Segment]:
        """A line break in an answer becomes a blank: it would be the answer's end."""
        return super().row_of_turns([_on_one_line(turn) for turn in turns], answers_next)

    def _most_read(self, prompt: str | None) -> int:
        return self.max_txt_len if prompt is None else super()._most_read(prompt)

    def _most_in_training(self, prompt: str | None) -> int:
        return self.max_txt_len  # of both as one text

    def _to_continue(self, prompt: str) -> Tokens:
        # published code cuts the end of what is too long, and with it what the prompt says after a question
        words = self._last(self._token_ids(prompt), self.max_txt_len - len(self._start))
        return Tokens([], [*self._start, *words], [])

    def _gap_after(self, prompt: str) -> str:
        return " " if prompt else ""

    def _to_answer(self, texts: list[str], gap: str) -> list[list[int]]:
        texts = [f"{gap}{text}".rstrip() + self.END for text in texts]
        return self._plain_text.batch(texts)

    def _sample(self, text: str, read: str) -> Tokens:
        ids = [*self._start, *self._token_ids(text + self.END)][: self.max_txt_len]
        count = len(self._start) + len(self._token_ids(read)) if read else 0
        return Tokens([], ids[:count], ids[count:])

    def _find_ends(self) -> list[int]:
        return self._token_ids(self.END)

    def _prepare_tokenizer(self) -> None:
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of model.language.name '{self.name}' has no pad token, which batches of "
                "texts need. "
                "Set `pad_token` in its tokenizer_config.json (OPT's is <pad>)."
            )
        ids = self.tokenizer(self.END, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ConfigError(
                f"the tokenizer of model.language.name '{self.name}' has no token of its own for the "
                "newline, where generation "
                "ends; OPT's has. Take an OPT's tokenizer."
            )


def _on_one_line(turn: Turn) -> Turn:
    if turn.role != "assistant":
        return turn
    parts = (" ".join(part.splitlines()) if isinstance(part, str) else part for part in turn.parts)
    return turn._replace(parts=tuple(parts))
