"""Serve a page on 127.0.0.1 to try a model on photos: `python predict.py --page`.

The page, page.html, loads nothing from other hosts and sends each photo, unchanged, in its own request. Requests from
pages of another origin are rejected, and so are requests for another host name, because a malicious website could make
its name resolve to 127.0.0.1 (DNS rebinding).
"""

import asyncio
import secrets
import socket
from pathlib import Path
from typing import Any

from workflow.image_classifier import encode_jpeg, read_image
from workflow.model import activation_maps, served_model
from workflow.serving.registered_model import RegisteredModel, read_data
from workflow.text import printable

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

PORT = 5002  # if it is in use, a free port is chosen
MAX_BYTES = 50_000_000  # per photo
MAX_CONCURRENT_PHOTOS = 4  # others wait
THUMBNAIL_PIXELS = 160  # width and height of a training photo
PAGE = Path(__file__).with_name("page.html")
POLICY = (  # allows only this page's script and style, and only requests to this server
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {  # other websites cannot read or embed this page
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def make_app(registered: RegisteredModel, port: int) -> FastAPI:
    """Return the application that serves the page and its requests on this port."""
    app = FastAPI(openapi_url=None)
    is_explainable = activation_maps.is_explainable(classifier := registered.model.unwrap_python_model())
    concurrent_photos, data = asyncio.Semaphore(MAX_CONCURRENT_PHOTOS), read_data(registered.run_id)
    add_access_control(app, port)
    app.get("/")(show_page)
    app.get("/model")(lambda: describe(registered) | {"explainable": is_explainable})

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        content = await receive_photo(request)
        async with concurrent_photos:
            (prediction,) = await run_in_threadpool(served_model.predict, registered.model, [content])
        if isinstance(prediction, str):
            raise HTTPException(400, printable(prediction))
        return prediction | {"has_photo": prediction.get("nearest") in data.by_file}

    @app.post("/explain")
    async def explain(request: Request) -> Response:
        if not is_explainable:
            raise HTTPException(404, "predictions of a model without a backbone cannot be explained")
        content = await receive_photo(request)
        async with concurrent_photos:
            overlay = await run_in_threadpool(next, activation_maps.explain_images(classifier, [content]))
        if isinstance(overlay, str):
            raise HTTPException(400, printable(overlay))
        return Response(overlay, media_type="image/jpeg")

    @app.get("/photo")
    def show_photo(file: str) -> Response:
        try:
            content = data.read(file)
        except OSError as error:
            raise HTTPException(404, "this photo is missing or has changed") from error
        return Response(encode_jpeg(read_image(content, THUMBNAIL_PIXELS)), media_type="image/jpeg")

    return app


def describe(registered: RegisteredModel) -> dict[str, Any]:
    return {"origin": printable(registered.origin), "classes": list(map(printable, registered.class_names))}


def show_page() -> HTMLResponse:
    """Return the page, with a content security policy that allows only its own script and style."""
    nonce = secrets.token_urlsafe()
    html = PAGE.read_text("utf-8").replace("NONCE", nonce)
    return HTMLResponse(html, headers={"Content-Security-Policy": POLICY.format(nonce)})


def add_access_control(app: FastAPI, port: int) -> None:
    """Reject requests from other origins and for other host names, and add HEADERS to all responses."""
    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    @app.exception_handler(HTTPException)
    def show_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.middleware("http")
    async def refuse_other_origins(request: Request, call_next: Any) -> Response:
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if host not in hosts or origin not in (None, f"http://{host}"):
            return PlainTextResponse(f"use http://127.0.0.1:{port}", 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response


async def receive_photo(request: Request) -> bytes:
    """Return the photo in the body of a request.

    Raises:
        HTTPException: the content type is not application/octet-stream, or the photo is too large
    """
    if request.headers.get("content-type") != "application/octet-stream":  # forms on other websites cannot send it
        raise HTTPException(415, "send the image file as application/octet-stream")
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BYTES:
            raise HTTPException(413, f"larger than {MAX_BYTES:,} bytes")
    return bytes(content)


def serve(registered: RegisteredModel) -> None:
    """Serve the page until Ctrl-C."""
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", PORT))
        except OSError:
            listener.bind(("127.0.0.1", 0))
        listener.listen()  # before the address is printed
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(registered, port), log_level="warning", access_log=False))
        print(f"Try it at http://127.0.0.1:{port} (Ctrl-C to stop)", flush=True)
        try:
            server.run([listener])
        except KeyboardInterrupt:
            return
