"""Classify images with the LiteRT export of a model, without TensorFlow. litert.py writes the export.

It starts in a fraction of a second rather than several seconds, and needs a fifth of the memory.
"""

import json
import math
import os
import queue
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workflow.errors import first_line
from workflow.files import sha256
from workflow.image_classifier import READING_VERSION, Classifier
from workflow.model.keras_import import suppress_noise

import mlflow
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from mlflow.exceptions import MlflowException

FOLDER = "litert"  # among the artifacts of a model
FLOAT, DESCRIPTION = "model.tflite", "model.json"
OUTPUTS = "probabilities", "similarity", "novelty", "nearest"  # a model without a backbone has only the first
MAX_INTERPRETERS = 4  # each takes 50 MB
THREADS = 2  # per interpreter: 10% less latency for one image, same throughput for many
TOLERANCE = 0.001  # maximum difference in probability from the model


class LiteRTClassifier(Classifier):
    """A classifier that runs a .tflite file.

    Its input is one image, because larger batches are no faster on a CPU. A single image is classified in the caller's
    thread, so that its priority applies; several are distributed over threads. Interpreters are created on demand.
    """

    def __init__(self, network: bytes, description: dict[str, Any]):
        """Load a network.

        Args:
            network: content of the .tflite file
            description: content of the export's model.json

        Raises:
            ValueError: the network is unusable
        """
        self.description = description
        self.class_names, self.image_size = description["labels"], description["image_size"]
        self.unsure_below, max_novelty = description["unsure_below"], description["unknown_above"]
        self.max_novelty = math.nan if max_novelty is None else max_novelty
        self.files = description["reference_files"]
        self.run_id, self.data_digest = description["run_id"], description["data_digest"]
        self.network, self.idle = network, queue.LifoQueue[Callable[..., dict[str, np.ndarray]]]()
        self.threads = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_INTERPRETERS), "litert")
        with suppress_noise():  # only the first interpreter of a process prints
            self.predict_batch(np.zeros((1, self.image_size, self.image_size, 3), "uint8"))

    def __reduce__(self) -> tuple[type["LiteRTClassifier"], tuple[bytes, dict[str, Any]]]:
        """Pickle what the classifier is created from: Dask sends it from worker to worker."""
        return LiteRTClassifier, (self.network, self.description)

    def predict_batch(self, pixels: np.ndarray) -> list[np.ndarray]:
        outputs = list((map if len(pixels) == 1 else self.threads.map)(self.run, pixels))
        return [np.concatenate([output[name] for output in outputs]) for name in OUTPUTS if name in outputs[0]]

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs for one image, computed by an idle interpreter."""
        try:
            interpret = self.idle.get_nowait()
        except queue.Empty:
            interpret = Interpreter(model_content=self.network, num_threads=THREADS).get_signature_runner()
        outputs = interpret(pixels=pixels[None].astype("float32"))
        self.idle.put(interpret)
        return outputs


def load_export(uri: str) -> LiteRTClassifier | str:
    """Return the classifier of the export that is stored with a model, or the reason why it cannot replace the model.

    Args:
        uri: MLflow model URI, or a model folder
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = Path(mlflow.artifacts.download_artifacts(f"{uri}/{FOLDER}", dst_path=folder))
            network, description = (path / FLOAT).read_bytes(), (path / DESCRIPTION).read_bytes()
        except (MlflowException, OSError):
            return "it has no LiteRT export"
    try:
        exported = json.loads(description)
        return find_difference(network, exported) or LiteRTClassifier(network, exported)
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        return f"its LiteRT export is damaged: {first_line(error)}"


def find_difference(network: bytes, description: dict[str, Any]) -> str:
    """Return why an export may predict differently from its model; "" if it does not."""
    if description["sha256"] != sha256(network):
        raise ValueError(f"{FLOAT} has changed")
    if description["reading_version"] != READING_VERSION:
        return "its LiteRT export is from another version of this program"
    agreement = description["compared"][FLOAT]
    if not agreement["photos"]:
        return "its LiteRT export was not compared with the model"
    return "" if agrees(agreement) else f"its LiteRT export differs from the model: {describe_agreement(agreement)}"


def agrees(agreement: dict[str, float]) -> bool:
    """Return whether an export predicts what its model predicts for all compared photos."""
    same = min(agreement["same label"], agreement["same unknown"]) == agreement["photos"]
    return same and agreement["largest difference"] <= TOLERANCE


def describe_agreement(agreement: dict[str, float]) -> str:
    """Return the result of a comparison as text."""
    if not agreement["photos"]:
        return "not compared with the model: no photos from the run are left"
    return (
        f"same label for {agreement['same label']} of {agreement['photos']} photos, same `unknown` for "
        f"{agreement['same unknown']}; probabilities differ by at most {agreement['largest difference']:.4f}"
    )
