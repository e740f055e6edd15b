"""EVLGen: training, evaluating and using visually conditioned language generation models.

The public names are imported on first use, so ``import evlgen`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evlgen import tome
    from evlgen.common.errors import EVLGenError
    from evlgen.common.registry import registry
    from evlgen.datasets.zoo import dataset_zoo, load_dataset
    from evlgen.models.zoo import load_model, load_model_and_preprocess, load_preprocess, model_zoo

__version__ = "0.1.0"

_HOMES = {
    "EVLGenError": "evlgen.common.errors",
    "registry": "evlgen.common.registry",
    "dataset_zoo": "evlgen.datasets.zoo",
    "load_dataset": "evlgen.datasets.zoo",
    "load_model": "evlgen.models.zoo",
    "load_model_and_preprocess": "evlgen.models.zoo",
    "load_preprocess": "evlgen.models.zoo",
    "model_zoo": "evlgen.models.zoo",
}
__all__ = [
    "EVLGenError",
    "dataset_zoo",
    "load_dataset",
    "load_model",
    "load_model_and_preprocess",
    "load_preprocess",
    "model_zoo",
    "registry",
    "tome",
]


def __getattr__(name: str) -> Any:
    if name == "tome":
        return importlib.import_module("evlgen.tome")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'evlgen' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
