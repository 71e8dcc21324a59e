"""Images of every format are read alike, costly or damaged ones are refused, and the classifier marks unknown ones."""

import base64
import contextlib
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from lib.mutants import mutate

from support.colors import COLORS, load_classifier, save_model
from support.images import encoded
from workflow import image_classifier
from workflow.image_classifier import FORMATS, ImageClassifier, ImagePrediction, UnusableError, read_image

import keras
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

SIZE = 32
RED_TOP = np.zeros((60, 40, 3), "uint8") + np.array([20, 20, 220], "uint8")  # blue, and red in the upper half
RED_TOP[:30] = (220, 20, 20)
HEIC = Path(__file__).parent / "support" / "red-top.heic"  # made with heif-enc
NOISE = np.random.default_rng(1).integers(0, 255, (60, 40, 3), "uint8")


def is_red_top(pixels: np.ndarray) -> bool:
    upper, lower = pixels[: SIZE // 2 - 2].mean((0, 1)), pixels[SIZE // 2 + 2 :].mean((0, 1))
    return bool(upper[0] > 180 > 60 > upper[2] and lower[2] > 180 > 60 > lower[0])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("WEBP", "RGB"),
        ("BMP", "RGB"),
        ("TIFF", "RGB"),
    ],
)
def test_any_format_and_mode_becomes_the_same_rgb_square(kind, mode, tmp_path):
    path = tmp_path / "wrong-ending.jpeg"
    path.write_bytes(encoded(Image.fromarray(RED_TOP).convert(mode), kind))
    pixels = read_image(path, SIZE)
    assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)
    assert is_red_top(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores an upright image like this
    stored = Image.fromarray(RED_TOP)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert is_red_top(read_image(encoded(stored, "JPEG", exif=exif, quality=95), SIZE))


def test_transparency_becomes_white():
    image = Image.fromarray(RED_TOP).convert("RGBA")
    image.putalpha(0)
    assert read_image(encoded(image, "PNG"), SIZE).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "AVIF", "PNG"])
def test_first_frame_of_an_animation_is_read(kind):
    frames = [Image.fromarray(RED_TOP), Image.new("RGB", (40, 60), "green")]
    assert is_red_top(read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), SIZE))


def test_one_pixel_is_an_image():
    assert (read_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), SIZE) == (9, 8, 7)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>Please sign in</html>", "unknown format"),
        (encoded(Image.fromarray(NOISE), "JPEG")[:2000], "truncated"),
        (encoded(Image.fromarray(NOISE), "PNG")[:2000], "truncated"),
        (encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw")[:2000], "truncated"),
        (encoded(Image.new("1", (10_000, 5_000)), "PNG"), "fewer than 50,000,000"),
        (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "fewer than 50,000,000"),
    ],
)
def test_unusable_content_is_refused_with_the_reason(content, reason, tmp_path):
    path = tmp_path / "image.jpeg"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(ValueError, match=reason):
            read_image(source, SIZE)


@pytest.mark.parametrize(("kind", "exif"), [("PNG", b"II*\0"), ("WEBP", b"II*\0"), ("PNG", b"garbage!")])
def test_damaged_exif_is_ignored(kind, exif):
    assert is_red_top(read_image(encoded(Image.fromarray(RED_TOP), kind, exif=exif), SIZE))


@pytest.mark.survived("image: EXIF with a camera maker that is a number")
def test_orientation_beside_a_damaged_tag_is_undone():
    maker, orientation = b"\x0f\1\5\0\1\0\0\0\x08\0\0\0", b"\x12\1\3\0\1\0\0\0\3\0\0\0"
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + maker + orientation + bytes(4)
    rotated = Image.fromarray(RED_TOP).transpose(Image.Transpose.ROTATE_180)
    assert is_red_top(read_image(encoded(rotated, "PNG", exif=exif), SIZE))


def test_missing_file_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_image(tmp_path / "none.jpeg", SIZE)


def test_keras_file_with_code_is_not_loaded(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Lambda(lambda pixels: pixels)])
    model.save(tmp_path / "model.keras")
    config = {"class_names": ["a", "b"], "image_size": 8}
    context = SimpleNamespace(artifacts={"model": str(tmp_path / "model.keras")}, model_config=config)
    with pytest.raises(ValueError, match="unsafe"):
        ImageClassifier().load_context(context)


