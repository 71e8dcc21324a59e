"""Compare serve.py with `mlflow models serve` and a minimal FastAPI application around the same Keras model.

    python ml_workflow.py; python benchmarks/serve.py

All receive the same JPEGs of about 300 kB, one per request in base64, from clients that wait for each response, and
serve.py also receives them as files. It runs with its log, its metrics and a shadow, and once more without a shadow.
The servers are measured in turn, in several rounds, at each number of clients.
"""

import base64
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from lib import PROJECT
from lib.machine import describe_machine
from lib.photos import draw_image
from lib.processes import MODEL, TIMEOUT_SECONDS, find_server, measure_cpu_seconds, start_server

from workflow.cli import Parser, command_line
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import numpy as np
import requests
from PIL import Image

HERE = Path(__file__).resolve().parent
PIXELS, NOISE, QUALITY = 900, 16, 90  # a synthetic image with camera noise is about 300 kB
PAUSE_SECONDS = 3  # between servers, so that the shadow of one does not compete with the next
JSON = {"Content-Type": "application/json"}


class Target(NamedTuple):
    """Where requests are sent, and their bodies."""

    url: str
    bodies: list[bytes]


def draw_photos(count: int) -> list[bytes]:
    """Return JPEG files."""
    photos = []
    for number in range(count):
        file, image = io.BytesIO(), np.asarray(draw_image(number, PIXELS))
        noise = np.random.default_rng(number).normal(0, NOISE, (*image.shape[:2], 1))
        Image.fromarray((image + noise).clip(0, 255).astype("uint8")).save(file, "JPEG", quality=QUALITY)
        photos.append(file.getvalue())
    return photos


class Round(NamedTuple):
    """The results of one round."""

    milliseconds: list[float]  # of each request
    failed: int
    seconds: float
    cpu_seconds: float  # of the server, which depend less on other programs on the machine


def load(target: Target, count: int, clients: int) -> Round:
    """Send requests, and measure them."""

    def send(numbers: range) -> list[tuple[float, bool]]:
        with requests.Session() as session:
            results = []
            for number in numbers:
                start, body = time.perf_counter(), target.bodies[number % len(target.bodies)]
                response = session.post(target.url, body, headers=JSON, timeout=TIMEOUT_SECONDS)
                results.append((1000 * (time.perf_counter() - start), response.ok))
            return results

    server = find_server(target.url)
    start, cpu_seconds = time.perf_counter(), measure_cpu_seconds(server)
    with ThreadPoolExecutor(clients) as pool:
        parts = pool.map(send, [range(i, count, clients) for i in range(clients)])
        results = [result for part in parts for result in part]
    seconds, cpu_seconds = time.perf_counter() - start, measure_cpu_seconds(server) - cpu_seconds
    time.sleep(PAUSE_SECONDS)
    return Round([ms for ms, _ in results], sum(not ok for _, ok in results), seconds, cpu_seconds)


@contextmanager
def start_targets(photos: list[bytes], is_alone: bool) -> Iterator[dict[str, Target]]:
    """Run serve.py and, unless `is_alone`, its peers, and yield the targets by name."""
    bodies = [json.dumps({"inputs": [base64.b64encode(photo).decode()]}).encode() for photo in photos]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        size = mlflow.pyfunc.load_model(MODEL).model_config["image_size"]
        keras_model = mlflow.artifacts.download_artifacts(f"{MODEL}/artifacts/model.keras", dst_path=folder)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "PATH": path}
        theirs = ["mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local", "-p"]
        bare = ["uvicorn", "bare_app:app", "--log-level", "warning", "--port"]

        def start_ours(name: str, *options: str) -> str:
            log = {"ML_WORKFLOW_PREDICTIONS": f"sqlite:///{folder}/{name}.db"}
            command = ["serve", "--model", MODEL, *options, "--port"]
            return stack.enter_context(start_server(command, "/health", PROJECT, **variables, **log))

        our_url, alone_url = start_ours("shadow", "--shadow", MODEL), start_ours("alone")
        targets = {
            "serve.py": Target(f"{our_url}/invocations", bodies),
            "serve.py, files": Target(f"{our_url}/predict", photos),
            "serve.py, no shadow": Target(f"{alone_url}/invocations", bodies),
        }
        if not is_alone:
            their_url = stack.enter_context(start_server(theirs, "/ping", HERE, **variables))
            variables |= {"MODEL": keras_model, "SIZE": str(size)}
            bare_url = stack.enter_context(start_server(bare, "/ping", HERE, **variables))
            targets |= {
                "mlflow models serve": Target(f"{their_url}/invocations", bodies),
                "bare FastAPI": Target(f"{bare_url}/invocations", bodies),
            }
        yield targets


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=200, help="per server and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="measure only serve.py")
    arguments = parser.parse_args()
    connect_mlflow(settings.mlflow_url, settings.state)
    photos = draw_photos(20)
    print(f"photos of {np.mean(list(map(len, photos))) / 1000:.0f} kB; {describe_machine()}")
    with start_targets(photos, arguments.alone) as targets:
        for target in targets.values():
            load(target, 20, 4)  # warm up
        for clients in arguments.clients:
            rounds = [
                {name: load(target, arguments.requests, clients) for name, target in targets.items()}
                for _ in range(arguments.rounds)
            ]
            print(f"{clients} clients, {arguments.rounds} x {arguments.requests} requests", flush=True)
            print(f"{'':22}{'p50 ms':>8}{'p99 ms':>8}{'per second':>12}{'CPU ms':>8}{'failed':>8}")
            for name in targets:
                times, failed, seconds, cpu = zip(*(results[name] for results in rounds), strict=True)
                p50, p99 = np.percentile(np.concatenate(times), [50, 99])
                rate, cpu_ms = arguments.requests / np.median(seconds), 1000 * np.median(cpu) / arguments.requests
                print(f"{name:22}{p50:8.1f}{p99:8.1f}{rate:12.1f}{cpu_ms:8.0f}{sum(failed):8}", flush=True)


if __name__ == "__main__":
    with command_line("serve.py"):
        main()
