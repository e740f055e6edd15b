"""``python -m evlgen data check``."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from evlgen.commands.arguments import add_run_arguments, allow_downloads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from evlgen.batch import Batch
    from evlgen.config.config import Config
    from evlgen.data_check import SplitReport
    from evlgen.datasets.base_builder import BaseDatasetBuilder
    from evlgen.models.text_lengths import TextLength, TextLengths, WordLengths
    from evlgen.tasks.base_task import BaseTask

HELP = "read every sample of a project's datasets: counts, what is broken, text lengths, contact sheets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="splits to look at; otherwise all that are here"
    )
    parser.add_argument("--num-workers", type=int, help="processes that read; otherwise run.num_workers")
    parser.add_argument(
        "--to", metavar="DIR", help="folder of the report; otherwise `check` below run.output_dir"
    )


def run(args: argparse.Namespace) -> int:
    from evlgen.config.config import load_stages
    from evlgen.config.consent import check_project

    stages = load_stages(args.cfg_path, args.options, args.plugins)
    for cfg in stages:
        check_project(cfg, allow_downloads(args))
    return max(_check(cfg, args) for cfg in stages)


def _check(cfg: Config, args: argparse.Namespace) -> int:
    """Looks at the datasets of a configuration. Returns the exit code."""
    from evlgen.assemble import ready_builders
    from evlgen.common.safe_text import printable
    from evlgen.data_check import find_shared, format_counts, write_skipped
    from evlgen.files.io import write_atomically

    builders = ready_builders(cfg)
    to = os.path.join(args.to, cfg.stage.name) if args.to and cfg.stage else args.to
    folder = Path(os.path.expanduser(to or os.path.join(cfg.run.output_dir, "check")))
    workers = cfg.run.num_workers if args.num_workers is None else args.num_workers
    lengths, task = _lengths(cfg), _task(cfg)
    reports = []
    for name, split in _wanted(builders, args.splits):
        measure = partial(_measured, lengths, task, split)
        report, sheet = _look_at(builders[name], split, measure, workers, cfg.run.seed, folder)
        reports.append(report)
        print("\n".join(format_counts(report, _limits(lengths, report), lengths.UNIT)), flush=True)
        if sheet is not None:
            print(printable(f"  some of them: {sheet}"), flush=True)
    for line in find_shared(reports):
        print(line)
    for line in _without_images(builders, reports, task):
        print(printable(line))
    write_skipped(reports, folder / "skipped.jsonl")
    content = {report.name: report.to_json(_limits(lengths, report), lengths.UNIT) for report in reports}
    write_atomically(folder / "report.json", json.dumps(content, indent=1))
    print(printable(f"report: {folder / 'report.json'}; broken samples: {folder / 'skipped.jsonl'}"))
    from evlgen.runners.skipped import SkippedSamples

    too_many = [r for r in reports if r.error is None and r.broken_share > cfg.run.max_skipped_share]
    for report in too_many:
        print(
            f"{printable(report.name)}: {report.broken_share:.1%} are broken, more than "
            f"run.max_skipped_share ({cfg.run.max_skipped_share:.1%}) allows: a run stops for that once it "
            f"has read {SkippedSamples.MIN_SEEN} samples"
        )
    return 1 if too_many or any(report.error is not None for report in reports) else 0


def _without_images(builders: dict, reports: Sequence[SplitReport], task: BaseTask) -> Iterator[str]:
    """For each split of questions that a run scores: what guessing from its training questions is worth."""
    from evlgen.datasets.question_dataset import QuestionMediaDataset
    from evlgen.tasks.metrics.blind_answers import blind_answers
    from evlgen.tasks.question_answering import QuestionAnsweringTask

    readable = {report.name for report in reports if report.error is None}
    if not isinstance(task, QuestionAnsweringTask):
        return
    for name, builder in builders.items():
        splits = [split for split in builder.splits if f"{name}/{split}" in readable]
        read = {split: builder.get_split(split) for split in splits}
        questions = {split: d for split, d in read.items() if isinstance(d, QuestionMediaDataset)}
        if (train := questions.pop("train", None)) is None:
            continue
        for split, dataset in questions.items():
            guesses = blind_answers(train.questions_with_answers(), dataset.questions())
            scores = []
            for rule, answers in guesses.items():
                found = [{"question_id": key, "answer": answer} for key, answer in answers.items()]
                metrics, _ = task.score(found, dataset)
                scores += [f"{metrics['agg_metrics']:.1f} by {rule}"] if metrics else []
            if scores:
                what = "without looking, train's most frequent answer gets"
                yield f"{name}/{split}: {what} {', '.join(scores)}"


def _limits(lengths: TextLengths | WordLengths, report: SplitReport) -> dict[str, int]:
    """The model's limits on the texts of a split."""
    return lengths.turn_limits if report.turns else lengths.limits


