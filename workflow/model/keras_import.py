"""Import Keras and TensorFlow without TensorFlow's warnings about missing GPUs."""

import importlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NOISE = re.compile(
    rb"All log messages before absl::InitializeLog|Could not find cuda drivers|oneDNN custom operations"
    rb"|Created TensorFlow Lite XNNPACK delegate"
)
DRAIN_SECONDS = 1  # maximum time to forward the last lines


def import_keras() -> None:
    """Import Keras with its default configuration and without NOISE.

    The user's keras.json and KERAS_MAX_EPOCHS would otherwise change the cached features and the training. TensorFlow
    (2.21) ignores TF_CPP_MIN_LOG_LEVEL during its import; once it respects it, remove suppress_noise().
    """
    with suppress_noise():
        config = importlib.import_module("keras").config
    config.set_floatx("float32")
    config.set_epsilon(1e-7)
    config.set_image_data_format("channels_last")
    config.set_max_epochs(None)
    config.set_max_steps_per_epoch(None)


@contextmanager
def suppress_noise() -> Iterator[None]:
    """Drop lines that match NOISE from this process's standard error, including output of C++ code."""
    try:
        terminal = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=forward_lines, args=(reader, os.dup(terminal)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)  # also closes the pipe, unless a child process has inherited it
        os.close(terminal)
        thread.join(DRAIN_SECONDS)


def forward_lines(reader: int, terminal: int) -> None:
    """Forward all lines except those that match NOISE."""
    with open(reader, "rb") as lines, open(terminal, "wb", buffering=0) as output:
        for line in lines:
            if not NOISE.search(line):
                with suppress(
                    OSError
                ):  # on a full disk, continue to read, because writing to a pipe without a reader fails
                    output.write(line)
