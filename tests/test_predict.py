"""predict.py as a program: any source is classified, and every unusable image or option is reported."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from make_docs import normalize, read_region
from predict import (
    describe_nearest,
    find_copies,
    list_folder,
    name_explanation,
    parse_arguments,
    prepare_folder,
    read_source,
)
from support.environments import make_environment
from support.images import ImageServer, closing_server
from support.project import PROJECT, Project, artifact, runs_of
from workflow.data import folder as image_folder
from workflow.data.folder import list_images
from workflow.errors import WorkflowError
from workflow.files import digest_file
from workflow.model import activation_maps, small_network
from workflow.records import DataVersion, ImageFile
from workflow.serving import registered_model

import mlflow
import numpy as np
import pytest
from PIL import Image


def predict(project: Project, *arguments: str) -> subprocess.CompletedProcess:
    return project.run(*arguments, script="predict.py")


def test_files_folders_patterns_and_urls_are_classified_alike(trained, photos):
    with closing_server(ImageServer(photos)) as images:
        url = f"{images.url}/oranges/orange-2.jpeg"
        end = predict(trained, "--json", str(photos), str(photos / "apples/apple-[12].jpeg"), url)
    predictions = json.loads(end.stdout)
    assert end.returncode == 0
    assert len(predictions) == 20 + 2 + 1
    by_name = {}
    for prediction in predictions:
        probabilities = prediction["probabilities"]
        assert probabilities.keys() == {"apples", "oranges"}
        assert prediction["probability"] == probabilities[prediction["label"]] == max(probabilities.values())
        by_name.setdefault(prediction["image"].rsplit("/", 1)[1], []).append(probabilities["apples"])
    for name in ("apple-1.jpeg", "apple-2.jpeg", "orange-2.jpeg"):
        first, again = by_name[name]
        assert first == pytest.approx(again, abs=1e-4)
    correct = [prediction["label"] in prediction["image"] for prediction in predictions]
    assert sum(correct) >= 0.9 * len(correct)


def test_champion_runs_without_importing_tensorflow_or_plots(trained, photos):
    slow = {"tensorflow", "keras", "matplotlib", "prefect", "sklearn"}
    program = copy.copy(trained)
    program.before = f"import atexit, sys; atexit.register(lambda: print({slow!r} & sys.modules.keys()))"
    end = predict(program, str(photos / "apples/apple-1.jpeg"))
    assert end.returncode == 0
    origin, *_, imported = end.stdout.splitlines()
    assert origin.endswith(", LiteRT")
    assert imported == "set()"


@pytest.fixture(scope="module")
def old_model(trained, tmp_path_factory) -> str:
    """A model folder without a LiteRT export, as earlier releases logged it."""
    (artifacts,) = trained.folder.glob("mlartifacts/models/m-*/artifacts")
    folder = tmp_path_factory.mktemp("old") / "model"
    shutil.copytree(artifacts, folder, ignore=shutil.ignore_patterns("litert"))
    return str(folder)


@pytest.mark.survived("predict: the model has no LiteRT export")
@pytest.mark.slow
def test_model_without_export_runs_with_keras(trained, photos, old_model):
    end = predict(trained, str(photos / "apples/apple-1.jpeg"), "--model", old_model)
    assert end.returncode == 0
    origin, reason, *_ = end.stdout.splitlines()
    assert origin.endswith(", Keras")
    assert f"--export FOLDER --model {old_model}" in reason


@pytest.mark.refused("predict: the model has no LiteRT export, and TensorFlow is not installed")
def test_model_without_export_needs_tensorflow(old_model, monkeypatch):
    monkeypatch.setattr(registered_model, "find_spec", lambda name: None)
    with pytest.raises(WorkflowError, match=f"--export FOLDER --model {old_model}"):
        registered_model.load(old_model)
    with pytest.raises(WorkflowError, match=r"pip install -r requirements\.txt"):
        registered_model.load(old_model, "Keras")


@pytest.mark.slow
def test_serving_requirements_are_all_that_is_needed(trained, photos, tmp_path):
    packages = ["-r", str(PROJECT / "requirements-serve.txt")]
    python = make_environment(tmp_path / "venv", *packages, has_project_packages=False)
    photo = str(photos / "apples/apple-1.jpeg")
    expected = json.loads(predict(trained, photo, "--json").stdout)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return trained.execute([str(python), str(PROJECT / "predict.py"), *arguments])

    assert json.loads(run(photo, "--json").stdout) == expected
    assert run(str(photos), "--score").returncode == 0
    for option in ("--explain", "--export"):
        end = run(*[photo] * (option == "--explain"), option, str(tmp_path / "folder"))
        assert end.returncode == 1
        assert "requirements.txt" in end.stderr.splitlines()[-1]
    assert run("--help").returncode == 0
    assert trained.execute([str(python), str(PROJECT / "serve.py"), "--help"]).returncode == 0


def test_lab_report_shows_its_output(trained, photos):
    _, _, command, *shown, _ = read_region("predict").strip().splitlines()[:-1]
    (trained.folder / "sample_images").symlink_to(PROJECT / "sample_images")
    (trained.folder / "dataset/images").symlink_to(photos)
    end = predict(trained, *command.split()[3:])
    assert end.returncode == 0
    printed = end.stdout.splitlines()
    assert len(shown) == len(printed) == 2 + 2
    kinds = [
        [re.sub("(unknown: [a-z ]+; |unsure; )?nearest is .*", "nearest", normalize(line)) for line in lines]
        for lines in (shown, printed)
    ]
    kinds = [[re.sub(" (apples|oranges) ", " fruit ", line) for line in lines] for lines in kinds]
    assert kinds[0] == kinds[1]  # labels may differ between models


def test_bad_images_are_reported_and_the_others_classified(trained, photos, tmp_path):
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
    assert [set(prediction) for prediction in json.loads(json_end.stdout)] == [
        {"image", "error"},
        {"image", "label", "probability", "probabilities", "similarity", "unknown", "nearest", "unsure", "digest"},
    ]


@pytest.mark.slow
def test_explain_writes_one_image_per_photo(trained, photos, tmp_path):
    mine, maps = tmp_path / "mine", tmp_path / "new/maps"
    for folder, kind in (("one", "apple"), ("two", "orange")):  # two photos of the same name
        (mine / folder).mkdir(parents=True)
        shutil.copy(photos / f"{kind}s/{kind}-1.jpeg", mine / folder / "fruit.jpeg")
    (mine / "bad.jpeg").write_text("no image")
    maps.mkdir(parents=True)
    (maps / "fruit.jpeg").write_text("a file of the user")
    end = predict(trained, str(mine), "--explain", str(maps))
    assert end.returncode == 1
    assert end.stdout.splitlines()[-1] == f"2 explanation(s) written to {maps}"
    json_end = predict(trained, "--json", str(mine), "--explain", str(maps))
    assert json_end.stderr.splitlines()[-1] == f"2 explanation(s) written to {maps}"
    bad, *predictions = json.loads(json_end.stdout)
    assert set(bad) == {"image", "error"}
    written = {prediction["explanation"] for prediction in predictions}
    assert {str(path) for path in maps.iterdir()} == written | {str(maps / "fruit.jpeg")}
    assert len(written) == 2
    assert (maps / "fruit.jpeg").read_text() == "a file of the user"
    for path in written:
        with Image.open(path) as image:
            assert (image.format, max(image.size)) == ("JPEG", activation_maps.OVERLAY_PIXELS)


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
def test_explanation_is_named_after_its_image(source, stem):
    assert name_explanation(source, b"1") == f"{stem}-6b86b273ff34.explained.jpg"
    assert name_explanation(source, b"2") == f"{stem}-d4735e3a265e.explained.jpg"


def make_registered(model) -> SimpleNamespace:
    """Return the part of a registered model that --explain uses."""
    return SimpleNamespace(uri="models:/a/1", classifier=SimpleNamespace(model=model, image_size=32))


@pytest.mark.refused("predict.py --explain: the model has no backbone")
def test_explain_without_a_backbone_creates_no_folder(tmp_path):
    registered = make_registered(small_network.build_small_network(2, 32, 0.1))
    with pytest.raises(WorkflowError, match="models:/a/1 has no backbone"):
        prepare_folder(str(tmp_path / "maps"), [str(tmp_path)], registered)
    assert list(tmp_path.iterdir()) == []
    assert prepare_folder(None, [str(tmp_path)], registered) is None


@pytest.mark.refused("predict.py --explain: its folder is among the images, or is a file")
@pytest.mark.parametrize(
    ("explain", "reason"),
    [
        ("photos", "photos is inside photos"),
        ("photos/maps", "photos/maps is inside photos"),
        ("link/maps", "link/maps is inside photos"),
        ("file", "file cannot be written"),
    ],
)
def test_unusable_folder_for_explanations_is_refused(tmp_path, monkeypatch, explain, reason):
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
    order = [prediction["image"] for prediction in json.loads(end.stdout)]
    assert order == sorted(order[:10]) + sorted(order[10:])
    assert "oranges" in order[0]


def test_missing_model_is_reported_with_the_others(trained, photos):
    end = predict(trained, str(photos), "--model", "models:/pears@champion")
    assert end.returncode == 1
    assert end.stderr.splitlines()[-1].endswith("has apples-oranges")
    assert end.stdout == ""


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/apples-oranges", "use models:/apples-oranges@champion"),
        ("models:/apples-oranges@best", "use models:/apples-oranges@champion or models:/apples-oranges/1"),
        ("models:/apples-oranges/9", "use models:/apples-oranges@champion or models:/apples-oranges/1"),
        ("pears", "pears is not a model"),
        ("runs:/0/model", "runs:/0/model cannot be loaded"),
    ],
)
def test_wrong_model_uri_is_reported_with_the_alternatives(trained, uri, message):
    mlflow.set_tracking_uri(f"sqlite:///{trained.folder / 'mlflow.db'}")
    with pytest.raises(WorkflowError, match=re.escape(message)) as error:
        registered_model.load(uri)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_drift_is_reported_for_images_of_other_things(trained, photos, tmp_path):
    draw = np.random.default_rng(5)
    for number in range(20):
        noise = draw.integers(0, 256, (64, 64, 3), "uint8")
        Image.fromarray(noise).resize((256, 256), Image.Resampling.NEAREST).save(tmp_path / f"noise-{number}.png")
    end = predict(trained, str(tmp_path))
    assert end.returncode == 0
    assert len(re.findall("unknown: [a-z ]+; (?:unsure; )?nearest is ", end.stdout)) == 20
    assert end.stdout.splitlines()[-1].startswith("20 of 20 images are unknown")
    scored = json.loads(predict(trained, "--json", "--score", str(photos)).stdout)
    predictions = scored["predictions"]
    assert scored["score"]["unknown"] == sum(prediction["unknown"] for prediction in predictions) <= 4
    training_photos = [prediction for prediction in predictions if prediction["similarity"] > 0.999]
    assert len(training_photos) >= 14
    assert all(prediction["image"].endswith(prediction["nearest"]) for prediction in training_photos)


@pytest.mark.parametrize("options", [[], pytest.param(["--json"], marks=pytest.mark.slow)])
def test_special_files_are_reported_without_waiting(trained, tmp_path, options):
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/again").symlink_to(tmp_path / "odd")
    (tmp_path / "odd/broken.jpeg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "odd/fifo.jpeg")
    end = predict(trained, *options, str(tmp_path / "empty"), str(tmp_path / "odd"), "x" * 300)
    assert end.returncode == 1
    reasons = [
        "empty or unreadable folder",
        "No such file or directory",
        "not a regular file",
        "File name too long",
    ]
    if options:
        assert [prediction["error"] for prediction in json.loads(end.stdout)] == reasons
    else:
        assert [line.rpartition("error: ")[2] for line in end.stdout.splitlines()[2:]] == reasons


def test_unknown_is_reported_before_unsure():
    prediction = {"similarity": 0.5, "nearest": "apples/1.jpeg", "unknown": False, "unsure": True}
    assert describe_nearest(prediction) == "unsure; nearest is apples/1.jpeg (0.50)"
    assert re.match("unknown.*; unsure; nearest", describe_nearest(prediction | {"unknown": True}))
    assert describe_nearest(prediction | {"unsure": None}).startswith("nearest")
    del prediction["unsure"]  # absent in earlier versions
    assert describe_nearest(prediction).startswith("nearest")


@pytest.mark.refused("folder: a subfolder that cannot be read")
def test_folder_lists_linked_classes_and_unreadable_folders(photos, tmp_path, monkeypatch):
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
    paths = list(list_folder(mine))
    assert len(paths) == 10 + 1
    assert read_source(paths[-1]) == "empty or unreadable folder"


@pytest.mark.refused("folder: a path that is too long")
def test_too_long_path_is_reported_with_the_others(tmp_path, monkeypatch):
    (tmp_path / "1.jpeg").write_text("no image")
    long = tmp_path / ("x" * 300)
    monkeypatch.setattr(image_folder, "list_visible", lambda _: iter([long, tmp_path / "1.jpeg"]))
    paths = list_folder(tmp_path)
    assert sorted(map(read_source, paths), key=str) == ["File name too long", b"no image"]


@pytest.mark.slow
def test_interrupt_does_not_wait_for_a_stalled_host(trained, photos):
    with closing_server(ImageServer(photos)) as images:
        images.faults["apples/apple-1.jpeg"] = ["stall"] * 9
        program = trained.start(f"{images.url}/apples/apple-1.jpeg", script="predict.py")
        program.read_until("^image")
        assert program.end(signal.SIGINT) < 4
    assert program.returncode == 1
    assert program.output.splitlines()[-1] == "predict.py: stopped"


@pytest.mark.slow
def test_concurrent_first_predictions_keep_the_database_intact(project, photos):
    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(lambda _: predict(project, str(photos)), range(4)))
    assert {end.returncode for end in ends} == {1}
    assert all("python ml_workflow.py" in end.stderr.splitlines()[-1] for end in ends)
    with sqlite3.connect(project.folder / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.slow
@pytest.mark.survived("terminal: the C locale and non-ASCII names")
def test_names_are_printed_whatever_the_locale(trained, photos, tmp_path):
    for name in ("ü.jpeg", "水果.jpeg"):
        shutil.copy(photos / "apples/apple-1.jpeg", tmp_path / name)
    end = trained.run(str(tmp_path), script="predict.py", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert end.returncode == 0, end.stderr
    assert len(end.stdout.splitlines()) == 2 + 2


@pytest.mark.slow
@pytest.mark.survived("terminal: standard output is closed")
def test_closed_standard_output_causes_no_traceback(trained, photos):
    command = trained.command(str(photos / "apples"), script="predict.py")
    shell = f"{shlex.join(command)} >&-"
    end = subprocess.run(["bash", "-c", shell], env=trained.environment(), capture_output=True, text=True, timeout=60)
    assert "Traceback" not in end.stderr


@pytest.mark.slow
@pytest.mark.survived("terminal: unprintable names, and a reader that closes the pipe")
def test_unprintable_name_and_closed_pipe_are_survived(trained, photos, tmp_path):
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


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [([], "--export FOLDER"), (["a.jpeg", "--export", "there"], "--export FOLDER"), (["--page"], "python serve.py")],
)
def test_misuse_is_reported_with_the_remedy(monkeypatch, capsys, arguments, remedy):
    monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
    with pytest.raises(SystemExit) as misuse:
        parse_arguments()
    assert misuse.value.code == 2
    assert remedy in capsys.readouterr().err


def test_explain_without_images_is_misuse(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py", "--export", "there", "--explain", "pictures"])
    with pytest.raises(SystemExit) as misuse:
        parse_arguments()
    assert misuse.value.code == 2
    assert "--explain needs images" in capsys.readouterr().err


@pytest.mark.slow
def test_champion_of_the_newest_run_is_used(photos, prefect, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(photos / "apples", mine / "reds")
    shutil.copytree(photos / "oranges", mine / "yellows")
    project = Project(tmp_path / "other")
    with project.mlflow_server():
        for source in (photos, mine):
            end = project.run("--source", str(source), "--epochs", "2", **prefect)
            assert end.returncode == 0, end.stderr
        commands = [line.partition(": ")[2] for line in end.stdout.splitlines() if line.startswith("Predict: ")]
        first = project.execute(["bash", "-c", commands[0]])
        assert first.returncode == 0, first.stderr
        assert first.stdout.startswith("models:/reds-yellows/1 (champion), run ")
        end = predict(project, str(mine / "reds/apple-1.jpeg"))
        origin, other, _, prediction = end.stdout.splitlines()
        assert origin.startswith("models:/reds-yellows/1 (champion), run ")
        assert prediction.split()[1] == "reds"
        assert other.endswith(f"predict.py {mine / 'reds/apple-1.jpeg'} --model models:/apples-oranges@champion")
        again = project.execute(["bash", "-c", other.partition(": ")[2]])
        assert again.stdout.splitlines()[-1].split()[1] == "apples"


@pytest.mark.refused("predict.py: --against or --min-accuracy without --score", "predict.py: --min-accuracy 90")
@pytest.mark.parametrize(
    "arguments", [["--against", "models:/a/1"], ["--min-accuracy", "0"], ["--score", "--min-accuracy", "90"]]
)
def test_misused_score_option_is_named(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", "photos", *arguments])
    with pytest.raises(SystemExit) as misuse:
        parse_arguments()
    assert misuse.value.code == 2
    assert arguments[-2] in capsys.readouterr().err


@pytest.fixture(scope="module")
def recompressed(photos, tmp_path_factory) -> Path:
    """The photos, smaller and recompressed, with the names of a messenger."""
    folder = tmp_path_factory.mktemp("recompressed")
    for path in sorted(photos.rglob("*.jpeg")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        image = Image.open(path).convert("RGB").resize((100, 100))
        image.save(folder / path.parent.name / f"IMG-{path.stem}-WA0001.jpg", quality=70)
    return folder


@pytest.mark.survived("predict.py --score: re-encoded copies of training photos")
def test_copies_of_training_photos_count_as_such(trained, recompressed):
    end = predict(trained, str(recompressed), "--score", "--json")
    splits = json.loads(artifact(trained, runs_of(trained)[0], "evaluation.json").read_text())["data"]["files"]
    training_images = sum(image["split"] in ("train", "validation") for image in splits)
    values = json.loads(end.stdout)["score"]
    assert (values["images"], values["training_images"]) == (20, training_images)


@pytest.mark.parametrize("is_there", [True, False])
def test_training_photos_are_compared_without_a_cache(photos, recompressed, tmp_path, monkeypatch, is_there):
    monkeypatch.setattr("predict.DATASET", tmp_path)
    paths = sorted(photos.rglob("*.jpeg"))[::5]
    names = [path.relative_to(photos).as_posix() for path in paths]
    files = [ImageFile(name, "", digest_file(path), split="train") for name, path in zip(names, paths, strict=True)]
    copies = [recompressed / path.parent.name / f"IMG-{path.stem}-WA0001.jpg" for path in paths]
    copies[0] = tmp_path / "crop.jpg"
    Image.open(paths[0]).crop((3, 5, 155, 154)).save(copies[0])
    fields = {"similarity": 0.9, "nearest": names[0]}
    predictions = [{"image": str(path), "digest": digest_file(path)} | fields for path in copies]
    copy_of = find_copies(predictions, [DataVersion("", str(photos if is_there else tmp_path), files)])
    expected = {item["digest"]: file.digest for item, file in zip(predictions, files, strict=True)} if is_there else {}
    assert {digest: copy_of[digest] for digest in expected} == expected
    assert bool(copy_of) == is_there


@pytest.mark.slow
@pytest.mark.survived("predict.py: a ZIP file")
def test_zip_file_is_scored_like_its_folder(trained, heic_photos, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", heic_photos)
    ends = [predict(trained, source, "--score", "--json") for source in (archive, str(heic_photos))]
    unpacked, folder = (json.loads(end.stdout) for end in ends)
    assert unpacked["score"] == folder["score"]
    assert [item["digest"] for item in unpacked["predictions"]] == [item["digest"] for item in folder["predictions"]]
    (tmp_path / "photos.zip").write_bytes(b"not a ZIP file")
    end = predict(trained, archive, "--json")
    assert end.returncode == 1
    assert archive in json.loads(end.stdout)["error"]


@pytest.mark.refused("predict.py --score: the accuracy is below --min-accuracy")
def test_low_accuracy_ends_with_status_3_and_whole_json(trained, photos, tmp_path):
    (tmp_path / "oranges").symlink_to(photos / "apples")
    options = ["--score", "--min-accuracy", "0.9", "--against", "models:/apples-oranges/1", "--json"]
    end = predict(trained, str(tmp_path), *options)
    assert end.returncode == 3
    printed = json.loads(end.stdout)
    assert printed["score"]["passed"] is False
    assert printed["score"]["training_images"] == printed["comparison"]["training_images"] > 0
    assert printed["comparison"]["differences"] == []
    shutil.copy(photos / "apples/apple-1.jpeg", tmp_path)
    (tmp_path / "oranges").unlink()
    failed = predict(trained, str(tmp_path), *options)
    assert failed.returncode == 1
    assert json.loads(failed.stdout).keys() == {"error"}
