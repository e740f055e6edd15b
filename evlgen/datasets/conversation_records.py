"""Reading conversations, in the layouts they are published in.

What a record holds is told by its keys:

====================================================  =======================================================
``conversations: [{from: human, value}, ..]``,        LLaVA's; the marker ``<image>`` (``<video>``) in what
``image`` a name, a list, or absent                   the human says is the place of an image
``messages: [{role, content}, ..]``                   OpenAI's and Hugging Face's; ``content`` is text as
                                                      above with ``images``, or a list of parts of ``type``
                                                      text, image, video
``texts: [{user, assistant}, ..]``, ``images``        the Cauldron's; its images stand before the first turn
====================================================  =======================================================

A marker is one only where there is an image for it: ``<image>`` in a record without images, in an answer, or
in a part of type text is text, unless it stands on a line of its own in a question, where an image is missing
then. ``<image>`` may be the place of a video, as LLaVA-Video's data have it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evlgen.common.errors import DataError
from evlgen.datasets.annotations import text_problem
from evlgen.datasets.base_dataset import BadRecord
from evlgen.datasets.compact_records import PackedRecords
from evlgen.datasets.records import refuse_bad
from evlgen.datasets.table_folders import split_named
from evlgen.datasets.tables import Row, Table
from evlgen.processors.turns import Turn, VisualPart, check_turns, read_turns, role_of_turn

TURN_KEYS = ("conversations", "messages", "texts")
_VISUALS = ("image", "images", "video", "videos")
KEYS = (*TURN_KEYS, *_VISUALS, "system", "id", "source", "references")
_MARKER = re.compile("<(image|video)>")
_OWN_LINE = re.compile(r"(?:^|(?<=\n))[ \t]*(?:<(?:image|video)>[ \t]*)+(?=\n|$)")
_CAULDRON_PLACE = "\n"  # between the Cauldron's images and its first question


def read_conversations(
    tables: Sequence[Table], split: str | None = None, split_column: str | None = None
) -> PackedRecords:
    """The records of tables, a `BadRecord` in the place of each that makes no sample. A record has
    ``messages`` (as `Turn.to_message` writes them), ``visuals`` (kind and name of each image or video, in the
    order of their places), ``visual`` (the first one's name, or the record's place in its file), and where
    they are known ``id``, ``source`` and ``references``: further right last answers.

    Args:
        split, split_column: take the rows of this split by this column.

    Raises:
        DataError: there are no rows, or none makes a sample.
    """
    records = PackedRecords(_records(tables, split, split_column))
    if not len(records):
        raise DataError(f"{tables[0].path} has no conversations.")
    refuse_bad(records)
    return records


def _records(
    tables: Sequence[Table], split: str | None, split_column: str | None
) -> Iterator[dict[str, Any] | BadRecord]:
    for table in tables:
        wanted = [key for key in (*KEYS, split_column) if key in table.columns]
        if not set(TURN_KEYS) & set(wanted):
            raise DataError(
                f"{table.path} has none of the columns {', '.join(TURN_KEYS)} (it has "
                f"{', '.join(table.columns) or 'none'}): it holds no conversations."
            )
        for row in table.rows(wanted, _VISUALS):
            if isinstance(row, BadRecord):
                yield row
            elif split is None or split_named(row.values.get(split_column or "")) == split:
                try:
                    yield read_conversation(row)
                except DataError as error:
                    yield BadRecord(row.place, str(error), error.cause)


def read_conversation(row: Row) -> dict[str, Any]:
    """A record of `read_conversations`. Raises `DataError` where the row makes none."""
    values = {key: value for key, value in row.values.items() if value is not None}
    given = [
        VisualPart(kind, name)
        for kind in ("image", "video")
        for key in (kind, f"{kind}s")
        for name in _names(values.get(key), key)
    ]
    if "conversations" in values:
        turns = _with_places(_llava_turns(values["conversations"]), given)
    elif "messages" in values:
        turns = _message_turns(values["messages"], given)
    elif "texts" in values:
        turns = _cauldron_turns(values["texts"], given)
    else:
        raise DataError(f"it has neither of {', '.join(TURN_KEYS)}.", "no turns")
    if len(turns) > 1 and turns[0].role == "system" and not (turns[0].text.strip() or turns[0].visuals):
        turns = turns[1:]  # as some exports write that there is none
    if isinstance(values.get("system"), str) and values["system"].strip() and turns[0].role != "system":
        turns = [Turn("system", (values["system"],)), *turns]
    check_turns(turns, learns=True)
    for number, turn in enumerate(turns, 1):
        if problem := text_problem(turn.text):
            raise DataError(f"turn {number} has {problem} in it.", "not UTF-8")
    visuals = [(visual.kind, _file_of(visual)) for turn in turns for visual in turn.visuals]
    known = {key: values[key] for key in ("id", "source") if isinstance(values.get(key), int | str)}
    references = values.get("references")
    if isinstance(references, Sequence) and all(isinstance(text, str) for text in references):
        known["references"] = [references] if isinstance(references, str) else list(references)
    return {
        "messages": [turn.to_message() for turn in turns],
        "visuals": visuals,
        "visual": visuals[0][1] if visuals else row.place,
        **known,
    }


def _names(value: Any, key: str) -> list[Any]:
    """The names of images in a column, none for an empty one."""
    if value is None or value == "":
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [name for one in value for name in _names(one, key)]
    if isinstance(value, Mapping):  # datasets' and OpenAI's
        value = next((value[k] for k in ("path", "url", "image") if value.get(k)), None)
    if not isinstance(value, str):
        raise DataError(f"'{key}' must name a file or be a list of names, not {value!r:.60}.", "bad record")
    return [value]


def _file_of(visual: VisualPart) -> str:
    """The name of a part's file; of bytes (``{bytes, path}`` in Parquet) an address that holds them."""
    source = visual.source
    if isinstance(source, Mapping):
        source = next((source[k] for k in ("bytes", "path", "url") if source.get(k)), source)
    if isinstance(source, bytes):
        source = f"data:{visual.kind}/any;base64,{base64.b64encode(source).decode()}"
    if isinstance(source, str) and source.strip():
        return source
    raise DataError(
        f"the {visual.kind} of a part is named by {source!r:.60}, not by a file.", "image without a file"
    )


