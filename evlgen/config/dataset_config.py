"""What the ``datasets`` section of a YAML file may say: a frozen dataclass for each builder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from evlgen.common.errors import ConfigError
from evlgen.config.schema import REQUIRED, build_dataclass, config_of, instantiate, parameters_of

C = TypeVar("C", bound="DatasetConfig")


class FrozenDict(dict[str, Any]):
    """A mapping that does not change, nor do those in it; its keys are attributes too. `dataclasses.asdict`
    makes a plain dict of it."""

    def __new__(cls, content: Mapping[str, Any]) -> Any:
        return super().__new__(cls) if isinstance(content, Mapping) else dict(content)  # pairs, from asdict

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__((key, frozen(value)) for key, value in content.items())

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(key) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def _refuse(self, *args: Any, **changes: Any) -> Any:
        raise TypeError("a configuration does not change: give other --options")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = __ior__ = _refuse
    pop = popitem = clear = update = setdefault = _refuse


class FrozenList(list[Any]):
    """A list that does not change, nor does what is in it. `dataclasses.asdict` makes a plain list of it."""

    def __new__(cls, content: Iterable[Any]) -> Any:
        return super().__new__(cls) if isinstance(content, list) else list(content)  # items, from asdict

    def __init__(self, content: Iterable[Any]) -> None:
        super().__init__(map(frozen, content))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)

    _refuse = FrozenDict._refuse  # whatever it is called with, where list's own methods say what they take
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # type: ignore[assignment]
    append = extend = insert = pop = remove = clear = sort = reverse = _refuse  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """What the section of every dataset says. Mappings and lists in it are frozen too.

    Args:
        vis_processor: ``{train: {name: .., ..}, eval: {name: .., ..}}``: what images or videos go through.
        text_processor: likewise, texts.
        builder: the registered dataset it is one of; as a key of the YAML only where the section has a name
            of its own.
    """

    vis_processor: dict[str, Any]
    text_processor: dict[str, Any]
    builder: str = ""

    def __post_init__(self) -> None:
        frozen(self)

    @classmethod
    def from_arguments(cls: type[C], name: str, *arguments: Any, **settings: Any) -> C:
        """What a builder's constructor is given: this section itself, or its values.

        Raises:
            ConfigError: unknown or missing keys, wrong types, impossible values.
        """
        if arguments and isinstance(arguments[0], cls):
            return arguments[0]
        keys = [key for key in parameters_of(cls) if key != "builder"]
        if len(arguments) > len(keys):
            raise ConfigError(
                f"datasets.{name}: {len(arguments)} values for the {len(keys)} keys {', '.join(keys)}."
            )
        return build_dataclass(cls, dict(zip(keys, arguments, strict=False)) | settings, f"datasets.{name}")


def dataset_config(builder_class: Any, values: Mapping[str, Any], name: str) -> DatasetConfig:
    """A checked section as its builder's dataclass: its ``CONFIG``; or, where the builder's constructor has
    the keys as parameters, one made of those.

    Args:
        builder_class: a registered builder.
        values: what `check_datasets` returns of the section.
        name: the section's.
    """
    builder = values.get("builder", name)
    declared = config_of(builder_class) or _config_of_parameters(builder_class, values)
    return instantiate(declared, {**values, "builder": builder})


def _config_of_parameters(builder_class: Any, values: Mapping[str, Any]) -> type[DatasetConfig]:
    of_framework = {*builder_class.FROM_FRAMEWORK, "builder"}
    fields: dict[str, tuple[Any, Any]] = {
        key: (Any, {}) for key in ("vis_processor", "text_processor", *values)
    }
    fields |= {key: (p.annotation, p.default) for key, p in parameters_of(builder_class).items()}
    return dataclasses.make_dataclass(
        f"{builder_class.__name__}Config",
        [
            (key, annotation) if default is REQUIRED else (key, annotation, _default(default))
            for key, (annotation, default) in fields.items()
            if key not in of_framework
        ],
        bases=(DatasetConfig,),
        frozen=True,
        kw_only=True,
    )


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def frozen(value: Any) -> Any:
    """The same with a `FrozenDict` for every mapping and a `FrozenList` for every list; the values of a
    dataclass are replaced in place."""
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if dataclasses.is_dataclass(value):
        for key, inner in vars(value).items():
            object.__setattr__(value, key, frozen(inner))
    return FrozenList(value) if isinstance(value, list) else value
