"""A folder with one folder of images per class: listed, verified, shrunk once, split by content and loaded.

A file is read again only when its size or times have changed since `digests-*.json` in the data set's folder was
written: delete it to have every byte read.

An image is a row, a dictionary: its file (relative to the folder), class, digest (SHA-256 of the content),
reason ("" when it can be used, else why not) and split (None when it is set aside).
"""

import hashlib
import json
import os
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from workflow.errors import WorkflowError
from workflow.model.image_classifier import read_image
from workflow.running.tracking import writing

import numpy as np
import PIL
from PIL import Image

CERTAIN = 2 * 10**9  # ns after which a change of a file's content is sure to give it another time
CACHE = 50_000_000  # bytes of a split's pixels
FEWEST = 3  # usable images a class: one for each split


def list_images(folder: Path) -> dict[str, list[Path]]:
    """The files of each class folder, by class name; hidden ones are left out.

    Raises WorkflowError when there is no folder, fewer than two classes, or a class without a file.
    """
    if not folder.is_dir():
        raise WorkflowError(f"{folder} is not a folder: give --source a folder with one folder of images a class")
    try:
        classes = [path for path in visible(folder) if path.is_dir()]
        images = {path.name: [file for file in visible(path) if file.is_file() or broken(file)] for path in classes}
    except OSError as error:
        raise WorkflowError(f"{error.filename} cannot be read: {error.strerror}") from error
    if len(classes) < 2:
        raise WorkflowError(f"{folder} has {len(classes)} class folder(s), two or more are needed: one a class")
    for name in images:
        if not images[name]:
            raise WorkflowError(f"{folder / name} has no images: fill it or remove it")
    return images


def broken(path: Path) -> bool:
    """Whether a link leads nowhere."""
    return path.is_symlink() and not path.exists()


def visible(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def sha256(content) -> str:
    """The SHA-256 of bytes, or of anything that JSON can write."""
    return hashlib.sha256(content if isinstance(content, bytes) else json.dumps(content).encode()).hexdigest()


def load_shrunk(images: list[dict], folder: Path, into: Path, size: int) -> tuple[list[dict], dict[str, Path]]:
    """The rows with a reason each ("" for a usable image), and the shrunk copies of the usable images by digest.

    They are named DIGEST.bmp, and lie in a folder of `into` that is made once for these rows, a size and a Pillow.
    """
    prepared = into / f"prepared-{size}-{PIL.__version__}-{sha256(images)[:12]}"
    if not prepared.exists():
        shrink_images(folder, images, prepared, size)
    rows = json.loads((prepared / "images.json").read_text())
    return rows, {row["digest"]: prepared / f"{row['digest']}.bmp" for row in rows if not row["reason"]}


def digest_files(folder: Path, into: Path) -> tuple[str, list[dict]]:
    """The digest of the folder's names and contents, and a row for each file with its class and digest.

    A file that cannot be read keeps a digest of its own. One with the size and the times that digests-*.json in `into`
    remembers is not read again.
    """
    memory = into / f"digests-{sha256(str(folder.resolve()))[:8]}.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    seen = {}

    def row(path: Path) -> dict:
        name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="backslashreplace")
        try:
            now, status = time.time_ns(), path.stat()
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            digest, *state_then = known.get(name, [None])
            if state_then != state:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            if max(state[1:]) < now - CERTAIN:
                seen[name] = [digest, *state]
        except OSError as error:
            digest = sha256(f"{path}: {error.strerror}")
        return {"file": name, "class": path.parent.name, "digest": digest}

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(row, [path for paths in list_images(folder).values() for path in paths]))
    if seen != known:
        with suppress(WorkflowError):  # it only saves time
            write_whole(memory, json.dumps(seen).encode())
    return sha256(rows), rows


def find_duplicates(images: list[dict]) -> dict[str, str]:
    """The reason to set aside, by file: a second copy in its class, or each copy when two classes claim the image."""
    reasons, copies = {}, {}
    for image in images:
        copies.setdefault(image["digest"], []).append(image)
    for first, *others in copies.values():
        reasons |= {other["file"]: f"duplicate of {first['file']}" for other in others}
        if len({image["class"] for image in (first, *others)}) > 1:
            files = ", ".join(image["file"] for image in (first, *others))
            reasons |= {image["file"]: f"one image in two classes: {files}" for image in (first, *others)}
    return reasons


def shrink_images(folder: Path, images: list[dict], prepared: Path, size: int) -> None:
    """Makes `prepared`, whole or not at all: DIGEST.bmp for each usable image, images.json with all reasons.

    An image that was shrunk before, in a folder that differs in its last part alone, is linked from there.
    """
    duplicates = find_duplicates(images)
    known = {path.name: path for path in prepared.parent.glob(f"{prepared.name.rpartition('-')[0]}-*/*.bmp")}

    def shrink(image: dict) -> dict:
        reason, name = duplicates.get(image["file"], ""), f"{image['digest']}.bmp"
        try:
            if not reason and not linked(known.get(name), part / name):
                Image.fromarray(read_image(folder / image["file"], size)).save(part / name)
        except ValueError as error:
            reason = str(error)
        return image | {"reason": reason}

    with writing(prepared):
        prepared.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prepared.parent, prefix=".prepared-") as beside:
            part = Path(beside, "whole")
            part.mkdir()
            with ThreadPoolExecutor() as pool:
                (part / "images.json").write_text(json.dumps(list(pool.map(shrink, images))))
            try:
                os.rename(part, prepared)
            except OSError:
                if not prepared.exists():  # unless another run was first
                    raise


