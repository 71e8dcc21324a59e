"""The state of training after each epoch, in a file, so that a run that died goes on where it was.

keras.callbacks.BackupAndRestore keeps neither the random generators nor the history, and a process that is killed
while it writes leaves the weights of one epoch with the number of another.
"""

import json
import os
import time
from pathlib import Path

import keras
import numpy as np


class Backup(keras.callbacks.Callback):
    """Keeps model, optimizer, random generators and history; the final weights are those of an undisturbed training.

    `history` has a dictionary for each epoch: Keras's logs, and its end as `time`, in ms since 1970.
    """

    def __init__(self, path: Path, epoch):
        super().__init__()
        self.path, self.epoch, self.history = path, epoch, []

    def restore(self, model) -> int:
        """Puts the model where the file left off, 0 epochs when there is none; call it before fit()."""
        self.set_model(model)
        if self.path.exists():
            model.optimizer.build(model.trainable_variables)
            with np.load(self.path) as saved:
                for number, variable in enumerate(self.variables()):
                    variable.assign(saved[f"arr_{number}"])
                self.history = json.loads(str(saved["history"]))
        self.epoch.assign(len(self.history))
        model._initial_epoch = len(self.history)  # as BackupAndRestore does: fit() itself has to be called as before
        return len(self.history)

    def variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch.assign(epoch)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.history.append(logs | {"time": int(1000 * time.time())})
        part = self.path.with_name(".part.npz")
        np.savez(part, *(variable.numpy() for variable in self.variables()), history=json.dumps(self.history))
        os.replace(part, self.path)
