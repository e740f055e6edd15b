"""The frozen vision encoder one batch ahead (`run.encode_ahead`).

On a GPU the next batch's images are encoded on a stream of their own while the backward pass of this one
runs: what one of them leaves free of the card, the other takes. The numbers are the same: a frozen encoder
draws no random numbers, and nothing in training changes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from evlgen.batch import Batch
from evlgen.loaders.interruption import StopNow
from evlgen.models.base_model import BaseModel
from evlgen.models.sequences import is_sequence

logger = logging.getLogger(__name__)


class EncodedAhead(Iterator[Batch]):
    """Batches with ``visual_tokens`` in place of ``image``; `begin` reads and encodes the next one early.
    Batches of sequences, and those of a model whose encoder learns, stay as they are.

    Args:
        batches: of a loader.
        model: on its device.
    """

    def __init__(self, batches: Iterator[Batch], model: BaseModel) -> None:
        self.batches, self.model = batches, model
        self._next: Batch | BaseException | None = None
        self._has_room = True
        self._stream = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            # the weights come there on the usual stream; nothing changes them later
            self._stream.wait_stream(torch.cuda.current_stream(model.device))

    def begin(self) -> None:
        """Called once the backward pass of a batch is under way. What goes wrong is raised where the batch is
        asked for: this one's step is not to be left half done."""
        if self._next is not None:
            return
        try:
            self._next = self._encoded(next(self.batches))
        except (Exception, StopNow) as error:
            self._next = error

    def __next__(self) -> Batch:
        self.begin()
        found, self._next = self._next, None
        assert found is not None
        if isinstance(found, BaseException):
            raise found
        if self._stream is not None and "visual_tokens" in found:
            usual = torch.cuda.current_stream(self.model.device)
            usual.wait_stream(self._stream)
            # its memory is not to be used again until both streams are done with it
            found["visual_tokens"].record_stream(usual)
        return found

    def _encoded(self, batch: Batch) -> Batch:
        if not self._has_room or "image" not in batch or is_sequence(batch):
            return batch
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                image = batch["image"].to(self.model.device, non_blocking=True)
                found = self.model.encoded({**batch, "image": image})
            # pixels that came on this stream may not be there yet where the usual one reads them
            return found if "visual_tokens" in found else batch
        except torch.OutOfMemoryError:
            self._has_room = False
            logger.warning("run.encode_ahead: the card has no room for it; images are encoded in their step")
            torch.cuda.empty_cache()
            return batch