@pytest.mark.survived("image: a damaged AVIF", "image: mutants of every format")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged metadata
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_image_is_refused_with_a_reason(kind):
    random = np.random.default_rng(5)
    whole = HEIC.read_bytes() if kind == "HEIF" else encoded(Image.fromarray(NOISE), kind)
    bodies = [mutate(whole, random) for _ in range(150)]
    bodies.append(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    for body in bodies:
        with contextlib.suppress(ValueError):  # and nothing else
            assert read_image(body, SIZE).shape == (SIZE, SIZE, 3)


@pytest.mark.survived("image: HEIC")
def test_heic_is_read():
    assert is_red_top(read_image(HEIC.read_bytes(), SIZE))


def test_exif_orientation_of_heic_is_ignored():
    pixels = read_image(HEIC.with_name("turned.heic").read_bytes(), SIZE)  # HEIC has a property for the orientation
    assert is_red_top(pixels.swapaxes(0, 1))


@pytest.mark.refused("image: HEIC without its decoder")
def test_heic_without_its_decoder_names_the_command(monkeypatch):
    requirement = (Path(__file__).parents[1] / "requirements-heic.txt").read_text().splitlines()[-1]
    monkeypatch.setattr(image_classifier, "FORMATS", tuple(kind for kind in FORMATS if kind != "HEIF"))
    with pytest.raises(ValueError, match=f"pip install {requirement}`"):
        read_image(HEIC, SIZE)


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
DEEP_IMAGES = {
    "0 to 1": (RAMP.astype("float32"), "TIFF"),
    "thermal": ((290 + 20 * RAMP).astype("float32"), "TIFF"),
    "negative": ((-5000 + 100 * RAMP).astype("int32"), "TIFF"),
    "12 bits": ((4095 * RAMP).astype("uint16"), "TIFF"),
    "12 bits PNG": ((4095 * RAMP).astype("uint16"), "PNG"),
    "16 bits": ((65535 * RAMP).astype("uint16"), "PNG"),
    "32 bits": ((2_000_000_000 * RAMP).astype("int32"), "TIFF"),
    "big-endian": ((4095 * RAMP).astype(">u2"), "TIFF"),
}


@pytest.mark.survived("image: values fill a small part of the range")
@pytest.mark.parametrize("name", DEEP_IMAGES)
def test_gray_with_many_bits_keeps_what_it_shows(name):
    values, kind = DEEP_IMAGES[name]
    image = Image.frombytes("I;16B", (64, 64), values.tobytes()) if name == "big-endian" else Image.fromarray(values)
    row = read_image(encoded(image, kind), SIZE)[SIZE // 2, :, 0]
    assert row[0] < 10
    assert row[-1] > 245
    assert 110 < row[SIZE // 2] < 145


def test_hot_pixel_does_not_darken_an_image():
    values = (4095 * RAMP).astype("uint16")
    values[5, 5] = 65535
    assert read_image(encoded(Image.fromarray(values), "TIFF"), SIZE)[20, -1, 0] > 245


@pytest.mark.refused("image: values that are not numbers", "image: 16-bit colors, nearly all black")
def test_values_that_8_bits_cannot_hold_are_refused():
    for value in (np.nan, np.inf):
        values = RAMP.astype("float32")
        values[3, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            read_image(encoded(Image.fromarray(values), "TIFF"), SIZE)
    with pytest.raises(ValueError, match="16-bit"):
        read_image(make_png(4095), SIZE)
    assert read_image(make_png(65535), SIZE).max() == 255


def make_png(value: int) -> bytes:
    """Return a PNG file with 16-bit colors, which Pillow cannot write: 8 x 8 pixels of a gray value."""
    header, rows = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), (b"\0" + struct.pack(">H", value) * 24) * 8
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_tiff(planes: np.ndarray, sample_format: int) -> bytes:
    """Return a TIFF file with the planes (samples, height, width) one after the other; Pillow cannot write these."""
    count, height, width = planes.shape
    bits, size = 8 * planes.itemsize, planes[0].nbytes
    start = 10 + 12 * 10
    arrays = [
        [bits] * count,
        [sample_format] * count,
        *([start + 12 * count + size * i for i in range(count)], [size] * count),
    ]
    data = b"".join(struct.pack(f"<{count}{kind}", *array) for kind, array in zip("HHII", arrays, strict=True))
    places = [start, start + 2 * count, start + 4 * count, start + 8 * count]
    bits_at, format_at, offsets, sizes = places if count > 1 else (array[0] for array in arrays)
    values = {256: (1, width), 257: (1, height), 258: (count, bits_at), 259: (1, 1), 262: (1, 2 if count > 1 else 1)}
    values |= {273: (count, offsets), 277: (1, count), 279: (count, sizes), 284: (1, 2), 339: (count, format_at)}
    entries = [struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, *value) for tag, value in values.items()]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + data + planes.tobytes()


@pytest.mark.refused("image: a TIFF file whose values Pillow misreads")
def test_tiff_that_pillow_misreads_is_refused():
    planes = RED_TOP.transpose(2, 0, 1)
    assert is_red_top(read_image(write_tiff(planes, 1), SIZE))
    for values, sample_format, reason in (
        (planes.astype("<u2") * 257, 1, "16-bit colors in separate planes"),
        (planes[:1].astype("i1"), 2, "signed values"),
        (planes[:1].astype("<u4") << 24, 1, "above 2,147,483,647"),
        (planes.astype("<f4"), 3, "TIFF file with unsupported values"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_image(write_tiff(values, sample_format), SIZE)


def make_tiff(width: int, height: int, tiles: list[tuple[int, int]]) -> bytes:
    """Return an empty grayscale TIFF file with these tile sizes; more than one repeats the tags."""
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, tile_width) for tile_width, _ in tiles] + [(323, tile_height) for _, tile_height in tiles]
    tags += [(324, 8), (325, 9)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def make_scans(scans: int) -> bytes:
    """Return a progressive JPEG file with this many empty scans at its end."""
    jpeg = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    return jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") :][:10] * scans + jpeg[-2:]


def make_rle(side: int) -> bytes:
    """Return an empty BMP file with run-length encoding."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(header), 0, 0, 14 + len(header)) + header


def make_frames(frames: int) -> bytes:
    """Return an AVIF file of 1024 x 1024 pixels whose frame is repeated."""
    avif = encoded(Image.new("L", (1024, 1024)), "AVIF", speed=10)
    start = avif.index(b"mdat") + 4
    size = struct.pack(">II", start, len(avif) - start)
    assert size in avif  # the location of the image
    return avif.replace(size, struct.pack(">II", start, frames * (len(avif) - start))) + avif[start:] * (frames - 1)


def make_references(count: int) -> bytes:
    """Return an AVIF file with this many references between its items."""
    avif = encoded(Image.new("L", (8, 8)), "AVIF")
    start = avif.index(b"meta") - 4
    end = start + int.from_bytes(avif[start : start + 4])
    box = struct.pack(">I4sII4sHH", 24 + 2 * count, b"iref", 0, 12 + 2 * count, b"dimg", 1, count) + bytes(2 * count)
    return avif[:start] + struct.pack(">I", end - start + len(box)) + avif[start + 4 : end] + box + avif[end:]


def make_parts(items: int) -> bytes:
    """Return an AVIF file whose items have 65,535 parts each, which take no space in the file."""
    location = struct.pack(">IHH", 0, 0, items) + b"".join(struct.pack(">HHH", i, 0, 65_535) for i in range(items))
    boxes = encoded(Image.new("L", (8, 8)), "AVIF")
    start = boxes.index(b"iloc") - 4
    return boxes[:start] + struct.pack(">I", 8 + len(location)) + b"iloc" + location


def make_chunks(kind: bytes, data: bytes, count: int) -> bytes:
    """Return a PNG file with this many chunks of a kind before its pixels, and as many after them."""
    png = encoded(Image.new("L", (8, 8)), "PNG")
    chunks = count * (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return png[:33] + chunks + png[33:-12] + chunks + png[-12:]


def insert_parts(kind: str, part: bytes, count: int) -> bytes:
    """Return a JPEG or GIF file with this many parts in its header."""
    whole = encoded(Image.new("L", (8, 8)), kind)
    start = {"JPEG": 2, "GIF": whole.index(b",")}[kind]
    return whole[:start] + count * part + whole[start:]


def make_strips(count: int) -> bytes:
    """Return a TIFF file with this many empty strips."""
    values = {256: (4, 8), 257: (4, 8), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1), 278: (4, 8)}
    entries = [struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in values.items()]
    entries += [struct.pack("<HHII", tag, 4, count, 200) for tag in (273, 279)]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(200 + 4 * count)


COSTLY = {
    "a PNG of many chunks": lambda: make_chunks(b"tIME", bytes(7), 5000),
    "a PNG of many color profiles": lambda: make_chunks(b"iCCP", b"x\0\0" + zlib.compress(bytes(1_000_000)), 20),
    "a JPEG of many segments": lambda: insert_parts("JPEG", b"\xff\xfe\0\3a", 5000),
    "a JPEG of fill bytes": lambda: insert_parts("JPEG", b"\xff", 50_000),
    "a GIF of many extensions": lambda: insert_parts("GIF", b"!\xfe\1a\0", 5000),
    "a TIFF of many strips": lambda: make_strips(200_000),
    "a false size in an AVIF": lambda: HEIC.with_name("false-size.avif").read_bytes(),  # 8000 x 6300 pixels, not 100
    "an AVIF of many frames": lambda: make_frames(50),
    "an AVIF of many parts": lambda: make_parts(1000),
    "an AVIF of many references": lambda: make_references(50_000),
    "a large tile": lambda: make_tiff(100, 100, [(30_000, 30_000)]),
    "tall tiles": lambda: make_tiff(60_000, 800, [(16, 65_536)]),
    "a repeated tag": lambda: make_tiff(100, 100, [(30_000, 30_000), (128, 128)]),
    "a width of one": lambda: encoded(Image.new("1", (1, 7_000_000)), "PNG"),
    "a height of one": lambda: encoded(Image.new("1", (7_000_000, 1)), "PNG"),
    "many scans": lambda: make_scans(1000),
    "run lengths": lambda: make_rle(7000),
}


@pytest.mark.refused(*(f"image: a small file that is slow to decode, {name}" for name in COSTLY))
@pytest.mark.parametrize("name", COSTLY)
def test_costly_image_is_refused_before_decoding(name, monkeypatch):
    content = COSTLY[name]()
    monkeypatch.setattr(image_classifier, "resize_to_rgb", None)  # must not be called
    assert len(content) < 1_000_000
    assert image_classifier.count_pixels(content) == 0
    with pytest.raises(ValueError, match=r"fewer than|ambiguous|too many parts"):
        read_image(content, SIZE)


@pytest.mark.survived("image: a photo of 200 megapixels", "image: a photo in MPO format")
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_phone_photos_are_read(kind):
    options = {"save_all": True, "append_images": [Image.new("L", (80, 60))]} if kind == "MPO" else {}
    photo = encoded(Image.new("L", (16_384, 12_288), 200), kind, **options)
    assert (b"MPF" in photo) == (kind == "MPO")
    assert image_classifier.count_pixels(photo) == 16_384 * 12_288 // 8
    assert read_image(photo, SIZE).min() == 200


@pytest.mark.survived("image: warnings of decoders")
def test_decoders_print_nothing(tmp_path):
    exif = encoded(Image.fromarray(RED_TOP), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    tiff = bytearray(encoded(Image.fromarray(RED_TOP), "TIFF", compression="tiff_lzw"))
    tiff[8:60] = b"\xff" * 52
    large = encoded(Image.new("1", (10_000, 9_000)), "JPEG")
    for number, content in enumerate((exif, bytes(tiff), large)):
        (tmp_path / f"{number}").write_bytes(content)
    program = (
        "import contextlib, pathlib, sys; from workflow.image_classifier import read_image\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    with contextlib.suppress(ValueError): read_image(path, 32)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def color_model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("color_model"))


def predict_colors(folder: Path, **options) -> dict[str, ImagePrediction]:
    """Return the prediction for each of COLORS of a model with these thresholds."""
    images = [encoded(Image.new("RGB", (9, 9), colour), "PNG") for colour in COLORS.values()]
    predictions = load_classifier(folder, **options).predict(list(map(to_base64, images)))
    return dict(zip(COLORS, predictions, strict=True))


def test_image_unlike_all_training_images_is_unknown(color_model):
    predictions = predict_colors(color_model, max_novelty=0.5)
    assert [name for name, prediction in predictions.items() if prediction.unknown] == ["blue"]
    assert [prediction.nearest for prediction in predictions.values()] == ["red/1", "red/2", "green/1", "green/2"]
    assert predictions["red"].similarity == pytest.approx(1, abs=1e-3)
    assert predictions["blue"].similarity < 0.5


def test_without_thresholds_nothing_is_unknown_or_unsure(color_model):
    for prediction in predict_colors(color_model).values():
        assert (prediction.unknown, prediction.unsure) == (None, None)
        assert prediction.similarity is not None


def test_model_without_a_backbone_has_no_similarity(color_model):
    for prediction in predict_colors(color_model, has_references=False, unsure_below=0.6).values():
        assert (prediction.unknown, prediction.similarity, prediction.nearest) == (None, None, None)
        assert prediction.unsure == (prediction.probability < 0.6)


def test_image_with_a_low_probability_is_unsure(color_model):
    predictions = predict_colors(color_model, unsure_below=0.8)
    assert [name for name, prediction in predictions.items() if prediction.unsure] == ["dark red", "blue"]


def test_cosines_are_those_of_the_shrunk_covariance():
    draw, labels = np.random.default_rng(3), np.repeat([0, 1, 2], [9, 4, 1])
    units = draw.normal(size=(14, 6)) * [3, 1, 1, 1, 1, 0.3] + labels[:, None]
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    images = draw.normal(size=(5, 6))
    residuals = units - np.stack([units[labels == label].mean(axis=0) for label in range(3)])[labels]
    covariance = residuals.T @ residuals / 11
    covariance += image_classifier.SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    center = np.mean([units[labels == label].mean(axis=0) for label in range(3)], axis=0) * 3 / 4
    root = np.linalg.inv(np.linalg.cholesky(covariance)).T
    whitened, references = (
        features / np.linalg.norm(features, axis=1, keepdims=True)
        for features in ((images - center) @ root, (units - center) @ root)
    )
    cosines = np.asarray(image_classifier.fit_whitening(units, labels, 6).compare(images))
    assert cosines == pytest.approx(whitened @ references.T, abs=1e-6)


def test_identical_references_have_finite_cosines():
    units = np.tile(np.eye(4)[0], (3, 1))
    cosines = np.asarray(image_classifier.fit_whitening(units, np.zeros(3, int), 4).compare(np.eye(4)))
    assert cosines[0] == pytest.approx(1)
    assert np.isfinite(cosines).all()


def make_classifier() -> ImageClassifier:
    """Return a classifier without a model, to test what precedes it."""
    classifier = ImageClassifier()
    classifier.image_size, classifier.classify = 8, len
    classifier.large, classifier.admitting, classifier.decoding = [], threading.Lock(), threading.Lock()
    return classifier


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.refused("endpoint: too many images, or too many pixels, in one request")
def test_too_large_request_is_refused_before_decoding(monkeypatch):
    bomb = to_base64(encoded(Image.new("1", (7000, 7000)), "PNG"))
    monkeypatch.setattr(image_classifier, "read_image", None)  # must not be called
    with pytest.raises(UnusableError, match="at most 2,000"):
        make_classifier().predict(["x"] * 2001)
    with pytest.raises(UnusableError, match="at most 300,000,000"):
        make_classifier().predict([bomb] * 7)


@pytest.mark.survived("endpoint: many large requests at once")
def test_large_requests_wait_and_small_ones_do_not(monkeypatch):
    large, small = (encoded(Image.new("1", (side, side)), "PNG") for side in (3200, 8))
    is_decoding, resume = threading.Semaphore(0), threading.Event()

    def read(content, size):
        if content == large:
            is_decoding.release()
            assert resume.wait(30)
        return np.zeros((size, size, 3), "uint8")

    monkeypatch.setattr(image_classifier, "read_image", read)
    classifier, count = make_classifier(), image_classifier.MAX_LARGE_REQUESTS
    with ThreadPoolExecutor(count) as pool:
        requests = [pool.submit(classifier.predict, [to_base64(large)]) for _ in range(count)]
        assert is_decoding.acquire(timeout=30)
        while len(classifier.large) < count:
            time.sleep(0.01)
        assert classifier.predict([to_base64(small)] * 5) == 5
        with pytest.raises(MlflowException, match="too many large requests") as error:
            classifier.predict([to_base64(large)])
        assert error.value.get_http_status_code() == 503
        assert not is_decoding.acquire(blocking=False)  # the other large requests wait for the first
        resume.set()
        assert [request.result() for request in requests] == [1] * count
    assert classifier.predict([to_base64(large)]) == 1


@pytest.mark.parametrize(("options", "scale"), [({}, 1 / 8), ({"progressive": True, "subsampling": 0}, 0.6)])
def test_jpeg_costs_less_than_its_pixels(options, scale):
    jpeg = encoded(Image.new("RGB", (6000, 6000)), "JPEG", **options)
    assert image_classifier.count_pixels(jpeg) == pytest.approx(6000 * 6000 * scale)
