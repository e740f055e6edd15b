"""What a run left on disk, read for its page. Nothing of it is executed: its plugins are not loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from evlgen.common.errors import DataError, EVLGenError
from evlgen.config.checks import EnvConfig
from evlgen.config.config import defaults_of, flat_keys
from evlgen.config.machine import MACHINE_FILE
from evlgen.config.run_config import RunConfig
from evlgen.config.yaml_io import read_yaml
from evlgen.report.metrics import image_use_of, metric_names, metrics_of
from evlgen.runners.facts import FACTS_FILE, read_facts
from evlgen.runners.sample_captions import SAMPLES_FILE

_MOST_LINES = 2_000_000  # of a log: a page shows a few hundred points of it


class RunFolder:
    """A run's folder: ``output/.../latest``, or what such a link points at.

    Raises:
        DataError: it is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        if not (self.path / "config.yaml").is_file():
            inner = self.path / "latest"
            if not (inner / "config.yaml").is_file():
                raise DataError(
                    f"{path} is not a run's folder: it has no config.yaml. Name a folder that training "
                    "wrote, such as output/shapes/latest."
                )
            self.path = inner.resolve()
        self.config: dict[str, Any] = read_yaml(self.path / "config.yaml")
        self.facts, self.machine = (read_facts(self.path / name) for name in (FACTS_FILE, MACHINE_FILE))

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The lines of ``log.jsonl``."""
        return [
            r
            for r in self._lines("log.jsonl")
            if isinstance(r.get("iteration"), int | None)
            and (r.get("type") != "train" or r.get("iteration") is not None)
            and (r.get("type") != "evaluation" or {"split", "label"} <= r.keys())
        ]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Those of training."""
        return [r for r in self.records if r.get("type") == "train"]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Those of validation."""
        return [r for r in self.records if r.get("type") == "evaluation" and r.get("label")]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Of each split the latest evaluation, tests included."""
        latest = {(r["split"], bool(r["label"])): r for r in self.records if r.get("type") == "evaluation"}
        return list(latest.values())

    @property
    def splits(self) -> list[str]:
        """Those validated, in the order of the log."""
        return list(dict.fromkeys(r["split"] for r in self.validations))

    def points(self, split: str) -> list[dict[str, Any]]:
        """A split's validations: ``iteration``, ``seconds`` and ``samples`` of training, metrics and the use
        of the images."""
        return [
            {
                "iteration": r["iteration"],
                "seconds": r.get("trained_seconds", 0.0),
                "samples": r.get("trained_samples", 0),
                **metrics_of(r),
                **image_use_of(r),
            }
            for r in self.validations
            if r["split"] == split
        ]

    @property
    def metrics(self) -> list[str]:
        """The metrics of its evaluations, the preferred ones first."""
        return metric_names([r for r in self.records if r.get("type") == "evaluation"])

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of ``samples.jsonl``; see `SampleCaptions`."""
        return [
            r for r in self._lines(SAMPLES_FILE) if {"split", "label", "iteration", "samples"} <= r.keys()
        ]

    @cached_property
    def skipped(self) -> list[dict[str, Any]]:
        """The lines of ``skipped.jsonl``."""
        return self._lines("skipped.jsonl")

    def skipped_by_cause(self) -> list[tuple[str, int, str]]:
        """Cause, number of samples that ``skipped.jsonl`` names, and the reason of one, the commonest
        first."""
        counts = Counter(str(r.get("cause")) for r in self.skipped)
        examples = {str(r.get("cause")): f"{r.get('id')}: {r.get('reason')}" for r in reversed(self.skipped)}
        return [(cause, count, examples[cause]) for cause, count in counts.most_common()]

    def anomalies(self) -> dict[str, int]:
        """How many steps ``spikes.jsonl`` and ``not_finite.jsonl`` list."""
        return {name: len(self._lines(f"{name}.jsonl")) for name in ("spikes", "not_finite")}

    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Key path -> value and default, where the configuration differs from the defaults of its model type
        and datasets."""
        default = self._defaults()
        own = flat_keys({k: v for k, v in self.config.items() if k != "plugins"})
        return {
            key: (value, default.get(key))
            for key, value in own.items()
            if key not in default or default[key] != value
        }

    def _defaults(self) -> dict[str, Any]:
        found = {"run": dataclasses.asdict(RunConfig(max_epoch=1))}
        found["run"] |= {"max_epoch": None, "runner": None}
        found["env"] = dataclasses.asdict(EnvConfig())
        sections = {name: self.config.get(name) or {} for name in ("model", "datasets")}
        with contextlib.suppress(EVLGenError, OSError):  # parts of a plugin: all that is set is shown
            found |= defaults_of(sections)
        return flat_keys(found)

    def _lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file of JSON; none where it is missing."""
        out = []
        try:
            with open(self.path / name, encoding="utf-8", errors="replace") as file:
                for _, line in zip(range(_MOST_LINES), file, strict=False):
                    try:
                        record = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(record, dict):
                        out.append(record)
        except FileNotFoundError:
            pass
        return out
