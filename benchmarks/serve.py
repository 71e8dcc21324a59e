"""Compare the latency of `mlflow models serve` with a minimal FastAPI application around the same Keras model.

    python ml_workflow.py; python benchmarks/serve.py

Both receive the same 150-pixel JPEGs, one per request, from clients that wait for each response. They are measured in
turn, several times.
"""

import base64
import io
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib.machine import describe_machine
from lib.photos import draw_image
from lib.processes import MODEL, TIMEOUT_SECONDS, start_server

from workflow.cli import Parser, command_line
from workflow.settings import settings
from workflow.tracking.connection import connect_mlflow

import mlflow
import numpy as np
import requests

HERE = Path(__file__).resolve().parent


def request_bodies(count: int) -> list[dict]:
    """Return request bodies with one image each."""
    bodies = []
    for number in range(count):
        file = io.BytesIO()
        draw_image(number, 150).save(file, "JPEG")
        bodies.append({"inputs": [base64.b64encode(file.getvalue()).decode()]})
    return bodies


def load(url: str, bodies: list[dict], clients: int) -> tuple[list[float], int, float]:
    """Send the requests; return their latencies in ms, the number that failed, and the total seconds."""

    def send(part: list[dict]) -> list[tuple[float, bool]]:
        with requests.Session() as session:
            results = []
            for body in part:
                start = time.perf_counter()
                response = session.post(url, json=body, timeout=TIMEOUT_SECONDS)
                results.append((1000 * (time.perf_counter() - start), response.ok))
            return results

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        parts = pool.map(send, [bodies[i::clients] for i in range(clients)])
        results = [result for part in parts for result in part]
    return [ms for ms, _ in results], sum(not ok for _, ok in results), time.perf_counter() - start


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=400, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    connect_mlflow(settings.mlflow_url, settings.state)
    bodies = request_bodies(arguments.requests)
    with tempfile.TemporaryDirectory() as folder:
        size = mlflow.pyfunc.load_model(MODEL).model_config["image_size"]
        keras_model = mlflow.artifacts.download_artifacts(f"{MODEL}/artifacts/model.keras", dst_path=folder)
        champion = ["mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local", "-p"]
        bare = ["uvicorn", "bare_app:app", "--log-level", "warning", "--port"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "PATH": path,
            "MODEL": keras_model,
            "SIZE": str(size),
        }
        with (
            start_server(bare, "/ping", HERE, **variables) as bare_url,
            start_server(champion, "/ping", HERE, **variables) as champion_url,
        ):
            urls = {"bare FastAPI": f"{bare_url}/invocations", "mlflow models serve": f"{champion_url}/invocations"}
            for url in urls.values():
                load(url, bodies[: 4 * arguments.clients], arguments.clients)  # warm
            rounds = [
                {name: load(urls[name], bodies, arguments.clients) for name in urls} for _ in range(arguments.rounds)
            ]
    print(f"{arguments.clients} clients, {arguments.rounds} x {arguments.requests} requests; {describe_machine()}")
    print(f"{'':22}{'p50 ms':>8}{'p95 ms':>8}{'per second':>12}{'failed':>8}")
    figures = {}
    for name in urls:
        times, failed, seconds = zip(*(results[name] for results in rounds), strict=True)
        figures[name] = np.percentile(np.concatenate(times), [50, 95])
        rate = arguments.requests / np.median(seconds)
        print(f"{name:22}{figures[name][0]:8.1f}{figures[name][1]:8.1f}{rate:12.0f}{sum(failed):8}")
    ratio = figures["mlflow models serve"] / figures["bare FastAPI"]
    print(f"{'ratio':22}{ratio[0]:8.2f}{ratio[1]:8.2f}")


if __name__ == "__main__":
    with command_line("serve.py"):
        main()
