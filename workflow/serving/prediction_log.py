"""The prediction log: a row per image in a database, and photos that are kept for labeling.

A background thread writes both, so that a full disk or a locked database neither fails nor delays a request.
"""

import io
import logging
import re
import threading
from collections import deque
from typing import Any

from workflow.errors import WorkflowError, explain_os_errors, first_line
from workflow.files import write_whole
from workflow.serving.metrics import Metrics
from workflow.settings import settings

import sqlalchemy
from PIL import Image
from sqlalchemy import Boolean, Column, DateTime, Engine, Float, Integer, Text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

WRITE_SECONDS = 0.5  # between two writes; a crash loses the predictions since the last one
MAX_WAITING_ROWS = 10_000  # while the database is unavailable; beyond this, the oldest are lost
MAX_WAITING_PHOTOS = 20
CLOSE_SECONDS = 2  # for the last write
INBOX = settings.state / "inbox"
DIGEST = r"[0-9a-f]{12,64}"

logger = logging.getLogger("serve")
PREDICTIONS = sqlalchemy.Table(
    "predictions",
    sqlalchemy.MetaData(),
    Column("id", Text, primary_key=True),
    Column("time", DateTime, nullable=False, index=True),  # UTC
    Column("request_id", Text, nullable=False),
    Column("image", Integer, nullable=False),  # position in the request
    Column("route", Text, nullable=False),
    Column("digest", Text, nullable=False, index=True),  # SHA-256 of the image file
    Column("version", Text, nullable=False),
    Column("label", Text, nullable=False),
    Column("probability", Float, nullable=False),
    Column("similarity", Float),
    Column("unknown", Boolean),
    Column("nearest", Text),
    Column("milliseconds", Float, nullable=False),  # from the headers of the request to its response
    Column("shadow_version", Text),
    Column("shadow_label", Text),
    Column("shadow_probability", Float),
)
SHADOW = PREDICTIONS.update().where(PREDICTIONS.c.id == sqlalchemy.bindparam("row"))


def open_database(url: str = settings.predictions) -> Engine:
    """Return an engine for the database of the log, without connecting to it yet.

    Raises:
        WorkflowError: the URL is malformed, or its driver is not installed
    """
    try:
        engine = sqlalchemy.create_engine(url or f"sqlite:///{settings.state / 'predictions.db'}", pool_pre_ping=True)
    except ModuleNotFoundError as error:
        remedy = "install its driver (for PostgreSQL: pip install 'psycopg[binary]')"
        raise WorkflowError(f"ML_WORKFLOW_PREDICTIONS: {first_line(error)}; {remedy}") from None
    except (ArgumentError, NoSuchModuleError) as error:
        example = "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
        raise WorkflowError(f"ML_WORKFLOW_PREDICTIONS: {first_line(error)}; use the form {example}") from None
    if engine.dialect.name == "sqlite":

        @sqlalchemy.event.listens_for(engine, "connect")
        def configure(connection: Any, _: object) -> None:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=ON"):
                connection.execute(f"PRAGMA {pragma}")

    return engine


