"""Configuration: files and options in, one checked, frozen `Config` out.

Layers, the weakest first: ``configs/default.yaml``, the model type's YAML, each dataset's YAML, the project
file, ``--options``. Everything is checked before anything is built: structure before torch is even imported,
then names, then all sections with the parameters of what was named.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from evlgen.common.errors import ConfigError, did_you_mean
from evlgen.common.plugins import load_entry_points, load_plugins
from evlgen.common.registry import registry
from evlgen.common.safe_text import message_lines
from evlgen.config.checks import (
    ARCH_IS_REQUIRED,
    EnvConfig,
    check_datasets,
    check_model,
    check_run,
    check_structure,
    check_together,
)
from evlgen.config.dataset_config import DatasetConfig, FrozenDict, dataset_config, frozen
from evlgen.config.derived import drop_foreign_sources, fill_processors, real_path
from evlgen.config.lavis import (
    datasets_from_lavis,
    from_published,
    has_published_file,
    left_out_beta,
    own_names,
    run_from_lavis,
)
from evlgen.config.layers import (
    MODEL_PARTS,
    OPTIONS,
    Layer,
    Layers,
    builder_name,
    display,
    read_layer,
)
from evlgen.config.model_config import ArchitectureConfig
from evlgen.config.named_code import (
    check_named,
    comes_with_weights,
    modules_of_paths,
    not_imported_unasked,
)
from evlgen.config.run_config import RunConfig
from evlgen.config.schema import Problems, Registered, build_dataclass, check_section, instantiate, show
from evlgen.config.stages import Stage, layers_of_stage, stage_names
from evlgen.config.yaml_io import dump_yaml
from evlgen.files.io import PACKAGE_ROOT, near_name, write_atomically

logger = logging.getLogger(__name__)

DEFAULTS = PACKAGE_ROOT / "configs" / "default.yaml"


@dataclass(frozen=True)
class Config:
    """A checked configuration, with what follows from other keys filled in. It does not change.

    Attributes:
        model: the ``model`` section: its architecture's dataclass (`BaseModel.CONFIG`).
        datasets: name -> section: its builder's dataclass (`BaseDatasetBuilder.CONFIG`).
        run: the ``run`` section.
        env: the ``env`` section.
        plugins: the plugins loaded, files as absolute paths.
        cfg_path: the project file, None where there was none.
        layers: where each key came from.
        sections: the ``datasets`` section as it is written: what is left out has its builder's default.
        stage: which stage of the file it is, None where the file has none.
    """

    model: ArchitectureConfig
    datasets: Mapping[str, DatasetConfig]
    run: RunConfig
    env: EnvConfig
    plugins: tuple[str, ...]
    cfg_path: Path | None
    layers: Layers = field(repr=False, compare=False)
    sections: Mapping[str, Any] = field(repr=False, compare=False)
    stage: Stage | None = None

    @classmethod
    def load(
        cls,
        cfg_path: str | os.PathLike | None,
        options: Sequence[str] = (),
        plugins: Sequence[str] = (),
        stage: str | None = None,
    ) -> Config:
        """Reads, layers and checks a project file.

        Args:
            cfg_path: the project file, looked up as `find_config` says; None: only defaults and options.
            options: ``key.path=value``, the value in YAML; they win over everything.
            plugins: modules or ``.py`` files to import besides the file's own ``plugins``.
            stage: which of the file's ``stages``; None: the last one, where it has any.

        Raises:
            ConfigError: the file is not there, or there are problems in it: one line for each, with the key's
                path, the file it came from, and the nearest valid key.
            EVLGenError: a plugin failed.
        """
        path = find_config(cfg_path) if cfg_path is not None else None
        defaults = read_layer(DEFAULTS)
        of_stage, this_stage = layers_of_stage(read_layer(path) if path else None, options, stage)
        own = Layers(of_stage)
        layers = Layers([defaults, *own.layers])
        published = has_published_file(own.layers)
        early = _early_problems(layers, published)
        load_entry_points()
        loaded = _load_named_code(layers, path, plugins)
        arch, beta_problem = own.get("model.arch"), left_out_beta(own.layers)
        translated, ignored = from_published(own.layers)
        own = Layers(translated)
        if published or len(early):
            _check_names(own)
        layers = Layers([defaults, *_with_dataset_defaults(_with_model_type(own)).layers])
        merged = layers.merged()
        merged["datasets"], of_datasets = datasets_from_lavis(merged.get("datasets", {}), arch)
        ignored += [*of_datasets, *(f"run.{key}" for key in run_from_lavis(merged.get("run", {}))[1])]
        problems = Problems(layers.source)
        model_values = check_model(merged.get("model", {}), problems)
        datasets = check_datasets(merged.get("datasets", {}), problems)
        env = check_section(merged.get("env"), EnvConfig, "env", problems=problems)
        run = check_run(merged.get("run", {}), problems, list(datasets))
        check_together(model_values, run, problems)
        if beta_problem:
            problems.add("model.beta", beta_problem)
        early.extend(problems)
        early.raise_any()
        layers.log_left_out()
        assert run is not None  # else there is a problem
        if this_stage is not None:
            run = dataclasses.replace(run, output_dir=os.path.join(run.output_dir, this_stage.name))
        _warn_of(ignored)
        if model_values.get("checkpoint"):
            model_values["checkpoint"] = real_path(model_values["checkpoint"])
        model_class = registry.get_model_class(model_values["arch"])
        model = instantiate(model_class.CONFIG, model_values)
        fill_processors(datasets, model_class.processor_defaults(model))
        drop_foreign_sources(datasets, layers)
        typed = {
            name: dataset_config(registry.get_builder_class(builder_name(name, section)), section, name)
            for name, section in datasets.items()
        }
        return cls(
            model=frozen(model),
            datasets=FrozenDict(typed),
            run=frozen(run),
            env=EnvConfig(**env),
            plugins=tuple(loaded),
            cfg_path=path,
            layers=layers,
            sections=datasets,
            stage=this_stage,
        )

    def source(self, key_path: str) -> str:
        """The file (or ``--options``) a key such as ``model.connector.r`` came from; "" if built in."""
        return self.layers.source(key_path)

    def is_built_in(self, key_path: str) -> bool:
        """Whether a key has the value that a type's or a dataset's own defaults give it."""
        return self.layers.is_built_in(key_path)

    def resuming(self) -> Config:
        """This configuration, of a run that goes on from its latest checkpoint."""
        return dataclasses.replace(self, run=dataclasses.replace(self.run, resume="auto"))

    def starting_from(self, checkpoint: str) -> Config:
        """This configuration, of a run that starts from these weights."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, checkpoint=checkpoint))

    def model_plain(self) -> dict[str, Any]:
        """The ``model`` section as plain dicts and lists."""
        return dataclasses.asdict(self.model)

    def datasets_plain(self) -> dict[str, dict[str, Any]]:
        """The ``datasets`` section as plain dicts and lists."""
        return copy.deepcopy(dict(self.sections))

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain dicts and lists."""
        return {
            "plugins": list(self.plugins),
            "env": dataclasses.asdict(self.env),
            "model": self.model_plain(),
            "datasets": self.datasets_plain(),
            "run": dataclasses.asdict(self.run),
        }

    def to_yaml(self) -> str:
        """The whole configuration as text that `load` reads back as the same one."""
        return dump_yaml(self.to_dict())

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_yaml` to a file."""
        write_atomically(path, self.to_yaml())


