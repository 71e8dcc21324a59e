"""The scoring script of Azure's inference server: {"input_data": [base64-encoded image file, ...]} in, predictions out.

Azure's own script for MLflow models expects a signature with columns, but the model's signature comes from the type
hints of its predict(). A request with unusable images returns status 400 with the reason for each.
"""

import json
import os
from pathlib import Path

import mlflow
from azureml.contrib.services.aml_response import AMLResponse
from mlflow.exceptions import MlflowException


def init() -> None:
    """Load the model, once per process, from its folder under AZUREML_MODEL_DIR."""
    global model
    (description,) = Path(os.environ["AZUREML_MODEL_DIR"]).rglob("MLmodel")
    model = mlflow.pyfunc.load_model(str(description.parent))


def run(body: str) -> list | AMLResponse:
    """Return the prediction for each image of a request, or an error status with the reason."""
    try:
        images = json.loads(body)["input_data"]
    except (ValueError, KeyError, TypeError):
        return AMLResponse({"message": 'send {"input_data": [base64-encoded image file, ...]}'}, 400, json_str=True)
    try:
        return [prediction.model_dump() for prediction in model.predict(images)]
    except MlflowException as error:
        return AMLResponse({"message": str(error)}, error.get_http_status_code(), json_str=True)
