"""Walking over a dataset before a run: what is there, what is broken, how long the texts are."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from evlgen.common.errors import DataError
from evlgen.common.safe_text import message, printable
from evlgen.datasets.base_dataset import (
    BadRecord,
    BaseDataset,
    CollatedDataset,
    SequenceDataset,
    Skipped,
    image_to_show,
)
from evlgen.files.io import atomic_file
from evlgen.loaders.data import eval_loader, evenly_spread, seeded, workers_named
from evlgen.models.text_lengths import TextLength

SHOWN = 16  # images on a contact sheet
TEXT_KEYS = ("text_input", "text_output")
# what texts are made of
_MEASURED_KEYS = (*TEXT_KEYS, "answers", "weights", "choices", "ocr_tokens", "messages")


class _Walked(NamedTuple):
    """What a walk keeps of a sample that could be read."""

    index: int  # type: ignore[assignment]  # not that of tuples
    texts: dict[str, Any]  # by key of the sample


@dataclass
class SplitReport:
    """What a walk over one split of a dataset found.

    Attributes:
        name: ``coco_caption/train``.
        num_samples: all samples, broken ones too.
        num_visuals: distinct images or videos among them; None where the dataset does not tell.
        num_references: texts to score against, of all images or questions.
        skipped: the broken samples.
        lengths: of each text, as the model is given it.
        error: why the split could not be looked at, or not to its end; None otherwise.
        shared: images or videos that are in another checked split too, by that split's name.
        turns: how many each conversation has.
        images: how many images and videos each conversation has.
    """

    name: str
    num_samples: int
    num_visuals: int | None = None
    num_references: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    lengths: list[TextLength] = field(default_factory=list)
    error: str | None = None
    shared: dict[str, int] = field(default_factory=dict)
    turns: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    visuals: set[Hashable] = field(default_factory=set, repr=False)
    readable: list[int] = field(default_factory=list, repr=False)

    @property
    def causes(self) -> Counter[str]:
        """How many samples are broken, by cause."""
        return Counter(sample.cause for sample in self.skipped)

    @property
    def images_by_number(self) -> dict[int, int]:
        """How many conversations have no image, one, two, and so on."""
        return dict(sorted(Counter(self.images).items()))

    @property
    def broken_share(self) -> float:
        """Of the samples, or, where that is more, of the shards they are in."""
        lost = sum(sample.lost_share for sample in self.skipped)
        return max(len(self.skipped) / self.num_samples, lost)

    @property
    def counts(self) -> dict[str, list[int]]:
        """How long texts are: what is read before, and what is learned; where there is any."""
        counts = {key: [getattr(length, key) for length in self.lengths] for key in ("read", "learned")}
        return {key: found for key, found in counts.items() if any(found)}

    @property
    def num_cut(self) -> int:
        """Texts of which the model's limits cut something off."""
        return sum(length.is_cut for length in self.lengths)

    @property
    def num_lost(self) -> int:
        """Texts of which those limits leave nothing to learn."""
        return sum(length.is_lost for length in self.lengths)

    def to_json(self, limits: Mapping[str, int], unit: str) -> dict[str, Any]:
        """The report as it is written down.

        Args:
            limits: of the model, by their keys; none where they could not be compared with.
            unit: ``tokens``, or ``words`` where the tokenizer is not on this machine.
        """
        if self.error is not None:
            return {"error": self.error}
        cut = {"cut_off": self.num_cut, "nothing_left": self.num_lost, "limits": dict(limits)}
        return {
            "samples": self.num_samples,
            "distinct_visuals": self.num_visuals,
            "references": self.num_references,
            "broken": dict(self.causes.most_common()),
            "shared_with": self.shared,
            "texts": len(self.lengths),
            unit: {key: _lengths(counts) for key, counts in self.counts.items()},
            **(cut if limits else {}),
            **({"turns": _lengths(self.turns), "images": self.images_by_number} if self.turns else {}),
        }


def check_split(
    name: str,
    dataset: BaseDataset,
    measure: Callable[[dict[str, Any]], Sequence[TextLength]],
    num_workers: int,
    seed: int = 42,
) -> SplitReport:
    """Reads every sample of a dataset as training or evaluation would.

    Args:
        name: what reports call it.
        measure: what a sample has of texts, by key -> how long those are that the model is given.
        num_workers: processes that read; 0: this one.
        seed: of the transforms' random choices.
    """
    report = SplitReport(name, len(dataset))
    loader = eval_loader(_Summaries(dataset), 8, num_workers, pin_memory=False)
    bar = tqdm(total=len(dataset), desc=printable(name), unit="sample", disable=None, leave=False)
    with workers_named(), seeded(seed), bar:
        for batch in loader:
            for found in batch:
                _note(report, found, measure)
            bar.update(len(batch))
    report.visuals = _visuals(dataset)
    report.num_visuals = len(report.visuals) or None
    known = [*dataset.references().values(), *dataset.answers().values()]
    report.num_references = sum(map(len, known))
    return report


def find_shared(reports: Sequence[SplitReport]) -> Iterator[str]:
    """Notes in each report how many of its images or videos are in the others too; a line for each pair."""
    for one, other in itertools.combinations(reports, 2):
        if common := len(one.visuals & other.visuals):
            one.shared[other.name] = other.shared[one.name] = common
            yield printable(f"{one.name} and {other.name} share {common} images or videos")


