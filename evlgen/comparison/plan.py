"""What is compared with what: configurations, their stages, and the settings that are the same for all."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evlgen.common.errors import ConfigError
from evlgen.comparison.parsing import Amount, Axis, parse_shares
from evlgen.config.config import Config, find_config
from evlgen.config.consent import Consent, check_project
from evlgen.config.yaml_io import parse_options, read_yaml

DEFAULT_PARTS = 6  # evaluations in a budget, where nothing else is said
_QUICK_METRICS = "run.metrics=[bleu, rouge_l, cider]"  # METEOR and SPICE wait for Java at each evaluation
_OWN_RUNNERS = ("runner_base", "runner_iter", "runner_timed", None)
_LENGTHS = ("max_epoch", "max_iters", "max_seconds", "iters_per_inner_epoch", "seconds_per_inner_epoch")
_SAME = ("run.seed", "run.output_dir", "run.resume")  # set for each run


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is the same for all configurations.

    Args:
        budget: of each run, all its stages together; None: the length in each project file.
        evaluate_every: training between two evaluations; None: as the project files have it.
        seeds: a run of each configuration for each.
        split: what is evaluated on; None: the first configuration's validation split.
        samples: how many of it, evenly spread; None: all.
        stage_split: see `parse_shares`.
        options: changes to all configurations.
        plugins: modules or files that register parts.
    """

    budget: Amount | None
    evaluate_every: Amount | None = None
    seeds: tuple[int, ...] = (42,)
    split: str | None = None
    samples: int | None = None
    stage_split: str | None = None
    options: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, amounts as text."""
        values = dataclasses.asdict(self)
        for key in ("budget", "evaluate_every"):
            amount = getattr(self, key)
            values[key] = None if amount is None else str(amount)
        return values


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a project file.

    Args:
        cfg_path: the file.
        options: what is changed in it, but for seed, folder and the checkpoint it starts from.
        config: all of it, resolved, as plain values.
    """

    cfg_path: str
    options: tuple[str, ...]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What is trained under one name.

    Args:
        name: of its folder.
        label: in plots and tables.
        stages: one, or several of which each starts from the one before.
        value: of the swept key.
    """

    name: str
    label: str
    stages: tuple[Stage, ...]
    value: str | None = None


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A configuration as the command line has it."""

    label: str
    cfg_paths: list[str]
    options: list[str]
    value: str | None = None


def plan(
    settings: Settings,
    entries: Sequence[str] = (),
    cfg_path: str | None = None,
    axes: Sequence[Axis] = (),
    allow_downloads: bool | Consent = False,
) -> tuple[Settings, list[Configuration]]:
    """All configurations, read and checked.

    Args:
        entries: project files, ``first.yaml+second.yaml`` for two stages.
        cfg_path: in their place one file (or stages), which the product of ``axes`` changes.
        allow_downloads: see `check_project`.

    Returns:
        the settings with what they left open filled in, and the configurations.

    Raises:
        ConfigError: a file or value is wrong, budget and evaluation have different units, or two
            configurations are the same.
        CheckpointError: a file beside weights names addresses that may not be fetched.
    """
    if cfg_path is not None:
        found = _from_axes(cfg_path, axes)
    else:
        labels = _labels(entries)
        found = [_Entry(label, entry.split("+"), []) for label, entry in zip(labels, entries, strict=True)]
    settings = _filled_in(settings, found)
    names = _folder_names([entry.label for entry in found])
    configurations = [
        Configuration(name, entry.label, _stages(entry, settings, allow_downloads), entry.value)
        for name, entry in zip(names, found, strict=True)
    ]
    _check_different(configurations)
    return settings, configurations


def _from_axes(cfg_path: str, axes: Sequence[Axis]) -> list[_Entry]:
    keys = [axis.key for axis in axes]
    doubled = next((key for key in keys if keys.count(key) > 1), None)
    if doubled:
        raise ConfigError(f"--grid: {doubled} is an axis twice.")
    out = []
    for values in itertools.product(*(axis.values for axis in axes)):
        pairs = list(zip(axes, values, strict=True))
        label = ", ".join(axis.label(value) for axis, value in pairs)
        options = [axis.option(value) for axis, value in pairs]
        out.append(_Entry(label, cfg_path.split("+"), options, values[0] if len(axes) == 1 else None))
    return out


def _labels(entries: Sequence[str]) -> list[str]:
    """File names without their ends; with folders where that does not tell them apart."""
    short = [" + ".join(Path(path).stem for path in entry.split("+")) for entry in entries]
    longer = [
        " + ".join("/".join(Path(path).with_suffix("").parts[-2:]) for path in entry.split("+"))
        for entry in entries
    ]
    return [s if short.count(s) == 1 else one for s, one in zip(short, longer, strict=True)]


def _folder_names(labels: Sequence[str]) -> list[str]:
    names: list[str] = []
    for label in labels:
        base = re.sub(r"[^A-Za-z0-9._=]+", "-", label).strip("-.")[:80] or "run"
        name, number = base, 2
        while name.lower() in (other.lower() for other in names):
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _filled_in(settings: Settings, entries: Sequence[_Entry]) -> Settings:
    """Evaluation's unit checked, its interval and split chosen."""
    budget, every = settings.budget, settings.evaluate_every
    if every is not None and budget is not None and every.unit != budget.unit:
        raise ConfigError(
            f"--evaluate-every {every}: give it in the unit of --budget {budget}, so that all configurations "
            "are evaluated at the same places."
        )
    if every is None and budget is not None:
        every = budget.share(1 / DEFAULT_PARTS)
    split = settings.split
    if split is None:
        first = entries[0]
        options = [*settings.options, *first.options, *_length_options(first.cfg_paths[-1], settings, 1.0)]
        run = Config.load(first.cfg_paths[-1], options, settings.plugins).run
        splits = [*run.valid_splits, *run.test_splits]
        if not splits:
            raise ConfigError("run.valid_splits is empty: say with --split what to evaluate on.")
        split = splits[0]
    return dataclasses.replace(settings, evaluate_every=every, split=split)