def load_stages(
    cfg_path: str | os.PathLike, options: Sequence[str] = (), plugins: Sequence[str] = ()
) -> list[Config]:
    """As `Config.load`, all stages of a project file; one configuration where it has none.

    Raises:
        ConfigError: as there, the problems of all stages; and see `check_sequence`.
    """
    names = stage_names(read_layer(find_config(cfg_path)))
    if not names:
        return [Config.load(cfg_path, options, plugins)]
    found, problems = [], []
    for name in names:
        try:
            found.append(Config.load(cfg_path, options, plugins, name))
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError(message_lines(dict.fromkeys(problems)))
    check_sequence(found)
    return found


def check_sequence(configs: Sequence[Config]) -> None:
    """What stages, each right in itself, cannot be one after the other: a later one reads the weights of an
    earlier one, and its checkpoints hold what it trains alone.

    Raises:
        ConfigError: names the stages and the keys.
    """
    for place, cfg in enumerate(configs):
        problems, stage = Problems(cfg.source), cfg.stage
        if stage is None:
            continue
        if cfg.run.evaluate:
            problems.add("run.evaluate", f"stage '{stage.name}' trains: set it to false")
        if cfg.run.resume not in (None, "auto"):
            problems.add("run.resume", "with stages it is auto, which finds the stage to go on with, or null")
        for before in () if stage.has_own_start else configs[:place]:
            for key, message in _unlike(before.model_plain(), cfg.model_plain()):
                assert before.stage is not None
                where = f"in stage '{before.stage.name}', whose weights '{stage.name}' starts from"
                problems.add(f"model.{key}", f"{message} {where}")
        problems.raise_any()


