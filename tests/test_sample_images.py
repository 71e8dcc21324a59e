"""The committed sample images: draw.py reproduces them."""

import draw
from support.project import PROJECT

import numpy as np
from PIL import Image


def test_samples_match_what_the_script_draws(tmp_path):
    draw.write(tmp_path)
    folder = PROJECT / "sample_images"
    names = sorted(path.relative_to(folder) for path in folder.glob("*/*.jpeg"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*.jpeg"))
    for name in names:  # JPEG encoders differ slightly between Pillow versions
        committed, redrawn = (np.asarray(Image.open(root / name), int) for root in (folder, tmp_path))
        assert np.abs(committed - redrawn).mean() < 2, name
