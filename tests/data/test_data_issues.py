"""What is found in a folder of photos: odd photos, small classes, formats, wrong labels."""

from workflow.data import data_issues
from workflow.data.exif import Capture
from workflow.data.sessions import assign_sessions
from workflow.records import HARD, MISLABELED, DataIssue, ImageFile, Prediction

import numpy as np
import pytest
from PIL import Image


def test_each_finding_is_told_and_a_good_folder_has_none(tmp_path):
    draw, features, images = np.random.default_rng(2), {}, []
    for name, count in (("a", 12), ("b", 12), ("c", 3)):
        (tmp_path / name).mkdir()
        centre = draw.normal(size=50)
        for number in range(count):
            file = f"{name}/{number}.{'png' if name == 'b' else 'jpeg'}"
            Image.new("RGB", (40 + number, 40)).save(tmp_path / file)
            images.append(ImageFile(file, name, file))
            features[file] = centre + 0.3 * draw.normal(size=50)
    good = [image for image in images if image.class_name == "a"]
    good += [ImageFile(image.file, "d", image.digest) for image in good]
    assert data_issues.check_folder(good, features, [], tmp_path, {}, {}) == []
    features["a/5.jpeg"] = draw.normal(size=50)
    found = data_issues.check_folder(images, features, [(images[0], images[20])], tmp_path, {}, {})
    assert [(one.kind, one.file, one.class_name) for one in found] == [
        ("near_duplicate", "a/0.jpeg", "a"),
        ("outlier", "a/5.jpeg", "a"),
        ("imbalance", "", "c"),
        ("format", "", "b"),
    ]
    assert "in two classes" in found[0].detail
    assert found[3].detail == (
        "all 12 photos have the format PNG, and hardly any photo of the other classes does: the model may learn the "
        "format"
    )


def find_shortcuts(tmp_path, **captures: list[Capture]) -> list[DataIssue]:
    """Return the issues on classes whose photos were taken like this; the files themselves are missing."""
    by_class = {
        name: [ImageFile(f"{name}/{number}.jpeg", name, f"{name}{number}") for number in range(len(of_class))]
        for name, of_class in captures.items()
    }
    by_digest = {f"{name}{n}": capture for name, of_class in captures.items() for n, capture in enumerate(of_class)}
    return data_issues.find_shortcuts(by_class, tmp_path, by_digest, assign_sessions(by_digest))


def take(count: int, camera: str, session: int | None = None) -> list[Capture]:
    """Return the captures of photos that were taken in one session, or in a session each."""
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
def test_camera_or_session_of_one_class_alone_is_a_finding(tmp_path, captures, expected):
    listed = find_shortcuts(tmp_path, **captures)
    assert [(finding.kind, finding.class_name) for finding in listed] == expected


def test_finding_on_a_camera_or_session_says_what_the_model_may_learn(tmp_path):
    camera, session = find_shortcuts(tmp_path, a=take(12, "Apple iPhone 12", 0), b=take(3, "X2") + [NO_EXIF] * 3)
    assert camera.detail == (
        "all 12 photos come from one camera, Apple iPhone 12, and hardly any photo of the other classes does "
        "(camera unknown for 3 of 6): the model may learn the camera"
    )
    assert session.detail == (
        "all 12 photos come from one session, Apple iPhone 12 at 2024-05-01 14:03, and hardly any photo of the other "
        "classes does (session unknown for 3 of 6): the model may learn its light and background"
    )


def test_unlikely_labels_come_first_and_hard_photos_last():
    def predict(file: str, own: float) -> Prediction:
        predicted = "a" if own >= 0.5 else "b"
        return Prediction(file, "a", predicted, max(own, 1 - own), {"a": own, "b": 1 - own})

    predictions = [predict("hard", 0.4), predict("good", 0.9), predict("wrong", 0.05), predict("worse", 0.01)]
    issues = data_issues.find_label_issues(predictions)
    assert [(one.file, one.kind) for one in issues] == [
        ("worse", MISLABELED),
        ("wrong", MISLABELED),
        ("hard", HARD),
    ]


def test_label_of_many_classes_is_compared_with_a_guess():
    probabilities = {"a": 0.06, "b": 0.5} | {str(number): 0.04 for number in range(8)}
    (issue,) = data_issues.find_label_issues([Prediction("", "a", "b", 0.5, probabilities)])
    assert issue.kind == HARD


def test_varied_class_has_no_odd_photos(tmp_path):
    draw, features, images = np.random.default_rng(2), {}, []
    for name, spread in (("even", 0.3), ("varied", 1.0)):
        (tmp_path / name).mkdir()
        center = draw.normal(size=50)
        for number in range(20):
            images.append(ImageFile(f"{name}/{number}.jpeg", name, f"{name}/{number}.jpeg"))
            features[images[-1].digest] = center + spread * draw.normal(size=50)
    by_class = {name: [one for one in images if one.class_name == name] for name in ("even", "varied")}
    assert data_issues.find_odd(by_class, features) == []