def _stages(entry: _Entry, settings: Settings, allow_downloads: bool | Consent) -> tuple[Stage, ...]:
    shares = parse_shares(settings.stage_split if len(entry.cfg_paths) > 1 else None, len(entry.cfg_paths))
    stages = []
    for number, (path, share) in enumerate(zip(entry.cfg_paths, shares, strict=True), start=1):
        is_last = number == len(entry.cfg_paths)
        options = (
            *("run.log_freq=10", "run.tensorboard=false"),  # the report has the curves
            *settings.options,
            *entry.options,
            *_length_options(path, settings, share),
            *_evaluation_options(settings, is_last),
        )
        cfg = Config.load(path, options, settings.plugins)
        if cfg.stage is not None:
            raise ConfigError(f"{path} has stages, and runs of one stage are compared: give each a file.")
        check_project(cfg, allow_downloads)
        config = cfg.to_dict()
        if config["run"]["task"] == "captioning" and config["run"]["metrics"] is None:
            options = (_QUICK_METRICS, *options)
            config["run"]["metrics"] = Config.load(path, options, settings.plugins).run.metrics
        stages.append(Stage(path, options, config))
    return tuple(stages)


def _length_options(cfg_path: str, settings: Settings, share: float) -> list[str]:
    """The options that give a stage its share of the budget, in parts after which it is evaluated."""
    budget, every = settings.budget, settings.evaluate_every
    own = read_yaml(find_config(cfg_path)).get("run") or {}
    given = parse_options(settings.options).get("run") or {}
    both = [section for section in (own, given) if isinstance(section, Mapping)]
    runner = next((s["runner"] for s in reversed(both) if "runner" in s), None)
    if budget is None:
        if every is None:
            return []
        if every.unit == "s":
            raise ConfigError(f"--evaluate-every {every}: without --budget it is given in iterations.")
        return [f"run.iters_per_inner_epoch={every.value:.0f}"]
    if runner not in _OWN_RUNNERS and budget.unit == "s":
        raise ConfigError(
            f"run.runner is '{runner}' in {cfg_path}: a budget of seconds needs runner_timed. Give the "
            "budget in iterations."
        )
    lengths: dict[str, str] = dict.fromkeys(_LENGTHS, "null")
    if budget.unit == "s":
        lengths["max_seconds"] = repr(budget.share(share).value)
    else:
        lengths["max_iters"] = f"{budget.share(share).value:.0f}"
    if every is not None:
        key = "seconds_per_inner_epoch" if budget.unit == "s" else "iters_per_inner_epoch"
        lengths[key] = repr(every.value) if budget.unit == "s" else f"{every.value:.0f}"
    options = [f"run.{key}={value}" for key, value in lengths.items()]
    return [*options, "run.runner=null"] if runner in _OWN_RUNNERS else options


def _evaluation_options(settings: Settings, is_last: bool) -> list[str]:
    """Every run is scored on the same samples; a stage before the last only where its own file says so."""
    samples = "null" if settings.samples is None else str(settings.samples)
    options = [
        "run.evaluate=false",
        "run.test_splits=[]",
        f"run.max_eval_samples={samples}",
        "run.max_valid_samples=null",
        "run.keep_last=1",
    ]
    if is_last:
        options += [f"run.valid_splits=[{json.dumps(settings.split)}]", "run.valid_freq=1"]
    return options


def _check_different(configurations: Sequence[Configuration]) -> None:
    if not configurations:
        raise ConfigError("name the project files to compare, or one with --cfg-path and the --grid.")
    seen: dict[str, str] = {}
    for configuration in configurations:
        leaves = [
            [(key, value) for key, value in flattened(stage.config) if key not in _SAME]
            for stage in configuration.stages
        ]
        text = json.dumps(leaves, default=str)
        if text in seen:
            raise ConfigError(f"'{seen[text]}' and '{configuration.label}' are the same configuration.")
        seen[text] = configuration.label


# ---- what differs ----


def differing_keys(configurations: Sequence[Configuration]) -> list[dict[str, Any]]:
    """For each configuration, the keys whose values are not the same in all of them; a key that it does not
    have is left out. Of stages before the last, what differs from the last one."""
    flat = [dict(flattened(c.stages[-1].config)) for c in configurations]
    keys = [key for key in dict.fromkeys(k for one in flat for k in one) if key not in _SAME]
    absent = object()
    differing = [
        key for key in keys if any(one.get(key, absent) != flat[0].get(key, absent) for one in flat[1:])
    ]
    out = []
    for configuration, one in zip(configurations, flat, strict=True):
        own = {key: one[key] for key in differing if key in one}
        for number, stage in enumerate(configuration.stages[:-1], start=1):
            before = dict(flattened(stage.config))
            own |= {
                f"stage {number}: {key}": before.get(key)
                for key in dict.fromkeys([*before, *one])
                if key not in _SAME and before.get(key, absent) != one.get(key, absent)
            }
        out.append(own)
    return out


def flattened(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """(key path, value) of every leaf of nested mappings."""
    if isinstance(value, Mapping) and value:
        return [
            leaf
            for key, inner in value.items()
            for leaf in flattened(inner, f"{path}.{key}" if path else str(key))
        ]
    return [(path, list(value) if isinstance(value, tuple) else value)]
