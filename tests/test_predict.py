import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_workflow
from make_docs import normalize, read_region
from predict import (
    describe_nearest,
    find_label,
    list_folder,
    name_picture,
    parse_arguments,
    prepare_folder,
    print_score,
    read_source,
    score,
)
from support.images import ImageServer, closing_server
from support.project import PROJECT, Project
from workflow.data import folder as image_folder
from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.model import activation_maps, small_network
from workflow.serving import registered_model

import mlflow
import numpy as np
import pytest
from PIL import Image


def predict(project: Project, *arguments: str) -> subprocess.CompletedProcess:
    return project.run(*arguments, script="predict.py")


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
    correct = [answer["label"] in answer["image"] for answer in answers]
    assert sum(correct) >= 0.9 * len(correct)


def test_lab_report_shows_what_it_prints(trained):
    _, _, command, *shown, _ = read_region("lab_report.md", "predict").strip().splitlines()[:-1]
    (trained.folder / "sample_images").symlink_to(PROJECT / "sample_images")
    end = predict(trained, *command.split()[3:])
    assert end.returncode == 0
    printed = end.stdout.splitlines()
    assert len(shown) == len(printed) == 2 + 2
    kinds = [
        [re.sub("(unknown: [a-z ]+; |unsure; )?nearest is .*", "nearest", normalize(line)) for line in lines]
        for lines in (shown, printed)
    ]
    kinds = [[re.sub(" (apples|oranges) ", " fruit ", line) for line in lines] for lines in kinds]
    assert kinds[0] == kinds[1]  # another model may see another fruit


def test_bad_images_are_told_and_the_others_answered(trained, photos, tmp_path):
    shutil.copy(photos / "apples/apple-1.jpeg", tmp_path / "good.jpeg")
    (tmp_path / "bad.jpeg").write_text("no image")
    end = predict(trained, str(tmp_path), str(tmp_path / "missing.jpeg"))
    assert end.returncode == 1
    origin, head, bad, good, missing = end.stdout.splitlines()
    assert origin.startswith("models:/apples-oranges/1 (champion), run ")
    assert head.split() == ["image", "label", "probability", "training", "photos"]
    assert bad.split(maxsplit=1) == [f"{tmp_path / 'bad.jpeg'}", "error: not an image: unknown format"]
    assert good.split()[:2] == [f"{tmp_path / 'good.jpeg'}", "apples"]
    assert float(good.split()[2]) > 0.5
    assert missing.split(maxsplit=1) == [f"{tmp_path / 'missing.jpeg'}", "error: No such file or directory"]
    json_end = predict(trained, "--json", str(tmp_path))
    assert json_end.returncode == 1
    assert [set(answer) for answer in json.loads(json_end.stdout)] == [
        {"image", "error"},
        {"image", "label", "probability", "probabilities", "similarity", "unknown", "nearest", "unsure"},
    ]


def test_explain_writes_a_picture_per_image_and_touches_no_other_file(trained, photos, tmp_path):
    mine, pictures = tmp_path / "mine", tmp_path / "new/pictures"
    for folder, kind in (("one", "apple"), ("two", "orange")):  # two photos of the same name
        (mine / folder).mkdir(parents=True)
        shutil.copy(photos / f"{kind}s/{kind}-1.jpeg", mine / folder / "fruit.jpeg")
    (mine / "bad.jpeg").write_text("no image")
    pictures.mkdir(parents=True)
    (pictures / "fruit.jpeg").write_text("a file of the user")
    end = predict(trained, str(mine), "--explain", str(pictures))
    assert end.returncode == 1
    assert end.stdout.splitlines()[-1] == f"2 picture(s) written to {pictures}"
    json_end = predict(trained, "--json", str(mine), "--explain", str(pictures))
    assert json_end.stderr.splitlines()[-1] == f"2 picture(s) written to {pictures}"
    bad, *answers = json.loads(json_end.stdout)
    assert set(bad) == {"image", "error"}
    written = {answer["explanation"] for answer in answers}
    assert {str(path) for path in pictures.iterdir()} == written | {str(pictures / "fruit.jpeg")}
    assert len(written) == 2
    assert (pictures / "fruit.jpeg").read_text() == "a file of the user"
    for path in written:
        with Image.open(path) as picture:
            assert (picture.format, max(picture.size)) == ("JPEG", activation_maps.PICTURE_PIXELS)