def _unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of the ``model`` section that keep the weights of a stage from a later one, and why."""
    for part in ("vision", "connector", "language"):
        old, new = before.get(part) or {}, now.get(part) or {}
        if old.get("name") != new.get("name"):
            yield f"{part}.name", f"is {show(new.get('name'))}, and it is {show(old.get('name'))}"
        if part != "connector" and old.get("freeze") is False and new.get("freeze") is not False:
            yield f"{part}.freeze", "must be false: it is trained"
        if old.get("lora") and old["lora"] != new.get("lora"):
            yield f"{part}.lora", f"must be {show(old['lora'])}, as it is"


def find_config(path: str | os.PathLike) -> Path:
    """A YAML file: as given (from the working folder), then inside the package.

    Raises:
        ConfigError: it is in neither place; names both, and packaged project files with a name like it.
    """
    given = Path(os.path.expanduser(path))
    places = [given.absolute(), PACKAGE_ROOT / given]
    for place in places:
        if os.path.isfile(place):
            return place
    packaged = [
        p.relative_to(PACKAGE_ROOT).as_posix() for p in sorted(PACKAGE_ROOT.glob("projects/**/*.yaml"))
    ]
    looked = " nor at ".join(dict.fromkeys(map(str, places)))
    hint = near_name(given) or did_you_mean(str(path), packaged)
    raise ConfigError(f"there is no YAML file at {looked}.{hint}")


def load_model_config(
    arch: str, model_type: str | None = None, overrides: Mapping[str, Any] | None = None
) -> DictConfig:
    """The ``model`` section of a registered model's type, checked.

    Args:
        arch: a registered model; or a published name, which means what it means in a file.
        model_type: one of its types; None: its default type.
        overrides: keys of the section that win over the type's, nested as in YAML.

    Raises:
        RegistryError: there is no such architecture.
        ConfigError: there is no such type, or the overrides do not fit.
    """
    load_entry_points()
    cls = registry.get_model_class(own_names(arch, None)[0])
    if model_type is None:
        model_type = cls.DEFAULT_MODEL_TYPE
    section = {**(overrides or {}), "arch": arch, "model_type": model_type}
    return _model_section(Layers([Layer("overrides", {"model": section})]))


def load_dataset_config(
    name: str, path: str | os.PathLike | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section of a registered dataset, checked: its own YAML, and over it that of a file.

    Args:
        name: a registered dataset, or what a file calls it.
        path: a file whose ``datasets`` section has one of this name, or only one.

    Returns:
        The section, and what the file itself says.

    Raises:
        RegistryError: there is no such dataset.
        ConfigError: no such file, no such section, or problems in it.
    """
    load_entry_points()
    layer = Layer("", {})
    section: dict[str, Any] = {}
    if path is not None:
        layer = read_layer(find_config(path))
        sections = layer.content.get("datasets")
        if not isinstance(sections, Mapping) or (name not in sections and len(sections) != 1):
            raise ConfigError(f"{layer.source} has no `{name}` under `datasets:`.")
        section = sections.get(name, next(iter(sections.values()))) or {}
    registry.get_builder_class(builder_name(name, section))
    layers = _with_dataset_defaults(Layers([Layer(layer.source, {"datasets": {name: section}})]))
    problems = Problems(layers.source)
    values = check_datasets(datasets_from_lavis(layers.merged()["datasets"])[0], problems)
    problems.raise_any()
    layers.log_left_out()
    return values[name], dict(section)


