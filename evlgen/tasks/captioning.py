"""Captioning: learn a caption for each image or video, write one, score it against people's."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from evlgen.batch import Batch
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BaseDataset, image_to_show
from evlgen.files.io import write_atomically
from evlgen.models.base_model import BaseModel
from evlgen.runners.sample_captions import reference_of
from evlgen.tasks.base_task import BaseTask
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.tasks.metrics import BegunMetrics, ImageId, score_captions

logger = logging.getLogger(__name__)

SHOWN = 12  # captions in the sheet of images, half of which are written to the log


@registry.register_task("captioning")
@registry.register_task("video_captioning")
class CaptioningTask(BaseTask):
    """Captions of images or videos by generation, scored as COCO's are.

    Result files: ``captions.json``, ``metrics.json``, and ``captions.png``, a sheet of images with what was
    written about them. ``captions.json`` is ``[{"image_id", "caption"}, ..]``: what COCO's and nocaps'
    servers are sent, and LAVIS writes for videos too. Ids are those of the ground truth, numbers or texts.
    """

    _metrics: BegunMetrics | None = None  # of the evaluation that is going on

    def before_evaluation(self, dataset: BaseDataset, split: str) -> None:
        """Begins with the scores, which takes some seconds, beside the writing of captions."""
        is_main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self._wanted = self.references_of(dataset) if is_main and self.run.report_metric else {}
        self._metrics = BegunMetrics(self.run.metrics) if self._wanted else None

    def valid_step(self, model: BaseModel, samples: Batch) -> list[dict[str, Any]]:
        """``{"image_id", "caption", "instance_id"}`` for each sample of a batch."""
        self.check_keys(samples, ("image_id", "instance_id"))
        if self.run.prompt is not None:
            samples = {**samples, "prompt": self.run.prompt}
        captions = model.generate(
            samples, max_length=self.max_len, **self.generation_options(min_length="min_len")
        )
        if self._metrics is not None:
            self._metrics.take(self._wanted, dict(zip(samples["image_id"], captions, strict=True)))
        keys = zip(samples["image_id"], samples["instance_id"], captions, strict=True)
        return [{"image_id": i, "caption": c, "instance_id": n} for i, n, c in keys]

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Writes and scores. ``agg_metrics`` is CIDEr + BLEU-4, as in LAVIS. Where the dataset has parts,
        ``CIDEr_<part>`` is told of each; see `domain_scores`."""
        # as the dataset has them, on any number of ranks
        results = sorted(results, key=lambda r: int(r["instance_id"]))
        rows = [{"image_id": r["image_id"], "caption": r["caption"]} for r in results]
        write_atomically(folder / "captions.json", json.dumps(rows, ensure_ascii=False, indent=0))
        self.warn_if_incomplete(rows, dataset, folder / "captions.json")
        references = self.references_of(dataset)
        self._show(results, references, dataset, folder)
        self.sample_scores = ("", {})
        metrics, self._metrics = self._metrics, None
        if not self.run.report_metric or not rows:
            return {}
        if not references:
            logger.warning("%s has no references: its captions are written, not scored", split)
            return {}
        captions = {r["image_id"]: r["caption"] for r in rows}
        scored = {i: caption for i, caption in captions.items() if references.get(i)}
        if len(scored) < len(captions):
            logger.warning("%s: only %d of %d images have references", split, len(scored), len(captions))
        if not scored:
            return {}
        scores = score_captions({i: references[i] for i in scored}, scored, metrics or self.run.metrics)
        metric = next((name for name in ("CIDEr", "ROUGE_L") if name in scores.per_image), "")
        self.sample_scores = (metric, scores.per_image.get(metric, {}))
        values = {**scores.values, **dataset.extra_metrics(captions)}
        if "CIDEr" in values:
            values.update(domain_scores(references, scored, dataset.domains()))
        if scores.agg_metrics is not None:
            values["agg_metrics"] = scores.agg_metrics
        write_atomically(
            folder / "metrics.json", json.dumps({**values, "left_out": scores.left_out}, indent=1)
        )
        return values

    def _show(
        self,
        results: list[dict[str, Any]],
        references: Mapping[Any, list[str]],
        dataset: BaseDataset,
        folder: Path,
    ) -> None:
        step = max(1, len(results) // SHOWN)
        shown = results[::step][:SHOWN]
        for row in shown[: SHOWN // 2]:
            logger.info(
                "  %s: %s   (a reference: %s)",
                row["image_id"],
                row["caption"],
                reference_of(row, references),
            )
        images = [image_to_show(dataset, int(row["instance_id"])) for row in shown]
        lines = [(row["caption"], reference_of(row, references)) for row in shown]
        caption_sheet(images, lines, folder / "captions.png")


def domain_scores(
    references: Mapping[ImageId, Sequence[str]],
    captions: Mapping[ImageId, str],
    domains: Mapping[ImageId, str],
) -> dict[str, float]:
    """``CIDEr_<domain>`` of the captions in each domain, such as nocaps' ``in-domain``.

    Each is scored by itself: CIDEr's document frequencies are those of its own images, as where each domain
    has a ground truth file of its own.
    """
    found = {}
    for domain in sorted(set(domains.values())):
        own = {image_id: text for image_id, text in captions.items() if domains.get(image_id) == domain}
        if own:
            scores = score_captions({image_id: references[image_id] for image_id in own}, own, ["cider"])
            found[f"CIDEr_{domain}"] = scores.values["CIDEr"]
    return found