def format_counts(report: SplitReport, limits: Mapping[str, int], unit: str) -> Iterator[str]:
    """A report in lines. See `SplitReport.to_json`."""
    if report.error is not None:
        yield f"{printable(report.name)}: cannot be looked at: {message(report.error)}"
        return
    visuals = "" if report.num_visuals is None else f" of {report.num_visuals} images or videos"
    references = f", {report.num_references} texts to score against" if report.num_references else ""
    yield f"{printable(report.name)}: {report.num_samples} samples{visuals}{references}"
    if report.skipped:
        causes = ", ".join(f"{count} {cause}" for cause, count in report.causes.most_common())
        yield f"  broken: {len(report.skipped)} ({report.broken_share:.1%}): {causes}"
    else:
        yield "  broken: none"
    if report.turns:
        found = _lengths(report.turns)
        images = ", ".join(f"{count} with {number}" for number, count in report.images_by_number.items())
        yield f"  turns: {found['median']} in the middle, {found['longest']} at most; images: {images}"
    for key, counts in report.counts.items():
        found = _lengths(counts)
        yield (
            f"  {key}: {found['median']} {unit} in the middle, {found['p90']} at the 90th percentile, "
            f"{found['longest']} at most"
        )
    if report.lengths and limits:
        limit = ", ".join(f"{key}: {value}" for key, value in limits.items())
        lost = f"; of {report.num_lost} nothing is left to learn" if report.num_lost else ""
        yield f"  cut off: {report.num_cut or 'none'} of {len(report.lengths)} texts ({limit}){lost}"


def write_sheet(report: SplitReport, dataset: BaseDataset, path: Path) -> bool:
    """A sheet of some of a split's images with their texts, as one PNG. False where none can be shown."""
    from evlgen.tasks.caption_sheet import caption_sheet

    images, captions = [], []
    references, answers = dataset.references(), dataset.answers()
    for index in _spread(_distinct(report.readable, dataset), SHOWN):
        image = image_to_show(dataset, index)
        if image is None:
            continue
        try:
            sample = dataset.load_text(index)
        except (DataError, OSError, NotImplementedError):
            continue
        texts = [sample[key] for key in TEXT_KEYS if isinstance(sample.get(key), str)]
        scored = (
            references.get(sample.get("image_id", "")) or answers.get(sample.get("question_id", "")) or []
        )
        images.append(image)
        captions.append((" - ".join(texts) or next(iter(scored), ""), dataset.sample_id(index)))
    if images:
        caption_sheet(images, captions, path)
    return bool(images)


def write_skipped(reports: Sequence[SplitReport], path: Path) -> None:
    """Lists every broken sample, a line of JSON each."""
    with atomic_file(path) as file:
        for report in reports:
            for s in report.skipped:
                record = {"split": report.name, "index": s.index, "id": s.id, "cause": s.cause}
                file.write(json.dumps({**record, "reason": s.reason}) + "\n")


class _Summaries(CollatedDataset):
    """What a walk keeps of each sample: pixels are read, and not sent on."""

    def __init__(self, dataset: BaseDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Walked | Skipped:
        sample = self.dataset[index]
        if isinstance(sample, Skipped):
            return sample
        texts = {key: sample[key] for key in _MEASURED_KEYS if key in sample}
        if "messages" in sample and "images" in sample:
            texts["image_shapes"] = [tuple(image.shape) for image in sample["images"]]
        return _Walked(index, texts)

    def collater(self, samples: Sequence[_Walked | Skipped]) -> Sequence[_Walked | Skipped]:
        return samples


def _note(
    report: SplitReport,
    found: _Walked | Skipped,
    measure: Callable[[dict[str, Any]], Sequence[TextLength]],
) -> None:
    if isinstance(found, Skipped):
        report.skipped.append(found)
        return
    try:
        report.lengths += measure(found.texts) if found.texts else []
    except DataError as error:  # the model's chat template does not take the conversation
        report.skipped.append(Skipped(found.index, str(found.index), str(error), error.cause))
        return
    report.readable.append(found.index)
    if "messages" in found.texts:
        report.turns.append(len(found.texts["messages"]))
        report.images.append(len(found.texts.get("image_shapes", [])))


def _visuals(dataset: BaseDataset) -> set[Hashable]:
    if not _tells_visuals(dataset):
        return set()
    readable = (i for i, record in enumerate(dataset.records) if not isinstance(record, BadRecord))
    return {source for index in readable for source in _sources(dataset, index)}


def _distinct(indices: Sequence[int], dataset: BaseDataset) -> list[int]:
    """One sample of each image or video."""
    if not _tells_visuals(dataset):
        return list(indices)
    return list({_sources(dataset, index): index for index in reversed(indices)}.values())[::-1]


def _sources(dataset: BaseDataset, index: int) -> tuple[Hashable, ...]:
    """What the images and videos of a sample are made from."""
    if isinstance(dataset, SequenceDataset):
        return tuple(dataset.source_of(visual) for visual in dataset.visuals(index))
    return (dataset.visual_source(index),)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    return [indices[i] for i in evenly_spread(len(indices), count)]


def _tells_visuals(dataset: BaseDataset) -> bool:
    return (
        isinstance(dataset, SequenceDataset) or type(dataset).visual_source is not BaseDataset.visual_source
    )


def _lengths(counts: Sequence[int]) -> dict[str, int]:
    ordered = sorted(counts)
    return {
        "median": ordered[(len(ordered) - 1) // 2],
        "p90": ordered[math.ceil(0.9 * len(ordered)) - 1],
        "longest": ordered[-1],
    }
