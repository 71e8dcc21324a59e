"""Measure the scoring server under attack: latency of small requests, memory, and shutdown.

    python ml_workflow.py; python benchmarks/attack.py

In the attack, --clients concurrent clients each send --images one-bit PNGs of 7000 x 7000 pixels and disconnect after a
second. Six such images reach the limit on the pixels of a request. Afterwards, one request has a million items that are
not images.
"""

import base64
import io
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from lib.machine import describe_machine
from lib.photos import draw_image
from lib.processes import MODEL, TIMEOUT_SECONDS, start_server

from workflow.cli import Parser, command_line
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import psutil
import requests
from PIL import Image


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


def measure_memory(server: psutil.Process, peak: list[float], stop: threading.Event) -> None:
    """Update the peak memory in MB of a server and its child processes until `stop` is set."""
    while not stop.wait(0.2):
        used = 0
        for process in [server, *server.children(recursive=True)]:
            try:
                used += process.memory_info().rss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], used / 1e6)


def find_server(url: str) -> psutil.Process:
    """Return the child process that serves a URL."""
    port = url.rpartition(":")[2]
    children = psutil.Process().children(recursive=False)
    return next(process for process in children if port in process.cmdline())


def attack(url: str, large: list[str], small: list[str], clients: int, seconds: float) -> tuple[list[str], list]:
    """Send large requests from many clients and small ones in turn.

    Returns:
        The outcomes of the large requests, and the outcome and seconds of each small one.
    """
    waits, end = [], time.perf_counter() + seconds
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(send, url, large, 1) for _ in range(clients)]
        while (start := time.perf_counter()) < end:
            waits.append((send(url, small), time.perf_counter() - start))
            time.sleep(0.5)
        return sorted({future.result() for future in futures}), waits


def terminate(server: psutil.Process) -> tuple[bool, float]:
    """Terminate a server and its child processes; return whether all exited, and the seconds."""
    processes = [server, *server.children(recursive=True)]
    start = time.perf_counter()
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, TIMEOUT_SECONDS)
    return not alive, time.perf_counter() - start


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--images", type=int, default=6, help="per request")
    parser.add_argument("--seconds", type=float, default=15, help="duration of the small requests")
    parser.add_argument("--items", type=int, default=1_000_000, help="in the request without images")
    arguments = parser.parse_args()
    connect_mlflow(settings.mlflow_url, settings.state)
    large = [encode(Image.new("1", (7000, 7000)), "PNG")] * arguments.images
    small = [encode(draw_image(1, 150), "JPEG")]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    variables = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PATH": path}
    command = ["mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local", "-p"]
    stop, peak = threading.Event(), [0.0]
    with start_server(command, "/ping", settings.state, **variables) as address:
        url = f"{address}/invocations"
        send(url, small)  # the first response takes longer
        server = find_server(address)
        threading.Thread(target=measure_memory, args=(server, peak, stop), daemon=True).start()
        time.sleep(1)
        initial_memory = peak[0]
        outcomes, waits = attack(url, large, small, arguments.clients, arguments.seconds)
        start = time.perf_counter()
        status = send(url, ["x"] * arguments.items)
        seconds_for_items = time.perf_counter() - start
        stop.set()
        attack(url, large, small, clients=4, seconds=0)
        has_exited, seconds_to_exit = terminate(server)
    print(f"{arguments.clients} clients with {arguments.images} images of 49 million pixels each; {describe_machine()}")
    print(f"responses to the clients within a second: {', '.join(outcomes)}")
    statuses, slowest = dict(Counter(status for status, _ in waits)), max(seconds for _, seconds in waits)
    print(f"{len(waits)} concurrent small requests: {statuses}, at most {slowest:.1f} s")
    print(f"{arguments.items:,} bad items: {status} after {seconds_for_items:.1f} s")
    print(f"memory: {initial_memory:.0f} MB before, {peak[0]:.0f} MB at most")
    print(f"SIGTERM under attack: {'exited' if has_exited else 'still running'} after {seconds_to_exit:.1f} s")


if __name__ == "__main__":
    with command_line("attack.py"):
        main()
