"""Image and text processors. Importing this package registers the built-in ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evlgen.common.errors import ConfigError
from evlgen.common.registry import registry
from evlgen.config.schema import check_section, to_plain
from evlgen.processors import image, text, video  # noqa: F401 (registers)
from evlgen.processors.base_processor import BaseProcessor

__all__ = ["BaseProcessor", "build_processor"]


def build_processor(section: Mapping[str, Any], path: str = "processor") -> BaseProcessor:
    """The processor a YAML section describes: ``{name: blip_image_eval, image_size: 224}``.

    Args:
        section: ``name`` and the processor's own parameters.
        path: the section's key path, for messages.

    Raises:
        ConfigError: no name, an unknown key, a wrong type or an impossible value.
        RegistryError: no processor has this name.
    """
    section = to_plain(section)
    if not isinstance(section, Mapping) or not section.get("name"):
        raise ConfigError(
            f"{path}: needs the name of a processor, such as {{name: blip_image_eval, image_size: 224}}."
        )
    parameters = {key: value for key, value in section.items() if key != "name"}
    cls = registry.get_processor_class(section["name"])
    processor = cls(**check_section(parameters, cls, path))
    processor.section = section
    return processor
