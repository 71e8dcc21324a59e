"""The file of predict.py --output: what it holds, and how a repeated command continues it, here and on Dask."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from predict import list_sources, parse_arguments
from support.project import Program, dask_cluster, fill
from workflow.errors import WorkflowError
from workflow.evaluation import metrics
from workflow.orchestration import cluster
from workflow.serving import output, registered_model
from workflow.serving.batch import Source, classify_chunks
from workflow.serving.litert_classifier import LiteRTClassifier
from workflow.text import from_text

import mlflow
import pandas as pd
import psutil
import pytest
from filelock import FileLock

MODEL = "models:/apples-oranges@champion"
ALL = pytest.mark.parametrize("suffix", output.SUFFIXES)


@pytest.fixture(scope="module")
def champion(trained):
    mlflow.set_tracking_uri(f"sqlite:///{trained.folder / 'mlflow.db'}")
    return registered_model.load(MODEL)


@pytest.fixture
def mine(photos, tmp_path) -> Path:
    """Six photos, and a damaged one with an odd name."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in (1, 2, 3):
        for kind in ("apple", "orange"):
            shutil.copy(photos / f"{kind}s/{kind}-{number}.jpeg", folder)
    (folder / os.fsdecode(b'caf\xe9, "\n\\xe9.jpeg')).write_text("no image")
    return folder


def write(champion, folder: Path, path: Path, dask: str | None = None, progress=lambda _: None) -> dict[str, int]:
    return dict(output.write_predictions(champion, list_sources([str(folder)]), path, dask, progress))


