"""The baseline for serve.py: a minimal FastAPI application around the Keras model in the file $MODEL."""

import base64
import io
import os

import keras
import numpy as np
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

SIZE = int(os.environ["SIZE"])  # pixels, both sides, as in training
app, model = FastAPI(), keras.saving.load_model(os.environ["MODEL"])


class Images(BaseModel):
    inputs: list[str]


@app.get("/ping")
def ping() -> bool:
    return True


@app.post("/invocations")
def invocations(images: Images) -> list[list[float]]:
    """Return the class probabilities of base64-encoded images."""
    files = [io.BytesIO(base64.b64decode(text)) for text in images.inputs]
    pixels = [np.asarray(Image.open(file).convert("RGB").resize((SIZE, SIZE))) for file in files]
    return model.predict_on_batch(np.stack(pixels)).tolist()