def _look_at(
    builder: BaseDatasetBuilder, split: str, measure: Callable, num_workers: int, seed: int, folder: Path
) -> tuple[SplitReport, Path | None]:
    """The report of a split, and its contact sheet where there is one. What keeps the split from being read
    is noted in the report."""
    from evlgen.common.errors import EVLGenError
    from evlgen.data_check import SplitReport, check_split, write_sheet
    from evlgen.datasets.stream import StreamDataset

    name = f"{builder.name}/{split}"
    try:
        dataset = builder.get_split(split)
        if isinstance(dataset, StreamDataset):
            dataset = dataset.listed()
        report = check_split(name, dataset, measure, num_workers, seed)
        sheet = folder / f"{builder.name}_{split}.png"
        return report, sheet if write_sheet(report, dataset, sheet) else None
    except EVLGenError as error:
        return SplitReport(name, 0, error=str(error)), None


def _wanted(builders: dict, splits: list[str] | None) -> list[tuple[str, str]]:
    """(dataset, split) pairs to look at: those named, or all whose files are here. What is left out is said.

    Raises:
        ConfigError: no dataset has a split that was named.
        DataError: nothing is here.
    """
    from evlgen.common.errors import ConfigError, DataError, did_you_mean
    from evlgen.common.safe_text import message_lines, printable

    known = sorted({split for builder in builders.values() for split in builder.splits})
    for split in splits or ():
        if split not in known:
            raise ConfigError(
                f"--splits: no dataset has a split '{split}'.{did_you_mean(split, known)} Splits: "
                f"{', '.join(known)}."
            )
    wanted, missing = [], []
    for name, builder in builders.items():
        for split in builder.splits:
            if splits and split not in splits:
                continue
            lines = builder.missing([split])
            missing += lines
            wanted += [] if lines else [(name, split)]
    missing = list(dict.fromkeys(missing))
    if not wanted or (splits and missing):
        title = "this data is not on this machine:"
        raise DataError(message_lines([title, *(f"  - {line}" for line in missing)]))
    for line in missing:
        print(printable(f"not looked at: {line}"))
    return wanted


def _task(cfg: Config) -> BaseTask:
    """The run's task, which puts prompts around texts. It scores nothing here."""
    import dataclasses

    from evlgen.common.registry import registry

    run = dataclasses.replace(cfg.run, apply_lemmatizer=False)
    return registry.get_task_class(run.task)(run)


def _lengths(cfg: Config) -> TextLengths | WordLengths:
    """What measures texts: the model's tokenizer with the model's limits where it is here, else in words."""
    from evlgen.common.registry import registry
    from evlgen.models.text_lengths import WordLengths

    model_class = registry.get_model_class(cfg.model.arch)
    found = model_class.text_lengths(cfg.model)
    if found is None:
        print("texts are counted in words: the model's tokenizer is not on this machine")
    return found or WordLengths()


def _measured(
    lengths: TextLengths | WordLengths, task: BaseTask, split: str, texts: Mapping[str, Any]
) -> Sequence[TextLength]:
    """How long a sample's texts are as the task gives them to the model."""
    from evlgen.datasets.base_builder import role_of

    if "messages" in texts:
        learns = role_of(split) == "train"
        return [lengths.of_turns(texts["messages"], texts.get("image_shapes", []), learns)]
    if "text_input" not in texts:
        return []
    batch = cast("Batch", {key: [value] for key, value in texts.items()})
    if role_of(split) == "train":
        batch = task.to_learn(batch)
        return lengths.learned(batch["text_input"], batch.get("text_output"))
    return lengths.asked(task.prompts(batch))
