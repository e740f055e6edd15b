"""Questions and answers in the chat template that a tokenizer brings."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from evlgen.common.errors import ConfigError
from evlgen.models.language.plain_text import PlainText

#: Stands for the picture in a message: the character Unicode has for what is not text.
PICTURE = "\ufffc"
_WORDS = "\ue000"  # a private character: stands for a text that spells control tokens


class ChatTemplate:
    """A tokenizer's chat template around a picture and a question.

    The user's message is the picture and the question after it. What the template puts before the picture
    stands before the soft prompts.

    Args:
        tokenizer: one with a ``chat_template``.
        name: the language model's, for errors.
        ends: tokens that end a text whatever the template says.

    Attributes:
        end_token_ids: tokens that end an answer, the template's own first.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that does not take such messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, ends: list[int]) -> None:
        self.tokenizer, self.name, self.plain_text = tokenizer, name, PlainText(tokenizer)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.language.chat_template: the tokenizer of model.language.name '{name}' has no chat "
                "template. Set it to false, or name a model that was tuned on conversations."
            )
        self.end_token_ids = ends
        tail = self._ids(self._answered(PICTURE).partition(PICTURE)[2])
        special = [token for token in tail if token in ends or token in tokenizer.added_tokens_decoder]
        self._end = special[0] if special else ends[0]
        self.end_token_ids = list(dict.fromkeys([self._end, *ends]))

    def question(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens before and after the picture, up to where the answer begins."""
        before, _, after = self._render(self._masked(text)).partition(PICTURE)
        return self._ids(before), self._ids_around(after, text)

    def answer(self, text: str, max_tokens: int) -> list[int]:
        """The tokens of an answer, its end token the last; ``max_tokens`` at most."""
        ids = self._ids_around(self._answered(self._masked(text)), text)
        ended = next((place for place, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return [*ids[: min(ended, max_tokens - 1)], self._end]

    def _masked(self, text: str) -> str:
        """A text as it is put into the template: by a character that stands for it where it spells tokens
        that only the template may write."""
        return _WORDS if self.plain_text.has_control(text) else text

    def _ids_around(self, rendered: str, text: str) -> list[int]:
        """The tokens of a part of the template that has ``text`` in it, `_masked`."""
        if not self.plain_text.has_control(text):
            return self._ids(rendered)
        before, _, after = rendered.partition(_WORDS)
        return [*self._ids(before), *self.plain_text(text), *self._ids(after)]

    def _answered(self, answer: str) -> str:
        """What the template has after the start of the assistant's turn."""
        start, whole = self._render(""), self._render("", answer)
        if not whole.startswith(start):
            return answer
        return whole[len(start) :]

    def _render(self, question: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": PICTURE + question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise ConfigError(self._unfit(str(error))) from error
        if PICTURE not in text:
            raise ConfigError(self._unfit("it leaves out what the user says"))
        return text

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids

    def _unfit(self, why: str) -> str:
        return (
            f"model.language.chat_template: the template of model.language.name '{self.name}' cannot take a "
            f"picture and a question: {why}. Set model.language.chat_template: false."
        )
