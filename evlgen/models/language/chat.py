"""Conversations, and single questions, in the chat template that a tokenizer brings."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from evlgen.common.errors import ConfigError, DataError, did_you_mean
from evlgen.files.io import PACKAGE_ROOT
from evlgen.models.language.plain_text import PlainText
from evlgen.models.language.segments import VISUAL, Segment
from evlgen.processors.turns import Turn

#: Stands for the image in a message: the character Unicode has for what is not text.
IMAGE = "\ufffc"
_WORDS = "\ue000"  # a private character: stands for a text that spells control tokens
_ANSWER = "\ue001"  # likewise, for an answer whose place is looked for
_FIRST_TEXT, _FIRST_VISUAL = 0xF0000, 0x100000  # private characters for parts of turns
_MARK = re.compile("([\U000f0000-\U0010fffd])")
_NOT_WORDS = re.compile(f"[{IMAGE}{_WORDS}{_ANSWER}\U000f0000-\U0010fffd]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Conversations whose tokens are kept: those of a batch are asked for again and again, whether anything of
#: them can be learned, to learn it, and to measure what their images are worth.
_REMEMBERED = 512
TEMPLATES = PACKAGE_ROOT / "assets" / "chat_templates"


def read_template(name: str) -> str:
    """A chat template by the name of one that is shipped, or the path of a Jinja file.

    Raises:
        ConfigError: there is none.
    """
    shipped = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    path = shipped.get(name, Path(os.path.expanduser(name)))
    if not path.is_file():
        raise ConfigError(
            f"model.language.chat_template: '{name}' is neither a file nor a template of this package."
            f"{did_you_mean(name, shipped)} Templates: {', '.join(shipped)}; true: the tokenizer's own."
        )
    return path.read_text(encoding="utf-8").rstrip("\n")


class ChatTemplate:
    """A tokenizer's chat template around an image and a question.

    The user's message is the image and the question after it. What the template puts before the image
    stands before the soft prompts.

    Args:
        tokenizer: one with a ``chat_template``, unless another one is given.
        name: the language model's, for errors.
        ends: tokens that end a text whatever the template says.
        template: the template in place of the tokenizer's.

    Attributes:
        end_token_ids: tokens that end an answer, the template's own first.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that does not take such messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, ends: list[int], template: str | None = None
    ) -> None:
        self.tokenizer, self.name, self.plain_text = tokenizer, name, PlainText(tokenizer)
        self.template = template
        self._recent: dict[Hashable, list[Segment]] = {}
        if not (template or tokenizer.chat_template):
            raise ConfigError(
                f"model.language.chat_template: the tokenizer of model.language.name '{name}' has no chat "
                "template. Set it to false, or name a model that was tuned on conversations."
            )
        self.end_token_ids = ends
        text_behind = self._answered(IMAGE).partition(IMAGE)[2]
        tail = self._ids(text_behind)
        special = [token for token in tail if token in ends or token in tokenizer.added_tokens_decoder]
        self._end = special[0] if special else ends[0]
        self.end_token_ids = list(dict.fromkeys([self._end, *ends]))
        # what the template writes after an answer, up to and with the token that ends it, if one does
        self._closing = "".join(text_behind.partition(self._spelled(self._end))[:2]) if special else ""

    def question(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens before and after the image, up to where the answer begins."""
        before, _, after = self._render(self._masked(text)).partition(IMAGE)
        return self._ids(before), self._ids_around(after, text)

    def answer(self, text: str, max_tokens: int) -> list[int]:
        """The tokens of an answer, its end token the last; ``max_tokens`` at most."""
        ids = self._ids_around(self._answered(self._masked(text)), text)
        ended = next((place for place, token in enumerate(ids) if token in self.end_token_ids), len(ids))
        return [*ids[: min(ended, max_tokens - 1)], self._end]

    def conversation(self, turns: Sequence[Turn], answers_next: bool = False) -> list[Segment]:
        """A conversation in tokens: what the assistant says is learned, with what ends its turn.

        What is learned is what the template marks with ``{% generation %}``; where it marks nothing, what it
        writes in an answer's turn behind the start of that turn, up to the token that ends it. Where the
        template writes no such token, the tokenizer's own end token is put behind each answer. A token
        belongs to one of both: where the tokenizer would join what is read and what is learned, they are
        tokenised apart.

        Args:
            answers_next: whether the assistant's next turn begins there.

        Raises:
            DataError: the template does not take such turns.
        """
        marks = _Marks(turns, self.plain_text)
        key = (answers_next, *marks.texts.items(), *(tuple(message.items()) for message in marks.messages))
        row = self._recent.get(key)
        if row is None:
            row = self._segments(marks, answers_next)
            if len(self._recent) == _REMEMBERED:
                self._recent.clear()
            self._recent[key] = row
        return list(row)

    def _segments(self, marks: _Marks, answers_next: bool) -> list[Segment]:
        whole, spans = self._answers(marks.messages, answers_next)
        found = _MARK.findall(whole)
        for number, wanted in enumerate(marks.visuals):
            if wanted not in found:
                role, place = marks.places[number]
                raise DataError(
                    f"the chat template of model.language.name '{self.name}' leaves out an image in turn "
                    f"{place} ({role}): move it to a user's turn.",
                    f"image in a {role} turn",
                )
        if [mark for mark in found if mark in marks.visuals] != marks.visuals:
            raise DataError(
                f"the chat template of model.language.name '{self.name}' changes the order of the turns that "
                "have images: move the images to users' turns.",
                "images in another order",
            )
        return list(self._tokens(whole, spans, marks))

    def _answers(
        self, messages: list[dict[str, str]], answers_next: bool
    ) -> tuple[str, list[tuple[int, int, bool]]]:
        """The conversation as the template writes it, and of each answer where what is learned of it begins
        and ends there, and whether an end token is missing behind it."""
        if _GENERATION.search(self._source()):
            whole, marked = self._marked(messages, answers_next)
            return whole, [(start, end, False) for start, end in marked]
        whole = self._rendered(messages, answers_next)
        spans: list[tuple[int, int, bool]] = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            others = [*messages[:place], {**message, "content": _ANSWER}, *messages[place + 1 :]]
            before, found, behind = self._rendered(others, answers_next).partition(_ANSWER)
            if not found:
                raise DataError(self._unfit("it has no place for what the assistant says", ""), "template")
            if (
                not whole.startswith(before)
                or not whole.endswith(behind)
                or len(whole) < len(before + behind)
            ):
                raise DataError(
                    self._unfit("what it writes around an answer depends on the answer", ""), "template"
                )
            start, end = len(before), len(whole) - len(behind)
            opening = self._rendered(messages[:place], True) if place else ""
            if opening and before.startswith(opening):
                start = len(opening)  # what generation continues
            is_closed = True
            if self._closing and behind.startswith(self._closing):
                end += len(self._closing)
            elif spelled := next(filter(behind.startswith, map(self._spelled, self.end_token_ids)), ""):
                end += len(spelled)  # the start of the next turn ends this one, as in ChatGLM's
            else:
                is_closed = False
            spans.append((start, end, not is_closed))
        return whole, spans

    def _marked(
        self, messages: list[dict[str, str]], answers_next: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `_answers`, by the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._template_errors():
            (whole,), (spans,) = render_jinja_template(
                [messages],
                chat_template=self._source(),
                return_assistant_tokens_mask=True,
                add_generation_prompt=answers_next,
                **self.tokenizer.special_tokens_map,
            )
        return whole, [tuple(span) for span in spans]

    def _tokens(self, whole: str, spans: list[tuple[int, int, bool]], marks: _Marks) -> Iterator[Segment]:
        """The segments of a rendered conversation."""
        start = 0
        missing = [end for _, end, is_missing in spans if is_missing]
        for text in _MARK.split(whole):
            end = start + len(text)
            inside = [(max(a, start), min(b, end)) for a, b, _ in spans if a < end and b > start]
            if text in marks.texts:
                yield Segment(self.plain_text(marks.texts[text]), learned=bool(inside))
            elif text in marks.visuals:
                yield VISUAL
            elif text:
                edges = {start, end, *(edge for span in inside for edge in span)}
                edges |= {edge for edge in missing if start < edge < end}
                places = sorted(edge - start for edge in edges)
                for (a, b), ids in zip(itertools.pairwise(places), self._cut(text, places), strict=True):
                    yield Segment(ids, any(x <= start + a and start + b <= y for x, y in inside))
                    if start + b in missing:
                        yield Segment([self._end], learned=True)
            if text and end in missing and text in (*marks.texts, *marks.visuals):
                yield Segment([self._end], learned=True)
            start = end

    def _cut(self, text: str, places: list[int]) -> list[list[int]]:
        """The tokens of a text between each two of some places in it, the first its start and the last its
        end: those of the whole text where none is in two parts, else each part's own."""
        ids = self._ids(text)
        if len(places) == 2:
            return [ids]
        starts = [self._ids(text[:place]) for place in places[:-1]]
        if all(ids[: len(start)] == start for start in starts):
            counts = [*map(len, starts), len(ids)]
            return [ids[a:b] for a, b in itertools.pairwise(counts)]
        return [self._ids(text[a:b]) for a, b in itertools.pairwise(places)]

    def _source(self) -> str:
        return self.template or self.tokenizer.get_chat_template()

    def _spelled(self, token: int) -> str:
        added = self.tokenizer.added_tokens_decoder.get(token)
        return self.tokenizer.convert_ids_to_tokens(token) if added is None else str(added)

    def _rendered(self, messages: Sequence[Mapping[str, Any]], answers_next: bool) -> str:
        """What the template makes of messages. Raises `DataError` where it does not take them."""
        with self._template_errors():
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answers_next,
            )

    @contextlib.contextmanager
    def _template_errors(self) -> Iterator[None]:
        try:
            yield
        except (TemplateError, ValueError, TypeError) as error:
            raise DataError(str(error).rstrip("."), "chat template") from error

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
        messages = [{"role": "user", "content": IMAGE + question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        try:
            text = self._rendered(messages, answer is None)
        except DataError as error:
            raise ConfigError(self._unfit(str(error))) from error
        if IMAGE not in text:
            raise ConfigError(self._unfit("it leaves out what the user says"))
        return text

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids

    def _unfit(self, why: str, remedy: str = " Set model.language.chat_template: false.") -> str:
        return (
            f"model.language.chat_template: the template of model.language.name '{self.name}' cannot take an "
            f"image and a question: {why}.{remedy}"
        )


class _Marks:
    """Turns as a template is given them: each image, and each text that spells what only the template may
    write, is one private character.

    Attributes:
        messages: for the template.
        texts: the texts by their marks.
        visuals: the marks of images and videos in their order.
        places: the role and number of the turn of each.
    """

    def __init__(self, turns: Sequence[Turn], plain_text: PlainText) -> None:
        self.messages: list[dict[str, str]] = []
        self.texts: dict[str, str] = {}
        self.visuals: list[str] = []
        self.places: list[tuple[str, int]] = []
        self._plain_text = plain_text
        for number, turn in enumerate(turns, 1):
            content = ""
            for is_text, parts in itertools.groupby(turn.parts, lambda part: isinstance(part, str)):
                if is_text:  # as one: two parts could spell together what neither does
                    content += self._text("".join(map(str, parts)))
                    continue
                for _ in parts:
                    content += chr(_FIRST_VISUAL + len(self.visuals))
                    self.visuals.append(content[-1])
                    self.places.append((turn.role, number))
            self.messages.append({"role": turn.role, "content": content})

    def _text(self, text: str) -> str:
        if not (self._plain_text.has_control(text) or _NOT_WORDS.search(text)):
            return text
        mark = chr(_FIRST_TEXT + len(self.texts))
        self.texts[mark] = text
        return mark