def read(path: Path) -> list[dict]:
    """Return the rows as pandas reads them, with None for missing values."""
    if path.suffix == ".jsonl":
        frame = pd.read_json(path, lines=True, dtype=False)
        frame["probabilities"] = frame["probabilities"].map(json.dumps, na_action="ignore")
    else:
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    assert list(frame) == list(output.COLUMNS)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def content(path: Path) -> dict[str, bytes]:
    files = path.glob("*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


@ALL
@pytest.mark.survived("output: names with line breaks, quotes and bytes that are not UTF-8")
def test_rows_hold_the_predictions_of_all_files(champion, mine, tmp_path, suffix):
    path = tmp_path / f"new/predictions{suffix}"
    counts = write(champion, mine, path)
    rows = read(path)
    names = list(list_sources([str(mine)]))
    assert [str(from_text(row["image"])) for row in rows] == names
    ((_, predictions),) = classify_chunks(champion.classifier, [[Source(name) for name in names]])
    for row, name, expected in zip(rows, names, predictions, strict=True):
        assert (row["size"], row["mtime_ns"]) == (os.stat(name).st_size, os.stat(name).st_mtime_ns)
        assert (row["model"], row["run_id"]) == (champion.uri, champion.run_id)
        assert json.loads(row.pop("probabilities") or "{}") == pytest.approx(expected.pop("probabilities", {}))
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert counts == {"classified": 6, "errors": 1, "unknown": sum(row["unknown"] is True for row in rows)}


@ALL
def test_repeated_command_classifies_only_new_and_changed_files(champion, mine, tmp_path, suffix):
    path = tmp_path / f"predictions{suffix}"
    write(champion, mine, path)
    before = content(path)
    assert write(champion, mine, path) == {"classified": 0, "errors": 1, "unknown": 0, "skipped": 6}
    assert content(path) == before  # the same error is not written twice
    shutil.copy(mine / "apple-1.jpeg", mine / "new.jpeg")
    shutil.copy(mine / "apple-2.jpeg", mine / "orange-1.jpeg")
    counts = write(champion, mine, path)
    assert (counts["classified"], counts["skipped"]) == (2, 5)
    rows = {Path(row["image"]).name: row for row in read(path)}  # the last row of an image counts
    assert rows["orange-1.jpeg"]["digest"] == rows["apple-2.jpeg"]["digest"]
    assert len(read(path)) == 9


@pytest.mark.survived("output: kill -9 tore the last line")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_torn_line_is_removed_and_classified_again(champion, mine, tmp_path, suffix):
    path = tmp_path / f"predictions{suffix}"
    write(champion, mine, path)
    whole, expected = path.read_bytes(), read(path)
    start_of_last = whole.rindex(b"\n", 0, -1) + 1
    for size in (0, 5, start_of_last, start_of_last + 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        write(champion, mine, path)
        for row, again in zip(expected, read(path), strict=True):
            row, again = (dict(values, probabilities=None) for values in (row, again))
            assert again == pytest.approx(row)


@ALL
@pytest.mark.refused("output: the file has predictions of another model")
def test_file_of_another_model_is_refused(champion, mine, tmp_path, suffix):
    path = tmp_path / f"predictions{suffix}"
    write(champion, mine, path)
    before = content(path)
    for change, remedy in (({"uri": "models:/a/2"}, f"--model {champion.uri}"), ({"run_id": "2"}, "another file")):
        with pytest.raises(WorkflowError, match=remedy):
            write(champion._replace(**change), mine, path)
    assert content(path) == before


@pytest.mark.refused("output: the file is not from predict.py")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "image,label\na.jpg,cat\n"),
        ("a.csv", "my only line"),
        ("a.csv", ",".join(output.COLUMNS) + "\na.jpg,cat\n"),
        ("a.jsonl", '{"label": "cat"}\n'),
        ("a.jsonl", '{"image": "a.jpg"}\n'),
        ("a.jsonl", "[1]"),
        ("a.jsonl", "\x00\xff\n"),
        ("a.parquet/part-00000.parquet", "text"),
        ("a.parquet/notes.txt", "text"),
        ("a.parquet", "text"),
        ("a.csv/notes.txt", "text"),
    ],
)
def test_file_of_another_kind_is_refused(champion, mine, tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(WorkflowError, match=r"a\.[a-z]+ (is not from|cannot be written)"):
        write(champion, mine, tmp_path / name.partition("/")[0])
    assert path.read_text() == text


@pytest.mark.refused("output: Parquet with other columns", "output: Parquet without pyarrow")
def test_unusable_parquet_file_is_refused(champion, mine, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").mkdir()
    pd.DataFrame({"image": ["a.jpg"]}).to_parquet(tmp_path / "a.parquet/part-00000.parquet")
    with pytest.raises(WorkflowError, match="is not from"):
        write(champion, mine, tmp_path / "a.parquet")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(output, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    with pytest.raises(WorkflowError, match="pip install pyarrow"):
        write(champion, mine, tmp_path / "b.parquet")


@pytest.mark.refused("output: another program writes the file")
def test_file_is_written_by_one_program_at_a_time(champion, mine, tmp_path):
    with FileLock(tmp_path / ".a.csv.lock"), pytest.raises(WorkflowError, match="another program"):
        write(champion, mine, tmp_path / "a.csv")


@ALL
@pytest.mark.refused("output: the disk is full")
def test_full_disk_keeps_what_is_written(champion, photos, small_disk, suffix, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BATCH_IMAGES", 5)
    monkeypatch.setattr(output, "PART_SECONDS", 0)
    path = small_disk / f"predictions{suffix}"
    with pytest.raises(WorkflowError, match="No space left on device"):
        write(champion, photos, path, progress=lambda _: fill(small_disk))
    assert 0 < len(read(path)) < 20
    (small_disk / "filler").unlink()
    counts = write(champion, photos, path)
    assert counts["skipped"] > 0
    assert len({row["image"] for row in read(path)}) == len(read(path)) == 20


@ALL
def test_interruption_keeps_what_is_classified(champion, mine, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(metrics, "MAX_BATCH_IMAGES", 3)
    path = tmp_path / f"predictions{suffix}"

    def interrupt(_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(champion, mine, path, progress=interrupt)
    assert len(read(path)) == 3
    write(champion, mine, path)
    assert len({row["image"] for row in read(path)}) == len(read(path)) == 7


@pytest.mark.parametrize(
    ("number", "suffix"),
    [
        (signal.SIGKILL, ".csv"),
        pytest.param(signal.SIGINT, ".parquet", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, ".parquet", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ".jsonl", marks=pytest.mark.slow),
    ],
)
@pytest.mark.survived("output: Ctrl-C, SIGTERM or kill -9")
def test_stopped_program_is_continued(trained, photos, tmp_path, number, suffix):
    path = tmp_path / f"predictions{suffix}"
    code = (
        "import predict, time; from workflow.evaluation import metrics; from workflow.serving import output;"
        "metrics.MAX_BATCH_IMAGES = 4; output.PART_SECONDS = 0.1; predict.PROGRESS_SECONDS = 0; predict.main()"
    )
    arguments = [str(photos), "--output", str(path)]
    command = [sys.executable, "-c", code, *arguments]
    program = Program(command, tmp_path, trained.environment())
    program.read_until("^8 classified")
    program.end(number)
    assert program.returncode == (1 if number == signal.SIGINT else -number)
    count = len(read(path))
    assert 4 <= count < 20
    end = trained.run(*arguments, script="predict.py")
    assert end.returncode == 0, end.stderr
    rows = read(path)
    assert len({row["image"] for row in rows}) == len(rows) == 20
    assert f"; {count} already in the file" in end.stdout


@pytest.fixture(scope="module")
def expected(champion, photos, tmp_path_factory) -> list[dict]:
    """The rows of all photos, without Dask."""
    path = tmp_path_factory.mktemp("expected") / "predictions.jsonl"
    write(champion, photos, path)
    return read(path)


def check(rows: list[dict], expected: list[dict]) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert json.loads(row["probabilities"]) == pytest.approx(json.loads(other["probabilities"]), abs=1e-5)
        assert dict(row, probabilities="") == pytest.approx(dict(other, probabilities=""), abs=1e-5)


class Unknown(LiteRTClassifier):
    """A classifier that the workers cannot import."""


@pytest.mark.refused("output: a Dask worker lacks a package")
def test_dask_workers_predict_the_same(champion, photos, expected, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BATCH_IMAGES", 4)
    path = tmp_path / "predictions.jsonl"
    (tmp_path / "elsewhere").mkdir()
    with dask_cluster(trained, tmp_path / "elsewhere") as (address, _):
        counts = write(champion, photos, path, address)
        again = write(champion, photos, path, address)
        with pytest.raises(WorkflowError, match=r"install requirements\.txt"):
            write(champion._replace(classifier=Unknown.__new__(Unknown)), photos, path, address)
    assert counts["classified"] == again["skipped"] == 20
    check(read(path), expected)


@pytest.mark.slow
@pytest.mark.survived("output: kill -9 of one of two Dask workers", "output: kill -9 of the Dask scheduler")
def test_dead_dask_processes_lose_no_rows(champion, photos, expected, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BATCH_IMAGES", 1)
    path = tmp_path / "predictions.jsonl"

    def kill(counts) -> None:
        if counts["classified"] in victims:
            victims[counts["classified"]].kill()

    with dask_cluster(trained, tmp_path) as (address, (worker, _)):
        (scheduler,) = (child for child in psutil.Process().children() if "scheduler" in child.cmdline())
        victims = {2: worker, 8: scheduler}
        with pytest.raises(WorkflowError, match="the Dask cluster at"):
            write(champion, photos, path, address, kill)
    assert 8 <= len(read(path)) < 20
    write(champion, photos, path)
    check(read(path), expected)


@pytest.mark.slow
@pytest.mark.survived("output: an image that kills the Dask worker")
def test_image_that_kills_a_worker_has_an_error(champion, mine, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_BATCH_IMAGES", 1)
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    package = shutil.copytree(cluster.PACKAGE, tmp_path / "copy/workflow")
    with open(package / "serving/batch.py", "a") as code:  # the workers load this version
        code.write("decode = Classifier.decode\nClassifier.decode = lambda self, content: ")
        code.write("os._exit(1) if content == b'no image' else decode(self, content)\n")
    monkeypatch.setattr(cluster, "PACKAGE", package)
    with dask_cluster(trained, tmp_path) as (address, _):
        counts = write(champion, mine, tmp_path / "a.csv", address)
    (row,) = (row for row in read(tmp_path / "a.csv") if "caf" in row["image"])
    assert row["error"].startswith("Dask worker: ")
    assert counts["classified"] > 0
    assert write(champion, mine, tmp_path / "a.csv")["classified"] == counts["errors"] - 1


@pytest.mark.refused("output: --dask with a model without a LiteRT export")
def test_dask_needs_an_export(champion, mine, tmp_path):
    keras = champion._replace(classifier=object(), why_keras="it has no LiteRT export")
    with pytest.raises(WorkflowError, match=f"--export FOLDER --model {champion.uri}"):
        write(keras, mine, tmp_path / "a.csv", "tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "a.txt"],
        ["--output", "a.csv", "--json"],
        ["--output", "a.csv", "--score"],
        ["--output", "a.csv", "--explain", "maps"],
        ["--dask", "tcp://127.0.0.1:8786"],
    ],
)
def test_unusable_combinations_are_refused(monkeypatch, options):
    monkeypatch.setattr("sys.argv", ["predict.py", "photos", *options])
    with pytest.raises(SystemExit) as end:
        parse_arguments()
    assert end.value.code == 2
