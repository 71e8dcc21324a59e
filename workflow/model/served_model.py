"""Load a logged model with its own serving code, as MLflow serves it, and classify image files with it.

Models of every release are evaluated and used this way: the code that was logged with a model reads the images.
"""

import base64
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workflow.errors import first_line

import mlflow
from mlflow.exceptions import MlflowException

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel  # which imports pandas

ServedPrediction = dict[str, Any]  # label, probability, probabilities, and other fields, depending on the release


def load_model(uri: str) -> "PyFuncModel":
    """Load the model at a URI, and delete the downloaded files afterwards.

    Raises:
        ValueError: the model cannot be loaded; the message is the reason, without temporary paths
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            return mlflow.pyfunc.load_model(uri, dst_path=folder)
        except Exception as error:  # a damaged model, or one from another project, may raise any exception
            reason = first_line(error).replace(f"{folder}/", "")
            if "MLmodel" in reason:
                reason = "its files are missing from MLflow's artifact store"
            raise ValueError(reason) from error


def class_names(model: "PyFuncModel") -> list[str]:
    """Return the class names of a model; [] for a model from another project."""
    names = (model.model_config or {}).get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def get_reference_embeddings(classifier: Any) -> Any:
    """Return the reference embeddings of an ImageClassifier of any release; None without a backbone."""
    names = ("reference_embeddings", "references", "known")  # in this release, earlier ones, and 1.0
    return next((getattr(classifier, name) for name in names if hasattr(classifier, name)), None)


def predict(model: "PyFuncModel", contents: Sequence[bytes]) -> list[ServedPrediction | str]:
    """Return the prediction for each image file, given its content, or the reason why it is unusable."""
    texts = [base64.b64encode(content).decode() for content in contents]
    try:
        predictions: Any = model.predict(texts)
        return [item if isinstance(item, dict) else item.model_dump() for item in predictions]
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        if len(texts) == 1:
            return [first_line(error).removeprefix("inputs[0]: ")]
    return [predict(model, [content])[0] for content in contents]
