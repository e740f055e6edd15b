"""Waiting requests become batches: by size, and by how long the oldest has waited."""

from __future__ import annotations

import asyncio
import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evlgen.serving.answering import Answer, Ask, Stopped

logger = logging.getLogger(__name__)

#: Answers requests of one kind; asks, before every token, whether anybody still waits.
AnswerFunction = Callable[[Sequence[Ask], Callable[[], bool]], list[Answer]]


@dataclass(eq=False)
class _Waiting:
    request: Ask
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future
    since: float = field(default_factory=time.monotonic)

    @property
    def is_wanted(self) -> bool:
        return not self.future.done()

    def finish(self, answer: Answer | None, error: Exception | None = None) -> None:
        """Hands the answer to who waits for it. From any thread."""

        def hand_over() -> None:
            if not self.is_wanted:
                return
            if error is None:
                self.future.set_result(answer)
            else:
                self.future.set_exception(error)

        try:
            self.loop.call_soon_threadsafe(hand_over)
        except RuntimeError:  # the loop is closed: nobody waits
            logger.debug("an answer came after the server had stopped")


class Batcher:
    """Runs a function over batches of requests, in a thread of its own.

    Requests of one `Ask.kind` are answered together, the oldest request first and with it up to ``max_batch``
    of its kind. A batch that is not full starts when its oldest request has waited for ``max_wait``. While
    one batch is computed, the next one gathers.

    Args:
        answer: see `AnswerFunction`.
        max_batch: requests of a batch at most.
        max_wait: in seconds.
        observe: called after each batch with its size and its seconds.
    """

    def __init__(
        self,
        answer: AnswerFunction,
        max_batch: int,
        max_wait: float,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._answer, self._observe = answer, observe
        self.max_batch, self.max_wait = max_batch, max_wait
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._stops = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the batch it is computing."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether batches are computed."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._queue)

    async def answer(self, request: Ask) -> Answer:
        """The answer to one request. Cancelling it takes the request out of the queue, or ends its batch
        when nobody else waits for that.

        Raises:
            EVLGenError: it cannot be answered.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, loop, loop.create_future())
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        return await waiting.future

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                started = time.monotonic()
                self._run(batch)
                self._observe(len(batch), time.monotonic() - started)

    def _next(self) -> list[_Waiting] | None:
        """The next batch; empty where those that waited have left; None at the end."""
        with self._changed:
            while True:
                while self._queue and not self._queue[0].is_wanted:
                    self._queue.popleft()
                if self._stops:
                    return None
                if not self._queue:
                    self._changed.wait()
                    continue
                kind = self._queue[0].request.kind
                count = sum(item.request.kind == kind for item in self._queue)
                left = self._queue[0].since + self.max_wait - time.monotonic()
                if count >= self.max_batch or left <= 0:
                    break
                self._changed.wait(left)
            batch: list[Any] = []
            rest: list[Any] = []
            for item in self._queue:
                fits = item.request.kind == kind and len(batch) < self.max_batch
                (batch if fits else rest).append(item)
            self._queue = collections.deque(rest)
        return [item for item in batch if item.is_wanted]

    def _run(self, batch: list[_Waiting]) -> None:
        try:
            answers = self._answer(
                [item.request for item in batch], lambda: any(item.is_wanted for item in batch)
            )
            for item, answer in zip(batch, answers, strict=True):
                item.finish(answer)
        except Stopped:
            pass  # all have left
        except Exception as error:
            if len(batch) == 1:
                batch[0].finish(None, error)
                return
            for item in batch:  # one of them is the cause: the others must not suffer
                if item.is_wanted:
                    self._run([item])
