"""The features of the images of a folder: each is computed once, and kept.

They are kept in the data set's folder, in files of up to CHUNK images, by the digests of the images and of what
computes them. A file that is damaged is computed anew. On a Dask cluster the chunks go to the workers; on one machine
the same code computes them one after the other, with all cores.
"""

import contextlib
import io
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from workflow.images import image_folder
from workflow.model import backbone, cluster, image_classifier

import numpy as np
import PIL

CHUNK = 64  # images: what one task computes, and what is lost when its process dies
CHUNK_BYTES = 8_000_000  # of image files in one task, because they may have to travel to a worker
AT_ONCE = 2  # tasks per thread of a cluster: one that is computed, one that waits
Item = tuple[str, Path | bytes]  # an image's digest, and where its content is, or the content


class Described(NamedTuple):
    """What is kept of an image: the backbone's features, a thumbnail, and when it was first seen (ns)."""

    features: np.ndarray
    thumbnail: np.ndarray
    since: int


def load_features(
    images: list[dict], folder: Path, into: Path, dask: str | None, progress: Callable[[int, int], None]
) -> tuple[list[dict], dict[str, Described]]:
    """The rows with a reason each ("" for a usable image), and what is known of the usable images by digest.

    What `into` does not hold yet is computed from the files in `folder`, by the Dask cluster at the address if one is
    given, and kept. `progress` is told how many images are done, and of how many, after each chunk but the last.
    """
    store, duplicates = store_folder(into), image_folder.find_duplicates(images)
    wanted = {image["digest"]: folder / image["file"] for image in images if image["file"] not in duplicates}
    known = read_store(store, wanted.keys())
    if missing := [(digest, path) for digest, path in wanted.items() if digest not in known]:
        done = 0
        with workers(dask, missing[0]) as (executor, at_once, travel):
            for found in compute_chunks(missing, executor, at_once, travel):
                keep(store, found)
                now = time.time_ns()
                known |= {
                    digest: result if isinstance(result, str) else Described(*result, now)
                    for digest, result, _ in found
                }
                done += len(found)
                if done < len(missing):
                    progress(done, len(missing))
    reasons = {digest: result for digest, result in known.items() if isinstance(result, str)}
    rows = [image | {"reason": duplicates.get(image["file"]) or reasons.get(image["digest"], "")} for image in images]
    return rows, {digest: result for digest, result in known.items() if not isinstance(result, str)}


def store_folder(into: Path) -> Path:
    """The folder for features: another backbone, Pillow or way of reading an image has another one."""
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (backbone, image_classifier)]
    key = image_folder.sha256([backbone.DIGEST, PIL.__version__, *code])
    return into / f"features-{backbone.NAME}-{key[:12]}"


def read_store(store: Path, digests) -> dict[str, Described | str]:
    """What the store holds of the images, or the reason why an image cannot be used."""
    known = {}
    for path in sorted(store.glob("*.npz")):
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                names = saved["digests"].tolist()
                rows = [row for row, digest in enumerate(names) if digest in digests]
                if rows:
                    reasons, found, thumbnails = saved["reasons"].tolist(), saved["features"], saved["thumbnails"]
                    since = path.stat().st_mtime_ns
                    known |= {names[row]: reasons[row] or Described(found[row], thumbnails[row], since) for row in rows}
        except (EOFError, IndexError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile):
            with contextlib.suppress(OSError):
                path.unlink()  # it is damaged, or another run has just taken it away for that reason
    return known


def keep(store: Path, found: list[tuple[str, tuple[np.ndarray, np.ndarray] | str, bool]]) -> None:
    """Writes what was found of a chunk to the store, but for what another attempt may find otherwise."""
    kept = [(digest, result) for digest, result, lasting in found if lasting]
    if not kept:
        return
    digests, results = zip(*kept, strict=True)
    nothing = np.zeros(backbone.FEATURES, "float32"), np.zeros(2 * [backbone.THUMBNAIL], "uint8")
    features, thumbnails = zip(*(nothing if isinstance(one, str) else one for one in results), strict=True)
    file = io.BytesIO()
    np.savez(
        file,
        digests=np.array(digests),
        reasons=np.array([result if isinstance(result, str) else "" for result in results]),
        features=np.stack(features),
        thumbnails=np.stack(thumbnails),
    )
    image_folder.write_whole(store / f"{image_folder.sha256(digests)[:16]}.npz", file.getvalue())


@contextlib.contextmanager
def workers(dask: str | None, probe: Item) -> Iterator[tuple[Executor, int, bool]]:
    """What computes the chunks, how many at once, and whether files have to travel because it does not see them."""
    if dask is None:
        with ThreadPoolExecutor(1) as executor:
            yield executor, 1, False
        return
    with cluster.connect(dask) as client:
        cluster.send_code(client)
        seen = client.run(backbone.sees, *probe).values()
        threads = sum(client.nthreads().values())
        yield client.get_executor(pure=False), AT_ONCE * threads, not all(seen)


def compute_chunks(missing: list[Item], executor: Executor, at_once: int, travel: bool) -> Iterator[list]:
    """What backbone.describe() says of each chunk, in order; no more than `at_once` chunks are under way."""
    under_way = deque()
    try:
        for chunk in chunks(missing):
            items = [(digest, content(path)) for digest, path in chunk] if travel else chunk
            under_way.append(executor.submit(backbone.describe, items))
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
        return path.read_bytes()
    except OSError:
        return path


def chunks(missing: list[Item]) -> Iterator[list[Item]]:
    """The images in groups of at most CHUNK images, and of CHUNK_BYTES unless a single image is larger."""
    chunk, size = [], 0
    for digest, path in missing:
        length = path.stat().st_size if path.exists() else 0
        if chunk and (len(chunk) == CHUNK or size + length > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append((digest, path))
        size += length
    if chunk:
        yield chunk
