"""One registry for everything a YAML project file can name.

``@registry.register_connector("my_connector")`` makes a class known;
``registry.get_connector_class("my_connector")`` finds it. The names of decorators and look-ups are LAVIS's.
The package's own parts are imported when a kind is first looked up, so ``import evlgen`` stays cheap.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partialmethod
from typing import Any, TypeVar

from evlgen.common.errors import RegistryError, did_you_mean

T = TypeVar("T")

# kind -> (package whose import registers the built-in ones, "module:Base" that each class derives from)
KINDS: dict[str, tuple[str, str | None]] = {
    "model": ("evlgen.models.architectures", "evlgen.models.base_model:BaseModel"),
    "vision_encoder": ("evlgen.models.vision", "evlgen.models.vision.base:VisionEncoder"),
    "connector": ("evlgen.models.connectors", "evlgen.models.connectors.base:Connector"),
    "language_model": ("evlgen.models.language", "evlgen.models.language.base:LanguageModel"),
    "builder": ("evlgen.datasets", "evlgen.datasets.base_builder:BaseDatasetBuilder"),
    "processor": ("evlgen.processors", "evlgen.processors.base_processor:BaseProcessor"),
    "task": ("evlgen.tasks", "evlgen.tasks.base_task:BaseTask"),
    "runner": ("evlgen.runners.runner", "evlgen.runners.runner:Runner"),
    "listener": ("evlgen.runners.heartbeat", "evlgen.runners.listener:Listener"),
    "lr_scheduler": ("evlgen.common.lr_schedules", None),
    "metric": ("evlgen.tasks.metrics", None),
}


def _where(cls: Any) -> str:
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return f"{getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}"


class Registry:
    """Names of classes (or functions), by kind. Use the instance ``registry``."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._imported: set[str] = set()

    def register(self, kind: str, name: str) -> Callable[[T], T]:
        """Decorator that makes a class known as ``name`` among its ``kind``.

        Raises:
            RegistryError: the name is taken by another class, or the class lacks the kind's base class.
        """

        def wrap(cls: T) -> T:
            known = self._entries[kind].get(name)
            if known is not None and not _same_source(known, cls):
                raise RegistryError(
                    f"{kind} '{name}' is registered twice: first at {_where(known)}, again at {_where(cls)}. "
                    "Give one of them another name."
                )
            self._check_base(kind, name, cls)
            self._entries[kind][name] = cls
            return cls

        return wrap

    def get(self, kind: str, name: str) -> Any:
        """The class registered as ``name``; raises `RegistryError` with the nearest names otherwise."""
        if not self.has(kind, name):
            known = self.names(kind)
            hint = did_you_mean(str(name), known)
            raise RegistryError(
                f"no {kind} is registered as '{name}'.{hint} Known: {', '.join(known)}. "
                "A name of your own needs its file in `plugins:` or --plugins, or is the path of a class in "
                "a module that Python finds, such as my_package.my_module.MyClass."
            )
        return self._find(kind, name)

    def has(self, kind: str, name: Any) -> bool:
        """Whether a name is known: registered, or the dotted path of a class whose module is imported.

        A path imports nothing here: what a stranger's configuration names does not run for that.

        Raises:
            RegistryError: the class at the path lacks the kind's base class.
        """
        self._load_builtin(kind)
        return isinstance(name, str) and self._find(kind, name) is not None

    def _find(self, kind: str, name: str) -> Any:
        if name in self._entries[kind]:
            return self._entries[kind][name]
        module, _, attribute = name.rpartition(".")
        cls = getattr(sys.modules.get(module), attribute, None) if module else None
        if not isinstance(cls, type):
            return None
        self._check_base(kind, name, cls)
        return cls

    def names(self, kind: str) -> list[str]:
        """All registered names of a kind, sorted."""
        self._load_builtin(kind)
        return sorted(self._entries[kind])

    def _load_builtin(self, kind: str) -> None:
        if kind not in KINDS:
            raise RegistryError(
                f"there is no kind '{kind}'.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}."
            )
        if kind not in self._imported:
            self._imported.add(kind)
            try:
                importlib.import_module(KINDS[kind][0])
            except BaseException:
                self._imported.discard(kind)
                raise

    @staticmethod
    def _check_base(kind: str, name: str, cls: Any) -> None:
        module, _, attribute = (KINDS[kind][1] or "").partition(":")
        own = (getattr(cls, "__module__", None), getattr(cls, "__qualname__", None))
        if not module or own == (module, attribute):  # a base itself is not in its module yet
            return
        base = getattr(importlib.import_module(module), attribute)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise RegistryError(
                f"{kind} '{name}' ({_where(cls)}) must derive from {module}.{attribute}. "
                f"Write `class {getattr(cls, '__name__', name)}({attribute}):`."
            )

    # LAVIS's names: register_<kind>, get_<kind>_class, list_<kinds>.
    register_model = partialmethod(register, "model")
    register_vision_encoder = partialmethod(register, "vision_encoder")
    register_connector = partialmethod(register, "connector")
    register_language_model = partialmethod(register, "language_model")
    register_builder = partialmethod(register, "builder")
    register_processor = partialmethod(register, "processor")
    register_task = partialmethod(register, "task")
    register_runner = partialmethod(register, "runner")
    register_listener = partialmethod(register, "listener")
    register_lr_scheduler = partialmethod(register, "lr_scheduler")
    register_metric = partialmethod(register, "metric")

    get_model_class = partialmethod(get, "model")
    get_vision_encoder_class = partialmethod(get, "vision_encoder")
    get_connector_class = partialmethod(get, "connector")
    get_language_model_class = partialmethod(get, "language_model")
    get_builder_class = partialmethod(get, "builder")
    get_processor_class = partialmethod(get, "processor")
    get_task_class = partialmethod(get, "task")
    get_runner_class = partialmethod(get, "runner")
    get_listener_class = partialmethod(get, "listener")
    get_lr_scheduler_class = partialmethod(get, "lr_scheduler")
    get_metric_class = partialmethod(get, "metric")

    list_models = partialmethod(names, "model")
    list_vision_encoders = partialmethod(names, "vision_encoder")
    list_connectors = partialmethod(names, "connector")
    list_language_models = partialmethod(names, "language_model")
    list_datasets = partialmethod(names, "builder")
    list_processors = partialmethod(names, "processor")
    list_tasks = partialmethod(names, "task")
    list_runners = partialmethod(names, "runner")
    list_listeners = partialmethod(names, "listener")
    list_lr_schedulers = partialmethod(names, "lr_scheduler")
    list_metrics = partialmethod(names, "metric")


def _same_source(first: Any, second: Any) -> bool:
    """True when a module was executed again (a plugin loaded twice, a reload): the same class from the same
    file."""
    names = getattr(first, "__qualname__", 1), getattr(second, "__qualname__", 2)
    return first is second or names[0] == names[1] and _where(first) == _where(second)


registry = Registry()
