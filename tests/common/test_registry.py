"""The registry: names, kinds, and what it says when something is wrong."""

from __future__ import annotations

import pytest

from evlgen.common import registry as registry_module
from evlgen.common.errors import RegistryError
from evlgen.common.registry import KINDS, Registry
from evlgen.processors.base_processor import BaseProcessor


@pytest.fixture
def empty() -> Registry:
    """A registry of its own, in which no built-in part is imported."""
    registry = Registry()
    registry._imported.update(KINDS)
    return registry


def test_a_registered_class_is_found_by_name(empty):
    @empty.register_processor("mine")
    class Mine(BaseProcessor):
        pass

    assert empty.get_processor_class("mine") is Mine
    assert empty.list_processors() == ["mine"]


def test_a_function_can_be_registered_where_a_kind_has_no_base(empty):
    @empty.register_lr_scheduler("flat")
    def flat(step: int) -> float:
        return 1.0

    assert empty.get_lr_scheduler_class("flat") is flat


def test_an_unknown_name_gives_kind_nearest_names_and_remedy(empty):
    empty.register_processor("blip_caption")(type("A", (BaseProcessor,), {}))
    with pytest.raises(RegistryError) as error:
        empty.get_processor_class("blip-captoin")
    text = str(error.value)
    assert "no processor is registered as 'blip-captoin'" in text
    assert "Did you mean 'blip_caption'?" in text
    assert "--plugins" in text


def test_a_name_that_is_no_text_is_an_error_like_any_other(empty):
    with pytest.raises(RegistryError, match="no processor is registered as 'None'"):
        empty.get_processor_class(None)


def test_a_name_registered_twice_names_both_places(empty):
    @empty.register_processor("mine")
    class First(BaseProcessor):
        pass

    with pytest.raises(
        RegistryError, match="'mine' is registered twice: first at .*test_registry.py:.* again at"
    ):

        @empty.register_processor("mine")
        class Second(BaseProcessor):
            pass

    assert empty.get_processor_class("mine") is First


def test_registering_the_same_class_again_is_harmless(empty):
    class Mine(BaseProcessor):
        pass

    empty.register_processor("mine")(Mine)
    assert empty.register_processor("mine")(Mine) is Mine


@pytest.mark.parametrize("wrong", [type("NotAProcessor", (), {}), lambda item: item])
def test_a_wrong_base_class_is_refused_and_not_registered(empty, wrong):
    with pytest.raises(
        RegistryError, match="must derive from evlgen.processors.base_processor.BaseProcessor"
    ):
        empty.register_processor("mine")(wrong)
    assert empty.list_processors() == []


def test_an_unknown_kind_names_the_nearest(empty):
    with pytest.raises(RegistryError, match="there is no kind 'conector'. Did you mean 'connector'"):
        empty.names("conector")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_lavis_style_names(empty, kind):
    listing = {"builder": "list_datasets"}.get(kind, f"list_{kind}s")
    assert callable(getattr(empty, f"register_{kind}"))
    assert callable(getattr(empty, f"get_{kind}_class"))
    assert getattr(empty, listing)() == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_brings_its_built_in_parts(kind):
    assert registry_module.registry.names(kind)