class PredictionLog:
    """Write predictions to the database, and photos to INBOX, in the background.

    Args:
        engine: the database
        metrics: where failed writes and lost predictions are counted
        max_inbox_bytes: total size of the photos in INBOX
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_inbox_bytes: int):
        self.engine, self.metrics, self.max_inbox_bytes = engine, metrics, max_inbox_bytes
        self.rows: deque[dict[str, Any]] = deque()  # predictions, and updates by the shadow, which have "row"
        self.photos: deque[tuple[str, bytes]] = deque(maxlen=MAX_WAITING_PHOTOS)
        self.failing: set[str] = set()  # already reported
        self.has_table = False
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def add(self, row: dict[str, Any]) -> None:
        """Queue a prediction or, if it has the key "row", the shadow's prediction for that row."""
        self.rows.append(row)
        if len(self.rows) > MAX_WAITING_ROWS:
            self.rows.popleft()
            self.metrics.log_lost.inc()

    def keep(self, digest: str, content: bytes) -> None:
        """Queue a photo to be kept."""
        self.photos.append((digest, content))

    def run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self.closing.wait(WRITE_SECONDS)
            self.write_rows()
            self.write_photos()

    def write_rows(self) -> None:
        """Write the queued rows in one transaction. Keep them if the database is unavailable."""
        rows = [self.rows.popleft() for _ in range(len(self.rows))]
        if not rows:
            return
        try:
            if not self.has_table:
                with explain_os_errors(settings.state):
                    settings.state.mkdir(parents=True, exist_ok=True)
                PREDICTIONS.metadata.create_all(self.engine)
                self.has_table = True
            with self.engine.begin() as connection:
                if predictions := [row for row in rows if "row" not in row]:
                    connection.execute(PREDICTIONS.insert(), predictions)
                if updates := [row for row in rows if "row" in row]:
                    connection.execute(SHADOW, updates)
            self.report("prediction log", "")
        except (SQLAlchemyError, WorkflowError) as error:
            self.metrics.log_failures.inc()
            if isinstance(error, OperationalError | WorkflowError) or not self.has_table:  # another replica creates it
                self.rows.extendleft(reversed(rows))
            else:  # retrying would not help
                self.metrics.log_lost.inc(len(rows))
            self.report("prediction log", first_line(error))

    def write_photos(self) -> None:
        """Write the queued photos to INBOX, each named after its digest."""
        for digest, content in [self.photos.popleft() for _ in range(len(self.photos))]:
            if any(INBOX.glob(f"{digest}.*")):
                continue
            if sum(path.stat().st_size for path in INBOX.glob("*")) + len(content) > self.max_inbox_bytes:
                self.report("inbox", f"{INBOX} is full; label or remove photos, or increase --keep-megabytes")
                return
            try:
                with Image.open(io.BytesIO(content)) as image:
                    write_whole(INBOX / f"{digest}.{(image.format or 'image').lower()}", content)
                self.report("inbox", "")
            except WorkflowError as error:
                self.report("inbox", first_line(error))

    def report(self, part: str, problem: str) -> None:
        """Log the start and the end of a problem."""
        if problem and part not in self.failing:
            self.failing.add(part)
            logger.error("%s: %s", part, problem)
        elif not problem and part in self.failing:
            self.failing.remove(part)
            logger.warning("%s: writable again", part)

    def close(self) -> None:
        """Write what is queued, and stop."""
        self.closing.set()
        self.thread.join(CLOSE_SECONDS)
        if self.rows:
            logger.error("prediction log: %d predictions were lost", len(self.rows))


def forget(prefix: str) -> int:
    """Delete all rows and kept photos of an image from the log and INBOX, and return how many.

    Args:
        prefix: SHA-256 of the image file, or its first 12 or more digits

    Raises:
        WorkflowError: this is not a digest, or the log cannot be written
    """
    prefix = prefix.strip().lower()
    if not re.fullmatch(DIGEST, prefix):
        raise WorkflowError(f"--forget: {prefix} is not a SHA-256 digest; use the output of sha256sum PHOTO")
    photos = list(INBOX.glob(f"{prefix}*"))
    with explain_os_errors(INBOX):
        for photo in photos:
            photo.unlink()
    engine = open_database()
    try:
        with engine.begin() as connection:
            PREDICTIONS.metadata.create_all(connection)
            rows = connection.execute(PREDICTIONS.delete().where(PREDICTIONS.c.digest.startswith(prefix))).rowcount
        if engine.dialect.name == "sqlite":  # the deleted rows are still in the WAL
            with engine.connect() as connection:
                connection.execute(sqlalchemy.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    except SQLAlchemyError as error:
        raise WorkflowError(f"prediction log: {first_line(error)}") from error
    return rows + len(photos)
