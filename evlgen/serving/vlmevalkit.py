"""The model ``EVLGen`` of VLMEvalKit, so that its datasets score any checkpoint.

``python -m evlgen.serving.vlmevalkit --config my.json``: VLMEvalKit's ``run.py``, with one more class to name
under ``model`` in its configuration, ``{"mine": {"class": "EVLGen", "checkpoint": "FOLDER"}}``. (It has no
entry points; the class has to be put among its own.)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from evlgen.common.errors import ConfigError, EVLGenError
from evlgen.models.chatting import pixels_of_visual
from evlgen.models.protocols import reads_videos
from evlgen.processors.turns import VisualPart
from evlgen.serving.lmms_eval import MARKER, Harnessed, Question


class EVLGen(Harnessed):
    """A checkpoint as VLMEvalKit drives it: one question at a time.

    Args:
        max_new_tokens: of an answer at most.
        num_beams: 1 is greedy search.
        arguments: of `Harnessed`.
    """

    INTERLEAVE = True  # images stand where the message has them
    is_api = False

    def __init__(self, max_new_tokens: int = 256, num_beams: int = 1, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        self.VIDEO_LLM = reads_videos(self.model)  # else a dataset of videos gives frames

    def use_custom_prompt(self, dataset: str | None) -> bool:
        return False

    def set_dump_image(self, dump_image: Callable[[Any], list[str]]) -> None:
        """VLMEvalKit's function that writes a row's images to files; its messages name these already."""

    @torch.no_grad()
    def generate(self, message: str | Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message: a text, or a list of ``{"type", "value"}``, of which ``type`` is ``text``,
        ``image`` or ``video``. Where it has no text, as an empty cell of a table gives, the model's own
        prompt is continued."""
        parts = [{"type": "text", "value": message}] if isinstance(message, str) else message
        text, visuals = "", []
        for part in parts:
            if part["type"] != "text":
                visuals.append(VisualPart(part["type"], part["value"]))
                text += MARKER
            elif isinstance(part["value"], str):  # an empty cell is not a number
                text += part["value"]
        images = [pixels_of_visual(self.model, visual, self.num_frames) for visual in visuals]
        question = Question("" if text == MARKER else text, visuals, images, None)
        return self._write([question], self._options(self.options, question))[0]


def main() -> None:
    """VLMEvalKit's ``run.py``. Raises `ConfigError` where the package is not installed."""
    try:
        models, runner = map(importlib.import_module, ("vlmeval.vlm", "vlmeval.run"))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"VLMEvalKit cannot be imported ({error}): see docs/lmms-eval.md for its packages."
        ) from error
    setattr(models, EVLGen.__name__, EVLGen)
    runner.main()


if __name__ == "__main__":
    try:
        main()
    except EVLGenError as error:
        raise SystemExit(f"error: {error}") from error
