"""The state of training after each epoch, in a file, so that a run that died goes on where it was.

keras.callbacks.BackupAndRestore keeps neither the random generators nor the history, and a process that is killed
while it writes leaves the weights of one epoch with the number of another.
"""

import json
import time
import zipfile
from pathlib import Path
from typing import Any

from workflow.files import write_arrays

import keras
import numpy as np


class Checkpoint(keras.callbacks.Callback):
    """Keeps model, optimizer, random generators and history; the final weights are those of an undisturbed training.

    `history` has a dictionary for each epoch: Keras's logs, and its end as `time`, in ms since 1970.
    """

    def __init__(self, path: Path, epoch: Any):
        super().__init__()
        self.path, self.epoch = path, epoch
        self.history: list[dict[str, float]] = []

    def restore(self, model: Any) -> None:
        """Puts the model where the file left off, at the start when there is none; call it before fit()."""
        self.set_model(model)
        model.optimizer.build(model.trainable_variables)
        try:
            with np.load(self.path) as saved:
                values = [saved[f"arr_{number}"] for number in range(len(self.variables()))]
                self.history = json.loads(str(saved["history"]))
        except FileNotFoundError:
            return
        except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            print(f"{self.path} is damaged ({error}): training begins anew", flush=True)
            return
        for variable, value in zip(self.variables(), values, strict=False):
            variable.assign(value)
        self.epoch.assign(len(self.history))
        # Private in Keras (3.15), and what its own BackupAndRestore sets. fit(initial_epoch=...) is public, but MLflow
        # logs the arguments of fit() as parameters, and a run that is gone on with cannot change its parameters.
        model._initial_epoch = len(self.history)

    def variables(self) -> list[Any]:
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.epoch.assign(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.history.append((logs or {}) | {"time": int(1000 * time.time())})
        values = [variable.numpy() for variable in self.variables()]
        write_arrays(self.path, *values, history=json.dumps(self.history))
