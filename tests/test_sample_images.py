"""Synthetic images: draw.py reproduces the committed ones, and the hard set has the data issues that it promises."""

import json

import draw
from support.project import PROJECT, Project, artifact, runs_of
from workflow.data.source import copy_samples, remove_samples
from workflow.records import Artifact

import numpy as np
import pytest
from PIL import Image


def test_samples_match_what_the_script_draws(tmp_path):
    draw.write(tmp_path)
    folder = PROJECT / "sample_images"
    names = sorted(path.relative_to(folder) for path in folder.glob("*/*.jpeg"))
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.glob("*/*.jpeg"))
    for name in names:  # JPEG encoders differ slightly between Pillow versions
        committed, redrawn = (np.asarray(Image.open(root / name), int) for root in (folder, tmp_path))
        assert np.abs(committed - redrawn).mean() < 2, name


def test_samples_are_removed_by_content_and_nothing_else(tmp_path):
    samples = PROJECT / "sample_images"
    copy_samples(samples, tmp_path)
    first, second, *_ = sorted(tmp_path.glob("apples/*"))
    first.rename(tmp_path / "apples/drawn-apple-01.jpeg")  # as in an earlier release
    second.write_bytes(b"a photo with the name of a sample")
    remove_samples(samples, tmp_path)
    assert list(tmp_path.glob("*/*")) == [second]


def test_hard_set_is_deterministic_and_has_its_issues(tmp_path):
    for name in ("first", "second"):
        draw.write_hard(tmp_path / name, count=12, size=96)
    first, second = (
        {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in (tmp_path / name).glob("*/*")}
        for name in ("first", "second")
    )
    assert first == second
    assert len(set(first.values())) == len(first) == 4 * (12 + 1) + 2
    assert {"oranges/odd.jpeg", "peaches/blank.jpeg", "apples/copy-01.jpeg", "tomatoes/wrong-12.jpeg"} <= set(first)


@pytest.mark.slow
def test_report_on_the_hard_set_has_something_to_show(tmp_path):
    project = Project(tmp_path)
    draw.write_hard(project.folder / "hard")
    end = project.run("--source", "hard")
    assert end.returncode == 0, end.stderr
    (run,) = runs_of(project)
    assert 0.75 <= run.data.metrics["cv_accuracy"] <= 0.95
    curve = json.loads(artifact(project, run, Artifact.EVIDENCE).read_text())["curve"]
    assert curve[-1]["accuracy"] > curve[0]["accuracy"] + 0.1
    report = artifact(project, run, Artifact.REPORT).read_text()
    for file in ("copy-01.jpeg", "odd.jpeg", "blank.jpeg", "wrong-24.jpeg"):
        assert file in report
