"""What is found in a folder of photos: odd photos, small classes, formats, wrong labels."""

from workflow.images import findings
from workflow.records import ImageFile, Prediction

import numpy as np
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
    assert findings.check_folder(good, features, [], tmp_path) == []
    features["a/5.jpeg"] = draw.normal(size=50)
    found = findings.check_folder(images, features, [(images[0], images[20])], tmp_path)
    assert [(one.kind, one.file, one.class_name) for one in found] == [
        ("near-duplicates", "a/0.jpeg", "a"),
        ("unlike its class", "a/5.jpeg", "a"),
        ("few photos", "", "c"),
        ("format", "", "b"),
    ]
    assert "in two classes" in found[0].detail


def test_doubtful_labels_come_with_the_least_likely_first():
    predictions = [
        Prediction(str(number), "a", "b" if own < 0.5 else "a", max(own, 1 - own), {"a": own})
        for number, own in enumerate((0.4, 0.9, 0.01))
    ]
    assert [one.file for one in findings.find_doubtful_labels(predictions)] == ["2", "0"]
