"""A plugin of mypy. torch declares that any attribute of a module that it does not know is `Tensor | Module`, so
that neither can be used without a cast; here it has no type, as everything else whose type is not declared."""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type


class Torch(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _without_type if fullname.startswith("torch.nn.modules.module.Module.") else None


def _without_type(context: AttributeContext) -> Type:
    declared = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.from_unimported_type) if isinstance(declared, UnionType) else declared


def plugin(version: str) -> type[Plugin]:
    return Torch
