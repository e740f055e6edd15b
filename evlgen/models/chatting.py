"""The half of a vision-language model that converses, and the images and videos of a conversation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evlgen.batch import Batch
from evlgen.common.errors import ConfigError, DataError
from evlgen.common.precision import without_autocast
from evlgen.files.io import resolve
from evlgen.media.frames import decode_address, is_data_address, read_frames
from evlgen.media.images import open_image
from evlgen.media.video import FrameList
from evlgen.models.language.segments import Row, SoftPrompts, num_positions, num_soft_of, num_visuals
from evlgen.models.pixels import pixels_of
from evlgen.models.protocols import HasVision, reads_videos
from evlgen.models.sequences import rows_to_continue
from evlgen.models.writing import Writing
from evlgen.processors.turns import VisualPart, check_turns, read_turns

_MOST_FRAMES = 4
_LEAST_ROOM = 64  # positions of an answer that older turns make room for, where nothing is said
_ANSWER_LEN = 256  # new tokens of an answer at most, where nothing is said
_NO_VIDEOS = (
    "this is a model of images, and the conversation has a video. Set model.vision.temporal: "
    "{form: average}, or take an architecture of videos, such as evlgen_video_opt."
)


class Chatting(Writing):
    """Conversations; `evlgen.models.vlm.VLM` is what has these."""

    if TYPE_CHECKING:

        def sequence_prompts(self, samples: Batch) -> SoftPrompts: ...

    def answer_turns(self, samples: Batch, **options: Any) -> list[str]:
        """The assistant's next turn of each conversation of a batch.

        Args:
            samples: ``messages`` and ``images`` as in `forward`, up to a user's turn.
            options: as of `generate`; ``num_beams`` is 1 unless given, ``max_length`` 256, or what
                there is room for.
        """
        return self.texts_of_turns(self.answer_turns_tokens(samples, **options))

    def texts_of_turns(self, tokens: list[list[int]]) -> list[str]:
        """What is written in tokens of `answer_turns_tokens`, without what ends a turn."""
        ends = self.language.turn_end_token_ids
        return self.texts([ids[:-1] if ids and ids[-1] in ends else ids for ids in tokens])

    @torch.no_grad()
    def answer_turns_tokens(self, samples: Batch, **options: Any) -> list[list[int]]:
        """As `answer_turns`, the tokens: the last one of a turn is an end token unless ``max_length`` cut
        it."""
        room = options.get("max_length") or _LEAST_ROOM
        rows, soft_prompts = rows_to_continue(self.language, samples, self.sequence_prompts(samples), room)
        with without_autocast(self.device):
            options = self._chat_options(options, rows, soft_prompts)
            return self.language.continue_rows(soft_prompts, rows, **options)

    def chat(
        self, messages: Sequence[Any], stream: bool = False, num_frames: int = 4, **options: Any
    ) -> str | Iterator[str]:
        """What the assistant says next.

        Args:
            messages: ``[{"role": "user", "content": ..}, ..]``, up to a user's turn, where ``content`` is a
                text or a list of ``{"type": "text", "text": ..}``, ``{"type": "image", "image": ..}`` and
                ``{"type": "video", "video": ..}``: paths, addresses, Pillow images, frames in a list, pixels.
            stream: give the text piece by piece, as it is written: an iterator, whose pieces together are
                the text.
            num_frames: of a video file.
            options: as of `answer_turns`.

        Raises:
            DataError: the turns are none, or an image cannot be read.
            ConfigError: a video for a model of images; a question that the language model has no room for.
                Older turns are left out where they leave none.
        """
        turns = read_turns(messages)
        check_turns(turns, learns=False)
        if turns[-1].role != "user":
            raise DataError(
                f"the conversation ends with the {turns[-1].role}'s turn: the last one must be the user's."
            )
        visuals = [visual for turn in turns for visual in turn.visuals]
        images = [pixels_of_visual(self, visual, num_frames) for visual in visuals]
        samples: Batch = {"messages": [turns], "images": [images]}
        return self._streamed(samples, options) if stream else self.answer_turns(samples, **options)[0]

    @torch.no_grad()
    def _streamed(self, samples: Batch, options: dict[str, Any]) -> Iterator[str]:
        room = options.get("max_length") or _LEAST_ROOM
        (row,), soft_prompts = rows_to_continue(self.language, samples, self.sequence_prompts(samples), room)
        options = self._chat_options(options, [row], soft_prompts)
        shown = ""
        with without_autocast(self.device):
            for tokens in self.language.stream_row(soft_prompts, row, **options):
                text = self.texts_of_turns([tokens])[0]
                is_whole = not text.endswith("\ufffd")  # else half of a character
                if is_whole and text != shown and text.startswith(shown):
                    yield text[len(shown) :]
                    shown = text
        if text.startswith(shown) and text != shown:
            yield text[len(shown) :]

    def _chat_options(
        self, options: dict[str, Any], rows: list[Row], soft_prompts: SoftPrompts
    ) -> dict[str, Any]:
        options = dict(options)
        penalties = {
            key: self._or_default(options.pop(key, None), key)
            for key in ("repetition_penalty", "length_penalty")
        }
        if options.get("max_length") is None:
            counts = iter(num_soft_of(soft_prompts))
            longest = max(num_positions(row, list(islice(counts, num_visuals(row)))) for row in rows)
            room = (self.language.max_positions or math.inf) - longest
            options["max_length"] = int(max(1, min(_ANSWER_LEN, room)))
        return {"num_beams": 1, **penalties, **options}


def pixels_of_visual(model: HasVision, visual: VisualPart, num_frames: int = _MOST_FRAMES) -> Tensor:
    """What a model sees of an image or a video in a conversation.

    Args:
        visual: its source is a path or address, a ``data:`` address, a Pillow image, frames in a list, or
            pixels.
        num_frames: of a video file, evenly spread.

    Returns:
        [3, H, W], or [3, T, H, W] for a model of videos.

    Raises:
        DataError: it cannot be read, or there is no source.
        ConfigError: a video for a model of images.
    """
    source = visual.source
    if visual.kind == "video" and not reads_videos(model):
        raise ConfigError(_NO_VIDEOS)
    if isinstance(source, Tensor):
        return source
    if source is None:
        raise DataError(f"an {visual.kind} of the conversation names no file: give it 'path' or 'image'.")
    if isinstance(source, str | os.PathLike):
        source = _opened(str(source), visual.kind, num_frames)
    return pixels_of(model, [FrameList(source) if isinstance(source, list) else source])[0]


def _opened(source: str, kind: str, num_frames: int) -> Any:
    if is_data_address(source):
        return open_image(decode_address(source))
    path = Path(resolve(os.path.expanduser(source)))
    return read_frames(path, num_frames) if kind == "video" else open_image(path)
