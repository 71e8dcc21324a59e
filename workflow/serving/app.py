"""The web application of serve.py: routes, inputs and outputs."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from workflow.image_classifier import MAX_IMAGES, ImagePrediction, decode_base64
from workflow.serving import page
from workflow.serving.access import Guard, Limits, describe_error
from workflow.serving.predictor import Predicted, Predictor, UnusableImagesError
from workflow.text import printable

from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError, StarletteHTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

FILE = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"image": {"type": "array", "items": FILE}}}
JSON_BODY = {"type": "object", "properties": {"inputs": {"type": "array", "items": {"type": "string"}}}}


class Predictions(BaseModel):
    """The predictions for the images of a request, in the same order, and the version that made them."""

    predictions: list[ImagePrediction]
    version: str


class Problem(BaseModel):
    """Why a request failed."""

    error: str


def describe_body(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of a request body, given its schema for each content type."""
    content = {name: {"schema": schema} for name, schema in schemas.items()}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def make_app(predictor: Predictor, hosts: list[str], token: str) -> FastAPI:
    """Return the application.

    Args:
        predictor: classifies the images
        hosts: accepted values of the Host header; empty if any is accepted
        token: required from clients, or ""
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        predictor.start()
        yield
        predictor.close()

    responses: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in (400, 401, 413, 429, 503)}
    app = FastAPI(title="Image classifier", redoc_url=None, lifespan=lifespan, responses=responses)
    app.add_middleware(Guard, metrics=predictor.metrics, hosts=hosts, token=token)
    limits = Limits()
    app.include_router(page.make_router(predictor.model, limits))
    add_error_handlers(app)
    add_prediction_routes(app, predictor, limits)

    @app.get("/health")
    def health() -> JSONResponse:
        """Describe the served version; return status 503 if it cannot predict."""
        description = describe_health(predictor)
        return JSONResponse(description, 200 if description["status"] == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        """Return metrics in Prometheus's text format."""
        return Response(predictor.metrics.export(predictor.model.serving.version), media_type=CONTENT_TYPE_LATEST)

    return app


def add_error_handlers(app: FastAPI) -> None:
    """Return errors as one line of JSON, and log nothing if a client disconnects."""
    app.add_exception_handler(StarletteHTTPException, lambda _, error: describe_error(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: describe_error(describe_parameter(error)))
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))  # nginx's status
    app.add_exception_handler(Exception, lambda *_: JSONResponse({"error": "internal error"}, 500))


def describe_parameter(error: Any) -> HTTPException:
    """Return the error for the first invalid parameter in a request's URL."""
    problem = error.errors()[0]
    return HTTPException(422, f"{problem['loc'][-1]}: {problem['msg'].lower()}")


def add_prediction_routes(app: FastAPI, predictor: Predictor, limits: Limits) -> None:
    def respond(predicted: Predicted, request: Request, tasks: BackgroundTasks, start: float) -> Response:
        body = Predictions.model_construct(predictions=predicted.predictions, version=predicted.serving.version)
        tasks.add_task(predictor.record, predicted, request.url.path, request.state.request_id, start)
        return Response(body.model_dump_json(), media_type="application/json", background=tasks)

    @app.post("/invocations", response_model=Predictions, **describe_body({"application/json": JSON_BODY}))
    async def invocations(request: Request, tasks: BackgroundTasks) -> Response:
        """Classify base64-encoded images, using MLflow's scoring protocol."""
        start = time.perf_counter()
        try:
            async with limits.receive(request) as body:
                check_json(request.headers.get("content-type", ""))
                predicted = await predictor.predict(lambda: parse_invocations(body))
        except UnusableImagesError as error:
            return describe_for_mlflow(HTTPException(400, error.describe("inputs")))
        except HTTPException as error:
            return describe_for_mlflow(error)
        return respond(predicted, request, tasks, start)

    @app.post("/predict", response_model=Predictions, **describe_body({"image/*": FILE, "multipart/form-data": FORM}))
    async def predict(request: Request, tasks: BackgroundTasks) -> Response:
        """Classify the image file in the body, or one or more in a form."""
        start, content_type = time.perf_counter(), request.headers.get("content-type", "")
        is_form = content_type.lower().startswith("multipart/form-data")
        try:
            async with limits.receive(request) as body:
                parse = (lambda: split_form(body, content_type)) if is_form else (lambda: [bytes(body)])
                predicted = await predictor.predict(parse)
        except UnusableImagesError as error:
            reason = error.describe("image") if is_form else error.reasons[0]
            raise HTTPException(400, printable(reason)) from None
        return respond(predicted, request, tasks, start)


