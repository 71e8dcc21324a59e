"""Write predictions to a .csv, .jsonl or .parquet file; repeating the command continues an unfinished file.

A .csv or .jsonl file is appended to. A .parquet file is a folder of parts, as Dask, pandas and Spark read it, because
Parquet files cannot be appended to. The columns are those of a prediction, the state of the file (`size`, `mtime_ns`),
and the model. If an image was classified again, because it had changed or had an error, its last row counts.
"""

import csv
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workflow.data import features
from workflow.data.source import is_url
from workflow.errors import WorkflowError, explain_os_errors
from workflow.evaluation import metrics
from workflow.files import acquire_lock, file_size, group, write_whole
from workflow.model.served_model import ServedPrediction
from workflow.serving.batch import Chunk, Source, classify_chunks, classify_on_cluster
from workflow.serving.litert_classifier import LiteRTClassifier
from workflow.serving.registered_model import RegisteredModel
from workflow.text import to_text
from workflow.tracking.connection import command_for

SUFFIXES = ".csv", ".jsonl", ".parquet"
PART_SECONDS = 60  # between two parts of a .parquet file; a killed program loses the rows since the last part
COLUMNS = {  # with their types in Parquet files
    "image": "string",
    "size": "int64",
    "mtime_ns": "int64",
    "digest": "string",
    "label": "string",
    "probability": "double",
    "probabilities": "string",  # JSON
    "similarity": "double",
    "nearest": "string",
    "unknown": "bool",
    "unsure": "bool",
    "error": "string",
    "model": "string",
    "run_id": "string",
}
Row = dict[str, Any]


class LineFile:
    """A .csv or .jsonl file. No cell contains a line break, so an unterminated line was left by a killed program."""

    def __init__(self, path: Path):
        self.path, self.is_csv = path, path.suffix.lower() == ".csv"
        self.header = to_line(COLUMNS) if self.is_csv else b""

    def create(self) -> None:
        open(self.path, "ab").close()

    def read(self) -> Iterator[Row]:
        """Yield all rows, and then remove a torn line; raise ValueError before that for a file of a different kind."""
        end, start = 0, self.header or b'{"image": '
        with open(self.path, "rb") as file:
            for line in file:
                if end == 0 and line[: len(start)] != start[: len(line)]:
                    raise ValueError("unexpected first line")
                if not line.endswith(b"\n"):
                    break
                if end or not self.is_csv:
                    yield self.parse(line.decode())
                end += len(line)
        os.truncate(self.path, end)

    def parse(self, line: str) -> Row:
        row = dict(zip(COLUMNS, next(csv.reader([line])), strict=True)) if self.is_csv else json.loads(line)
        if list(row) != list(COLUMNS):
            raise ValueError("unexpected columns")
        return row

    def write(self, rows: list[Row]) -> None:
        """Append rows, and wait until they are on disk. On failure, the file is left as it was."""
        size = file_size(self.path)
        lines = [to_line(flatten(row).values()) if self.is_csv else to_json(row) + b"\n" for row in rows]
        try:
            with open(self.path, "ab") as file:
                file.write((b"" if size else self.header) + b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, size)
            raise

    def flush(self) -> None:
        """Do nothing: write() has written all rows."""


class ParquetFolder:
    """A folder of Parquet files, each written atomically."""

    def __init__(self, path: Path):
        if find_spec("pyarrow") is None:
            raise WorkflowError(f"{path} needs pyarrow: `pip install pyarrow`; or choose a .csv or .jsonl file")
        self.path, self.rows, self.written, self.parts = path, list[Row](), time.monotonic(), 0

    def create(self) -> None:
        self.path.mkdir(exist_ok=True)
        for unfinished in self.path.glob(".*.part"):  # left by a killed program
            unfinished.unlink()

    def read(self) -> Iterator[Row]:
        """Yield all rows; raise ValueError if a file is of a different kind."""
        from pyarrow import parquet

        for path in sorted(path for path in self.path.iterdir() if not path.name.startswith((".", "_"))):
            self.parts = int(path.name.removeprefix("part-").removesuffix(".parquet")) + 1
            with open(path, "rb") as content, parquet.ParquetFile(content) as part:
                if part.schema_arrow.names != list(COLUMNS):
                    raise ValueError("unexpected columns")
                for batch in part.iter_batches(columns=["image", "size", "mtime_ns", "error", "model", "run_id"]):
                    yield from batch.to_pylist()

    def write(self, rows: list[Row]) -> None:
        """Buffer rows, and write a part every PART_SECONDS."""
        self.rows += map(flatten, rows)
        if time.monotonic() - self.written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write a part if there are rows."""
        import pyarrow as pa
        from pyarrow import parquet

        if self.rows:
            schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
            parquet.write_table(pa.Table.from_pylist(self.rows, schema), content := io.BytesIO())
            write_whole(self.path / f"part-{self.parts:05}.parquet", content.getvalue())
            self.parts += 1
        self.rows, self.written = [], time.monotonic()


def to_line(cells: Iterable[Any]) -> bytes:
    """Return a line of a .csv file."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()


def to_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def flatten(row: Row) -> Row:
    """Return a row with the probabilities as text."""
    probabilities = row["probabilities"]
    return row | {"probabilities": probabilities and to_json(probabilities).decode()}


def to_cell(value: Any) -> Any:
    """Return a value without line breaks and without characters that are not valid Unicode."""
    if not isinstance(value, str):
        return value
    return value.replace("\n", "\\x0a").replace("\r", "\\x0d").encode(errors="backslashreplace").decode()


