"""Classify the images of HTTP requests: decode, classify in batches, log, count, and pass them to the shadow."""

import asyncio
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from workflow.files import sha256
from workflow.image_classifier import (
    LARGE_REQUEST_PIXELS,
    MAX_LARGE_REQUESTS,
    MAX_REQUEST_PIXELS,
    ImagePrediction,
    count_pixels,
)
from workflow.serving.access import RETRY
from workflow.serving.followed_model import FollowedModel, Serving
from workflow.serving.metrics import Metrics
from workflow.serving.prediction_log import PredictionLog

import numpy as np
from fastapi import HTTPException

MAX_SHADOW_IMAGES = 64  # waiting for the shadow; beyond this, images are dropped
IDLE_SECONDS = 0.005  # between checks of whether the model is idle
CHUNK_IMAGES = 4  # queued per request, so that large requests do not delay small ones


class Photo(NamedTuple):
    """An image file of a request."""

    content: bytes | str  # or the reason why it is unusable
    digest: str
    pixels: int  # to decode

    @classmethod
    def of(cls, content: bytes | str) -> "Photo":
        return cls(content, sha256(content) if isinstance(content, bytes) else "", count_pixels(content))


class Predicted(NamedTuple):
    """The photos of a request and their predictions, all by the same version."""

    serving: Serving
    photos: list[Photo]
    images: list[np.ndarray]
    predictions: list[ImagePrediction]


