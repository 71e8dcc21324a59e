"""Read and classify files in chunks, in this process or on the workers of a Dask cluster."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from importlib import import_module
from multiprocessing.pool import ThreadPool  # its threads do not delay the process's exit
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow.data.download import fetch
from workflow.data.other_files import explain_stand_in
from workflow.data.source import is_url
from workflow.errors import first_line
from workflow.files import read_file, sha256
from workflow.image_classifier import Classifier
from workflow.model.served_model import ServedPrediction

import requests

if TYPE_CHECKING:
    from workflow.serving.litert_classifier import LiteRTClassifier

    import distributed


class Source(NamedTuple):
    """A file or URL to classify, and the state of the file."""

    name: str
    size: int | None = None  # None for a URL or a missing file
    mtime_ns: int | None = None


Chunk = list[Source]


def read_source(source: str) -> bytes | str:
    """Return the content of a file or URL, or the reason why it is unreadable."""
    try:
        if is_url(source):
            return fetch(source)
        if os.path.isdir(source):
            return "empty or unreadable folder"
        return explain_stand_in(Path(source)) or read_file(source)
    except requests.ConnectionError:
        return "host unreachable"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)


def classify_contents(classifier: Classifier, contents: list[bytes | str]) -> list[ServedPrediction]:
    """Return the fields of the prediction for the content of each image file, or its `error`.

    Args:
        classifier: classifies the images
        contents: of image files, or the reason why a file is unreadable, which becomes its `error`
    """
    with ThreadPool() as pool:
        images = pool.map(classifier.decode, contents)  # decode() returns a reason unchanged
    classified = iter(classifier.classify([image for image in images if not isinstance(image, str)]))
    return [
        {"error": image} if isinstance(image, str) else next(classified).model_dump() | {"digest": sha256(content)}
        for content, image in zip(contents, images, strict=True)
    ]


def classify_chunks(classifier: Classifier, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[ServedPrediction]]]:
    """Yield each chunk with its predictions, as classify_contents() returns them."""
    with ThreadPool() as pool:
        for chunk in chunks:
            yield chunk, classify_contents(classifier, pool.map(read_source, [source.name for source in chunk]))


def classify_on_cluster(
    client: "distributed.Client", classifier: "LiteRTClassifier", chunks: Iterable[Chunk], max_tasks: int
) -> Iterator[tuple[Chunk, list[ServedPrediction]]]:
    """Yield each chunk with its predictions, in order, as classify_chunks() does; the workers need no access to files.

    If workers die or fail while classifying a chunk, each of its predictions has the reason as its `error`.

    Args:
        client: of the cluster
        classifier: sent once to each worker
        chunks: sent to the workers as contents of files
        max_tasks: chunks in progress at the same time

    Raises:
        ImportError: a worker lacks packages
    """
    client.run(import_module, type(classifier).__module__)
    # The scheduler keeps the arguments, so that the classifier survives the death of all workers that have it.
    shared = client.submit(type(classifier), classifier.network, classifier.description, pure=False)
    tasks: deque[tuple[Chunk, distributed.Future[list[ServedPrediction]]]] = deque()

    def await_first() -> tuple[Chunk, list[ServedPrediction]]:
        chunk, task = tasks.popleft()
        if error := task.exception():
            return chunk, [{"error": f"Dask worker: {first_line(error)}"} for _ in chunk]
        return chunk, task.result()

    with ThreadPool() as pool:
        for chunk in chunks:
            contents = pool.map(read_source, [source.name for source in chunk])
            tasks.append((chunk, client.submit(classify_contents, shared, contents, pure=False)))
            if len(tasks) >= max_tasks:
                yield await_first()
        while tasks:
            yield await_first()
