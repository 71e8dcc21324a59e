"""Prepare MLflow's SQLite database: migrate it to the installed MLflow, and update it after its folder has been moved.

    python -m workflow.tracking.database     # in a copied project, before `mlflow gc`

MLflow (3.17) stores absolute paths of artifacts, and has no API that changes them. In a moved folder, artifacts of
earlier runs would be missing. In a copied one, `mlflow gc` would delete the files of the original.
"""

import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from workflow.cli import command_line
from workflow.errors import WorkflowError
from workflow.servers import back_up, check_database, needs_migration
from workflow.settings import settings

import mlflow

MIGRATIONS = Path(mlflow.__file__).parent / "store/db_migrations/versions"
COLUMNS = {  # with paths or URIs of artifacts
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def migrate(file: Path) -> None:
    """Back up and migrate a database from an earlier release of MLflow.

    Raises:
        WorkflowError: a later release wrote the database, or the migration fails
    """
    if not needs_migration(file, "MLflow", mlflow.__version__, MIGRATIONS):
        return
    backup = back_up(file)
    print(f"{file}: migrating from an older MLflow release to {mlflow.__version__}; backup: {backup}", file=sys.stderr)
    command = [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", f"sqlite:///{file.as_posix()}"]
    end = subprocess.run(command, cwd=file.parent, capture_output=True, text=True)
    if end.returncode:
        reason = (end.stderr.strip().splitlines() or ["no message"])[-1]
        raise WorkflowError(f"{file} could not be migrated ({reason}); replace it with {backup}, and try again")


def update_addresses(file: Path, state: Path) -> None:
    """Update the artifact paths in a database whose folder was moved or copied.

    A path is replaced if its files have the same path relative to the database.

    Args:
        file: the database
        state: folder in which this project stores artifacts; paths in it are not changed

    Raises:
        WorkflowError: the database cannot be written
    """
    homes = folder, _ = file.parent.resolve(), state.resolve()
    try:
        with closing(sqlite3.connect(file)) as database, database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged_models'").fetchone():
                return  # new, or from a release of MLflow that this project never used
            for (location,) in database.execute("SELECT artifact_location FROM experiments").fetchall():
                parts = re.fullmatch(r"(.+)/((?:mlartifacts|mlruns)(?:/.*)?)", location or "")
                root = to_path(parts[1]) if parts else None
                if parts and root and root.resolve() not in homes and (folder / parts[2]).exists():
                    replace_prefix(database, root, folder)
    except sqlite3.OperationalError as error:
        reason = f"{error}, but the artifact paths in it must be updated, because the project was moved"
        raise WorkflowError(f"{file}: {reason}; repeat the command with write permission") from error


def replace_prefix(database: sqlite3.Connection, root: Path, folder: Path) -> None:
    """Replace one folder with another in all artifact paths below it, which may be file URIs."""
    print(f"This project was moved or copied from {root}; updating the artifact paths in its database", file=sys.stderr)
    for old, new in ((root.as_uri(), folder.as_uri()), (str(root), str(folder))):
        for table, columns in COLUMNS.items():
            for column in columns:
                is_below = f"substr({column}, 1, length(:old) + 1) = :old || '/'"
                is_new = f"substr({column}, 1, length(:new) + 1) = :new || '/'"  # a copy may be inside the original
                update = f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1)"
                database.execute(f"{update} WHERE {is_below} AND NOT {is_new}", {"old": old, "new": new})


def to_path(address: str) -> Path | None:
    """Return the path of an address in this machine's file system; None for any other address."""
    scheme = urlsplit(address).scheme
    if scheme == "file":
        return Path(url2pathname(urlsplit(address).path))
    return None if len(scheme) > 1 else Path(address)  # a single letter is a Windows drive


if __name__ == "__main__":
    with command_line("database.py"):
        database_file = settings.state / "mlflow.db"
        if database_file.exists():
            check_database(database_file)
            migrate(database_file)
            update_addresses(database_file, settings.state)