class UnusableImagesError(Exception):
    """Images of a request are unusable; `reasons` has the reason for each, by its position."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__(reasons)
        self.reasons = reasons

    def describe(self, name: str) -> str:
        return "; ".join(f"{name}[{position}]: {reason}" for position, reason in self.reasons.items())


class Shadow:
    """Classify images with a second model while the first is idle, and record its predictions.

    Args:
        model: the second model
        metrics: where agreement is counted
        log: the prediction log, or None
        is_idle: returns whether no request is in progress
    """

    def __init__(self, model: FollowedModel, metrics: Metrics, log: PredictionLog | None, is_idle: Callable[[], bool]):
        self.model, self.metrics, self.log, self.is_idle = model, metrics, log, is_idle
        self.waiting: queue.Queue[tuple[np.ndarray, str, str] | None] = queue.Queue(MAX_SHADOW_IMAGES)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def add(self, image: np.ndarray, label: str, row: str) -> None:
        """Queue an image with the label that the first model predicted, and the id of its row in the log."""
        try:
            self.waiting.put_nowait((image, label, row))
        except queue.Full:
            self.metrics.shadow_dropped.inc()

    def run(self) -> None:
        if sys.platform == "linux":  # where threads have priorities
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while item := self.waiting.get():
            while not self.is_idle():
                time.sleep(IDLE_SECONDS)
            image, label, row = item
            serving = self.model.serving
            try:
                (prediction,) = serving.registered.classifier.classify([image])
            except Exception:  # the code of a model may raise any exception; clients do not depend on the shadow
                self.metrics.shadow_dropped.inc()
                continue
            self.metrics.shadow.labels(prediction.label, prediction.label == label).inc()
            if self.log:
                fields = {"shadow_label": prediction.label, "shadow_probability": prediction.probability}
                self.log.add({"row": row, "shadow_version": serving.version, **fields})


class Predictor:
    """Classify the images of requests, and count, log and keep them.

    Args:
        model: the model whose predictions are returned
        shadow: a second model, or None
        metrics: where predictions are counted
        log: the prediction log, or None
        keep_unsure: whether photos that are unknown or unsure are kept
    """

    def __init__(
        self,
        model: FollowedModel,
        shadow: FollowedModel | None,
        metrics: Metrics,
        log: PredictionLog | None,
        keep_unsure: bool,
    ):
        self.model, self.metrics, self.log, self.keep_unsure = model, metrics, log, keep_unsure
        self.shadow = Shadow(shadow, metrics, log, lambda: not self.requests) if shadow else None
        self.decoders = ThreadPoolExecutor(os.cpu_count(), "decode")
        self.large_decoder = ThreadPoolExecutor(1, "decode-large")
        self.classifiers = ThreadPoolExecutor(1, "classify")
        self.requests = self.large_requests = 0  # in progress
        metrics.queue.set_function(lambda: self.model.serving.batcher.queue_length)

    async def predict(self, parse: Callable[[], Sequence[bytes | str]]) -> Predicted:
        """Return the predictions for the images that parse() returns; parse() runs in another thread.

        Raises:
            UnusableImagesError: at least one of them is unusable
            HTTPException: they are too large, or too many large requests are in progress
        """
        self.requests += 1
        try:
            return await self.classify(parse, self.model.serving)
        finally:
            self.requests -= 1

    async def classify(self, parse: Callable[[], Sequence[bytes | str]], serving: Serving) -> Predicted:
        run = asyncio.get_running_loop().run_in_executor
        photos = await run(self.decoders, lambda: list(map(Photo.of, parse())))
        if (pixels := sum(photo.pixels for photo in photos)) > MAX_REQUEST_PIXELS:
            raise HTTPException(400, f"inputs: {pixels:,} pixels to decode; send at most {MAX_REQUEST_PIXELS:,}")
        decode, images, predictions = serving.registered.classifier.decode, list[np.ndarray](), list[ImagePrediction]()
        reasons = dict[int, str]()
        async with self.admit(pixels) as threads:
            for start in range(0, len(photos), CHUNK_IMAGES):
                chunk = photos[start : start + CHUNK_IMAGES]
                results = await asyncio.gather(*(run(threads, decode, photo.content) for photo in chunk))
                reasons |= {start + i: result for i, result in enumerate(results) if isinstance(result, str)}
                if not reasons:
                    usable = [result for result in results if not isinstance(result, str)]
                    images += usable
                    predictions += await serving.batcher.classify(usable, self.classifiers)
        if reasons:
            raise UnusableImagesError(reasons)
        return Predicted(serving, photos, images, predictions)

    @asynccontextmanager
    async def admit(self, pixels: int) -> AsyncIterator[ThreadPoolExecutor]:
        """Yield the threads that decode a request: one for all large requests, several for the others."""
        if pixels <= LARGE_REQUEST_PIXELS:
            yield self.decoders
            return
        if self.large_requests == MAX_LARGE_REQUESTS:
            reason = "too many large requests in progress; send fewer or smaller images, or retry later"
            raise HTTPException(503, reason, RETRY)
        self.large_requests += 1
        try:
            yield self.large_decoder
        finally:
            self.large_requests -= 1

    def record(self, predicted: Predicted, route: str, request_id: str, start: float) -> None:
        """Count and log predictions, keep photos, and queue images for the shadow, after the response has been sent."""
        now, milliseconds = datetime.now(UTC).replace(tzinfo=None), 1000 * (time.perf_counter() - start)
        for position, (photo, image, prediction) in enumerate(zip(*predicted[1:], strict=True)):
            self.metrics.count_prediction(prediction)
            row = uuid.uuid4().hex
            if self.log:
                names = ("label", "probability", "similarity", "unknown", "nearest")
                fields: dict[str, Any] = {name: getattr(prediction, name, None) for name in names}
                fields |= {"id": row, "time": now, "request_id": request_id, "image": position, "route": route}
                fields |= {"digest": photo.digest, "version": predicted.serving.version, "milliseconds": milliseconds}
                self.log.add(fields)
                if self.keep_unsure and (prediction.unknown or prediction.unsure) and isinstance(photo.content, bytes):
                    self.log.keep(photo.digest, photo.content)
            if self.shadow:
                self.shadow.add(image, prediction.label, row)

    def start(self) -> None:
        """Start the background threads."""
        for model in (self.model, self.shadow and self.shadow.model):
            if model:
                model.start()
        for worker in (self.shadow, self.log):
            if worker:
                worker.thread.start()

    def close(self) -> None:
        """Stop the background threads, and write the queued rows and photos."""
        for threads in (self.decoders, self.large_decoder, self.classifiers):
            threads.shutdown(wait=False, cancel_futures=True)
        self.model.close()
        if self.shadow:
            self.shadow.model.close()
        if self.log:
            self.log.close()