def _llava_turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise DataError("'conversations' must be a list of turns.", "no turns")
    turns = []
    for number, turn in enumerate(conversations, 1):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {number} must be a mapping, not {type(turn).__name__}.", "bad turn")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise DataError(f"turn {number} has no text under 'value'.", "empty turn")
        turns.append(Turn(role_of_turn(role, number), (text,)))
    if not turns:
        raise DataError("the conversation has no turns.", "no turns")
    return turns


def _message_turns(messages: Any, given: Sequence[VisualPart]) -> list[Turn]:
    turns = read_turns(messages)
    places = [visual for turn in turns for visual in turn.visuals]
    if not places and not given:  # what stands in a part of type text is text
        written = [
            turn for turn, message in zip(turns, messages, strict=True) if isinstance(message["content"], str)
        ]
        _with_places(written, given)
        return turns
    if not places:
        return _with_places(turns, given)
    open_places = [place for place in places if place.source is None]
    if not open_places and len(given) in (0, len(places)):
        return turns  # a column may name once more what the parts name
    if len(open_places) != len(given):
        raise _other_number(len(open_places), len(given), "parts without a file of their own")
    names = {kind: iter([v for v in given if v.kind == kind]) for kind in ("image", "video")}
    filled = []
    for turn in turns:
        parts: list[Any] = []
        for part in turn.parts:
            if not isinstance(part, VisualPart) or part.source is not None:
                parts.append(part)
                continue
            own = next(names[part.kind], None)
            if own is None:
                raise DataError("its places of images and of videos are not as many as these.", "bad record")
            parts.append(own)
        filled.append(turn._replace(parts=tuple(parts)))
    return filled


def _cauldron_turns(texts: Any, given: Sequence[VisualPart]) -> list[Turn]:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
        raise DataError("'texts' must be a list of {user, assistant}.", "no turns")
    turns = []
    for number, pair in enumerate(texts, 1):
        if not isinstance(pair, Mapping) or not all(
            isinstance(pair.get(role), str) for role in ("user", "assistant")
        ):
            raise DataError(
                f"entry {number} of 'texts' must have the texts 'user' and 'assistant'.", "bad turn"
            )
        turns += [Turn("user", (pair["user"],)), Turn("assistant", (pair["assistant"],))]
    if given:
        turns[0] = Turn("user", (*given, _CAULDRON_PLACE + turns[0].text))
    return turns


def _with_places(turns: Sequence[Turn], given: Sequence[VisualPart]) -> list[Turn]:
    """Turns of text with images and videos in the places of their markers. Raises `DataError` where these are
    not as many."""
    asked = [turn.text for turn in turns if turn.role != "assistant"]
    found = sum(len(_MARKER.findall(text)) for text in asked)
    alone = sum(len(_MARKER.findall(line)) for text in asked for line in _OWN_LINE.findall(text))
    if not given and not alone:
        return list(turns)
    if len(given) not in (found, alone):
        raise _other_number(found, len(given), "markers (<image>, <video>)")
    only_alone = found != len(given)
    names = {kind: [v for v in given if v.kind == kind][::-1] for kind in ("image", "video")}
    return [
        turn if turn.role == "assistant" else turn._replace(parts=tuple(_parts(turn.text, names, only_alone)))
        for turn in turns
    ]


def _parts(text: str, names: Mapping[str, list[VisualPart]], only_alone: bool) -> Iterable[Any]:
    lines = [found.span() for found in _OWN_LINE.finditer(text)]
    start = 0
    for marker in _MARKER.finditer(text):
        if only_alone and not any(a <= marker.start() and marker.end() <= b for a, b in lines):
            continue
        own = names[marker[1]] or (names["video"] if marker[1] == "image" else [])
        if not own:
            raise DataError(f"it has more markers <{marker[1]}> than {marker[1]}s.", "places without images")
        if text[start : marker.start()]:
            yield text[start : marker.start()]
        yield own.pop()
        start = marker.end()
    if text[start:]:
        yield text[start:]


def _other_number(places: int, images: int, what: str) -> DataError:
    why = "images without places" if images > places else "places without images"
    return DataError(f"it has {places} {what} and {images} images: there must be one for each.", why)
