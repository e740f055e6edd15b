"""A plugin of mypy. torch declares what it does not know of a module as `Tensor | Module`, which can be used
as neither without a cast; here it has no type, as all else whose type is not declared."""

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
