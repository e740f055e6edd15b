"""Captioning: learn a caption for each picture, write one, score it against people's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from evlgen.common.io import write_atomically
from evlgen.common.registry import registry
from evlgen.datasets.base_dataset import BaseDataset
from evlgen.models.base_model import BaseModel
from evlgen.tasks.base_task import BaseTask
from evlgen.tasks.caption_sheet import caption_sheet
from evlgen.tasks.metrics import score_captions

logger = logging.getLogger(__name__)

SHOWN = 12  # captions in the sheet of pictures, half of which are written to the log


@registry.register_task("captioning")
class CaptioningTask(BaseTask):
    """Captions by generation, scored as COCO's are.

    Result files: ``captions.json`` in COCO's result format, ``metrics.json``, and ``captions.png``, a sheet
    of pictures with what was written about them.
    """

    def valid_step(self, model: BaseModel, samples: dict[str, Any]) -> list[dict[str, Any]]:
        """``{"image_id", "caption", "instance_id"}`` for each sample of a batch."""
        if self.run.prompt is not None:
            samples = {**samples, "prompt": self.run.prompt}
        captions = model.generate(
            samples,
            num_beams=self.run.num_beams,
            max_length=self.run.max_len,
            min_length=self.run.min_len,
            length_penalty=1.0 if self.run.length_penalty is None else self.run.length_penalty,
            repetition_penalty=self.run.repetition_penalty,
        )
        keys = zip(samples["image_id"], samples["instance_id"], captions, strict=True)
        return [{"image_id": i, "caption": c, "instance_id": n} for i, n, c in keys]

    def after_evaluation(
        self, results: list[dict[str, Any]], dataset: BaseDataset, split: str, folder: Path
    ) -> dict[str, float]:
        """Writes and scores. ``agg_metrics`` is CIDEr + BLEU-4, as in LAVIS."""
        results = sorted(
            results, key=lambda r: int(r["instance_id"])
        )  # as the dataset has them, on any number of ranks
        rows = [{"image_id": r["image_id"], "caption": r["caption"]} for r in results]
        write_atomically(folder / "captions.json", json.dumps(rows, ensure_ascii=False, indent=0))
        references = dataset.references()
        self._show(results, references, dataset, folder)
        if not self.run.report_metric or not rows:
            return {}
        if not references:
            logger.warning("%s has no references: its captions are written, not scored", split)
            return {}
        captions = {r["image_id"]: r["caption"] for r in rows}
        scores = score_captions({i: references[i] for i in captions}, captions, self.run.metrics)
        metrics = {**scores.values, **dataset.extra_metrics(captions)}
        if scores.agg_metrics is not None:
            metrics["agg_metrics"] = scores.agg_metrics
        write_atomically(
            folder / "metrics.json", json.dumps({**metrics, "left_out": scores.left_out}, indent=1)
        )
        return metrics

    def _show(
        self,
        results: list[dict[str, Any]],
        references: dict[Any, list[str]],
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
                references.get(row["image_id"], [""])[0],
            )
        pictures = [dataset.picture(int(row["instance_id"])) for row in shown]
        lines = [(row["caption"], references.get(row["image_id"], [""])[0]) for row in shown]
        caption_sheet(pictures, lines, folder / "captions.png")
