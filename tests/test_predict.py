import json
import shutil
import subprocess

from conftest import Copy, ImageServer, closing_server

import pytest


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos) -> Copy:
    """A copy of the project with a champion, and no server."""
    project = Copy(tmp_path_factory.mktemp("trained"))
    end = project.run("--source", str(photos))
    assert "is the champion" in end.stdout, end.stderr
    return project


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
    origin, bad, good, missing = end.stdout.splitlines()
    assert origin.startswith("apples-oranges version 1, the champion, of run ")
    assert bad == f"{tmp_path / 'bad.jpeg'}: error: not an image: unknown format"
    assert good.startswith(f"{tmp_path / 'good.jpeg'}: apples 0.")
    assert missing == f"{tmp_path / 'missing.jpeg'}: error: No such file or directory"


def test_more_images_than_a_batch_keep_their_order(trained, photos):
    trained.replace("predict.py", "BATCH = 64", "BATCH = 4")
    end = predict(trained, "--json", str(photos / "oranges"), str(photos / "apples"))
    trained.replace("predict.py", "BATCH = 4", "BATCH = 64")
    order = [answer["image"] for answer in json.loads(end.stdout)]
    assert order == sorted(order[:10]) + sorted(order[10:])
    assert "oranges" in order[0]


def test_unknown_model_is_told_in_one_line(trained, photos):
    end = predict(trained, str(photos), "--model", "models:/pears@champion")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].startswith("predict.py: models:/pears@champion cannot be loaded")
    assert end.stdout == ""
