"""Control access to the server, and limit its connections and requests."""

import asyncio
import base64
import binascii
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from workflow.serving.metrics import Metrics

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 500  # beyond this, the oldest connection that is waiting for its client is closed
MAX_PENDING_CONNECTIONS = 200  # accepted at once; more could displace a new one before its request is read
MAX_REQUESTS = 64  # in progress, with complete bodies; beyond this, 429
MAX_BODY_BYTES = 50_000_000  # per request; beyond this, 413
MAX_BUFFERED_BYTES = 75_000_000  # of all requests in progress; beyond this, 503 for bodies over SMALL_BODY_BYTES
SMALL_BODY_BYTES = 1_000_000
MAX_HEADER_BYTES = 16_384
MAX_REQUEST_ID_LENGTH = 64
HEADER_SECONDS = 10  # to send the headers of a request
BODY_SECONDS = 20  # to send the body; then 408
REQUEST_SECONDS = 60  # from the headers to the response; then 503
SHUTDOWN_SECONDS = 7  # to finish the requests in progress after SIGTERM
RETRY = {"Retry-After": "1"}
HEADERS = {  # other websites cannot read or embed responses
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Protocol(H11Protocol):
    """HTTP/1.1 with MAX_CONNECTIONS and HEADER_SECONDS, for which uvicorn (0.54) has no settings."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= MAX_CONNECTIONS:
            self.close_oldest()
        super().connection_made(transport)
        self.opened, self.seen = self.loop.time(), self.cycle
        self.check = self.loop.call_later(HEADER_SECONDS, self.check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self.check.cancel()
        super().connection_lost(exc)

    @property
    def awaits_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def close_oldest(self) -> None:
        """Close the oldest connection that awaits headers or, if there is none, a body."""
        connections = [item for item in self.connections if isinstance(item, Protocol)]
        waiting = [item for item in connections if item.awaits_headers]
        waiting = waiting or [item for item in connections if item.cycle.more_body]
        if waiting:
            oldest = min(waiting, key=lambda item: item.opened)
            self.connections.discard(oldest)
            oldest.transport.abort()

    def check_progress(self) -> None:
        """Close the connection if it has awaited the same headers since the last check; otherwise check again later."""
        if self.awaits_headers and self.cycle is self.seen:
            self.transport.abort()
            return
        self.seen = self.cycle
        self.check = self.loop.call_later(HEADER_SECONDS, self.check_progress)


class Guard:
    """Middleware that rejects requests from other websites or without the token, and times out and counts the others.

    Requests for another host name are rejected because a malicious website could make its name resolve to 127.0.0.1
    (DNS rebinding).

    Args:
        app: the application
        metrics: where requests are counted
        hosts: accepted values of the Host header; empty if any is accepted
        token: required for every route but /health; "" if no token is required
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: list[str], token: str):
        self.app, self.metrics, self.hosts, self.token = app, metrics, hosts, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, headers, status = time.perf_counter(), Headers(scope=scope), 0
        scope["state"]["request_id"] = request_id = choose_request_id(headers)

        async def send_and_count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS | {"X-Request-ID": request_id})
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                route = getattr(scope.get("route"), "path", "none")
                self.metrics.count_request(route, status, time.perf_counter() - start)

        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                app = self.refuse(headers, scope["path"]) or self.app
                await app(scope, receive, send_and_count)
        except (TimeoutError, asyncio.CancelledError):  # uvicorn cancels requests after SHUTDOWN_SECONDS
            if not status:
                response = describe_error(HTTPException(503, "the server is too busy; retry later", RETRY))
                await response(scope, receive, send_and_count)

    def refuse(self, headers: Headers, path: str) -> JSONResponse | None:
        """Return the response to a rejected request; None if the request is accepted."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and host not in self.hosts:
            return describe_error(HTTPException(403, f"unknown host name; use http://{self.hosts[0]}"))
        if origin is not None and origin.partition("://")[2] != host:
            return describe_error(HTTPException(403, "requests from other websites are refused"))
        if self.token and path != "/health" and not self.is_authorized(headers.get("authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="token as the password", charset="UTF-8"'}
            return describe_error(HTTPException(401, "send the token: Authorization: Bearer TOKEN", challenge))
        return None

    def is_authorized(self, authorization: str) -> bool:
        """Return whether a header contains the token, as a bearer token or as a password from a browser."""
        scheme, _, credentials = authorization.partition(" ")
        sent = credentials.strip().encode()
        if scheme.lower() == "basic":
            try:
                sent = base64.b64decode(sent, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        return secrets.compare_digest(sent, self.token)


def choose_request_id(headers: Headers) -> str:
    """Return the request ID set by the client or a proxy, or a new one."""
    request_id = headers.get("x-request-id", "")
    is_valid = request_id.isascii() and request_id.isprintable() and len(request_id) <= MAX_REQUEST_ID_LENGTH
    return request_id if request_id and is_valid else uuid.uuid4().hex


def describe_error(error: Any, **fields: str) -> JSONResponse:
    """Return the response to a failed request: one line of JSON with `error`."""
    return JSONResponse({"error": error.detail, **fields}, error.status_code, error.headers)


class Limits:
    """Limit the request bodies in memory and the requests in progress."""

    def __init__(self) -> None:
        self.buffered = self.requests = 0
        self.explaining = asyncio.Semaphore(1)

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Yield the body of a request, and count the body and the request until the block ends.

        Raises:
            HTTPException: the body is empty, too large or too slow, or there are too many requests
        """
        content = bytearray()
        try:
            await self.read_body(request, content)
            if self.requests == MAX_REQUESTS:
                raise HTTPException(429, "too many requests in progress; retry later", RETRY)
            self.requests += 1
            try:
                yield content
            finally:
                self.requests -= 1
        finally:
            self.buffered -= len(content)
            content.clear()  # an exception may refer to it until its reference cycle is collected

    async def read_body(self, request: Request, content: bytearray) -> None:
        too_large = HTTPException(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes")
        if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > MAX_BODY_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    self.buffered += len(chunk)
                    if len(content) > MAX_BODY_BYTES:
                        raise too_large
                    if self.buffered > MAX_BUFFERED_BYTES and len(content) > SMALL_BODY_BYTES:
                        raise HTTPException(503, "too many large requests in progress; retry later", RETRY)
        except TimeoutError:
            raise HTTPException(408, f"the request took longer than {BODY_SECONDS} s to arrive") from None
