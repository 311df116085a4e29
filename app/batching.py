"""The bounded queue, and the threads that take from it: each decodes some images and predicts them as one batch."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import Empty, SimpleQueue
from threading import Thread

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram

from app.model import Model, Values
from src.images import Pixels, SizeError, decode

GATHERING = 0.02
"""Seconds after which a thread predicts what it has decoded: large images do not keep small ones waiting."""

WAITING = 6
"""Images a thread that wait before it takes more than one. The first of a batch waits for the last: with 1, the slowest
1 % at half the load took 6.2 times as long as a request alone, with 6 5.0 times (side by side, medians of 8 rounds),
and the most images a second were the same: 189 and 191."""

MAX_SCANS = 32
"""A progressive JPEG has about ten scans. Each is a pass over all pixels, for which 75 bytes are enough: a picture of
50 million takes 0.2 s longer with each."""


class RequestError(Exception):
    """A request that is answered with an error: its status, and what was found and expected, in one sentence."""

    def __init__(self, status: int, detail: str, *, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


@dataclass(frozen=True)
class Upload:
    """One image as it was sent."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image: (classes,) and (h, w)."""

    probabilities: Values
    heat: Values | None


@dataclass(frozen=True, eq=False)
class _Job:
    upload: Upload
    model: Model
    heat: bool
    answer: asyncio.Future[Prediction]


_Outcome = tuple[_Job, Prediction | Exception]


class Batcher:
    """Takes requests in the event loop's thread, and works on their images in others.

    No image waits for a batch to fill: a thread takes what is there, which is one image until many wait.
    """

    def __init__(self, *, workers: int, batch: int, queue: int, max_pixels: int, registry: CollectorRegistry) -> None:
        self.pending = 0
        """Images that wait or are worked on."""
        self._batch, self._limit, self._max_pixels = batch, queue, max_pixels
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [Thread(target=self._work, name=f"worker {number}", daemon=True) for number in range(workers)]
        sizes = sorted({1, 2, 4, 8, 16, 32, batch})
        self._sizes = Histogram("classifier_batch_images", "Images of a batch.", buckets=sizes, registry=registry)
        depth = Gauge("classifier_queue_images", "Images that wait or are worked on.", registry=registry)
        depth.set_function(lambda: self.pending)
        for thread in self._threads:
            thread.start()

    def check_room(self, images: int) -> None:
        """Raise RequestError (503) where so many more images would overfill the queue."""
        if self.pending + images > self._limit:
            raise RequestError(503, f"{self.pending} images wait, of at most {self._limit}; try again", retry_after=1)

    async def predict(self, uploads: Sequence[Upload], model: Model, *, heat: bool) -> list[Prediction]:
        """Answer for the images of a request, all by one model. Raises RequestError where one cannot be used."""
        self.check_room(len(uploads))
        jobs = [_Job(upload, model, heat, self._loop.create_future()) for upload in uploads]
        self.pending += len(jobs)
        for job in jobs:
            self._queue.put(job)
        try:
            return await asyncio.gather(*(job.answer for job in jobs))
        finally:
            for job in jobs:  # those that nobody waits for any more are not worked on
                job.answer.cancel()

    def close(self, seconds: float) -> None:
        """End the threads after what is queued, or leave them to their work after some seconds."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(seconds)

    # --- in the threads -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while job := self._queue.get():
            self._work_on(job)
            del job  # a thread that waits keeps neither an image nor a model that was replaced

    def _work_on(self, job: _Job) -> None:
        for model, group in groupby(self._gather(job), lambda decoded: decoded[0].model):
            self._predict(model, *zip(*group, strict=True))

    def _gather(self, job: _Job) -> list[tuple[_Job, Pixels]]:
        """Decode an image, and as many more as are there, do not take long, and fit into a batch."""
        began, found = time.monotonic(), []
        while True:
            if (pixels := self._decode(job)) is not None:
                found.append((job, pixels))
            full = len(found) == self._batch or time.monotonic() - began > GATHERING
            if full or self._queue.qsize() < WAITING * len(self._threads):
                return found
            try:
                following = self._queue.get_nowait()
            except Empty:
                return found
            if following is None:  # the end, which is for `_work` to see
                self._queue.put(None)
                return found
            job = following

    def _decode(self, job: _Job) -> Pixels | None:
        """Decode an image, or settle the job where it cannot be used or is not waited for any more."""
        card, name, data = job.model.card, job.upload.name, job.upload.data
        try:
            if job.answer.done():
                raise RequestError(503, "nobody waits for this answer")
            if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
                raise RequestError(400, f"{name!r}: a JPEG of {scans} scans, more than {MAX_SCANS}")
            return decode(data, size=card.size, channels=card.channels, max_pixels=self._max_pixels)
        except SizeError as error:
            failure: Exception = RequestError(
                413, f"{name!r}: {error}; at most {self._max_pixels:,} pixels are accepted"
            )
        except ValueError as error:
            failure = RequestError(400, f"{name!r}: {error}")
        except MemoryError:
            failure = RequestError(503, f"{name!r}: the memory is full; try again", retry_after=1)
        except Exception as error:  # a thread that ends would leave the queue to the others
            failure = error
        self._settle([(job, failure)])
        return None

    def _predict(self, model: Model, jobs: Sequence[_Job], images: Sequence[Pixels]) -> None:
        self._sizes.observe(len(jobs))
        try:
            shares, heat = model.predict(np.stack(images), heat=any(job.heat for job in jobs))
        except Exception as error:
            self._settle([(job, error) for job in jobs])
            return
        heats = [None] * len(jobs) if heat is None else heat
        self._settle([(job, Prediction(*found)) for job, *found in zip(jobs, shares, heats, strict=True)])

    def _settle(self, outcomes: list[_Outcome]) -> None:
        self._loop.call_soon_threadsafe(self._answer, outcomes)

    def _answer(self, outcomes: list[_Outcome]) -> None:
        self.pending -= len(outcomes)
        for job, outcome in outcomes:
            if job.answer.done():
                continue
            if isinstance(outcome, Exception):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(outcome)
