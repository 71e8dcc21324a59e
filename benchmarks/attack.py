"""Measure a server under attack: latency of small requests, memory, and shutdown.

    python ml_workflow.py; python benchmarks/attack.py [--mlflow]

It attacks serve.py or, with --mlflow, `mlflow models serve`. Each attack lasts --seconds, while small requests are sent
one after another:

- 1-bit images, RGB images, RGBA images: 40 clients each send six PNGs of 7000 x 7000 pixels, which reach the limit on
  the pixels of a request, and disconnect after a second
- large bodies: 4 clients each send 100 MB
- large requests: 4 clients each send 49 MB, which is less than the limit
- idle: 1,000 connections send nothing
- slow headers, slow bodies: 200 connections each send a byte per second

Afterwards, a request with a million items that are not images is sent, and the server is terminated under attack.
"""

import base64
import contextlib
import io
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from lib import PROJECT
from lib.machine import describe_machine
from lib.photos import draw_image
from lib.processes import MODEL, TIMEOUT_SECONDS, find_server, start_server

from workflow.cli import Parser, command_line
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import psutil
import requests
from PIL import Image

OURS = ["serve", "--model", MODEL, "--port"]
THEIRS = ["mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local", "-p"]
PAUSE_SECONDS = 0.5  # between small requests


def encode(image: Image.Image, kind: str) -> str:
    """Return an image file in base64."""
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def send(url: str, images: list[str], timeout: float = TIMEOUT_SECONDS) -> str:
    """Return the status of the response, or the type of the error."""
    try:
        return str(requests.post(url, json={"inputs": images}, timeout=timeout).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def send_body(url: str, megabytes: int) -> str:
    """Send a large body in chunks, and return the status of the response, or the type of the error."""
    chunks = iter([bytes(1_000_000)] * megabytes)
    try:
        headers = {"Content-Type": "application/json"}
        return str(requests.post(url, chunks, headers=headers, timeout=TIMEOUT_SECONDS).status_code)
    except requests.RequestException as error:
        return type(error).__name__


def drip(url: str, start: bytes, count: int, end: float) -> str:
    """Open connections that send `start` and then a byte per second; return how many the server closed."""
    host, port = url.split("/")[2].split(":")
    closed = 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
        for client in clients:
            with contextlib.suppress(OSError):
                client.sendall(start.replace(b"HOST", f"{host}:{port}".encode()))
        while clients and time.perf_counter() < end:
            time.sleep(1)
            for client in list(clients):
                try:
                    client.sendall(b"x" if start else b"")
                    client.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                except BlockingIOError:
                    continue
                except OSError:
                    pass
                closed += 1
                clients.remove(client)
    return f"{closed} of {count} connections answered or closed"


class Memory(threading.Thread):
    """The peak memory in MB of a server and its child processes."""

    def __init__(self, server: psutil.Process):
        super().__init__(daemon=True)
        self.server, self.peak = server, 0.0

    def run(self) -> None:
        while True:
            used = 0
            for process in [self.server, *self.server.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    used += process.memory_info().rss
            self.peak = max(self.peak, used / 1e6)
            time.sleep(0.1)


def attack(url: str, jobs: list[Callable[[], str]], small: list[str], seconds: float) -> tuple[list[str], list]:
    """Run the jobs at once, and send small requests one after another.

    Returns:
        The outcomes of the jobs, and the outcome and duration of each small request.
    """
    waits, end = [], time.perf_counter() + seconds
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(job) for job in jobs]
        while (start := time.perf_counter()) < end:
            waits.append((send(url, small), time.perf_counter() - start))
            time.sleep(PAUSE_SECONDS)
        return sorted({future.result() for future in futures}), waits


def list_attacks(url: str, images: int, seconds: float) -> dict[str, list[Callable[[], str]]]:
    """Return the jobs of each attack by its name."""

    def flooding(mode: str) -> list[Callable[[], str]]:
        return [partial(send, url, [encode(Image.new(mode, (7000, 7000)), "PNG")] * images, 1)] * 40

    def dripping(start: bytes, count: int) -> list[Callable[[], str]]:
        return [lambda: drip(url, start, count, time.perf_counter() + seconds)]

    head = b"POST /invocations HTTP/1.1\r\nHost: HOST\r\n"
    return {
        "1-bit images": flooding("1"),
        "RGB images": flooding("RGB"),
        "RGBA images": flooding("RGBA"),
        "large bodies": [partial(send_body, url, 100)] * 4,
        "large requests": [partial(send, url, ["A" * 1_000_000] * 49)] * 4,
        "idle": dripping(b"", 1_000),
        "slow headers": dripping(head, 200),
        "slow bodies": dripping(head + b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n", 200),
    }


def terminate(server: psutil.Process) -> tuple[bool, float]:
    """Terminate a server and its child processes; return whether all exited, and how many seconds it took."""
    processes = [server, *server.children(recursive=True)]
    start = time.perf_counter()
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, TIMEOUT_SECONDS)
    return not alive, time.perf_counter() - start


def report(name: str, outcomes: list[str], waits: list[tuple[str, float]], peak: float) -> None:
    statuses, slowest = dict(Counter(status for status, _ in waits)), max(seconds for _, seconds in waits)
    print(f"{name}: {', '.join(outcomes)}", flush=True)
    print(
        f"    {len(waits)} small requests: {statuses}, at most {slowest:.1f} s; memory up to {peak:.0f} MB", flush=True
    )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--mlflow", action="store_true", help="attack `mlflow models serve`")
    parser.add_argument("--images", type=int, default=6, help="per request")
    parser.add_argument("--seconds", type=float, default=15, help="duration of each attack")
    parser.add_argument("--items", type=int, default=1_000_000, help="in the request without images")
    arguments = parser.parse_args()
    connect_mlflow(settings.mlflow_url, settings.state)
    small = [encode(draw_image(1, 150), "JPEG")]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    variables: dict[str, Any] = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PATH": path}
    command, health = (THEIRS, "/ping") if arguments.mlflow else (OURS, "/health")
    with start_server(command, health, settings.state if arguments.mlflow else PROJECT, **variables) as address:
        url = f"{address}/invocations"
        send(url, small)  # the first response takes longer
        memory = Memory(server := find_server(address))
        memory.start()
        time.sleep(1)
        print(f"{' '.join(command)}: {memory.peak:.0f} MB before; {describe_machine()}", flush=True)
        attacks = list_attacks(url, arguments.images, arguments.seconds)
        for name, jobs in attacks.items():
            memory.peak = 0
            report(name, *attack(url, jobs, small, arguments.seconds), memory.peak)
        start = time.perf_counter()
        status = send(url, ["x"] * arguments.items)
        print(f"{arguments.items:,} bad items: {status} after {time.perf_counter() - start:.1f} s")
        attack(url, attacks["1-bit images"][:4], small, 0)
        has_exited, seconds = terminate(server)
    print(f"SIGTERM under attack: {'exited' if has_exited else 'still running'} after {seconds:.1f} s")


if __name__ == "__main__":
    with command_line("attack.py"):
        main()