@pytest.mark.parametrize(
    ("source", "stem"),
    [
        ("photos/apple 1.jpeg", "apple_1"),
        ("https://ann:secret@host/photos/a.jpeg?size=/9", "a"),
        ("https://ann:secret@host", "image"),
        ("caf\udce9 \x1b.tar.gz", "caf____tar"),
        ("水" * 300, "水" * 40),
    ],
)
def test_name_of_a_picture_says_which_image_it_shows(source, stem):
    assert name_picture(source, b"1") == f"{stem}-6b86b273ff34.explained.jpg"
    assert name_picture(source, b"2") == f"{stem}-d4735e3a265e.explained.jpg"


def make_registered(model) -> SimpleNamespace:
    """A registered model, as far as --explain looks at it."""
    classifier = SimpleNamespace(model=model, image_size=32)
    return SimpleNamespace(uri="models:/a/1", model=SimpleNamespace(unwrap_python_model=lambda: classifier))


@pytest.mark.refused("predict.py --explain: the model has no backbone")
def test_model_without_a_backbone_explains_nothing_and_leaves_no_folder(tmp_path):
    found = make_registered(small_network.build_small_network(2, 32, 4, 0.1))
    with pytest.raises(WorkflowError, match=r"^--explain: models:/a/1 has no backbone .* choose another --model$"):
        prepare_folder(str(tmp_path / "pictures"), [str(tmp_path)], found)
    assert list(tmp_path.iterdir()) == []
    assert prepare_folder(None, [str(tmp_path)], found) is None


@pytest.mark.refused("predict.py --explain: its folder lies among the images, or is a file")
@pytest.mark.parametrize(
    ("explain", "reason"),
    [
        ("photos", "photos lies in photos, which would mix its pictures with your images"),
        ("photos/pictures", "photos/pictures lies in photos, which would"),
        ("link/pictures", "link/pictures lies in photos, which would"),
        ("file", "file cannot be written: File exists"),
    ],
)
def test_folder_for_pictures_that_cannot_serve_is_refused(tmp_path, monkeypatch, explain, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(activation_maps, "is_explainable", lambda _: True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkflowError, match=reason):
        prepare_folder(explain, ["photos", "http://host/a.jpeg"], make_registered(None))
    assert prepare_folder("elsewhere", ["photos"], make_registered(None)).is_dir()


@pytest.mark.slow
def test_more_images_than_a_batch_keep_their_order(trained, photos):
    trained.before = "from workflow.evaluation import metrics; metrics.MAX_BATCH_IMAGES = 4"
    end = predict(trained, "--json", str(photos / "oranges"), str(photos / "apples"))
    trained.before = ""
    order = [answer["image"] for answer in json.loads(end.stdout)]
    assert order == sorted(order[:10]) + sorted(order[10:])
    assert "oranges" in order[0]


def test_unknown_model_is_told_in_one_line(trained, photos):
    end = predict(trained, str(photos), "--model", "models:/pears@champion")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].endswith("pears not found; registered models: apples-oranges")
    assert end.stdout == ""


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        (
            "models:/apples-oranges",
            "models:/apples-oranges names no version: write models:/apples-oranges@champion, or",
        ),
        ("models:/apples-oranges@best", "is not there: there are models:/apples-oranges@champion, models:/apples-ora"),
        (
            "models:/apples-oranges/9",
            "is not there: there are models:/apples-oranges@champion, models:/apples-oranges/1",
        ),
        ("pears", "pears is no model: name one as models:/NAME@champion, models:/NAME/3, or by its folder"),
        ("runs:/0/model", "runs:/0/model cannot be loaded: "),
    ],
)
def test_wrong_model_uri_is_told_with_what_there_is(trained, uri, told):
    mlflow.set_tracking_uri(f"sqlite:///{trained.folder / 'mlflow.db'}")
    with pytest.raises(WorkflowError, match=re.escape(told)) as refused:
        registered_model.load(uri)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_folder_of_other_things_is_unknown_and_drift_is_told(trained, photos, tmp_path):
    draw = np.random.default_rng(5)
    for number in range(20):
        noise = draw.integers(0, 256, (64, 64, 3), "uint8")
        Image.fromarray(noise).resize((256, 256), Image.Resampling.NEAREST).save(tmp_path / f"noise-{number}.png")
    end = predict(trained, str(tmp_path))
    assert end.returncode == 0
    assert len(re.findall("unknown: [a-z ]+; nearest is ", end.stdout)) == 20
    last = end.stdout.splitlines()[-1]
    assert last.startswith("20 of 20 images are unknown, where about 5% would be expected: ")
    own = json.loads(predict(trained, "--json", "--score", str(photos)).stdout)
    assert own["score"]["unknown"] == sum(answer["unknown"] for answer in own["answers"]) <= 4
    trained_on = [answer for answer in own["answers"] if answer["similarity"] > 0.999]
    assert len(trained_on) >= 14
    assert all(answer["image"].endswith(answer["nearest"]) for answer in trained_on)


