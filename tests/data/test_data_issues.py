"""Data issues: outliers, imbalance, shortcuts, near-duplicates and mislabeled photos."""

from pathlib import Path

from workflow.data.data_issues import Folder, find_issues, find_label_issues, find_outliers, find_shortcuts
from workflow.data.exif import Capture
from workflow.data.sessions import assign_sessions
from workflow.records import HARD, MISLABELED, DataIssue, ImageFile, Prediction

import numpy as np
import pytest
from PIL import Image


def make_folder(path: Path, images: list[ImageFile], features=None, duplicate_of=None, captures=None) -> Folder:
    captures = captures or {}
    return Folder(path, images, features or {}, duplicate_of or {}, captures, assign_sessions(captures))


def test_each_issue_is_found_and_a_good_folder_has_none(tmp_path):
    generator, features, images = np.random.default_rng(2), {}, []
    for name, count in (("a", 12), ("b", 12), ("c", 3)):
        (tmp_path / name).mkdir()
        center = generator.normal(size=50)
        for number in range(count):
            file = f"{name}/{number}.{'png' if name == 'b' else 'jpeg'}"
            Image.new("RGB", (40 + number, 40)).save(tmp_path / file)
            images.append(ImageFile(file, name, file))
            features[file] = center + 0.3 * generator.normal(size=50)
    good = [image for image in images if image.class_name == "a"]
    twins = [ImageFile(image.file, "d", f"d{image.digest}") for image in good]
    twin_features = features | {twin.digest: features[image.digest] for twin, image in zip(twins, good, strict=True)}
    assert find_issues(make_folder(tmp_path, good + twins, twin_features)) == []
    features["a/5.jpeg"] = generator.normal(size=50)
    duplicate_of = {"a/0.jpeg": "b/8.png", "b/8.png": "b/8.png"}
    issues = find_issues(make_folder(tmp_path, images, features, duplicate_of))
    assert [(issue.kind, issue.file, issue.class_name) for issue in issues] == [
        ("near_duplicate", "a/0.jpeg", "a"),
        ("outlier", "a/5.jpeg", "a"),
        ("imbalance", "", "c"),
        ("format", "", "b"),
    ]
    assert "in another class" in issues[0].detail
    assert "all 12 photos have the format PNG" in issues[3].detail


def test_empty_folder_has_no_issues(tmp_path):
    assert find_issues(make_folder(tmp_path, [])) == []


def list_shortcuts(folder: Path, **captures: list[Capture]) -> list[DataIssue]:
    """Return the shortcuts of classes whose photos have these captures; the files are missing."""
    images = [
        ImageFile(f"{name}/{number}.jpeg", name, f"{name}{number}")
        for name, of_class in captures.items()
        for number in range(len(of_class))
    ]
    by_digest = {f"{name}{n}": capture for name, of_class in captures.items() for n, capture in enumerate(of_class)}
    return find_shortcuts(make_folder(folder, images, captures=by_digest))


def take(count: int, camera: str, session: int | None = None) -> list[Capture]:
    """Return the captures of photos from one session, or from a session each."""
    base = START if session is None else START + DAY * session
    return [Capture(camera, base + (DAY * n if session is None else n)) for n in range(count)]


DAY, START = 86_400, 1_714_572_180  # seconds
NO_EXIF = Capture()


@pytest.mark.parametrize(
    ("captures", "expected"),
    [
        ({"a": take(12, "X1"), "b": take(12, "X2")}, [("camera", "a"), ("camera", "b")]),
        ({"a": [*take(9, "X1"), NO_EXIF], "b": [NO_EXIF] * 10}, [("camera", "a")]),
        ({"a": [*take(9, "X1"), NO_EXIF], "b": [NO_EXIF] * 9 + take(1, "X1")}, [("camera", "a")]),
        ({"a": take(8, "X1") + [NO_EXIF] * 2, "b": [NO_EXIF] * 10}, []),
        ({"a": take(10, "X1"), "b": [NO_EXIF] * 8 + take(2, "X1")}, []),
        ({"a": take(10, "X1"), "b": [NO_EXIF] * 10, "c": take(10, "X1")}, []),
        ({"a": take(3, "X1"), "b": take(2, "X2")}, [("camera", "a")]),
        ({"a": [NO_EXIF] * 9, "b": [NO_EXIF] * 9}, []),
        ({"a": take(9, "X1")}, []),
        ({"a": take(9, "X1", 1), "b": take(9, "X1", 2)}, [("session", "a"), ("session", "b")]),
        ({"a": take(9, "X1", 1), "b": take(9, "X1", 1)}, []),
        ({"a": take(9, "X1", 50), "b": take(9, "X1")}, [("session", "a")]),
        ({"a": take(9, "X1", 1), "b": take(9, "X2")}, [("camera", "a"), ("camera", "b"), ("session", "a")]),
        ({"a": take(5, "X1", 1) + take(5, "X1", 2), "b": take(9, "X1", 3)}, [("session", "b")]),
        ({"a": [Capture("X1")] * 4, "b": [NO_EXIF] * 4}, [("camera", "a")]),
    ],
)
def test_camera_or_session_of_one_class_alone_is_an_issue(tmp_path, captures, expected):
    assert [(issue.kind, issue.class_name) for issue in list_shortcuts(tmp_path, **captures)] == expected


def test_shortcut_names_camera_session_and_unknown_photos(tmp_path):
    camera, session = list_shortcuts(tmp_path, a=take(12, "Apple iPhone 12", 0), b=take(3, "X2") + [NO_EXIF] * 3)
    assert "from one camera, Apple iPhone 12" in camera.detail
    assert "camera unknown for 3 of 6" in camera.detail
    assert "Apple iPhone 12 at 2024-05-01 14:03" in session.detail


def test_unlikely_labels_come_first_and_hard_photos_last():
    def predict(file: str, probability: float) -> Prediction:
        predicted = "a" if probability >= 0.5 else "b"
        probabilities = {"a": probability, "b": 1 - probability}
        return Prediction(file, "a", predicted, max(probabilities.values()), probabilities)

    predictions = [predict("hard", 0.4), predict("good", 0.9), predict("wrong", 0.05), predict("worse", 0.01)]
    issues = find_label_issues(predictions)
    assert [(issue.file, issue.kind) for issue in issues] == [
        ("worse", MISLABELED),
        ("wrong", MISLABELED),
        ("hard", HARD),
    ]


def test_threshold_for_mislabeled_depends_on_the_classes():
    probabilities = {"a": 0.06, "b": 0.5} | {str(number): 0.04 for number in range(8)}
    (issue,) = find_label_issues([Prediction("", "a", "b", 0.5, probabilities)])
    assert issue.kind == HARD


def test_varied_class_has_no_outliers(tmp_path):
    generator, features, images = np.random.default_rng(2), {}, []
    for name, spread in (("even", 0.3), ("varied", 1.0)):
        center = generator.normal(size=50)
        for number in range(20):
            images.append(ImageFile(f"{name}/{number}.jpeg", name, f"{name}/{number}.jpeg"))
            features[images[-1].digest] = center + spread * generator.normal(size=50)
    assert find_outliers(make_folder(tmp_path, images, features)) == []
