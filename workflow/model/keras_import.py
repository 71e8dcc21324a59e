"""The import of Keras, and of TensorFlow with it, without scikit-learn."""

import importlib
import sys


def import_keras() -> None:
    """Imports Keras without scikit-learn, which saves 0.6 s.

    keras.wrappers (Keras 3.15) imports scikit-learn where it is installed, and nothing here uses it. This function
    becomes unnecessary when Keras imports its wrappers only where they are used.
    """
    absent = "sklearn" not in sys.modules
    if absent:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # makes its import fail, as where it is missing
    try:
        importlib.import_module("keras")
    finally:
        if absent:
            del sys.modules["sklearn"]