@pytest.mark.parametrize("options", [[], pytest.param(["--json"], marks=pytest.mark.slow)])
def test_what_is_no_image_file_is_told_and_never_waited_for(trained, tmp_path, options):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/again").symlink_to(tmp_path / "odd")
    (tmp_path / "odd/broken.jpeg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "odd/fifo.jpeg")
    end = predict(trained, *options, str(tmp_path / "empty"), str(tmp_path / "odd"), "x" * 300)
    assert end.returncode == 1
    reasons = [
        "a folder without images, or not readable",
        "No such file or directory",
        "not a file",
        "File name too long",
    ]
    if options:
        assert [answer["error"] for answer in json.loads(end.stdout)] == reasons
    else:
        assert [line.rpartition("error: ")[2] for line in end.stdout.splitlines()[2:]] == reasons


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("mine/apples/1.jpg", "apples"),
        ("mine/apples/garden/1.jpg", "apples"),
        ("mine/apples/oranges/1.jpg", "apples"),
        ("mine/test/apples/1.jpg", "apples"),
        ("mine/pears/1.jpg", ""),
        ("mine/caf\udce9/1.jpg", "caf\\xe9"),
        ("apples/garden/oranges/1.jpg", "oranges"),
        ("apples/garden/1.jpg", "apples"),
        ("http://host/apples/1.jpg", "apples"),
    ],
)
def test_label_is_the_first_class_on_the_way_to_an_image(tmp_path, monkeypatch, image, label):
    monkeypatch.chdir(tmp_path)
    named = [(tmp_path / folder).parts for folder in ("mine", "apples")]
    assert find_label(image, named, ["apples", "oranges", "caf\\xe9"]) == label


def make_answers(folder: Path, unsure: Iterable[bool | None]) -> list[dict]:
    """Return answers to photos of apples and oranges: to four that are correct, and to a wrong one."""
    files = ["apples/1", "apples/2", "apples/3", "oranges/1", "oranges/2"]
    pairs = zip(files, [0.9, 0.8, 0.4, 0.3, 0.1], unsure, strict=True)
    answers = []
    for file, apples, is_unsure in pairs:
        probabilities = {"apples": apples, "oranges": 1 - apples}
        label = max(probabilities, key=probabilities.get)
        answer = {"image": str(folder / file), "label": label, "probability": probabilities[label]}
        answers.append(answer | {"probabilities": probabilities, "unknown": file == "apples/1", "unsure": is_unsure})
    return answers


