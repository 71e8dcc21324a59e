"""A logged model as MLflow serves it: loaded with its own packaged code, and asked about image files.

Every model is judged and used in this way, whatever its age: the code that it was logged with reads the images.
"""

import base64
import tempfile
from collections.abc import Sequence
from typing import Any

from workflow.errors import first_line

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PyFuncModel

Answer = dict[str, Any]  # what a model says of an image: it depends on the version with which it was logged


def load_model(uri: str) -> PyFuncModel:
    """The model behind a URI; what was fetched for it does not stay on the disk.

    Raises ValueError with the reason, which names files of the model, and not where they were for a moment.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return mlflow.pyfunc.load_model(uri, dst_path=folder)
        except Exception as error:  # whatever comes of files that somebody else has made, or that are damaged
            reason = first_line(error).replace(f"{folder}/", "")
            if "MLmodel" in reason:
                reason = "its files are gone from where MLflow keeps them"
            raise ValueError(reason) from error


def class_names(model: PyFuncModel) -> list[str]:
    """The labels that the model gives; [] for a model that is not of this project."""
    names = (model.model_config or {}).get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def predict(model: PyFuncModel, contents: Sequence[bytes]) -> list[Answer | str]:
    """The model's answer to each image file's content, or its reason why there is none.

    An answer has `label`, `probability` and `probabilities`, and whatever else this version of the model says.
    """
    texts = [base64.b64encode(content).decode() for content in contents]
    try:
        answers: Any = model.predict(texts)
        return [answer if isinstance(answer, dict) else answer.model_dump() for answer in answers]
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        if len(texts) == 1:
            return [first_line(error).removeprefix("inputs[0]: ")]
    return [predict(model, [content])[0] for content in contents]
