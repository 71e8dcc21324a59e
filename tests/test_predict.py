import json
import os
import shutil
import subprocess
import sys

import ml_workflow
import predict as predict_program
from conftest import Copy, ImageServer, closing_server

import pytest


def predict(project: Copy, *arguments: str) -> subprocess.CompletedProcess:
    end = project.run(*arguments, script="predict.py")
    assert "Traceback" not in end.stderr
    return end


def test_champion_answers_files_folders_patterns_and_urls_alike(trained, photos):
    with closing_server(ImageServer(photos)) as images:
        url = f"{images.url}/oranges/orange-2.jpeg"
        end = predict(trained, "--json", str(photos), str(photos / "apples/apple-[12].jpeg"), url)
    answers = json.loads(end.stdout)
    assert end.returncode == 0
    assert len(answers) == 20 + 2 + 1
    by_name = {}
    for answer in answers:
        assert answer["probabilities"].keys() == {"apples", "oranges"}
        assert (
            answer["probability"] == answer["probabilities"][answer["label"]] == max(answer["probabilities"].values())
        )
        by_name.setdefault(answer["image"].rsplit("/", 1)[1], []).append(answer["probabilities"]["apples"])
    for name in ("apple-1.jpeg", "apple-2.jpeg", "orange-2.jpeg"):
        first, again = by_name[name]
        assert first == pytest.approx(again, abs=1e-4)
    right = [answer["label"] in answer["image"] for answer in answers]
    assert sum(right) >= 0.9 * len(right)


def test_bad_images_are_told_and_the_others_answered(trained, photos, tmp_path):
    shutil.copy(photos / "apples/apple-1.jpeg", tmp_path / "good.jpeg")
    (tmp_path / "bad.jpeg").write_text("no image")
    end = predict(trained, str(tmp_path), str(tmp_path / "missing.jpeg"))
    assert end.returncode == 1
    origin, head, bad, good, missing = end.stdout.splitlines()
    assert origin.startswith("models:/apples-oranges/1 (champion), run ")
    assert head.split() == ["image", "label", "probability"]
    assert bad.split(maxsplit=1) == [f"{tmp_path / 'bad.jpeg'}", "error: not an image: unknown format"]
    assert good.split()[:2] == [f"{tmp_path / 'good.jpeg'}", "apples"]
    assert float(good.split()[2]) > 0.5
    assert missing.split(maxsplit=1) == [f"{tmp_path / 'missing.jpeg'}", "error: No such file or directory"]
    json_end = predict(trained, "--json", str(tmp_path))
    assert json_end.returncode == 1
    assert [set(answer) for answer in json.loads(json_end.stdout)] == [
        {"image", "error"},
        {"image", "label", "probability", "probabilities"},
    ]


def test_more_images_than_a_batch_keep_their_order(trained, photos):
    trained.replace("image_classifier.py", "BATCH = 64", "BATCH = 4")
    end = predict(trained, "--json", str(photos / "oranges"), str(photos / "apples"))
    trained.replace("image_classifier.py", "BATCH = 4", "BATCH = 64")
    order = [answer["image"] for answer in json.loads(end.stdout)]
    assert order == sorted(order[:10]) + sorted(order[10:])
    assert "oranges" in order[0]


def test_unknown_model_is_told_in_one_line(trained, photos):
    end = predict(trained, str(photos), "--model", "models:/pears@champion")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith("predict.py: models:/pears@champion cannot be loaded")
    assert end.stdout == ""


def test_empty_and_unreadable_folders_are_told(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop/again").symlink_to(tmp_path / "loop")
    end = predict(trained, "--json", str(tmp_path / "empty"), str(tmp_path / "loop"))
    assert end.returncode == 1
    (answer,) = json.loads(end.stdout)
    assert answer == {"image": str(tmp_path / "empty"), "error": "a folder without images, or not readable"}


def test_name_that_cannot_be_printed_and_reader_that_leaves_end_without_a_traceback(trained, photos, tmp_path):
    shutil.copy(photos / "apples/apple-1.jpeg", os.fsencode(tmp_path) + b"/\xff \n.jpeg")
    assert predict(trained, str(tmp_path)).returncode == 0
    many = [str(photos)] * 500  # more than a pipe holds
    command = [sys.executable, "predict.py", *many]
    program = subprocess.Popen(
        command,
        cwd=trained.folder,
        env=trained.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.readline()
    program.stdout.close()
    assert b"Traceback" not in program.stderr.read()
    program.stderr.close()
    assert program.wait(60) == 1


def test_tracking_uri_is_that_of_the_training_runs():
    assert predict_program.TRACKING_URI == ml_workflow.TRACKING_URI
    assert f"models:/apples-oranges@{ml_workflow.CHAMPION}" == predict_program.MODEL