@pytest.mark.parametrize(
    ("unsure", "sure", "line"),
    [
        ([False, False, True, False, False], {"images": 4, "correct": 4}, "4 of the other 4 are correct"),
        ([False, True, False, True, True], {"images": 2, "correct": 1}, "1 of the other 2 are correct"),
        ([True] * 5, {"images": 0, "correct": 0}, None),
        ([None] * 5, None, None),
    ],
    ids=["one is unsure", "three are unsure", "all are unsure", "no limit"],
)
def test_score_tells_how_many_sure_answers_are_correct(tmp_path, monkeypatch, capsys, unsure, sure, line):
    (tmp_path / "mine").mkdir()
    answers = [*make_answers(tmp_path / "mine", unsure), {"image": str(tmp_path / "mine/apples/4"), "error": "odd"}]
    result = score(answers, [str(tmp_path / "mine")], ["apples", "oranges"])
    assert (result["images"], result["correct"], result["sure"]) == (5, 4, sure)
    assert result["recall"] == {"apples": pytest.approx(2 / 3), "oranges": 1}
    assert result["confusions"] == [{"class": "apples", "answer": "oranges", "images": 1}]
    assert (result["unknown"], result["not_readable"]) == (1, 1)
    print_score(result)
    printed = capsys.readouterr().out
    assert ("Unsure:" in printed) == (line is not None)
    assert (line or "") in printed


def test_unsure_answer_is_told_and_an_unknown_one_before_all():
    answer = {"similarity": 0.5, "nearest": "apples/1.jpeg", "unknown": False, "unsure": True}
    assert describe_nearest(answer) == "unsure; nearest is apples/1.jpeg (0.50)"
    assert describe_nearest(answer | {"unknown": True}).startswith("unknown")
    assert describe_nearest(answer | {"unsure": None}).startswith("nearest")
    del answer["unsure"]  # as a model of an earlier release answers
    assert describe_nearest(answer).startswith("nearest")


