"""Texts of people as tokens: whatever a text spells, it becomes no control token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

#: Added tokens that are markup even where a tokenizer does not call them special: ``<image>``, ``[MASK]``.
_MARKUP = re.compile(r"<\S+>|\[\S+\]")
_UNKNOWN = "\U0010fffd"  # a private character, in nobody's vocabulary


class PlainText:
    """A tokenizer for what people wrote. ``</s>`` in a caption is four characters, never the end of a text.

    Args:
        tokenizer: any tokenizer of transformers. Tokens that are added to it later need a new `PlainText`.

    Attributes:
        before, after: what the tokenizer itself puts around a text, such as ``<s>`` and ``</s>``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {token: str(content) for token, content in tokenizer.added_tokens_decoder.items()}
        special = set(tokenizer.all_special_ids)
        special |= {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
        special |= {token for token, content in added.items() if _MARKUP.fullmatch(content)}
        self._controls = special - self._unknown()
        self._spellings = [content for token, content in added.items() if token in special]
        self.before, self.after = self._surroundings()

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text alone, without those the tokenizer puts around it."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As calling it, of several texts."""
        return [self._spelled(ids) for ids in self._ids(texts)] if texts else []

    def has_control(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return any(content in text for content in self._spellings)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids

    def _spelled(self, ids: list[int]) -> list[int]:
        """Tokens with each control token by its characters. Some tokenizers find it all the same, as one of
        their words (T5's unigrams) or as an added token that is not special."""
        if self._controls.isdisjoint(ids):
            return ids
        spelled = []
        for token in ids:
            spelled += self._spell(token) if token in self._controls else [token]
        return spelled

    def _spell(self, control: int) -> list[int]:
        parts: list[int] = []
        for char in self.tokenizer.convert_ids_to_tokens(control):
            token = self.tokenizer.convert_tokens_to_ids(char)
            parts += self._ids([char])[0] if token is None or token in self._controls else [token]
        return [part for part in parts if part not in self._controls]

    def _unknown(self) -> set[int]:
        """The token of unknown words, where it says nothing else: text, if not much of one."""
        tokenizer = self.tokenizer
        others = {
            *(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
            *(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id),
        }
        return {tokenizer.unk_token_id, *self._ids([_UNKNOWN])[0]} - others

    def _surroundings(self) -> tuple[list[int], list[int]]:
        alone, whole = self("a"), self.tokenizer("a").input_ids
        for place in range(len(whole) - len(alone) + 1):
            if whole[place : place + len(alone)] == alone:
                return whole[:place], whole[place + len(alone) :]
        return [], []
