"""A model for red and green images whose backbone returns the mean color, so that it needs no training."""

import warnings
from pathlib import Path
from types import SimpleNamespace

from workflow.image_classifier import ImageClassifier

import keras
import numpy as np

SIZE = 32  # pixels, both sides
COLORS = {"red": (220, 20, 20), "dark red": (120, 30, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
REFERENCES = {"red/1": (220, 20, 20), "red/2": (200, 30, 20), "green/1": (20, 220, 20), "green/2": (30, 200, 30)}


def save_model(folder: Path) -> Path:
    """Write the files of the model to a folder, and return the folder."""
    backbone = keras.Sequential([keras.Input((None, None, 3)), keras.layers.GlobalAveragePooling2D()], name="backbone")
    dense = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((None, None, 3)), backbone, dense, keras.layers.Softmax()])
    dense.set_weights([np.array([[0.01, 0], [0, 0.01], [0, 0]]), np.zeros(2)])
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "__array__ implementation", DeprecationWarning
        )  # raised by Keras with NumPy 2
        model.save(folder / "model.keras")
    features = np.array(list(REFERENCES.values()), "float32")
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    labels = [file.startswith("green") for file in REFERENCES]
    arrays = {"features": units.astype("float16"), "labels": np.array(labels, int), "files": np.array(list(REFERENCES))}
    np.savez(folder / "reference_embeddings.npz", **arrays, max_novelty=np.nan)
    return folder


def load_classifier(
    folder: Path, has_references: bool = True, max_novelty: float = np.nan, unsure_below: float | None = None
) -> ImageClassifier:
    """Return the model as served.

    Args:
        folder: written by save_model()
        has_references: whether the model has reference embeddings
        max_novelty: images above it are unknown
        unsure_below: predictions with a lower probability are unsure
    """
    artifacts = {"model": str(folder / "model.keras")}
    if has_references:
        artifacts["reference_embeddings"] = str(folder / "reference_embeddings.npz")
    config = {"class_names": ["red", "green"], "image_size": SIZE, "unsure_below": unsure_below}
    classifier = ImageClassifier()
    classifier.load_context(SimpleNamespace(artifacts=artifacts, model_config=config))
    classifier.max_novelty = max_novelty
    return classifier
