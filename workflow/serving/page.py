"""One page on 127.0.0.1 to try a model on photos: `python predict.py --page`.

The page is page.html, which loads nothing from elsewhere. Each photo is sent as it is, in a request of its own. A
request under another host's name is refused (a page elsewhere could have its name lead to 127.0.0.1), and so is one
that a page of another origin makes.
"""

import asyncio
import io
import secrets
import socket
from pathlib import Path
from typing import Any

from workflow.image_classifier import read_image
from workflow.model import activation_maps, served_model
from workflow.serving.photos import find_photos
from workflow.serving.registered_model import RegisteredModel
from workflow.text import printable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from PIL import Image

PORT = 5002  # another one when it is taken
MAX_BYTES = 50_000_000  # of a photo
AT_ONCE = 4  # photos that are worked on; the others wait
SHOWN_SIZE = 160  # pixels of a training photo, both sides
PAGE = Path(__file__).with_name("page.html")
CLOSED = {  # nothing of the page is for other pages, and nothing from elsewhere is for the page
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(registered: RegisteredModel, port: int) -> FastAPI:
    """The application behind the page; `port` is the one under which it may be asked."""
    app = FastAPI(openapi_url=None)
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
    working, photos = asyncio.Semaphore(AT_ONCE), find_photos(registered.run_id)
    classifier = registered.model.unwrap_python_model()
    is_explainable = activation_maps.is_explainable(classifier)

    @app.middleware("http")
    async def refuse_strangers(request: Request, call_next: Any) -> Response:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in hosts or origin not in (None, f"http://{host}"):
            return PlainTextResponse(f"this page is at http://127.0.0.1:{port} alone", 403)
        response = await call_next(request)
        response.headers.update(CLOSED)
        return response

    @app.get("/")
    def show_page() -> HTMLResponse:
        nonce = secrets.token_urlsafe()
        allowed = (
            f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:; connect-src 'self'"
        )
        policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(
            PAGE.read_text("utf-8").replace("NONCE", nonce), headers={"Content-Security-Policy": policy}
        )

    @app.get("/model")
    def describe_model() -> dict[str, Any]:
        names = {"origin": printable(registered.origin), "classes": list(map(printable, registered.class_names))}
        return names | {"explainable": is_explainable}

    @app.post("/classify")
    async def classify(request: Request) -> JSONResponse:
        if isinstance(content := await receive_photo(request), JSONResponse):
            return content
        async with working:
            (answer,) = await run_in_threadpool(served_model.predict, registered.model, [content])
        if isinstance(answer, str):
            return JSONResponse({"error": printable(answer)}, 400)
        return JSONResponse(answer | {"at_hand": answer.get("nearest") in photos.files})

    @app.post("/explain")
    async def explain(request: Request) -> Response:
        if not is_explainable:
            return JSONResponse({"error": "a model without a backbone cannot be explained"}, 404)
        if isinstance(content := await receive_photo(request), JSONResponse):
            return content
        async with working:
            picture = await run_in_threadpool(next, activation_maps.explain_images(classifier, [content]))
        if isinstance(picture, str):
            return JSONResponse({"error": printable(picture)}, 400)
        return Response(picture, media_type="image/jpeg")

    @app.get("/photo")
    def show_photo(file: str) -> Response:
        content = photos.read(file)
        if content is None:
            return PlainTextResponse("this photo is not at hand", 404)
        small = io.BytesIO()
        Image.fromarray(read_image(content, SHOWN_SIZE)).save(small, "JPEG")
        return Response(small.getvalue(), media_type="image/jpeg")

    return app


async def receive_photo(request: Request) -> bytes | JSONResponse:
    """Return the photo that a request sends, or the response that refuses it."""
    if request.headers.get("content-type") != "application/octet-stream":  # a form of another page cannot send it
        return JSONResponse({"error": "send the image file as application/octet-stream"}, 415)
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BYTES:
            return JSONResponse({"error": f"more than {MAX_BYTES:,} bytes are refused"}, 413)
    return bytes(content)


def serve(registered: RegisteredModel) -> None:
    """Serves the page until Ctrl-C."""
    with socket.socket() as listening:
        try:
            listening.bind(("127.0.0.1", PORT))
        except OSError:
            listening.bind(("127.0.0.1", 0))
        listening.listen()  # whoever reads the address below can ask at once
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(registered, port), log_level="warning", access_log=False))
        print(f"Try it at http://127.0.0.1:{port} until you press Ctrl-C", flush=True)
        try:
            server.run([listening])
        except KeyboardInterrupt:
            return
