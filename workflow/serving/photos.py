"""The photos that a model was trained and tested on, where they still lie on this machine."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from workflow.files import read_file, sha256
from workflow.records import DataVersion, ImageFile, RunData

import mlflow
from mlflow.exceptions import MlflowException
from pydantic import ValidationError


class Photos(NamedTuple):
    """The files of a run's data version, and where they lay when it ran."""

    data: DataVersion
    files: dict[str, ImageFile]  # by name, relative to the folder

    def read(self, name: str) -> bytes | None:
        """The content of a file; None when it is none of the run's, or is gone or changed."""
        if name not in self.files:
            return None
        try:
            content = read_file(self.data.path_of(name))
        except OSError:
            return None
        return content if sha256(content) == self.files[name].digest else None


def find_photos(run_id: str) -> Photos:
    """The photos of a run, from its artifact evaluation.json; none when that cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evaluation.json", dst_path=folder)
            data = RunData.read(Path(path)).data
        except (MlflowException, OSError, ValidationError):
            return Photos(DataVersion("", "", []), {})
    return Photos(data, {image.file: image for image in data.files})
