"""The photos that a model was trained and tested on, where they still lie on this machine."""

import tempfile
from pathlib import Path

from workflow.files import sha256
from workflow.model import served_model
from workflow.names import locate
from workflow.records import DataVersion, Evaluation

import mlflow
import requests
from mlflow.exceptions import MlflowException
from pydantic import ValidationError


def find_data(run_id: str) -> DataVersion | None:
    """The data version of a run, from its artifact evaluation.json; None when that cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="evaluation.json", dst_path=folder)
            return Evaluation.read(Path(path)).data
        except (MlflowException, OSError, ValidationError, requests.RequestException):
            return None


def read_photo(data: DataVersion, file: str) -> bytes | None:
    """The content of one of the data version's files; None when it is no such file, or is gone or changed."""
    digests = {image.file: image.digest for image in data.files}
    try:
        content = served_model.read_file(locate(data.folder, file)) if file in digests else b""
    except OSError:
        return None
    return content if file in digests and sha256(content) == digests[file] else None
