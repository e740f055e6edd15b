"""The contract of processors: one callable that turns a raw item into what a model reads."""

from __future__ import annotations

from typing import Any


class BaseProcessor:
    """Turns one item (a Pillow image, a video, a string) into what a model reads.

    A subclass's constructor parameters are the keys its YAML section may have.
    """

    def __call__(self, item: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(item)")
