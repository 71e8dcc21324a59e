"""The baseline of serve.py: a FastAPI application around the Keras model file that $MODEL names, for
images of $SIZE pixels, and nothing else."""

import base64
import io
import os

import keras
import numpy as np
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

SIZE = int(os.environ["SIZE"])  # pixels, as the model was trained
app, model = FastAPI(), keras.saving.load_model(os.environ["MODEL"])


class Images(BaseModel):
    inputs: list[str]


@app.get("/ping")
def ping() -> bool:
    return True


@app.post("/invocations")
def invocations(images: Images) -> list[list[float]]:
    """The class probabilities of each image in base64."""
    opened = [
        Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").resize((SIZE, SIZE)) for text in images.inputs
    ]
    return model.predict_on_batch(np.stack([np.asarray(image) for image in opened])).tolist()