def check_json(content_type: str) -> None:
    """Raise HTTPException unless the content type is JSON in UTF-8, as MLflow's server does."""
    kind, _, parameter = content_type.lower().partition(";")
    if kind.strip() != "application/json" or parameter.strip() not in ("", "charset=utf-8"):
        raise HTTPException(415, "send JSON in UTF-8, with Content-Type: application/json")


def parse_invocations(body: bytearray) -> list[bytes | str]:
    """Return the content of each image in a request body, or the reason why it is unusable."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "inputs: the request is not valid JSON") from None
    if not isinstance(content, dict) or "inputs" not in content:
        raise HTTPException(400, 'inputs: the request is not a JSON object such as {"inputs": ["..."]}')
    if not isinstance(inputs := content["inputs"], list):
        raise HTTPException(400, "inputs: not a list of base64-encoded images")
    if len(inputs) > MAX_IMAGES:
        raise HTTPException(400, f"inputs: {len(inputs):,} images; send at most {MAX_IMAGES:,}")
    if invalid := [i for i, item in enumerate(inputs) if not isinstance(item, str)]:
        raise HTTPException(400, "; ".join(f"inputs[{i}]: not a base64-encoded string" for i in invalid))
    return list(map(decode_base64, inputs))


def split_form(body: bytearray, content_type: str) -> list[bytes]:
    """Return the content of each part of a form.

    FastAPI needs another package to parse forms, and that package writes files to disk.
    """
    boundary = content_type.partition("boundary=")[2].partition(";")[0].strip().strip('"').encode("latin-1")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary) if boundary else []
    contents = [part.partition(b"\r\n\r\n")[2] for part in parts[1:-1]]
    if len(contents) > MAX_IMAGES:
        raise HTTPException(400, f"{len(contents):,} images; send at most {MAX_IMAGES:,}")
    if not contents or not parts[-1].startswith(b"--"):
        raise HTTPException(400, "not a complete form; send each image as a part of a multipart/form-data body")
    return contents


def describe_for_mlflow(error: HTTPException) -> JSONResponse:
    """Return the response to a failed request, with the fields of MLflow's server in addition to `error`."""
    code = {400: "INVALID_PARAMETER_VALUE", 503: "TEMPORARILY_UNAVAILABLE"}.get(error.status_code, "BAD_REQUEST")
    return describe_error(error, error_code=code, message=error.detail)


def describe_health(predictor: Predictor) -> dict[str, Any]:
    """Return the state of the server, its version, and the last reload."""
    model, shadow = predictor.model, predictor.shadow
    registered = model.serving.registered
    return {
        "status": "stuck" if model.serving.batcher.is_stuck else "ok",
        "version": registered.uri,
        "alias": registered.alias,
        "run": registered.run_id,
        "data_digest": registered.data_digest,
        "runtime": registered.runtime,
        "checked_images": model.serving.checked,
        "since": model.serving.since.isoformat(timespec="seconds"),
        "last_reload": model.reloaded and model.reloaded.isoformat(timespec="seconds"),
        "last_reload_error": model.error or None,
        "shadow": shadow and shadow.model.serving.version,
    }
