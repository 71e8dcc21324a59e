"""Serve a registered model, and replace it when its alias is assigned to another version."""

import asyncio
import ctypes
import gc
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from workflow.errors import WorkflowError, first_line
from workflow.image_classifier import ImagePrediction
from workflow.records import Artifact, DataVersion, Evaluation, Prediction
from workflow.serving.registered_model import RegisteredModel, load, read_data, resolve
from workflow.tracking.logging import read_artifact

import numpy as np
from pydantic import ValidationError

POLL_SECONDS = 2
RETRY_SECONDS = 60  # before retrying a version that could not be loaded
MAX_CHECKED = 10  # test images on which a new version is checked before it is served
TOLERANCE = 0.01  # maximum difference from the recorded probabilities
MAX_BATCH_IMAGES = 8
M_MMAP_THRESHOLD, MIN_MMAP_BYTES = -3, 65_536  # the option is from glibc's malloc.h
MAX_BATCH_SECONDS = 20  # beyond this, the server is unhealthy

logger = logging.getLogger("serve")


class Batcher:
    """Classify the images of concurrent requests in batches.

    The first request does not wait. Requests that arrive while a batch is being classified form the next batch.
    """

    def __init__(self, classify: Callable[[list[np.ndarray]], list[ImagePrediction]]):
        self.classify_batch = classify
        self.waiting: deque[tuple[list[np.ndarray], asyncio.Future[list[ImagePrediction]]]] = deque()
        self.task: asyncio.Task[None] | None = None
        self.started = 0.0  # when the current batch began

    @property
    def is_stuck(self) -> bool:
        return not self.is_idle and time.monotonic() - self.started > MAX_BATCH_SECONDS

    @property
    def queue_length(self) -> int:
        return sum(len(images) for images, _ in self.waiting)

    @property
    def is_idle(self) -> bool:
        return self.task is None or self.task.done()

    async def classify(self, images: list[np.ndarray], threads: Executor) -> list[ImagePrediction]:
        """Return the predictions for the images of one request."""
        predictions = asyncio.get_running_loop().create_future()
        self.waiting.append((images, predictions))
        if self.is_idle:
            self.task = asyncio.create_task(self.run(threads))
        return await predictions

    async def run(self, threads: Executor) -> None:
        """Classify batches until the queue is empty."""
        while self.waiting:
            batch, count = [self.waiting.popleft()], 0
            while self.waiting and (count := count + len(batch[-1][0])) + len(self.waiting[0][0]) <= MAX_BATCH_IMAGES:
                batch.append(self.waiting.popleft())
            images, self.started = [image for part, _ in batch for image in part], time.monotonic()
            outcome = asyncio.get_running_loop().run_in_executor(threads, self.classify_batch, images)
            (result,) = await asyncio.gather(outcome, return_exceptions=True)
            classified = iter(result if isinstance(result, list) else ())
            for part, predictions in batch:
                part_predictions = list(islice(classified, len(part)))
                if predictions.cancelled():  # the request took too long
                    continue
                if isinstance(result, BaseException):
                    predictions.set_exception(result)
                else:
                    predictions.set_result(part_predictions)


@dataclass(frozen=True)
class Serving:
    """A loaded version."""

    registered: RegisteredModel
    data: DataVersion  # the images of its run
    checked: int  # stored test images that it predicts as its evaluation recorded
    has_backbone: bool
    batcher: Batcher
    since: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def version(self) -> str:
        return self.registered.uri


def load_checked(uri: str) -> Serving:
    """Load a version, and check that it predicts stored test images as recorded in its evaluation.

    Raises:
        WorkflowError: it cannot be loaded, or its predictions differ
    """
    registered = load(uri)
    try:
        evaluation = Evaluation.from_json(read_artifact(registered.run_id, Artifact.EVALUATION) or b"")
        data, recorded = evaluation.data, evaluation.test.predictions
    except ValidationError:  # it is missing, or from another release
        data, recorded = read_data(registered.run_id), []
    try:
        checked, has_backbone = check_predictions(registered, recorded, data)
    except WorkflowError:
        raise
    except Exception as error:  # the code of a model may raise any exception
        raise WorkflowError(f"{registered.uri} fails: {first_line(error)}") from error
    return Serving(registered, data, checked, has_backbone, Batcher(registered.classifier.classify))


