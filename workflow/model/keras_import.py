"""The import of Keras, and of TensorFlow with it: without scikit-learn, and without the lines that everybody gets."""

import importlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = re.compile(
    rb"All log messages before absl::InitializeLog|Could not find cuda drivers|oneDNN custom operations"
    rb"|Created TensorFlow Lite XNNPACK delegate"
)
SECONDS = 1  # to print what was still on its way when the import ends


def import_keras() -> None:
    """Imports Keras without scikit-learn, which saves 0.6 s, and without TensorFlow's lines on a missing GPU.

    keras.wrappers (Keras 3.15) imports scikit-learn where it is installed, and nothing here uses it. This function
    becomes unnecessary when Keras imports its wrappers only where they are used, and TensorFlow heeds
    TF_CPP_MIN_LOG_LEVEL while it is imported (2.21 does not).
    """
    absent = "sklearn" not in sys.modules
    if absent:
        sys.modules["sklearn"] = None  # type: ignore[assignment]  # makes its import fail, as where it is missing
    try:
        with without_noise():
            importlib.import_module("keras")
    finally:
        if absent:
            del sys.modules["sklearn"]


@contextmanager
def without_noise() -> Iterator[None]:
    """Takes the lines of NOISE out of what this process, C++ included, writes to its standard error."""
    try:
        terminal = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=forward, args=(reader, terminal), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # closes the only end of the pipe that is written to, unless a child process has it too
        thread.join(SECONDS)


def forward(reader: int, terminal: int) -> None:
    """Writes each line that comes to the terminal, except those of NOISE."""
    with open(reader, "rb") as lines, open(terminal, "wb", buffering=0) as out:
        for line in lines:
            if not NOISE.search(line):
                out.write(line)