def defaults_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``model`` and ``datasets`` sections where only the architecture, its type and datasets are named.

    Args:
        config: plain values, as a saved configuration has them.

    Raises:
        RegistryError, ConfigError: a part of it is not here.
    """
    load_entry_points()
    model = {key: value for key, value in config["model"].items() if key in ("arch", "model_type") and value}
    named = {}
    for name, section in config["datasets"].items():
        builder = builder_name(name, section)
        named[name] = {} if builder == name else {"builder": builder}
    layers = _with_model_type(Layers([Layer("", {"model": model, "datasets": named})]))
    merged = _with_dataset_defaults(layers).merged()
    cls = registry.get_model_class(model["arch"])
    built = build_dataclass(cls.CONFIG, merged["model"], "model")
    fill_processors(merged["datasets"], cls.processor_defaults(built))
    return {"model": dataclasses.asdict(built), "datasets": merged["datasets"]}


def load_model_file(path: str | os.PathLike) -> DictConfig:
    """The ``model`` section of a YAML file, checked, its relative paths looked up beside the file.

    What the file leaves out comes from its ``model_type``; or from the architecture's default type, where
    the file does not name all three parts itself. It may come from somebody else, with weights: only its
    ``model`` section is read, and no plugin of it is imported.

    Raises:
        ConfigError: no such file, no ``model`` section, or problems in it.
    """
    return load_model_layers([read_layer(find_config(path))])


def load_model_layers(layers: Sequence[Layer]) -> DictConfig:
    """As `load_model_file`, of layers, the weakest first. The first one is the file."""
    if not isinstance(layers[0].content.get("model"), Mapping):
        raise ConfigError(f"{layers[0].source} has no `model:` section.")
    load_entry_points()
    sections = [Layer(layer.source, {"model": layer.content.get("model")}) for layer in layers]
    return _model_section(Layers(sections))


def _model_section(layers: Layers) -> DictConfig:
    translated, ignored = from_published(layers.layers, is_project=False)
    layers = _with_model_type(Layers(translated))
    _warn_of(ignored)
    problems = Problems(layers.source)
    values = check_model(layers.merged()["model"], problems)
    problems.raise_any()
    layers.log_left_out()
    return OmegaConf.create(values)


def _warn_of(ignored: Sequence[str]) -> None:
    """One warning that names the published keys that have no effect here."""
    if not ignored:
        return
    launched = any(path in ("run.device", "run.world_size", "run.distributed") for path in ignored)
    why = "; devices and processes come from how the command is started" if launched else ""
    logger.warning("%s: without effect here%s", ", ".join(ignored), why)


def _early_problems(layers: Layers, published: bool) -> Problems:
    """What can be said without importing models, datasets and tasks: keys and types of ``run``. In a
    published file they may belong to a task that is not here, and wait.

    Raises:
        ConfigError: the sections are wrong, or the file is empty.
    """
    problems = Problems(layers.source, check_names=False)
    check_structure(layers, problems)
    problems.raise_any()
    try:
        merged = layers.merged()
    except ConfigError:
        return problems  # a reference may lead to a key of a layer that is not there yet
    check_section(merged.get("env"), EnvConfig, "env", problems=problems)
    if not published:
        check_run(merged.get("run", {}), problems)
    if "arch" not in merged.get("model", {}):
        empty = [layer.source for layer in layers.layers if not layer.content and layer.source != OPTIONS]
        problems.add("model.arch", f"{ARCH_IS_REQUIRED}; {empty[0]} is empty" if empty else ARCH_IS_REQUIRED)
        if empty:
            problems.raise_any()
    return problems


def _check_names(layers: Layers) -> None:
    """Raises `ConfigError` for an architecture or a task that is not here: what else is unknown in the file
    belongs to it."""
    problems = Problems(layers.source)
    for key, kind in (("model.arch", "model"), ("run.task", "task")):
        problem = Registered(kind).problem(layers.get(key)) if layers.has(key) else None
        if problem:
            problems.add(key, problem)
    problems.raise_any()


def _load_named_code(layers: Layers, path: Path | None, plugins: Sequence[str]) -> list[str]:
    """Imports the plugins of a file and its options, those of ``plugins``, and the modules of parts that are
    named by their paths. Returns the names, files as absolute paths.

    Raises:
        EVLGenError: one failed; or the file came with weights, and the user has not named it.
    """
    asked_for, in_file = list(plugins), list[str]()
    listed = layers.get("plugins") or []
    (asked_for if layers.source("plugins") == OPTIONS else in_file).extend(listed)
    for layer in layers.layers:
        named = modules_of_paths([layer.content])
        (asked_for if layer.source == OPTIONS else in_file).extend(named)
    base = path.parent if path else None
    if path is not None and comes_with_weights(path):
        base = None  # the user's ./part.py is his own, not a file beside the weights
        load_plugins(asked_for)
        withheld = not_imported_unasked(in_file, path)
        check_named(withheld, display(path))
        in_file = [name for name in in_file if name not in withheld]
    return load_plugins([*in_file, *asked_for], base)


def _with_model_type(layers: Layers) -> Layers:
    """The layers with the model type's YAML below the project file. Wrong names are left to `check_model`."""
    arch = layers.get("model.arch")
    if not registry.has("model", arch):
        return layers
    cls = registry.get_model_class(arch)
    model_type = _model_type(layers, cls)
    if not isinstance(model_type, str) or model_type not in cls.MODEL_TYPES:
        return layers
    layer = _default_layer(cls.MODEL_TYPES[model_type], f"type '{model_type}' of {arch}", "model")
    layer.content["model"].update(arch=arch, model_type=model_type)
    return Layers([layer, *layers.layers])


