"""Unusual images, and a web server for images with faults on demand."""

import contextlib
import io
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image


class ImageServer(ThreadingHTTPServer):
    """Serve .../CLASS/FILE from a folder; `faults` maps a path to the faults of its next responses, in order."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), ImageHandler)
        self.folder, self.faults, self.requests, self.megabytes = folder, {}, [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class ImageHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = "/".join(self.path.split("/")[-2:])
        self.server.requests.append((time.monotonic(), name))
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        path = self.server.folder / name
        body = path.read_bytes() if path.is_file() else b""
        if fault == "reset":  # linger 0 resets the connection instead of closing it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "404" or not body:
            return self.respond(404, b"not found")
        if fault == "500":
            return self.respond(500, b"later")
        if fault == "429":
            return self.respond(429, b"slow down", {"Retry-After": "1"})
        if fault == "loop":
            return self.respond(302, b"", {"Location": self.path})
        if fault == "endless":
            return self.send_endlessly()
        if fault in ("drip", "stall"):
            return self.send_slowly(body, fault)
        if fault == "truncate":
            self.close_connection = True
            return self.respond(200, body[: len(body) // 2], {"Content-Length": str(len(body))})
        bodies = {"html": b"<html>Please sign in</html>", "empty": b"", "garbage": bytes(b ^ 0x5A for b in body)}
        return self.respond(200, bodies.get(fault, body))

    def send_slowly(self, body: bytes, fault: str):
        """Send a byte every 50 ms for 5 s, or one byte followed by silence for 5 s."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client disconnected
            for byte in body[: 100 if fault == "drip" else 1]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05 if fault == "drip" else 5)

    def send_endlessly(self):
        """Send 512 MiB without a length, until the client disconnects."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(512):
                self.wfile.write(bytes(2**20))
                self.server.megabytes += 1

    def respond(self, status: int, body: bytes, headers: dict | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Return the image as the content of a file of that format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def odd_images(photo: Image.Image) -> dict[str, bytes]:
    """Return valid but unusual image files by name; all but one-pixel.png and animated.gif show the photo."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    rotated = photo.transpose(Image.Transpose.ROTATE_90)
    transparent = photo.convert("RGBA")
    transparent.putalpha(photo.convert("L"))
    gray = np.asarray(photo.convert("L"), "uint16") * 257
    return {
        "png-inside.jpeg": encoded(photo, "PNG"),
        "cmyk.jpeg": encoded(photo.convert("CMYK"), "JPEG"),
        "gray-16-bit.png": encoded(Image.fromarray(gray), "PNG"),
        "palette-alpha.png": encoded(transparent.quantize(64), "PNG"),
        "upright.jpeg": encoded(photo, "JPEG", quality=98, subsampling=0),
        "turned.jpeg": encoded(rotated, "JPEG", quality=98, subsampling=0, exif=exif),
        "one-pixel.png": encoded(photo.resize((1, 1)), "PNG"),
        "animated.gif": encoded(photo, "GIF", save_all=True, append_images=[Image.new("RGB", photo.size, "blue")]),
    }


@contextlib.contextmanager
def closing_server(server: ThreadingHTTPServer):
    """Run a server in a thread, and close it after the block."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
