"""The photos that a model was trained and tested on, if they still exist on this machine."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from workflow.files import read_file, sha256
from workflow.records import DataVersion, ImageFile, RunData

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import ValidationError


class Photos(NamedTuple):
    """The files of a run's data version, and their folder at the time of the run."""

    data: DataVersion
    files: dict[str, ImageFile]  # by name, relative to the folder

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if it is not part of the run, missing or changed."""
        if name not in self.files:
            return None
        try:
            content = read_file(self.data.path_of(name))
        except OSError:
            return None
        return content if sha256(content) == self.files[name].digest else None


def find_photos(run_id: str) -> Photos:
    """Return the photos listed in a run's artifact evaluation.json; none if that is missing or unreadable."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evaluation.json", dst_path=folder)
            data = RunData.read(Path(path)).data
        except (MlflowException, OSError, ValidationError):
            return Photos(DataVersion("", "", []), {})
    return Photos(data, {image.file: image for image in data.files})
