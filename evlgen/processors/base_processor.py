"""The contract of processors: one callable that turns a raw item into what a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


class BaseProcessor:
    """Turns one item (a Pillow image, a video, a string) into what a model reads.

    A subclass's constructor parameters are the keys its YAML section may have.

    Attributes:
        section: the section it was built from, ``name`` included; empty where it was built in Python.
    """

    section: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, item: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(item)")


class UnchangedProcessor(BaseProcessor):
    """Gives an item back as it is: what LAVIS takes where no processor is named."""

    def __call__(self, item: Any) -> Any:
        return item
