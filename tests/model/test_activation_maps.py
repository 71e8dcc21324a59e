"""Class activation maps add up to the margin, and peak at the object."""

import io
from types import SimpleNamespace

import draw
from support.images import encoded, odd_images
from support.project import PROJECT
from workflow.image_classifier import read_image
from workflow.model import activation_maps, backbone
from workflow.model.head import add_backbone, build_head, compile_model
from workflow.model.small_network import build_small_network

import keras
import numpy as np
import pytest
from PIL import Image

SIZE, HALF = backbone.IMAGE_SIZE, backbone.IMAGE_SIZE // 2
TEMPERATURE = 1.7
FRUITS = ("apples", "oranges")
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Keras saves with NumPy 2


def train_head(pixels: np.ndarray, labels: np.ndarray):
    """Return a head trained on the photos."""
    head = build_head(int(labels.max()) + 1, dropout=0.2)
    compile_model(head, 0.03, steps=60)
    head.fit(backbone.compute_features(pixels), labels, epochs=30, verbose=0)
    return head


def make_classifier(model) -> SimpleNamespace:
    """Return the part of an ImageClassifier that activation maps use."""
    return SimpleNamespace(model=model, image_size=SIZE)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    paths = sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[::3]
    return np.stack([read_image(path, SIZE) for path in paths])


