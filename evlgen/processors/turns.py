"""The turns of a conversation: who speaks, what is said, and where images and videos stand.

Turns are written as OpenAI's and Hugging Face's chats are: ``{"role": "user", "content": "What is this?"}``,
where ``content`` may be a list of parts, ``{"type": "text", "text": ..}``, ``{"type": "image", ..}``,
``{"type": "video", ..}``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from evlgen.common.errors import DataError

ROLES = ("system", "user", "assistant")
_ALSO = {"human": "user", "gpt": "assistant", "bot": "assistant", "developer": "system"}
_VISUALS = ("image", "video")
_PLACES = {"image": ("image", "url", "path", "image_url"), "video": ("video", "url", "path", "video_url")}


class VisualPart(NamedTuple):
    """The place of an image or a video in a turn.

    Attributes:
        kind: ``image`` or ``video``.
        source: a file's name, an address, an image, frames, pixels; None where the sample gives them apart.
    """

    kind: str
    source: Any = None


class Turn(NamedTuple):
    """A turn.

    Attributes:
        role: one of `ROLES`.
        parts: texts and visuals in their order.
    """

    role: str
    parts: tuple[str | VisualPart, ...]

    @property
    def text(self) -> str:
        """What is said, without images."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def visuals(self) -> list[VisualPart]:
        """The places of images and videos."""
        return [part for part in self.parts if isinstance(part, VisualPart)]

    def to_message(self) -> dict[str, Any]:
        """The turn as ``{"role", "content"}``, without the sources of its images."""
        if not self.visuals:
            return {"role": self.role, "content": self.text}
        parts = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in self.parts]
        return {"role": self.role, "content": parts}


def read_turns(messages: Any) -> list[Turn]:
    """The turns of a list of messages.

    Raises:
        DataError: it is not a list of messages; an unknown role or kind of content; a turn that is empty.
    """
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f"a conversation must be a list of turns, not {type(messages).__name__}.", "no turns")
    if not messages:
        raise DataError("the conversation has no turns.", "no turns")
    return [_turn(message, number) for number, message in enumerate(messages, 1)]


def role_of_turn(name: Any, number: int) -> str:
    """The role that a name means. Raises `DataError` where it is none."""
    role = _ALSO.get(name, name) if isinstance(name, str) else name
    if role in ROLES:
        return role
    near = difflib.get_close_matches(str(name).lower(), (*ROLES, *_ALSO), 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(
        f"turn {number} has the unknown role {name!r}.{hint} Roles: {', '.join(ROLES)}; LLaVA's: human, gpt.",
        "unknown role",
    )


def check_turns(turns: Sequence[Turn], learns: bool) -> None:
    """Raises `DataError` for a turn that says nothing and, where it is to be learned, a conversation that
    does not end with an answer."""
    for number, turn in enumerate(turns, 1):
        if not turn.text.strip() and (turn.role == "assistant" or not turn.visuals):
            raise DataError(f"turn {number} ({turn.role}) is empty.", "empty turn")
        if turn.role == "system" and number > 1:
            raise DataError(
                f"turn {number} is the system's: only the first turn may be.", "system turn in the middle"
            )
    if learns and turns[-1].role != "assistant":
        raise DataError(
            f"the conversation ends with a question (turn {len(turns)}, {turns[-1].role}): training learns "
            "what the assistant says, so its last turn must be an answer.",
            "ends with a question",
        )


def _turn(message: Any, number: int) -> Turn:
    if isinstance(message, Turn):
        return message
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(
            f"turn {number} must be a mapping with 'role' and 'content', not {str(message):.80}.", "bad turn"
        )
    return Turn(role_of_turn(message["role"], number), tuple(_parts(message["content"], number)))


def _parts(content: Any, number: int) -> Iterator[str | VisualPart]:
    if isinstance(content, str):
        yield content
        return
    if content is None or isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise DataError(
            f"turn {number}: content must be a text or a list of parts, not {type(content).__name__}.",
            "bad turn",
        )
    for part in content:
        yield part if isinstance(part, str) else _part(part, number)


def _part(part: Any, number: int) -> str | VisualPart:
    kind: Any = part.get("type") if isinstance(part, Mapping) else None
    kind = {"image_url": "image", "video_url": "video", "input_text": "text", "input_image": "image"}.get(
        kind, kind
    )
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind not in _VISUALS:
        raise DataError(
            f"turn {number} has a part that is neither text, image nor video: {str(part):.80}.", "bad turn"
        )
    source = next((part[key] for key in _PLACES[kind] if part.get(key) is not None), None)
    if isinstance(source, Mapping) and "url" in source:  # OpenAI's {"image_url": {"url": ..}}
        source = source["url"]
    return VisualPart(kind, source)