def _model_type(layers: Layers, cls: Any) -> str | None:
    """The named type, else the default type; none where the section names all its parts and stands alone."""
    if layers.has("model.model_type"):
        return layers.get("model.model_type")
    if all(layers.has(f"model.{part}.name") for part in MODEL_PARTS):
        return None
    return cls.DEFAULT_MODEL_TYPE


def _with_dataset_defaults(layers: Layers) -> Layers:
    defaults = []
    sections = layers.get("datasets") or {}
    for name in layers.section_names("datasets"):
        builder = builder_name(name, sections.get(name))
        if not registry.has("builder", builder):
            continue
        path = getattr(registry.get_builder_class(builder), "DEFAULT_CONFIG", None)
        if path is None:
            continue
        layer = _default_layer(path, f"dataset '{builder}'", "datasets")
        if builder not in layer.content["datasets"]:
            raise ConfigError(
                f"{layer.source}, the defaults of '{builder}', has no `{builder}` under `datasets:`."
            )
        layer.content["datasets"] = {name: layer.content["datasets"][builder]}
        defaults.append(layer)
    return Layers([*defaults, *layers.layers])


def _default_layer(path: str, what: str, section: str) -> Layer:
    """The YAML file of a type's or a dataset's defaults: one top-level section."""
    file = PACKAGE_ROOT / path
    if not file.is_file():
        raise ConfigError(f"the defaults of {what} are not at {file}.")
    layer = dataclasses.replace(read_layer(file), is_built_in=True)
    if set(layer.content) != {section} or not isinstance(layer.content[section], Mapping):
        raise ConfigError(f"{layer.source}, the defaults of {what}, must have one section, `{section}:`.")
    return layer


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], ignored: Iterable[str] = ()) -> list[str]:
    """A line for each key path whose value differs between two plain configurations, but for ``ignored``."""
    before, now = dict(_leaves(old)), dict(_leaves(new))
    paths = [p for p in sorted({*before, *now}) if p not in set(ignored)]
    return [
        f"{path} was {_shown(before, path)}, is {_shown(now, path)}"
        for path in paths
        if before.get(path, _ABSENT) != now.get(path, _ABSENT)
    ]


def flat_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain configuration as key path -> value."""
    return dict(_leaves(config))


_ABSENT = object()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _shown(values: Mapping[str, Any], path: str) -> str:
    return repr(values[path]) if path in values else "not set"
