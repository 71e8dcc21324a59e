"""What Azure's inference server runs: {"input_data": [image file in base64, ...]} in, the model's answers out.

Azure's own script for MLflow models cannot be used: it expects a signature of columns, and the model's comes from the
types of its predict(). When an image cannot be used, the status is 400 and the message says which one and why.
"""

import json
import os
from pathlib import Path

import mlflow
from azureml.contrib.services.aml_response import AMLResponse
from mlflow.exceptions import MlflowException


def init() -> None:
    """Loads the model, once per process; Azure has put it somewhere below AZUREML_MODEL_DIR."""
    global model
    (description,) = Path(os.environ["AZUREML_MODEL_DIR"]).rglob("MLmodel")
    model = mlflow.pyfunc.load_model(str(description.parent))


def run(body: str) -> list | AMLResponse:
    """The answer to each image of a request; status 400 with the reason when there is none."""
    try:
        images = json.loads(body)["input_data"]
    except (ValueError, KeyError, TypeError):
        return AMLResponse({"message": 'send {"input_data": [an image file in base64, ...]}'}, 400, json_str=True)
    try:
        return [answer.model_dump() for answer in model.predict(images)]
    except MlflowException as error:
        return AMLResponse({"message": str(error)}, error.get_http_status_code(), json_str=True)
