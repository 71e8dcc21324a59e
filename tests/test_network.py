import ml_workflow
import network

import numpy as np
import pytest


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (3, 31, 200, 3)])
def test_model_takes_raw_pixels_of_any_size_and_stays_small(shape):
    model = network.build_model(2, ml_workflow.IMAGE_SIZE, ml_workflow.FILTERS, ml_workflow.DROPOUT)
    probabilities = model.predict(np.full(shape, 255, "uint8"), verbose=0)
    assert probabilities.shape == (shape[0], 2)
    assert np.allclose(probabilities.sum(1), 1)
    assert model.count_params() < 100_000