def make_row(source: Source, prediction: ServedPrediction, registered: RegisteredModel) -> Row:
    """Return the row for an image, with its name as to_text() returns it."""
    origin = {"image": to_text(source.name), "model": registered.uri, "run_id": registered.run_id}
    cells = prediction | origin | {"size": source.size, "mtime_ns": source.mtime_ns}
    return {name: to_cell(cells.get(name)) for name in COLUMNS}


def row_key(row: Row) -> int:
    """Return a key for the image of a row and the state of its file; as an integer, because there may be millions."""
    size, mtime_ns = (None if row[name] in (None, "") else int(row[name]) for name in ("size", "mtime_ns"))
    return hash((row["image"], size, mtime_ns))


def read_errors(output: LineFile | ParquetFolder, registered: RegisteredModel) -> dict[int, str]:
    """Return the error of each row of a file, "" for a prediction, by row_key().

    Raises:
        WorkflowError: the file is unreadable, of a different kind, or has predictions of another model
    """
    errors, path = dict[int, str](), output.path
    csv.field_size_limit(2**31 - 1)  # probabilities of thousands of classes
    try:
        for row in output.read():
            if (row["model"], row["run_id"]) != (to_cell(registered.uri), registered.run_id):
                other = "" if row["model"] == registered.uri else f", or --model {row['model']}"
                model = f"{row['model']}, run {row['run_id']}"
                raise WorkflowError(f"{path} has predictions of {model}; choose another file{other}")
            errors[row_key(row)] = row["error"] or ""
    except (ValueError, TypeError, csv.Error) as error:
        raise WorkflowError(f"{path} is not from this version of predict.py; choose another file") from error
    return errors


@contextmanager
def open_output(path: Path, registered: RegisteredModel) -> Iterator[tuple[LineFile | ParquetFolder, dict[int, str]]]:
    """Create or lock a file of predictions; yield it with the errors of its rows; see read_errors().

    Raises:
        WorkflowError: as for read_errors(), or another program is writing the file, or it cannot be written
    """
    output = ParquetFolder(path) if path.suffix.lower() == ".parquet" else LineFile(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        busy = f"another program is writing {path}; wait for it to finish"
        lock = acquire_lock(path.with_name(f".{path.name}.lock"), busy)
    with lock:
        with explain_os_errors(path):
            output.create()
            errors = read_errors(output, registered)
        yield output, errors


def examine(name: str) -> Source:
    """Return a file or URL with the state of the file."""
    try:
        status = None if is_url(name) else os.stat(name)
    except OSError:  # reported when it is read
        status = None
    return Source(name, status.st_size, status.st_mtime_ns) if status else Source(name)


@contextmanager
def classify_sources(
    registered: RegisteredModel, sources: Iterable[Source], dask: str | None
) -> Iterator[Iterator[tuple[Chunk, list[ServedPrediction]]]]:
    """Yield an iterator over chunks and their predictions; with Dask, the cluster's workers classify them.

    Raises:
        WorkflowError: Dask is not installed, the model has no LiteRT export, or as for cluster.connect()
    """
    max_bytes = features.MAX_CHUNK_BYTES if dask else metrics.MAX_BATCH_BYTES
    chunks = group(sources, lambda source: source.size or 0, metrics.MAX_BATCH_IMAGES, max_bytes)
    if not dask:
        yield classify_chunks(registered.classifier, chunks)
        return
    if find_spec("distributed") is None:
        raise WorkflowError("--dask needs Dask: pip install -r requirements.txt")
    if not isinstance(registered.classifier, LiteRTClassifier):
        command = command_for("predict.py", "--export", "FOLDER", "--model", registered.uri)
        raise WorkflowError(f"--dask needs a LiteRT export of the model, but {registered.why_keras}; run `{command}`")
    from workflow.orchestration import cluster

    with cluster.connect(dask) as client:
        max_tasks = cluster.TASKS_PER_THREAD * sum(client.nthreads().values())
        yield classify_on_cluster(client, registered.classifier, chunks, max_tasks)


def list_new(
    registered: RegisteredModel, names: Iterable[str], errors: dict[int, str], counts: Counter[str]
) -> Iterator[Source]:
    """Yield the files and URLs that have no prediction yet, and count the others as `skipped`; see read_errors()."""
    for source in map(examine, names):
        if errors.get(row_key(make_row(source, {}, registered))) == "":
            counts["skipped"] += 1
        else:
            yield source


def write_predictions(
    registered: RegisteredModel,
    names: Iterable[str],
    path: Path,
    dask: str | None,
    progress: Callable[[Counter[str]], None],
) -> Counter[str]:
    """Classify files and URLs, and append a row for each to a file, skipping those whose prediction it already has.

    Args:
        registered: the model
        names: of the files and URLs
        path: the file, with one of the SUFFIXES
        dask: address of a Dask scheduler whose workers classify the images, or None
        progress: called with the counts after each chunk

    Returns:
        The numbers of `classified`, `unknown` and `skipped` images, and of `errors`.

    Raises:
        WorkflowError: as for open_output() and classify_sources()
    """
    counts = Counter[str]()
    with open_output(path, registered) as (output, errors):
        try:
            with classify_sources(registered, list_new(registered, names, errors, counts), dask) as results:
                for chunk, predictions in results:
                    pairs = zip(chunk, predictions, strict=True)
                    rows = [make_row(source, prediction, registered) for source, prediction in pairs]
                    count(counts, rows)
                    with explain_os_errors(path):
                        output.write([row for row in rows if errors.get(row_key(row)) != (row["error"] or "")])
                    progress(counts)
        finally:
            with explain_os_errors(path):
                output.flush()
    return counts


def count(counts: Counter[str], rows: list[Row]) -> None:
    """Add the rows to the counts."""
    failed = sum(row["error"] is not None for row in rows)
    counts.update(classified=len(rows) - failed, errors=failed, unknown=sum(row["unknown"] is True for row in rows))
