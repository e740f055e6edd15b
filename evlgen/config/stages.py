"""``stages:`` in a project file: trainings one after the other, each from the weights of the one before.

A stage is ``{name, model, datasets, run}``, all of them optional: what it changes of the file's own sections.
One that has ``datasets`` trains on these alone, with the file's own settings for those that it has too. An
option ``stages.NAME.run.init_lr=1e-5`` is for one stage, any other option for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.config.layers import Layer, options_layer
from evlgen.config.problems import Problems
from evlgen.config.schema import show, unknown_key

STAGES = "stages"
_SECTIONS = ("model", "datasets", "run")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")  # it names a folder


class Stage(NamedTuple):
    """Which stage of a project file a configuration is.

    Attributes:
        has_own_start: whether it names the checkpoint itself that it starts from; else it starts from the
            weights of the stage before, if there is one.
    """

    name: str
    number: int
    has_own_start: bool


def stage_names(file: Layer | None) -> list[str]:
    """What the stages of a project file are called: ``name``, else ``stage1``, ``stage2``, ..; empty where it
    has none.

    Raises:
        ConfigError: ``stages`` is not a list of stages. Names each key by its place, ``stages[1]``.
    """
    if file is None or STAGES not in file.content:
        return []
    stages, problems = file.content[STAGES], Problems(lambda path: file.source)
    if not isinstance(stages, list) or not stages:
        problems.add(STAGES, f"must be a list of stages, not {show(stages)}")
        stages = []
    names: list[str] = []
    for number, stage in enumerate(stages):
        place, keys = f"{STAGES}[{number}]", ("name", *_SECTIONS)
        if not isinstance(stage, Mapping):
            problems.add(place, f"must be a mapping of {', '.join(keys)}, not {show(stage)}")
            continue
        for key in stage:
            if key not in keys:
                problems.add(f"{place}.{key}", unknown_key(key, keys))
        name = stage.get("name", f"stage{number + 1}")
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "latest":
            problems.add(f"{place}.name", f"must be a name for a folder, such as pretrain, not {show(name)}")
        elif name in names:
            problems.add(f"{place}.name", f"two stages are called '{name}'")
        names.append(name)
    problems.raise_any()
    return names


def layers_of_stage(
    file: Layer | None, options: Sequence[str], name: str | None = None
) -> tuple[list[Layer], Stage | None]:
    """The layers of a project file and of options for one of its stages, the weakest first, and which stage
    that is; None where the file has no stages.

    Args:
        name: the stage's; None: the last one.

    Raises:
        ConfigError: an option is for a stage that the file does not have; and see `stage_names`.
    """
    names = stage_names(file)
    _check_options(options, names)
    if file is None or not names:
        return [*([file] if file else []), options_layer(options)], None
    number = names.index(name) if name else len(names) - 1
    base = {key: value for key, value in file.content.items() if key != STAGES}
    changes = [{key: value for key, value in one.items() if key != "name"} for one in file.content[STAGES]]
    own = changes[number]
    datasets = set(_datasets(own if "datasets" in own else base))
    if "datasets" in own and "datasets" in base:
        base["datasets"] = {key: value for key, value in _datasets(base).items() if key in datasets}
    of_others = {key for one in (file.content, *changes) for key in _datasets(one)} - datasets
    prefix = f"{STAGES}.{names[number]}."
    own_options = [o.strip().removeprefix(prefix) for o in options if o.strip().startswith(prefix)]
    others = [o for o in options if _key(o)[0] != STAGES and not _is_for(o, of_others)]
    layers = [
        Layer(file.source, base),
        Layer(f"{file.source}, {STAGES}[{number}] '{names[number]}'", own),
        options_layer([*others, *own_options]),
    ]
    starts = [options_layer(own_options).content.get("model"), own.get("model")]
    has_own_start = any(isinstance(model, Mapping) and model.get("checkpoint") for model in starts)
    return layers, Stage(names[number], number, has_own_start)


def _datasets(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``datasets`` section; empty where it is not one, which is reported later."""
    datasets = content.get("datasets")
    return datasets if isinstance(datasets, Mapping) else {}


def _key(option: str) -> list[str]:
    return option.partition("=")[0].strip().split(".")


def _is_for(option: str, datasets: set[str]) -> bool:
    key = _key(option)
    return key[0] == "datasets" and len(key) > 1 and key[1] in datasets


def _check_options(options: Sequence[str], names: Sequence[str]) -> None:
    for option in options:
        key = _key(option)
        if key[0] == STAGES and not (len(key) > 3 and key[1] in names and key[2] in _SECTIONS):
            known = f"Stages: {', '.join(names)}." if names else "The project file has no stages."
            hint = did_you_mean(key[1], names) if len(key) > 1 else ""
            raise ConfigError(
                f"--options {option}: write stages.NAME.run.init_lr=1e-5, with a stage's name.{hint} {known}"
            )
