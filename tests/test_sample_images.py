import draw
from support.project import PROJECT

import numpy as np
from PIL import Image


def test_samples_are_small_and_what_the_script_draws(tmp_path):
    draw.write(tmp_path)
    samples = sorted(
        path.relative_to(PROJECT / "sample_images") for path in (PROJECT / "sample_images").glob("*/*.jpeg")
    )
    assert samples == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*.jpeg"))
    assert len(samples) >= 40
    assert sum((PROJECT / "sample_images" / name).stat().st_size for name in samples) <= 1_000_000
    for name in samples:  # JPEG encoders differ a little from one Pillow to the next
        ours, redrawn = (np.asarray(Image.open(root / name), int) for root in (PROJECT / "sample_images", tmp_path))
        assert np.abs(ours - redrawn).mean() < 2, name