def check_predictions(registered: RegisteredModel, recorded: list[Prediction], data: DataVersion) -> tuple[int, bool]:
    """Return the number of stored test images that a model predicts as recorded, and whether it has a backbone.

    Missing or changed images are skipped, because the model may have been trained on a different machine.

    Raises:
        WorkflowError: a prediction differs
    """
    classifier, images, expected = registered.classifier, list[np.ndarray](), list[Prediction]()
    for record in recorded:
        with suppress(OSError):
            image = classifier.decode(data.read(record.file))
            if isinstance(image, np.ndarray) and len(images) < MAX_CHECKED:
                images.append(image)
                expected.append(record)
    blank = np.zeros((classifier.image_size, classifier.image_size, 3), "uint8")
    predictions = classifier.classify([*images, blank])
    for prediction, record in zip(predictions, expected, strict=False):
        probability = prediction.probabilities.get(record.predicted, 0.0)
        if not abs(probability - record.probability) <= TOLERANCE:
            raise WorkflowError(
                f"{registered.uri} disagrees with its evaluation: the probability of {record.predicted} for "
                f"{record.file} is {probability:.3f}, not {record.probability:.3f}"
            )
    return len(images), predictions[-1].similarity is not None


def return_freed_memory() -> None:
    """Make the allocator return large freed blocks to the system, so that replaced models leave no memory in use.

    By default, glibc raises its threshold for such blocks, and each thread keeps freed memory in its own arena.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):  # musl has no such function
        library.mallopt(M_MMAP_THRESHOLD, MIN_MMAP_BYTES)


class FollowedModel:
    """The version that a model URI refers to, even after its alias has moved.

    Attributes:
        serving: the version to use; assigned by a background thread
        reloaded: when a version was last replaced, or None
        error: why the version with the alias is not served; "" if it is
    """

    def __init__(self, uri: str, on_load: Callable[[str], None] = lambda result: None):
        self.uri, self.on_load = uri, on_load
        self.serving = load_checked(uri)
        self.reloaded: datetime | None = None
        self.error = self.rejected = ""
        self.retry_at, self.has_garbage = 0.0, False
        self.stopped = threading.Event()

    def start(self) -> None:
        """Follow the alias until close(). A URI without an alias always refers to the same version."""
        if "@" in self.uri:
            threading.Thread(target=self.follow, daemon=True).start()

    def follow(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            try:
                self.update()
                error = self.error if self.rejected else ""
            except Exception as problem:  # whatever happens, keep serving
                error = first_line(problem) or type(problem).__name__
            if error != self.error:
                self.error = error
                if error:
                    logger.error("still serving %s: %s", self.serving.version, error)

    def update(self) -> None:
        """Load the version with the alias, unless it is already served.

        Raises:
            Exception: the registry is unreachable, or the version cannot be served
        """
        uri, _ = resolve(self.uri)
        if uri == self.serving.version:
            self.rejected = ""
            if self.has_garbage:  # the replaced LiteRT interpreters, which have reference cycles
                gc.collect()
                self.has_garbage = False
            return
        if uri == self.rejected and time.monotonic() < self.retry_at:
            return
        self.rejected, self.retry_at = uri, time.monotonic() + RETRY_SECONDS
        try:
            serving = load_checked(self.uri)
        except Exception:
            self.on_load("failed")
            raise
        logger.warning("now serving %s instead of %s", serving.version, self.serving.version)
        self.serving, self.reloaded, self.rejected = serving, serving.since, ""
        self.on_load("loaded")
        self.has_garbage = True

    def close(self) -> None:
        self.stopped.set()