@pytest.fixture(scope="module")
def classifier(pixels):
    """A classifier of apples and oranges."""
    head = train_head(pixels, np.repeat([0, 1], len(pixels) // 2))
    return make_classifier(add_backbone(head, TEMPERATURE))


def check_margins(classifier, pixels: np.ndarray, temperature: float) -> None:
    """Check that contributions and maps, with the bias, add up to the margins of the predicted classes."""
    logits = temperature * np.log(classifier.model.predict(pixels, verbose=0).astype("float64"))
    contributions, bias, predicted = activation_maps.compute_contributions(classifier, pixels)
    assert predicted.tolist() == logits.argmax(axis=1).tolist()
    margins = [row.max() - np.delete(row, row.argmax()).mean() for row in logits]
    assert min(margins) > 0.1
    assert contributions.sum(axis=(1, 2, 3)) + bias == pytest.approx(margins, abs=1e-3)
    maps = activation_maps.compute_maps(classifier, pixels)
    assert (maps.shape, maps.dtype) == ((len(pixels), SIZE, SIZE), np.float32)
    assert maps.sum(axis=(1, 2)) + bias == pytest.approx(margins, abs=1e-3)


@pytest.mark.slow
def test_contributions_of_a_saved_model_add_up_to_the_margin(pixels, tmp_path):
    head = train_head(pixels, np.arange(len(pixels)) % 3)
    add_backbone(head, TEMPERATURE).save(tmp_path / "model.keras")
    loaded = make_classifier(keras.saving.load_model(tmp_path / "model.keras"))
    check_margins(loaded, pixels[:9], TEMPERATURE)
    assert activation_maps.compute_contributions(loaded, pixels[:2])[0].shape == (2, len(backbone.VIEWS), 7, 7)


def test_model_with_two_views_and_no_temperature_is_explained(classifier, pixels, monkeypatch):
    monkeypatch.setattr(backbone, "VIEWS", (336, 224))
    older = backbone.build_backbone.__wrapped__()  # bypass the cache that other tests share
    _, dropout, dense, _, softmax = classifier.model.layers
    model = keras.Sequential([keras.Input((None, None, 3)), older, dropout, dense, softmax])
    assert activation_maps.list_views(make_classifier(model)) == [336, 224]
    check_margins(make_classifier(model), pixels[:4], 1)


def test_peak_is_in_the_quadrant_with_the_object(classifier):
    random = np.random.default_rng(7)
    side, photos, quarters = HALF - 30, [], []
    for number in range(40):
        plain = np.full((SIZE, SIZE, 3), random.integers(60, 256, 3), "uint8")
        noise = random.integers(0, 256, (SIZE, SIZE, 3), "uint8")
        photo = Image.fromarray(plain if number % 2 else noise)
        row, column = random.integers(0, 2, 2)
        fruit = draw.draw(FRUITS[number % 4 // 2], 200, random).resize((side, side))
        photo.paste(fruit, (column * HALF + random.integers(0, 30), row * HALF + random.integers(0, 30)))
        photos.append(np.asarray(photo))
        quarters.append((row, column))
    maps = activation_maps.compute_maps(classifier, np.stack(photos))
    peaks = [np.divmod(values.argmax(), SIZE) for values in maps]
    hits = [(row // HALF, column // HALF) == quarter for (row, column), quarter in zip(peaks, quarters, strict=True)]
    assert np.mean(hits) >= 0.8


@pytest.mark.parametrize("view", backbone.VIEWS)
def test_spread_positions_keep_their_sum_and_center(view):
    spread = activation_maps.spread_positions(7, view, SIZE)
    assert spread.sum(axis=0) == pytest.approx(1)
    centers = (np.arange(SIZE) + 0.5) @ spread
    assert centers[1:-1] == pytest.approx(((SIZE - view) / 2 + view / 7 * (np.arange(7) + 0.5))[1:-1], abs=0.05 * view)
    level = spread.sum(axis=1)[HALF - view // 4 : HALF + view // 4]
    assert level == pytest.approx(7 / view, rel=0.05)


def test_model_without_a_backbone_is_not_explainable(classifier):
    assert activation_maps.is_explainable(classifier)
    assert not activation_maps.is_explainable(make_classifier(build_small_network(2, 32, 0.1)))


def test_explanations_are_upright_and_a_reason_if_unusable(classifier):
    photo = draw.draw("apples", 900, np.random.default_rng(3)).resize((900, 600))
    contents = odd_images(photo) | {
        "empty": b"",
        "text": b"no image",
        "line.png": encoded(photo.resize((900, 1)), "PNG"),
    }
    overlays = dict(zip(contents, activation_maps.explain_images(classifier, contents.values()), strict=True))
    unusable = {"empty", "text"}
    assert {name for name, overlay in overlays.items() if isinstance(overlay, str)} == unusable
    images = {name: Image.open(io.BytesIO(file)) for name, file in overlays.items() if name not in unusable}
    assert {image.format for image in images.values()} == {"JPEG"}
    sizes = {name: image.size for name, image in images.items()}
    assert (sizes.pop("one-pixel.png"), sizes.pop("line.png")) == ((400, 400), (400, 1))
    assert set(sizes.values()) == {(400, 267)}
    upright, turned = (np.asarray(images[name].convert("L"), "float32") for name in ("upright.jpeg", "turned.jpeg"))
    assert np.abs(upright - turned).mean() < 5


def test_unusable_images_have_a_reason_in_their_place(classifier):
    contents = [b"", encoded(Image.new("RGB", (9, 9)), "PNG"), b"no image"] * 4
    results = activation_maps.explain_images(classifier, contents)
    assert [result if isinstance(result, str) else "" for result in results] == [
        "not an image: the file is empty",
        "",
        "not an image: unknown format",
    ] * 4


def test_overlay_is_brightest_at_the_peak_of_the_map():
    values = np.full((SIZE, SIZE), -1, "float32")
    values[:HALF, HALF:] = 3
    overlay = activation_maps.draw_map(Image.new("RGB", (300, 200), "gray"), values)
    pixels = np.asarray(Image.open(io.BytesIO(overlay)))
    assert pixels.shape == (200, 300, 3)
    assert pixels[:95, 155:].min() > pixels[105:].max() > pixels[:95, :145].min() > 0
    negative = Image.open(io.BytesIO(activation_maps.draw_map(Image.new("RGB", (30, 20)), values - 9)))
    assert np.asarray(negative).max() < 30
