"""Keras is used in its default configuration, whatever the user has configured."""

import json
import os
import subprocess
import sys

from support.project import PROJECT

import numpy as np
import pytest

PROGRAM = """
import sys
from workflow.model import backbone
import numpy as np
pixels = np.random.default_rng(1).integers(0, 255, (1, backbone.IMAGE_SIZE, backbone.IMAGE_SIZE, 3), "uint8")
np.save(sys.argv[1], backbone.compute_features(pixels))
import keras
assert (keras.config.epsilon(), keras.config.max_epochs(), keras.config.max_steps_per_epoch()) == (1e-7, None, None)
"""


@pytest.mark.slow
@pytest.mark.survived("Keras: keras.json with another float type and data format", "Keras: KERAS_MAX_EPOCHS")
def test_features_do_not_depend_on_the_configuration_of_keras(tmp_path):
    config = {"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first", "backend": "tensorflow"}
    (tmp_path / "keras.json").write_text(json.dumps(config))
    ours = {"KERAS_HOME": str(tmp_path), "KERAS_MAX_EPOCHS": "1", "KERAS_MAX_STEPS_PER_EPOCH": "1"}
    features = []
    for number, variables in enumerate(({"KERAS_HOME": str(tmp_path / "empty")}, ours)):
        file = tmp_path / f"{number}.npy"
        command = [sys.executable, "-c", PROGRAM, str(file)]
        end = subprocess.run(command, cwd=PROJECT, env=os.environ | variables, capture_output=True, text=True)
        assert end.returncode == 0, end.stderr
        features.append(np.load(file))
    assert features[0].dtype == features[1].dtype == "float32"
    assert np.array_equal(*features)
