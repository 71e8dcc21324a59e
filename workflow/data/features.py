"""The features of the images of a folder: each is computed once, and kept.

They are kept in the folder `dataset`, in files of up to CHUNK images, by the digests of the images and of what computes
them: a change in backbone.py, exif.py or image_classifier.py has all features computed anew. So has a file that is
damaged. On a Dask cluster the chunks go to the workers; on one machine the same code computes them one after the other,
with all cores.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from workflow import image_classifier
from workflow.data import exif
from workflow.data.exif import Capture
from workflow.data.feature_table import FeatureTable
from workflow.data.verified_image import can_see
from workflow.files import file_size, group, read_file, sha256, write_arrays
from workflow.model import backbone, backbone_weights
from workflow.model.backbone import Description
from workflow.orchestration import cluster
from workflow.records import ImageFile
from workflow.text import locate

import numpy as np
import PIL

CHUNK = 64  # images: what one task computes, and what is lost when its process dies
CHUNK_BYTES = 8_000_000  # of image files in one task, because they may have to travel to a worker
AT_ONCE = 2  # tasks per thread of a cluster: one that is computed, one that waits
Item = tuple[str, Path]  # an image's digest, and where its content is
Result = Description | str  # of an image, or why it cannot be used
Found = list[tuple[str, Result, bool]]  # what backbone.compute_items() says of a chunk


def load_features(
    images: list[ImageFile], folder: Path, cache: Path, dask: str | None, progress: Callable[[int, int], None]
) -> tuple[list[ImageFile], FeatureTable]:
    """The image files, with the reason where one cannot be used, and what is known of the usable ones.

    What `cache` does not hold yet is computed from the files in `folder`, by the Dask cluster at the address if one is
    given, and kept. `progress` is told how many images are done, and of how many, after each chunk but the last.
    """
    store = store_folder(cache)
    wanted = {image.digest: locate(folder, image.file) for image in images if not image.reason}
    known = FeatureTable.reserve(len(wanted))
    read_store(store, wanted, known)
    if missing := [(digest, path) for digest, path in wanted.items() if not known.knows(digest)]:
        done = 0
        with workers(dask, missing[0]) as (executor, at_once, travel):
            for found in compute_chunks(missing, executor, at_once, travel):
                since = time.time_ns()
                write_chunk(store, found, since)
                for digest, result, is_permanent in found:
                    known.add(digest, result, since, is_permanent)
                done += len(found)
                if done < len(missing):
                    progress(done, len(missing))
    told = [
        image if image.reason or image.digest not in known.reasons else image.with_reason(*known.reasons[image.digest])
        for image in images
    ]
    return told, known


def store_folder(cache: Path) -> Path:
    """The folder for features: another backbone, Pillow or way of reading an image has another one."""
    files = backbone.__file__, exif.__file__, image_classifier.__file__
    code = [Path(file).read_text(encoding="utf-8") for file in files]
    key = sha256([backbone_weights.DIGEST, PIL.__version__, *code])
    return cache / f"features-{backbone.NAME}-{key[:12]}"


def read_store(store: Path, wanted: Container[str], known: FeatureTable) -> None:
    """Adds to what is known all that the store holds of the wanted images."""
    for path in sorted(store.glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                digests = saved["digests"].tolist()
                rows = [row for row, digest in enumerate(digests) if digest in wanted]
                if rows:
                    reasons, features, thumbnails = saved["reasons"], saved["features"], saved["thumbnails"]
                    cameras, times, since = saved["cameras"], saved["times"], int(saved["since"])
                    check_arrays(len(digests), reasons, features, thumbnails, cameras, times)
                    reasons, captures = reasons.tolist(), list(map(Capture, cameras.tolist(), times.tolist()))
                    for row in rows:
                        description = Description(features[row], thumbnails[row], captures[row])
                        known.add(digests[row], reasons[row] or description, since)
        except OSError:
            continue  # it cannot be read now, or another run has just taken it away
        except Exception:  # it is damaged; a single bit decides what is raised
            with contextlib.suppress(OSError):
                path.unlink()


def check_arrays(images: int, *arrays: np.ndarray) -> None:
    """Raise ValueError unless the arrays of a file, from `reasons` to `times`, are as write_chunk() writes them."""
    one_each = (images,)
    shapes = one_each, (images, backbone.FEATURES), (images, backbone.THUMBNAIL, backbone.THUMBNAIL), one_each, one_each
    for array, kind, shape in zip(arrays, "UfuUi", shapes, strict=True):
        if (array.dtype.kind, array.shape) != (kind, shape):
            raise ValueError(f"an array has the type {array.dtype} and the shape {array.shape}")


def write_chunk(store: Path, found: Found, since: int) -> None:
    """Writes the results of a chunk to the store, except those that another attempt may change.

    `since` is the time at which the images of the chunk were first seen: near-duplicates follow the earliest.
    """
    kept = [(digest, result) for digest, result, is_permanent in found if is_permanent]
    if not kept:
        return
    digests, results = zip(*kept, strict=True)
    empty = np.zeros(backbone.FEATURES, "float32"), np.zeros(2 * [backbone.THUMBNAIL], "uint8"), Capture()
    features, thumbnails, captures = zip(*(empty if isinstance(one, str) else one for one in results), strict=True)
    cameras, times = zip(*captures, strict=True)
    write_arrays(
        store / f"{sha256(digests)[:16]}.npz",
        digests=np.array(digests),
        reasons=np.array([result if isinstance(result, str) else "" for result in results]),
        features=np.stack(features),
        thumbnails=np.stack(thumbnails),
        cameras=np.array(cameras),
        times=np.array(times, "int64"),
        since=since,
    )


@contextlib.contextmanager
def workers(dask: str | None, probe: Item) -> Iterator[tuple[Executor, int, bool]]:
    """What computes the chunks, how many at once, and whether files have to travel because it does not see them."""
    if not dask:
        with ThreadPoolExecutor(1) as executor:
            yield executor, 1, False
        return
    with cluster.connect(dask) as client:
        seen = client.run(can_see, *probe).values()
        threads = sum(client.nthreads().values())
        yield client.get_executor(pure=False), AT_ONCE * threads, not all(seen)


def compute_chunks(missing: list[Item], executor: Executor, at_once: int, travel: bool) -> Iterator[Found]:
    """What backbone.compute_items() says of each chunk, in order; no more than `at_once` chunks are under way."""
    under_way: deque[Future[Found]] = deque()
    try:
        for chunk in group(missing, lambda item: file_size(item[1]), CHUNK, CHUNK_BYTES):
            items: Sequence[tuple[str, Path | bytes]] = chunk
            if travel:
                items = [(digest, content(path)) for digest, path in chunk]
            under_way.append(executor.submit(backbone.compute_items, items))
            if len(under_way) >= at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def content(path: Path) -> bytes | Path:
    """The content of a file; its path when it cannot be read, so that the worker finds no file and says so."""
    try:
        return read_file(path)
    except OSError:
        return path
