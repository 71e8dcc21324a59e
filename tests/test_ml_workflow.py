import json
import sys

import ml_workflow
from ml_workflow import download_data, preprocess_data
from workflow.errors import WorkflowError
from workflow.judging import gate
from workflow.judging.gate import decide, model_name

import mlflow
import numpy as np
import pytest
from prefect.logging import disable_run_logger


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty place for data and tracking, and no run logger: tasks are called as the functions that they are."""
    monkeypatch.setattr(ml_workflow, "DATASET", tmp_path / "dataset")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("test", (tmp_path / "mlartifacts").as_uri()))
    with disable_run_logger():
        yield tmp_path
    mlflow.end_run()


def results(labels: str, predicted: str, loss: float = 0.5) -> dict:
    images = [{"label": label, "predicted": guess} for label, guess in zip(labels, predicted, strict=True)]
    accuracy = sum(label == guess for label, guess in zip(labels, predicted, strict=True)) / len(labels)
    return {"images": images, "test_accuracy": accuracy, "test_loss": loss, "version": "3"}


@pytest.mark.parametrize(
    ("candidate", "champion", "promoted", "reason"),
    [
        (results("aabb", "aabb"), None, True, "always guessing a gets 0.50"),
        (results("aabb", "aaab"), None, True, "accuracy 0.75"),
        (results("aabb", "aaaa"), None, False, "always guessing a gets 0.50"),
        (results("aaab", "aaaa"), None, False, "always guessing a gets 0.75"),
        (results("aabb", "aabb", 0.6), results("aabb", "aaab", 0.1), True, "version 3"),
        (results("aabb", "aaab", 0.1), results("aabb", "aabb", 0.6), False, "1.00 and 0.6000"),
        (results("aabb", "aaab", 0.1), results("aabb", "abbb", 0.2), True, "loss 0.1000"),
        (results("aabb", "aaab", 0.2), results("aabb", "aaab", 0.1), False, "same 4 test images"),
        (results("aabb", "aabb", 0.1), results("aabb", "aabb", 0.1), False, "version 3"),
        (results("aabb", "aabb", float("nan")), results("aabb", "aabb", 0.1), False, "loss nan"),
    ],
)
def test_gate_promotes_only_what_is_better(candidate, champion, promoted, reason):
    decision, why = decide(candidate, champion)
    assert decision is promoted
    assert reason in why


@pytest.mark.parametrize(
    ("current", "told"),
    [
        ("7", "a-b version 7 is the champion: it was promoted before its run was interrupted"),
        ("4", "a-b version 7 is not the champion: another run changed the champion meanwhile"),
        ("3", "a-b version 7 is the champion: accuracy 1.00"),
    ],
)
def test_verdict_heeds_the_champion_of_now(monkeypatch, current, told):
    monkeypatch.setattr(gate, "champion_version", lambda *_: current)
    candidate = results("abab", "abab") | {"champion": results("abab", "aaaa")}
    assert gate.verdict("a-b", "7", candidate, "champion").startswith(told)


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (["apples", "oranges"], "apples-oranges"),
        (["cats & dogs", "what?"], "cats _ dogs-what_-"),
        (["a-b", "c"], "a-b-c-"),
        (["a", "b-c"], "a-b-c-"),
        (["x" * 300, "y"], "x" * 200 + "-"),
    ],
)
def test_model_is_named_after_its_classes(classes, name):
    assert model_name(classes).startswith(name)


def test_other_classes_give_another_model_name():
    sets = [["a-b", "c"], ["a", "b-c"], ["a", "b", "c"], ["a?", "b"], ["a!", "b"], ["x" * 300, "y"], ["x" * 300, "z"]]
    assert len({model_name(classes) for classes in sets}) == len(sets)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "argument --epochs: '0': input should be greater than 0"),
        (["--epochs", "2.5"], "argument --epochs: '2.5'"),
        (["--batch-size", "-1"], "argument --batch-size: '-1'"),
        (["--learning-rate", "nan"], "argument --learning-rate: 'nan': input should be a finite number"),
        (["--learning-rate", "0"], "argument --learning-rate: '0'"),
        (["--seed", "-1"], "argument --seed: '-1'"),
        (["--seed", str(2**32)], "argument --seed"),
        (["--epoch-count", "3"], "unrecognized arguments: --epoch-count 3"),
        (["--only_new", "true"], "unrecognized arguments: --only_new true"),
        (
            ["--backbone", "mobilenet"],
            "argument --backbone: 'mobilenet': input should be 'efficientnet-lite0' or 'none'",
        ),
        (["--cron", "0 6 * * 1"], "--cron needs --serve"),
        (["--serve", "--cron", "0 6 * *"], "argument --cron: '0 6 * *': value error, invalid cron string"),
        (["--serve", "--cron", ""], "argument --cron: ''"),
    ],
)
def test_misused_command_ends_with_one_line_and_status_2(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ml_workflow.py", *arguments])
    with pytest.raises(SystemExit) as end:
        ml_workflow.main()
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert error.startswith("ml_workflow.py: ")
    assert words in error


def test_images_are_known_when_the_newest_judged_version_has_them_all(here):
    def known(digest: str) -> str:
        return gate.newest_version(digest, [{"class": "b"}, {"class": "a"}, {"class": "b"}])

    assert known("1") == ""
    client = mlflow.MlflowClient()
    for name in ("a-b", "a-c"):
        client.create_registered_model(name)
    client.create_model_version("a-b", str(here), tags={"data_digest": "1"})
    assert known("1") == ""  # its run died before the gate
    client.set_model_version_tag("a-b", "1", "gate", "a-b version 1 is not the champion")
    client.create_model_version("a-c", str(here), tags={"data_digest": "2", "gate": "a-c version 1 is the champion"})
    assert (known("1"), known("2")) == ("a-b version 1", "")
    client.create_model_version("a-b", str(here), tags={"data_digest": "2", "gate": "a-b version 2 is the champion"})
    assert (known("1"), known("2")) == ("", "a-b version 2")


def test_download_fetches_only_what_is_missing_or_broken(here, image_server, photos):
    folder = here / "images"
    download_data.fn(image_server.url, folder)
    fetched = {name for _, name in image_server.requests}
    assert fetched == set(ml_workflow.FILES)
    assert all((folder / name).read_bytes() == (photos / name).read_bytes() for name in ml_workflow.FILES)

    (folder / "apples/apple-3.jpeg").unlink()
    (folder / "oranges/orange-9.jpeg").write_bytes((photos / "oranges/orange-9.jpeg").read_bytes()[:3000])
    image_server.requests.clear()
    download_data.fn(image_server.url, folder)
    assert sorted(name for _, name in image_server.requests) == ["apples/apple-3.jpeg", "oranges/orange-9.jpeg"]


def test_unreachable_source_is_told_and_nothing_stands_in(here, unused_port):
    with pytest.raises(WorkflowError, match=r"http://127\.0\.0\.1:\d+ cannot be reached: check the network"):
        download_data.fn(f"http://127.0.0.1:{unused_port}", here / "images")
    assert not (here / "images").exists()


def test_samples_stand_in_for_the_unreachable_default_and_leave_when_it_is_back(
    here, image_server, unused_port, monkeypatch
):
    folder = here / "images"
    monkeypatch.setattr(ml_workflow, "SOURCE", f"http://127.0.0.1:{unused_port}")
    download_data.fn(ml_workflow.SOURCE, folder)
    drawn = {path.relative_to(ml_workflow.SAMPLES) for path in ml_workflow.SAMPLES.glob("*/*.jpeg")}
    assert {path.relative_to(folder) for path in folder.glob("*/*")} == drawn
    assert (folder / ".source").read_text() == "sample_images, because 127.0.0.1 could not be reached"

    monkeypatch.setattr(ml_workflow, "SOURCE", image_server.url)
    download_data.fn(ml_workflow.SOURCE, folder)
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/*")} == set(ml_workflow.FILES)
    assert (folder / ".source").read_text() == image_server.url


def test_samples_never_mix_with_photos_that_are_already_there(here, photos, unused_port, monkeypatch):
    monkeypatch.setattr(ml_workflow, "SOURCE", f"http://127.0.0.1:{unused_port}")
    (here / "images/apples").mkdir(parents=True)
    (here / "images/apples/apple-1.jpeg").write_bytes((photos / "apples/apple-1.jpeg").read_bytes())
    with pytest.raises(WorkflowError, match="cannot be reached"):
        download_data.fn(ml_workflow.SOURCE, here / "images")
    assert [path.name for path in (here / "images").glob("*/*")] == ["apple-1.jpeg"]


@pytest.mark.parametrize(
    ("backbone", "shape", "kind"), [("efficientnet-lite0", (1280,), np.float32), ("none", (64, 64, 3), np.uint8)]
)
def test_datasets_hold_every_image_once_with_its_own_label(here, photos, backbone, shape, kind):
    datasets = preprocess_data.fn(photos, batch_size=4, backbone=backbone)
    seen = [file for dataset in datasets for file in dataset.file_names]
    assert sorted(seen) == sorted(ml_workflow.FILES)
    for dataset in datasets:
        batches = list(dataset.as_numpy_iterator())
        assert all(inputs.shape[1:] == shape and inputs.dtype == kind for inputs, _ in batches)
        assert max(len(labels) for _, labels in batches) <= 4
        assert dataset.class_names == ["apples", "oranges"]
    test = datasets[2]
    labels = np.concatenate([labels for _, labels in test.as_numpy_iterator()])
    assert [test.class_names[label] for label in labels] == [file.split("/")[0] for file in test.file_names]


@pytest.mark.parametrize("backbone", ml_workflow.BACKBONES)
def test_training_order_changes_with_each_epoch_and_repeats_with_the_seed(here, photos, backbone):
    def order(seed):
        train, _, _ = preprocess_data.fn(photos, batch_size=2, seed=seed, backbone=backbone)
        sums = []
        for epoch in (0, 1):
            train.epoch.assign(epoch)
            sums.append([inputs.sum() for inputs, _ in train.as_numpy_iterator()])
        return sums

    first = order(1)
    assert first[0] != first[1]
    assert first == order(1)
    assert first != order(2)


def test_run_records_the_data_set_even_when_a_class_is_too_small(here, photos):
    (here / "source/apples").mkdir(parents=True)
    (here / "source/oranges").mkdir()
    (here / "source/apples/a.jpeg").write_text("broken")
    (here / "source/oranges/o.jpeg").write_bytes((photos / "oranges/orange-1.jpeg").read_bytes())
    with mlflow.start_run() as run, pytest.raises(WorkflowError, match=r"class apples has 0 usable image\(s\)"):
        preprocess_data.fn(here / "source")
    table = json.loads(mlflow.artifacts.load_text(f"{run.info.artifact_uri}/images.json"))
    assert [row[table["columns"].index("file")] for row in table["data"]] == ["apples/a.jpeg", "oranges/o.jpeg"]
    assert len(mlflow.get_run(run.info.run_id).data.params["data_digest"]) == 64


def test_odd_names_are_only_names(here, photos):
    names = ["-rf", "a b", "é 🍎", "new\nline", "$(touch x)", "..jpeg..", "%2e%2e", "'quote\"", "x" * 200]
    for kind in ("apples", "oranges"):
        (here / "mine" / kind).mkdir(parents=True)
        for number, name in enumerate(names, 1):
            source = photos / kind / f"{kind[:-1]}-{number}.jpeg"
            (here / "mine" / kind / name).write_bytes(source.read_bytes())
    datasets = preprocess_data.fn(here / "mine")
    used = {name for dataset in datasets for name in dataset.file_names}
    assert used == {f"{kind}/{name}" for kind in ("apples", "oranges") for name in names if not name.startswith(".")}
    assert {path.name for path in here.iterdir()} == {"dataset", "mine", "mlflow.db", "mlartifacts"}


def test_download_writes_beside_a_link_and_never_through_it(here, image_server, photos):
    outside = here / "outside.jpeg"
    outside.write_text("precious")
    (here / "images/apples").mkdir(parents=True)
    (here / "images/apples/apple-1.jpeg").symlink_to(outside)
    download_data.fn(image_server.url, here / "images")
    assert outside.read_text() == "precious"
    assert (here / "images/apples/apple-1.jpeg").read_bytes() == (photos / "apples/apple-1.jpeg").read_bytes()
