"""OpenAI's chat completions: what a request asks for, and the form of a response."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evlgen.common.errors import DataError, did_you_mean
from evlgen.models.language.generation import LEAST
from evlgen.processors.turns import Turn, VisualPart, check_turns, role_of_turn
from evlgen.serving.answering import Text
from evlgen.serving.errors import Refusal
from evlgen.serving.limits import Limits

_MOST_ERRORS = 3  # of a request that are named
_MOST_PARTS = 1024  # of a message
_INT64 = 2**63

Zero = Annotated[float, Field(ge=0, le=0)]  # a setting of OpenAI's of which only the default is understood


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageAddress(_Model):
    """``image_url`` of a content part."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    """A content part that is an image."""

    type: Literal["image_url"]
    image_url: ImageAddress


class TextPart(_Model):
    """A content part that is text."""

    type: Literal["text"]
    text: str


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[ImagePart | TextPart, Field(discriminator="type")]], Field(max_length=_MOST_PARTS)
    ]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_as_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Model):
    """``stream_options``."""

    include_usage: bool = False


class TextFormat(_Model):
    """``response_format``, of which plain text is understood."""

    type: Literal["text"]


class ChatRequest(_Model):
    """The body of a request to ``/v1/chat/completions``. Beside OpenAI's settings: ``num_beams``,
    ``repetition_penalty`` and ``length_penalty``. Other settings are refused, but where they are null, as
    clients write what is not set."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, None]

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    num_beams: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST, le=10)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    # understood where they change nothing
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def max_new_tokens(self) -> int | None:
        """New tokens at most, by either of the names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """The request in a body.

    Raises:
        Refusal: it is not JSON, or not such a request; names the field.
    """
    # parsed, a value of two bytes takes hundreds: images are long, and few
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.values:
        raise Refusal(400, f"the request has more than {limits.values:,} values.", "too_large")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal_of(error) from None
    for name, value, limit in (
        ("max_tokens", request.max_new_tokens, limits.max_tokens),
        ("n", request.n, limits.texts),
        ("num_beams", request.num_beams, limits.texts),
    ):
        if value is not None and value > limit:
            raise Refusal(400, f"{name} is {value}, and this server allows {limit}.", "too_large", name)
    return request


def _refusal_of(error: ValidationError) -> Refusal:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    lines, fields = [], [".".join(map(str, item["loc"])) for item in found]
    for item, field in list(zip(found, fields, strict=True))[:_MOST_ERRORS]:
        if item["type"] == "none_required":
            near = did_you_mean(field, ChatRequest.model_fields)
            lines.append(f"'{field[:80]}' is not supported here: leave it out.{near}")
        elif item["type"] == "json_invalid":
            return Refusal(400, f"the body is not JSON: {item['msg']}.", "invalid_json")
        else:
            lines.append(f"{field[:120] or 'the body'}: {item['msg']}.")
    more = f" And {len(found) - _MOST_ERRORS} more." if len(found) > _MOST_ERRORS else ""
    return Refusal(400, " ".join(lines) + more, "invalid_request", fields[0][:120] or None)


@dataclass(frozen=True)
class Asked:
    """What the messages of a request ask.

    Attributes:
        images: their addresses.
        text: of the only message; None where it has none.
        turns: of a conversation; None where there is one message with one image.
    """

    images: list[str]
    text: str | None
    turns: list[Turn] | None


def what_is_asked(messages: Sequence[Message], limits: Limits, only_turns: bool = False) -> Asked:
    """The question, or the conversation, in the messages of a request.

    Args:
        only_turns: one message with one image is a conversation as well.

    Raises:
        Refusal: too many images or too much text; no image, where the model answers questions about images.
        DataError: a conversation that does not end with a user's turn, or with turns that say nothing.
    """
    parts = [part for message in messages for part in message.content]
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    if sum(map(len, texts)) > limits.text_chars:
        raise Refusal(
            400, f"the texts have more than {limits.text_chars} characters.", "too_large", "messages"
        )
    if len(images) > limits.images:
        raise Refusal(
            400,
            f"there are {len(images)} images, and at most {limits.images} are read.",
            "too_large",
            "messages",
        )
    if not images and not only_turns:
        raise Refusal(
            400,
            "messages: there is no image. Send a content part "
            '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}}.',
            "missing_image",
            "messages",
        )
    if len(messages) == len(images) == 1 and messages[0].role == "user" and not only_turns:
        return Asked(images, "\n".join(texts).strip() or None, None)
    turns = [Turn(role_of_turn(m.role, n), _parts_of(m)) for n, m in enumerate(messages, 1)]
    check_turns(turns, learns=False)
    if turns[-1].role != "user":
        raise DataError(f"messages: the last one is the {turns[-1].role}'s, and must be the user's.")
    return Asked(images, None, turns)


def _parts_of(message: Message) -> tuple[str | VisualPart, ...]:
    return tuple(
        VisualPart("image") if isinstance(part, ImagePart) else part.text for part in message.content
    )


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of ``stops`` in it."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=len(text))]


def _choices(texts: Sequence[Text], stops: Sequence[str]) -> list[tuple[str, str]]:
    """(text, why it ended) of each."""
    found = []
    for text in texts:
        shown = _cut(text.text, stops)
        cut_short = text.is_cut and shown == text.text
        found.append((shown, "length" if cut_short else "stop"))
    return found


def _usage(prompt_tokens: int, texts: Sequence[Text]) -> dict[str, int]:
    written = sum(text.num_tokens for text in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def completion(
    name: str, model: str, prompt_tokens: int, texts: Sequence[Text], stops: Sequence[str]
) -> dict[str, Any]:
    """The response, whole."""
    return {
        **_head(name, "chat.completion", model),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(_choices(texts, stops))
        ],
        "usage": _usage(prompt_tokens, texts),
    }


class Chunks:
    """The response, in the pieces of a stream.

    Args:
        count: how many texts it has.
        stops: what ends a text.
        with_usage: whether the last piece counts tokens.
    """

    def __init__(self, name: str, model: str, count: int, stops: Sequence[str], with_usage: bool) -> None:
        self.head = _head(name, "chat.completion.chunk", model)
        if with_usage:
            self.head["usage"] = None
        self.stops, self.with_usage = stops, with_usage
        self.sent = [""] * count

    def begin(self) -> Iterator[dict[str, Any]]:
        """The pieces before the first word."""
        for index in range(len(self.sent)):
            yield self._piece(index, {"role": "assistant", "content": ""})

    def more(self, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What texts that are still written have gained, without an end that may yet become a stop or
        another character."""
        for index, text in enumerate(texts):
            # an earlier stop may yet end behind the first one that is there
            sure = min(_cut(text, self.stops), text[: len(text) - _undecided(text, self.stops)], key=len)
            # a character of four bytes may be three of these until its last byte is written
            sure = sure.rstrip("\ufffd")
            yield from self._rest(index, sure)

    def continue_to(self, texts: Sequence[Text]) -> bool:
        """Whether what was sent is the beginning of the answer: not where a batch failed in the middle and
        its requests were answered anew."""
        return all(
            text.startswith(sent)
            for (text, _), sent in zip(_choices(texts, self.stops), self.sent, strict=True)
        )

    def end(self, prompt_tokens: int, texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
        """What is left of the texts, and why they ended."""
        for index, (text, reason) in enumerate(_choices(texts, self.stops)):
            yield from self._rest(index, text)
            yield self._piece(index, {}, reason)
        if self.with_usage:
            yield {**self.head, "choices": [], "usage": _usage(prompt_tokens, texts)}

    def _rest(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        sent = self.sent[index]
        if len(text) > len(sent) and text.startswith(sent):
            self.sent[index] = text
            yield self._piece(index, {"content": text[len(sent) :]})

    def _piece(self, index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self.head, "choices": [choice]}


def _undecided(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a stop."""
    most = len(text) + 1
    lengths = (s for stop in stops for s in range(1, min(len(stop), most)) if text.endswith(stop[:s]))
    return max(lengths, default=0)


def _head(name: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}