@pytest.mark.refused("folder: one in it cannot be read")
def test_folder_lists_linked_classes_and_what_cannot_be_read(photos, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copytree(photos / "apples", mine / "apples")
    (mine / "oranges").symlink_to(photos / "oranges")
    (mine / "again").symlink_to(mine)
    listed = [path for paths in list_images(photos).values() for path in paths]
    assert [path.removeprefix(f"{mine}/") for path in list_folder(mine)] == [
        str(path.relative_to(photos)) for path in listed
    ]
    list_visible = image_folder.list_visible

    def refuse(path):
        if path.name == "apples":
            raise PermissionError(13, "Permission denied", str(path))
        return list_visible(path)

    monkeypatch.setattr(image_folder, "list_visible", refuse)
    found = list_folder(mine)
    assert len(found) == 10 + 1
    assert read_source(found[-1]) == "a folder without images, or not readable"


@pytest.mark.refused("folder: a path in it is too long")
def test_path_that_is_too_long_is_told_with_the_others(tmp_path, monkeypatch):
    (tmp_path / "1.jpeg").write_text("no image")
    long = tmp_path / ("x" * 300)
    monkeypatch.setattr(image_folder, "list_visible", lambda _: [long, tmp_path / "1.jpeg"])
    found = list_folder(tmp_path)
    assert sorted(map(read_source, found), key=str) == ["File name too long", b"no image"]


@pytest.mark.slow
def test_interrupt_does_not_wait_for_a_host_that_does_not_answer(trained, photos):
    with closing_server(ImageServer(photos)) as images:
        images.faults["apples/apple-1.jpeg"] = ["stall"] * 9
        program = trained.start(f"{images.url}/apples/apple-1.jpeg", script="predict.py")
        program.read_until("^image")
        assert program.end(signal.SIGINT) < 4
    assert program.returncode == 1
    assert program.output.splitlines()[-1] == "predict.py: stopped"


@pytest.mark.slow
def test_first_predictions_at_once_leave_a_sound_database(project, photos):
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: predict(project, str(photos)), range(4)))
    assert {end.returncode for end in ends} == {1}
    assert all("`python ml_workflow.py` trains one" in end.stderr.splitlines()[-1] for end in ends)
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.survived("terminal: its locale is C, and names are odd")
def test_names_are_printed_whatever_the_locale(trained, photos, tmp_path):
    for name in ("ü.jpeg", "水果.jpeg"):
        shutil.copy(photos / "apples/apple-1.jpeg", tmp_path / name)
    end = trained.run(str(tmp_path), script="predict.py", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert end.returncode == 0, end.stderr
    assert len(end.stdout.splitlines()) == 2 + 2


@pytest.mark.slow
@pytest.mark.survived("terminal: standard output is closed")
def test_closed_standard_output_ends_without_a_traceback(trained, photos):
    command = trained.command(str(photos / "apples"), script="predict.py")
    shell = f"{shlex.join(command)} >&-"
    end = subprocess.run(["bash", "-c", shell], env=trained.environment(), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in end.stderr


@pytest.mark.slow
@pytest.mark.survived("terminal: names that cannot be printed, and a reader that has had enough")
def test_unprintable_name_and_reader_that_leaves_are_survived(trained, photos, tmp_path):
    shutil.copy(photos / "apples/apple-1.jpeg", os.fsencode(tmp_path) + b"/\xff \n.jpeg")
    assert predict(trained, str(tmp_path)).returncode == 0
    many = [str(photos)] * 500  # more than a pipe holds
    program = subprocess.Popen(
        trained.command(*many, script="predict.py"),
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


def test_alias_that_is_asked_is_the_one_that_a_run_moves():
    assert registered_model.CHAMPION == ml_workflow.CHAMPION


@pytest.mark.parametrize("arguments", [[], ["photo.jpeg", "--page"], ["--page", "--export", "there"]])
def test_not_one_of_images_page_and_export_is_misuse(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    with pytest.raises(SystemExit) as misuse:
        parse_arguments()
    assert misuse.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("predict.py: name images to classify, or use --page, or --export FOLDER;")


def test_explain_without_images_is_misuse(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py", "--page", "--explain", "pictures"])
    with pytest.raises(SystemExit) as misuse:
        parse_arguments()
    assert misuse.value.code == 2
    assert capsys.readouterr().err.startswith("predict.py: --explain needs images to classify")


@pytest.mark.slow
def test_champion_of_the_newest_run_answers(photos, prefect, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(photos / "apples", mine / "reds")
    shutil.copytree(photos / "oranges", mine / "yellows")
    project = Project(tmp_path / "other")
    with project.mlflow_server():
        for source in (photos, mine):
            end = project.run("--source", str(source), "--epochs", "2", **prefect)
            assert end.returncode == 0, end.stderr
        asked = [line.partition(": ")[2] for line in end.stdout.splitlines() if line.startswith("Predict: ")]
        first = project.execute(["bash", "-c", asked[0]])  # what the run has printed, as it stands
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("models:/reds-yellows/1 (champion), run ")
        end = predict(project, str(mine / "reds/apple-1.jpeg"))
        origin, other, _, answer = end.stdout.splitlines()
        assert origin.startswith("models:/reds-yellows/1 (champion), run ")
        assert answer.split()[1] == "reds"
        assert other.endswith(f"predict.py {mine / 'reds/apple-1.jpeg'} --model models:/apples-oranges@champion")
        again = project.execute(["bash", "-c", other.partition(": ")[2]])
        assert again.stdout.splitlines()[-1].split()[1] == "apples"
