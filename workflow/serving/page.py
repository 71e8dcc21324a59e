"""The web page for trying the model on photos.

It loads nothing from other hosts, and sends each photo, unchanged, in a separate request.
"""

import functools
import importlib.util
import secrets
from pathlib import Path
from typing import Any

from workflow.image_classifier import encode_jpeg, read_image
from workflow.model import activation_maps
from workflow.serving.access import Limits
from workflow.serving.followed_model import FollowedModel, Serving
from workflow.serving.registered_model import load
from workflow.text import printable

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

THUMBNAIL_PIXELS = 160  # width and height of a training photo
PAGE = Path(__file__).with_name("page.html")
POLICY = (  # allows only this page's script and style, and only requests to this server
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_router(model: FollowedModel, limits: Limits) -> APIRouter:
    """Return the routes of the page and of the photos that it shows."""
    router = APIRouter(include_in_schema=False)
    router.get("/")(show_page)
    router.get("/model")(lambda: describe(model.serving))

    @router.post("/explain")
    async def explain(request: Request) -> Response:
        serving = model.serving
        if not is_explainable(serving):
            raise HTTPException(404, "explanations need a model with a backbone, and TensorFlow")
        async with limits.receive(request) as photo, limits.explaining:
            overlay = await run_in_threadpool(explain_photo, serving.version, bytes(photo))
        if isinstance(overlay, str):
            raise HTTPException(400, printable(overlay))
        return Response(overlay, media_type="image/jpeg")

    @router.get("/photo")
    def show_photo(file: str) -> Response:
        try:
            content = model.serving.data.read(file)
        except OSError as error:
            raise HTTPException(404, "this photo is missing or has changed") from error
        return Response(encode_jpeg(read_image(content, THUMBNAIL_PIXELS)), media_type="image/jpeg")

    return router


def show_page() -> HTMLResponse:
    """Return the page, with a content security policy that allows only its own script and style."""
    nonce = secrets.token_urlsafe()
    html = PAGE.read_text("utf-8").replace("NONCE", nonce)
    return HTMLResponse(html, headers={"Content-Security-Policy": POLICY.format(nonce)})


def describe(serving: Serving) -> dict[str, Any]:
    """Return the information about the served version that the page shows."""
    registered, classes = serving.registered, serving.registered.class_names
    return {
        "origin": printable(registered.origin),
        "classes": list(map(printable, classes)),
        "explainable": is_explainable(serving),
    }


def is_explainable(serving: Serving) -> bool:
    return serving.has_backbone and importlib.util.find_spec("tensorflow") is not None


@functools.lru_cache(maxsize=1)
def load_keras_model(uri: str) -> Any:
    """Return a version's Keras classifier, which is needed because LiteRT does not output feature maps."""
    return load(uri, "Keras").classifier


def explain_photo(uri: str, photo: bytes) -> bytes | str:
    """Return the photo with its class activation map, or the reason why the photo is unusable."""
    return next(activation_maps.explain_images(load_keras_model(uri), [photo]))