def linked(known: Path | None, path: Path) -> bool:
    """Whether a file could be given a second name; it cannot where it has gone, or where files have one name."""
    with suppress(OSError):
        if known:
            path.hardlink_to(known)
            return True
    return False


def split_by_content(digests: list[str], test_share: float, validation_share: float, salt: int) -> dict[str, str]:
    """The split of each image of one class, by its content alone; {} for fewer than three.

    A class that has drawn too few for a split borrows (one test image is too few, two where it has ten images or more):
    new images then return what was borrowed, and move no other. Train borrows only where all images drew a held-out
    split, with three images once in 125 times.
    """
    if len(digests) < FEWEST:
        return {}
    least = 2 if len(digests) >= 10 else 1  # test images: from a single one no recall can be told
    draw = {digest: int(sha256(f"{salt}:{digest}".encode())[:8], 16) / 16**8 for digest in digests}
    order = sorted(draw, key=draw.get)
    held_out = sum(draw[digest] < test_share + validation_share for digest in order)
    held_out = min(max(held_out, least + 1), len(order) - 1)
    test = min(max(sum(draw[digest] < test_share for digest in order), least), held_out - 1)
    return dict(zip(order, ["test"] * test + ["validation"] * (held_out - test) + ["train"] * len(order), strict=False))


def split_images(
    images: list[dict], test_share: float, validation_share: float, salt: int, leaders: dict[str, str] | None = None
) -> list[dict]:
    """The rows with their split; None for what is set aside and for a class with too few usable images.

    Near-duplicates share the split of the one that leads them, which is at `leaders` by digest, as long as a class has
    enough other images.
    """
    splits = {}
    for name in {image["class"] for image in images}:
        usable = [image["digest"] for image in images if image["class"] == name and not image["reason"]]
        leader = {digest: (leaders or {}).get(digest, digest) for digest in usable}
        if len(set(leader.values())) < FEWEST:
            leader = dict(zip(usable, usable, strict=True))
        found = split_by_content(list(dict.fromkeys(leader.values())), test_share, validation_share, salt)
        splits |= {digest: found[leader[digest]] for digest in usable if found}
    return [image | {"split": None if image["reason"] else splits.get(image["digest"])} for image in images]


def check_classes(images: list[dict]) -> None:
    """Raises WorkflowError, which names the class and its images, when a class has too few usable ones."""
    for name in sorted({image["class"] for image in images}):
        reasons = [
            f"{image['file']}: {image['reason']}" for image in images if image["class"] == name and image["reason"]
        ]
        usable = sum(image["class"] == name and not image["reason"] for image in images)
        if usable < FEWEST:
            raise WorkflowError(
                "; ".join([f"class {name} has {usable} usable image(s), {FEWEST} are needed", *reasons[:3]])
            )


def load_split(split: str, inputs: dict[str, np.ndarray | Path], data: dict, batch_size: int, seed: int):
    """One split as a tf.data.Dataset of (input, label); the order of train follows from the seed and its `epoch`.

    `inputs` has the features of each image by its digest, or the path of its shrunk copy, which stands for its pixels.
    They are kept in memory, but for more than CACHE bytes of pixels, which are read anew in each epoch.
    """
    import tensorflow as tf

    images = [image for image in data["images"] if image["split"] == split]
    names = sorted({image["class"] for image in images})
    chosen = [inputs[image["digest"]] for image in images]
    classes = np.array([names.index(image["class"]) for image in images], "int32")
    labels = tf.constant(classes)
    epoch = tf.Variable(0, dtype=tf.int64, trainable=False)  # training that was interrupted goes on with its order
    order = numbers = tf.data.Dataset.range(len(images))

    def shuffle(_):
        return numbers.shuffle(len(images), seed=seed * 2**20 + epoch, reshuffle_each_iteration=False)

    if split == "train":
        order = tf.data.Dataset.range(1).flat_map(shuffle)
        order = order.apply(tf.data.experimental.assert_cardinality(len(images)))
    if isinstance(chosen[0], Path) and len(chosen) * chosen[0].stat().st_size > CACHE:
        paths, shape = tf.constant([str(path) for path in chosen]), read_pixels(chosen[0]).shape

        def read(number):
            pixels = tf.io.decode_bmp(tf.io.read_file(paths[number]), channels=3)
            return tf.ensure_shape(pixels, shape), labels[number]

        dataset = order.map(read, tf.data.AUTOTUNE).batch(batch_size)
    else:
        values = tf.constant(np.stack([read_pixels(one) if isinstance(one, Path) else one for one in chosen]))
        dataset = order.batch(batch_size).map(lambda some: (tf.gather(values, some), tf.gather(labels, some)))
    dataset = dataset.prefetch(tf.data.AUTOTUNE)
    dataset.class_names, dataset.file_names = names, [image["file"] for image in images]
    dataset.batch_size, dataset.data, dataset.epoch = batch_size, data, epoch
    dataset.labels, dataset.features = classes, None if isinstance(chosen[0], Path) else values.numpy()
    return dataset


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of a shrunk image: uint8, shape (size, size, 3)."""
    with Image.open(path) as image:
        return np.asarray(image)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it: nobody ever sees a part of it."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
