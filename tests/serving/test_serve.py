"""serve.py: predictions as MLflow's server makes them, promotions without a restart, the log, and what it refuses."""

import base64
import contextlib
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import serve
from support.images import encoded
from support.project import PROJECT, Program, Project, fill

import mlflow
import numpy as np
import psutil
import pytest
import requests
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

MODEL = "apples-oranges"
SWAPS = 10  # of versions, to see whether memory grows; after 50, it had not
TOKEN = "a-token-of-sixteen-or-more-characters"


class Served:
    """A running serve.py."""

    def __init__(self, project: Project, program: Program, url: str):
        self.project, self.program, self.url = project, program, url

    def predict(self, content: bytes, **options) -> requests.Response:
        return requests.post(f"{self.url}/predict", content, timeout=60, **options)

    def invoke(self, content: object, **options) -> requests.Response:
        return requests.post(f"{self.url}/invocations", json=content, timeout=60, **options)

    def health(self) -> dict:
        return requests.get(f"{self.url}/health", timeout=60).json()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a metric with these labels."""
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def rows(self, count: int) -> list[dict]:
        """Return the rows of the log, once there are so many."""
        wait_until(lambda: len(read_log(self.project)) >= count)
        return read_log(self.project)


def read_log(project: Project) -> list[dict]:
    with contextlib.closing(sqlite3.connect(project.folder / "predictions.db")) as database:
        database.row_factory = sqlite3.Row
        with contextlib.suppress(sqlite3.OperationalError):  # no table yet
            return [dict(row) for row in database.execute("SELECT * FROM predictions ORDER BY time, request_id, image")]
    return []


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)


@contextlib.contextmanager
def serving(project: Project, *options: str, end: int | None = signal.SIGTERM, **settings: str) -> Iterator[Served]:
    """Run serve.py on a free port; send the signal `end` afterwards."""
    program = project.start("--port", "0", *options, script="serve.py", **settings)
    try:
        program.read_until("^Serving at http")
        yield Served(project, program, program.output.splitlines()[-1].split()[2].replace("0.0.0.0", "127.0.0.1"))
    finally:
        if program.poll() is None:
            program.end(end)


@pytest.fixture(scope="session")
def seed(trained) -> Path:
    """The MLflow database of a project with a champion, to be copied."""
    return trained.folder / "mlflow.db"


def copy_project(seed: Path, folder: Path) -> Project:
    """Return a project with the same champion and a registry of its own."""
    project = Project(folder)
    shutil.copy(seed, project.folder)
    return project


@pytest.fixture
def copied(seed, tmp_path) -> Project:
    return copy_project(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.survived("serve.py: Ctrl-C or SIGTERM while a photo is decoded")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_ends_while_a_photo_is_decoded(copied, number):
    copied.before = "import time; from workflow.image_classifier import Classifier\n"
    copied.before += "Classifier.decode = lambda *_: print('decoding', flush=True) or time.sleep(25)"
    with serving(copied) as server, ThreadPoolExecutor() as pool:
        reply = pool.submit(server.predict, encoded(Image.new("L", (8, 8)), "PNG"))
        server.program.read_until("^decoding")
        assert server.program.end(number) < 15
        assert server.program.returncode == 0
        assert reply.result().status_code == 503


@pytest.fixture(scope="module")
def served(seed, tmp_path_factory) -> Iterator[Served]:
    """A server for the tests that leave its registry alone."""
    with serving(copy_project(seed, tmp_path_factory.mktemp("served"))) as server:
        yield server
    assert re.fullmatch(r"models:/.*\nServing at .*\n", server.program.output)  # nothing else was logged


def registry(project: Project) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")


def register(project: Project, folder: Path, has_run: bool = True) -> str:
    """Register the model in a folder as another version of the champion's model, and return its number."""
    run = registry(project).get_model_version(MODEL, "1").run_id if has_run else None
    return registry(project).create_model_version(MODEL, str(folder), run).version


def promote(project: Project, version: str, alias: str = "champion") -> None:
    registry(project).set_registered_model_alias(MODEL, alias, version)


@pytest.fixture(scope="session")
def champion(trained) -> Path:
    """The files of the champion."""
    (model_file,) = trained.folder.glob("mlartifacts/models/*/artifacts/MLmodel")
    return model_file.parent


@pytest.fixture(scope="session")
def swapped(champion, tmp_path_factory) -> Path:
    """A model that confuses apples and oranges."""
    folder = shutil.copytree(champion, tmp_path_factory.mktemp("swapped") / "model")
    edit_export(folder, labels=["oranges", "apples"])
    return folder


def edit_export(folder: Path, **changes: object) -> None:
    """Change the description of the LiteRT export of a model."""
    file = folder / "litert/model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="session")
def contents(photos) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.glob("*/*"))]


def find_lag(promotions: list[tuple[float, str]], received: float, version: str) -> float:
    """Return how many seconds before a response the version that it names was replaced as champion; 0 if it was not."""
    periods = itertools.pairwise([*promotions, (math.inf, "")])
    return max(0, received - max(end for (start, name), (end, _) in periods if name == version and start <= received))


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


# Predictions


def test_form_and_body_are_predicted_alike(served, contents):
    alone = [served.predict(content).json() for content in contents[:3]]
    assert [response["version"] for response in alone] == 3 * [f"models:/{MODEL}/1"]
    files = [("image", (f"{i}.jpeg", content)) for i, content in enumerate(contents[:3])]
    form = requests.post(f"{served.url}/predict", files=files, timeout=60).json()
    for expected, prediction in zip(alone, form["predictions"], strict=True):
        assert prediction["probabilities"] == pytest.approx(expected["predictions"][0]["probabilities"], abs=1e-4)


@pytest.mark.parametrize("options", [["--data-binary", "@photo.jpg"], ["-F", "image=@photo.jpg"]])
def test_curl_commands_of_the_documents_work(served, contents, tmp_path, options):
    (tmp_path / "photo.jpg").write_bytes(contents[0])
    command = ["curl", "-sS", *options, f"{served.url}/predict"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["predictions"][0]["label"] == "apples"


def test_eight_clients_get_their_own_predictions(served, contents):
    alone = [served.predict(content).json()["predictions"][0]["probability"] for content in contents]
    with ThreadPoolExecutor(8) as clients:
        responses = list(clients.map(served.predict, contents * 5))
    together = [response.json()["predictions"][0]["probability"] for response in responses]
    assert np.abs(np.array(together).reshape(5, -1) - alone).max() < 1e-4


@pytest.mark.survived("serve.py: one request has many large images")
def test_large_request_does_not_delay_small_ones(served, contents):
    large = [base64_of(encoded(Image.new("RGBA", (3000, 3000)).quantize(4), "PNG"))] * 20
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(served.invoke, {"inputs": large})
        time.sleep(0.5)
        start = time.monotonic()
        assert served.predict(contents[0]).ok
        assert time.monotonic() - start < 3
        assert not response.done()
        assert len(response.result().json()["predictions"]) == 20


@pytest.fixture(scope="module")
def scoring_server(trained):
    with trained.scoring_server() as url:
        yield url


def requests_of_parity(good: bytes) -> dict[str, object]:
    """Return requests by name: JSON values, or bytes that are sent as they are."""
    text, bomb = base64_of(good), base64_of(encoded(Image.new("1", (10_000, 5_000)), "PNG"))
    bad = [base64_of(content) for content in (b"text", b"", good[:2000])]
    return {
        "one image": {"inputs": [text]},
        "several images": {"inputs": [text, text, text]},
        "no image": {"inputs": []},
        "line breaks": {"inputs": [base64.encodebytes(good).decode()]},
        "another field": {"inputs": [text], "params": {"a": 1}},
        "unusable images": {"inputs": [text, *bad, bomb, "not base64!", f"data:,{text}"]},
        "other types": {"inputs": [text, None, {"b64": text}, 3]},
        "too many images": {"inputs": ["x"] * 2_001},
        "empty object": {},
        "list": [],
        "text": "x",
        "number": 1,
        "inputs is text": {"inputs": "x"},
        "inputs is an object": {"inputs": {}},
        "inputs is null": {"inputs": None},
        "inputs is a number": {"inputs": 1},
        "instances": {"instances": [text]},
        "not JSON": b"{",
        "not UTF-8": b"\xff",
        "empty": b"",
    }


def test_responses_equal_those_of_mlflow(served, scoring_server, contents):
    for name, body in requests_of_parity(contents[0]).items():
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        urls = scoring_server, f"{served.url}/invocations"
        expected, response = (requests.post(url, data, headers=headers, timeout=60) for url in urls)
        assert response.status_code == expected.status_code, name
        theirs, ours = expected.json(), response.json()
        if expected.ok:
            assert ours.keys() == theirs.keys() | {"version"}
            for prediction, reference in zip(ours["predictions"], theirs["predictions"], strict=True):
                assert prediction.keys() == reference.keys()
                assert prediction["label"] == reference["label"]
                assert prediction["probabilities"] == pytest.approx(reference["probabilities"], abs=1e-3)
                assert prediction["nearest"] == reference["nearest"]
        else:
            assert ours["message"] == ours["error"]
            assert "\n" not in response.text
            assert len(response.text) < 1000
            if theirs["message"].startswith("inputs"):
                assert (ours["message"], ours["error_code"]) == (theirs["message"], theirs["error_code"]), name


@pytest.mark.refused("serve.py: not JSON, wrong type, no body, not an image, unknown route, wrong method")
@pytest.mark.parametrize(
    ("method", "route", "options", "status"),
    [
        ("POST", "invocations", {"data": b"{}", "headers": {"Content-Type": "text/csv"}}, 415),
        ("POST", "invocations", {"data": b"{}"}, 415),
        ("POST", "invocations", {}, 415),
        ("POST", "predict", {}, 400),
        ("POST", "predict", {"data": b"text"}, 400),
        ("POST", "predict", {"data": b"text", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ("POST", "predict", {"data": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ("POST", "predict", {"files": [("image", b"text"), ("image", b"")]}, 400),
        ("POST", "predict", {"data": encoded(Image.new("1", (10_000, 5_000)), "PNG")}, 400),
        ("POST", "predict", {"data": bytes(50_000_001)}, 413),
        ("POST", "predict", {"data": iter([bytes(10_000_000)] * 6)}, 413),
        ("POST", "explain", {"data": b"text"}, 400),
        ("GET", "photo", {}, 422),
        ("GET", "nowhere", {}, 404),
        ("GET", "predict", {}, 405),
        ("DELETE", "health", {}, 405),
    ],
)
def test_bad_request_gets_one_line_with_the_error(served, method, route, options, status):
    response = requests.request(method, f"{served.url}/{route}", timeout=60, **options)
    assert response.status_code == status, response.text
    assert response.json()["error"]
    assert "\n" not in response.text


def test_index_names_the_unusable_image_of_a_form(served, contents):
    files = [("image", content) for content in (contents[0], b"text", b"")]
    reasons = requests.post(f"{served.url}/predict", files=files, timeout=60).json()["error"]
    assert reasons == "image[1]: not an image: unknown format; image[2]: not an image: the file is empty"


def test_openapi_describes_the_routes(served):
    assert "swagger" in requests.get(f"{served.url}/docs", timeout=60).text
    description = requests.get(f"{served.url}/openapi.json", timeout=60).json()
    assert description["paths"].keys() == {"/invocations", "/predict", "/health", "/metrics"}
    assert "multipart/form-data" in description["paths"]["/predict"]["post"]["requestBody"]["content"]


def test_metrics_count_requests_and_predictions(served, contents):
    before = [served.metric("serve_requests_total", route="/predict", status=status) for status in ("200", "400")]
    images = served.metric("serve_predictions_total", label="oranges")
    served.predict(contents[-1])
    served.predict(b"text")
    assert served.metric("serve_requests_total", route="/predict", status="200") == before[0] + 1
    assert served.metric("serve_requests_total", route="/predict", status="400") == before[1] + 1
    assert served.metric("serve_predictions_total", label="oranges") == images + 1
    assert served.metric("serve_model", version=f"models:/{MODEL}/1") == 1
    assert served.metric("serve_similarity_count") >= 1
    assert served.metric("serve_request_seconds_count", route="/predict") >= 2
    assert {"serve_queue_length", "serve_reloads_total"} <= {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(requests.get(f"{served.url}/metrics", timeout=60).text)
    }


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Prometheus: apt-get install prometheus")
def test_prometheus_scrapes_as_documented(copied, contents, unused_port, tmp_path):
    document = (PROJECT / "docs/serve.md").read_text()
    config, expressions = (
        re.search(r"```yaml\n(.*?)```", document, re.DOTALL)[1],
        re.findall(r"^\| `(.*serve_.*?)`", document, re.M),
    )
    (tmp_path / "token").write_text(TOKEN)
    with serving(copied, "--token-file", str(tmp_path / "token")) as server:
        (tmp_path / "prometheus.yml").write_text(config.replace("127.0.0.1:5001", server.url.partition("://")[2]))
        options = ["--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{unused_port}"]
        with subprocess.Popen(["prometheus", *options], cwd=tmp_path, stderr=subprocess.DEVNULL) as prometheus:

            def query(expression: str) -> list:
                server.predict(contents[0], headers={"Authorization": f"Bearer {TOKEN}"})
                with contextlib.suppress(requests.ConnectionError):  # it starts
                    url = f"http://127.0.0.1:{unused_port}/api/v1/query"
                    return requests.get(url, {"query": expression}, timeout=60).json()["data"]["result"]
                return []

            try:
                wait_until(lambda: [item["value"][1] for item in query("up")] == ["1"])
                for expression in expressions:
                    wait_until(lambda expression=expression: query(expression))
            finally:
                prometheus.terminate()
    assert len(expressions) == 5


# Access


@pytest.mark.survived("serve.py: a client breaks off its upload")
def test_aborted_upload_logs_nothing(served):
    host, port = served.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000000\r\n\r\n"
            client.sendall(head.encode() + bytes(1000))
    assert served.health()["status"] == "ok"  # the fixture checks that nothing was logged


@pytest.mark.slow
@pytest.mark.survived("serve.py: large bodies and decompression bombs")
def test_attacks_take_little_memory(copied, contents):
    bombs = {"inputs": [base64_of(encoded(Image.new("1", (7_000, 7_000)), "PNG"))] * 6}
    sizes = [[bytes(1_000_000)] * 60, [bytes(49_000_000)]]
    with serving(copied) as server, ThreadPoolExecutor(8) as clients:
        server.predict(contents[0])
        process, stop = psutil.Process(server.program.pid), threading.Event()
        idle, peak = process.memory_info().rss, 0
        jobs = [clients.submit(server.predict, iter(chunks)) for chunks in 3 * sizes]
        jobs += [clients.submit(server.invoke, bombs)]
        while not all(job.done() for job in jobs) and not stop.wait(0.05):
            peak = max(peak, process.memory_info().rss)
    assert {job.result().status_code for job in jobs} <= {200, 400, 413, 503}
    assert peak < 1.7 * idle, (idle, peak)


@pytest.mark.slow
@pytest.mark.survived("serve.py: 1,000 idle connections, slow headers")
def test_idle_and_slow_connections_are_closed(served, contents):
    host, port = served.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for number in range(1_000):
            client = stack.enter_context(socket.create_connection((host, int(port))))
            client.sendall(b"GET /hea" if number % 2 else b"")
            if number % 250 == 0:
                start = time.monotonic()
                assert served.predict(contents[0]).ok
                assert time.monotonic() - start < 3
        client.settimeout(25)
        assert client.recv(1) == b""


@pytest.mark.survived("serve.py: a burst of connections")
def test_burst_of_connections_displaces_no_request(served, contents):
    host, port = served.url.removeprefix("http://").split(":")
    head = f"POST /predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(contents[0])}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        served.program.send_signal(signal.SIGSTOP)
        stack.callback(served.program.send_signal, signal.SIGCONT)
        client = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
        client.sendall(head.encode() + contents[0])
        for _ in range(1_000):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex((host, int(port)))
        served.program.send_signal(signal.SIGCONT)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.refused("serve.py: a program listens on the port", "serve.py: another host without a token")
@pytest.mark.parametrize(
    ("options", "settings", "remedy"),
    [
        ("--port {port}", {}, "--port"),
        ("--host 0.0.0.0", {}, "ML_WORKFLOW_TOKEN"),
        pytest.param("--token-file {folder}/short", {}, "fewer than 16", marks=pytest.mark.slow),
        pytest.param("--host 192.0.2.1", {"ML_WORKFLOW_TOKEN": TOKEN}, "--host", marks=pytest.mark.slow),
        pytest.param("--model models:/{model}/9 --port 0", {}, "the newest", marks=pytest.mark.slow),
        pytest.param(
            "--port 0", {"ML_WORKFLOW_PREDICTIONS": "x://y"}, "ML_WORKFLOW_PREDICTIONS", marks=pytest.mark.slow
        ),
    ],
)
def test_server_that_cannot_start_ends_with_one_line(copied, unused_port, tmp_path, options, settings, remedy):
    (tmp_path / "short").write_text("short\n")
    with socket.socket() as other:
        other.bind(("127.0.0.1", unused_port))
        other.listen()
        arguments = options.format(port=unused_port, folder=tmp_path, model=MODEL).split()
        end = copied.run(*arguments, script="serve.py", **settings)
    assert end.returncode == 1
    assert remedy in end.stderr
    assert len(end.stderr.splitlines()) == 1


@pytest.mark.refused("serve.py: no champion")
def test_missing_champion_is_reported_with_alternatives(copied):
    registry(copied).delete_registered_model_alias(MODEL, "champion")
    end = copied.run("--port", "0", script="serve.py")
    assert (end.returncode, len(end.stderr.splitlines())) == (1, 1)
    assert f"models:/{MODEL}/1" in end.stderr
    assert "mlflow.db" in end.stderr


@pytest.mark.parametrize(
    ("host", "port", "accepted"),
    [("127.0.0.2", 5001, "127.0.0.2:5001"), ("::1", 5001, "[::1]:5001"), ("localhost", 80, "localhost")],
)
def test_own_address_is_an_accepted_host(host, port, accepted):
    assert serve.list_hosts(host, port)[0] == accepted
    assert serve.list_hosts("0.0.0.0", port) == []


@pytest.mark.refused("serve.py: a client without the token")
def test_token_is_required_for_every_route_but_health(copied, contents, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with serving(copied, "--host", "0.0.0.0", "--token-file", str(tmp_path / "token")) as server:
        for route in ("", "metrics", "docs", "openapi.json", "model", "photo", "nowhere"):
            assert requests.get(f"{server.url}/{route}", timeout=60).status_code == 401
        for wrong in (
            "Bearer x",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            "Basic !",
            f"Basic {base64_of(b'x:y')}",
            "",
        ):
            assert server.predict(contents[0], headers={"Authorization": wrong}).status_code == 401
        assert server.health()["status"] == "ok"
        for right in (f"Bearer {TOKEN}", f"Basic {base64_of(f'me:{TOKEN}'.encode())}"):
            assert server.predict(contents[0], headers={"Authorization": right}).ok
        evil = {"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}
        assert server.predict(contents[0], headers=evil).status_code == 403


# Promotions


@pytest.mark.survived("serve.py: a promoted version is broken, or predicts otherwise than it was evaluated")
def test_promotion_is_served_and_a_broken_version_is_not(copied, contents, champion, swapped, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = [register(copied, swapped), register(copied, tmp_path / "empty")]
    good = register(copied, champion)
    with serving(copied) as server:
        promote(copied, good)
        wait_until(lambda: server.predict(contents[0]).json()["version"] == f"models:/{MODEL}/{good}", 30)
        assert server.health()["last_reload"]
        for version in broken:
            promote(copied, version)
            wait_until(lambda version=version: f"/{version} " in (server.health()["last_reload_error"] or ""), 120)
            assert server.health()["version"] == f"models:/{MODEL}/{good}"
            assert server.predict(contents[0]).json()["predictions"][0]["label"] == "apples"
        promote(copied, "1")
        wait_until(lambda: server.health()["version"] == f"models:/{MODEL}/1", 30)
        assert server.health()["last_reload_error"] is None
        assert server.metric("serve_reloads_total", result="loaded") == 2
        assert server.metric("serve_reloads_total", result="failed") == 2
    lines = [line for line in server.program.output.splitlines() if "serving models" in line]
    assert [re.sub(".*(now|still) serving.*", r"\1", line) for line in lines] == ["now", "still", "still", "now"]


@pytest.mark.slow
@pytest.mark.survived("serve.py: the registry goes away")
def test_unreachable_registry_keeps_the_model(copied, contents):
    database = f"sqlite:///{copied.folder / 'mlflow.db'}"
    with copied.mlflow_server("--backend-store-uri", database), serving(copied) as server:
        copied.signal_server("mlflow", signal.SIGKILL)
        wait_until(lambda: server.health()["last_reload_error"], 120)
        assert server.predict(contents[0]).json()["version"] == f"models:/{MODEL}/1"
        assert server.health()["status"] == "ok"


@pytest.mark.slow
@pytest.mark.survived("serve.py: promotions under load")
def test_promotions_under_load_fail_no_request(copied, contents, champion, swapped):
    versions = ["1", *(str(register(copied, champion)) for _ in range(2))]
    broken = str(register(copied, swapped))
    promotions, responses, stop = [(0.0, "1")], [], threading.Event()
    start = time.monotonic()
    with serving(copied) as server:
        limit = max(10, 2 * (time.monotonic() - start))  # seconds; more on a machine that is too busy

        def send_requests(client: int) -> None:
            with requests.Session() as session:
                while not stop.is_set():
                    response = session.post(f"{server.url}/predict", contents[client], timeout=60)
                    version = response.json()["version"].rpartition("/")[2]
                    responses.append((time.monotonic(), response.status_code, version))

        with ThreadPoolExecutor(16) as clients:
            futures = [clients.submit(send_requests, client) for client in range(16)]
            for number in range(10):
                version = broken if number == 4 else versions[(number + 1) % 3]
                promote(copied, version)
                if version != broken:
                    promotions.append((time.monotonic(), version))
                time.sleep(6)
            wait_until(lambda: server.health()["version"] == f"models:/{MODEL}/{version}")
            stop.set()
            for future in futures:
                future.result()
    assert {status for _, status, _ in responses} == {200}
    assert {version for *_, version in responses} == set(versions)
    lag = max(find_lag(promotions, received, version) for received, _, version in responses)
    print(f"{len(responses)} responses, the last one of a replaced version {lag:.1f} s after the promotion")
    assert lag < limit


@pytest.mark.slow
def test_replaced_versions_leave_no_memory(copied, contents, champion):
    versions, memory = ["1", register(copied, champion)], []
    with serving(copied) as server:
        process = psutil.Process(server.program.pid)
        for number in range(1, SWAPS + 1):
            promote(copied, versions[number % 2])
            uri = f"models:/{MODEL}/{versions[number % 2]}"
            wait_until(lambda uri=uri: server.predict(contents[0]).json()["version"] == uri)
            time.sleep(3)  # for the next look at the registry, which collects garbage
            memory.append(process.memory_info().rss / 1e6)
    print(f"{memory[0]:.0f} MB after the first replacement, {memory[-1]:.0f} MB after {SWAPS}")
    assert memory[-1] - memory[0] < 100, memory


# The log


def test_log_has_a_row_per_image(copied, contents, photos):
    with serving(copied) as server:
        response = server.invoke(
            {"inputs": [base64_of(content) for content in contents[:2]]}, headers={"X-Request-ID": "r1"}
        )
        assert response.headers["X-Request-ID"] == "r1"
        server.predict(contents[-1])
        server.predict(b"text")
        rows = server.rows(3)
    assert [(row["request_id"], row["image"], row["route"]) for row in rows[:2]] == [
        ("r1", i, "/invocations") for i in (0, 1)
    ]
    assert [row["digest"] for row in rows] == [hashlib.sha256(c).hexdigest() for c in (*contents[:2], contents[-1])]
    for row, prediction in zip(rows, response.json()["predictions"], strict=False):
        names = ("label", "probability", "similarity", "unknown", "nearest")
        assert [row[name] for name in names] == [prediction[name] for name in names]
        assert row["version"] == f"models:/{MODEL}/1"
        assert 0 < row["milliseconds"] < 60_000
    assert len(rows) == 3


@pytest.mark.slow
@pytest.mark.survived("serve.py: killed under load")
def test_log_survives_kill_9(copied, contents):
    completed = []
    with serving(copied, end=None) as server:

        def send_requests(client: int) -> None:
            with contextlib.suppress(requests.RequestException):
                while True:
                    response = server.predict(contents[client])
                    completed.append((time.monotonic(), response.headers["X-Request-ID"]))

        with ThreadPoolExecutor(4) as clients:
            for client in range(4):
                clients.submit(send_requests, client)
            time.sleep(4)
            killed = time.monotonic()
            server.program.kill()
    server.program.communicate()
    logged = {row["request_id"] for row in read_log(copied)}
    assert {request for moment, request in completed if moment < killed - 1} <= logged
    assert len(completed) > 5
    with serving(copied) as server:
        server.predict(contents[0])
        server.rows(len(logged) + 1)


@pytest.mark.slow
@pytest.mark.survived("serve.py: the log is locked")
def test_locked_log_fails_no_request(copied, contents):
    with serving(copied) as server:
        server.predict(contents[0])
        server.rows(1)
        with contextlib.closing(sqlite3.connect(copied.folder / "predictions.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert server.predict(contents[0]).ok
            wait_until(lambda: server.metric("serve_log_failures_total") >= 1)
            assert server.predict(contents[0]).ok
        server.rows(3)
        wait_until(lambda: server.metric("serve_log_failures_total") >= 1)
        assert server.metric("serve_log_lost_total") == 0
    assert server.program.output.count("prediction log: (sqlite3.OperationalError) database is locked") == 1
    assert server.program.output.count("prediction log: writable again") == 1


@pytest.mark.survived("serve.py: the disk of the log is full")
def test_full_disk_fails_no_request(seed, small_disk, contents):
    project = copy_project(seed, small_disk)
    with serving(project, "--keep", "unsure", "--keep-megabytes", "50") as server:
        fill(project.folder)
        noise = encoded(Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), "uint8")), "PNG")
        for content in (contents[0], noise):
            assert server.predict(content).ok
        wait_until(lambda: server.metric("serve_log_failures_total") >= 2)
        (project.folder / "filler").unlink()
        server.rows(2)
    assert server.program.output.count("prediction log: ") == 2


def test_unsure_photos_are_kept_and_forgotten(copied, contents):
    random = np.random.default_rng(5)
    noise = [encoded(Image.fromarray(random.integers(0, 256, (600, 600, 3), "uint8")), "PNG") for _ in range(2)]
    digest = hashlib.sha256(noise[0]).hexdigest()
    inbox = copied.folder / "inbox"
    with serving(copied, "--keep", "unsure", "--keep-megabytes", "2") as server:
        predictions = [server.predict(content).json()["predictions"][0] for content in contents]
        sure = next(i for i, item in enumerate(predictions) if not item["unknown"] and not item["unsure"])
        assert hashlib.sha256(contents[sure]).hexdigest() not in {path.stem for path in inbox.glob("*")}
        for content in (noise[0], noise[0], noise[1]):
            assert server.predict(content).json()["predictions"][0]["unknown"]
        rows = server.rows(len(contents) + 3)
        assert [row["digest"] for row in rows[-3:-1]] == [digest, digest]
        wait_until(lambda: (inbox / f"{digest}.png").exists())
        assert not (inbox / f"{hashlib.sha256(noise[1]).hexdigest()}.png").exists()  # --keep-megabytes
        end = copied.run("--forget", digest, script="serve.py")
        assert (end.returncode, end.stdout.split()[-1]) == (0, "3"), end.stderr
    assert not (inbox / f"{digest}.png").exists()
    assert digest not in {row["digest"] for row in read_log(copied)}
    assert digest.encode() not in b"".join(path.read_bytes() for path in copied.folder.glob("predictions.db*"))
    assert copied.run("--forget", "nothing", script="serve.py").returncode == 1


@pytest.mark.slow
def test_no_log_writes_no_files(copied, contents):
    with serving(copied, "--no-log") as server:
        server.predict(contents[0])
    assert not list(copied.folder.glob("predictions*"))
    assert copied.run("--no-log", "--keep", "unsure", script="serve.py").returncode == 2


# The shadow


def test_shadow_predictions_are_logged_and_never_returned(copied, contents, swapped, tmp_path):
    other = shutil.copytree(swapped, tmp_path / "other")
    edit_export(other, run_id="")  # otherwise its evaluation would be checked
    promote(copied, version := register(copied, other, has_run=False), "challenger")
    with serving(copied, "--shadow", f"models:/{MODEL}@challenger") as server:
        for content in contents[:3]:
            assert server.predict(content).json()["predictions"][0]["label"] == "apples"
        wait_until(lambda: all(row["shadow_label"] for row in server.rows(3)))
        rows = server.rows(3)
        assert server.metric("serve_shadow_predictions_total", agrees="False") == 3
    assert {(row["label"], row["shadow_label"]) for row in rows} == {("apples", "oranges")}
    assert {row["shadow_version"] for row in rows} == {f"models:/{MODEL}/{version}"}


# The end


@pytest.mark.slow
def test_sigterm_lets_requests_finish(copied, contents):
    with serving(copied, end=None) as server, ThreadPoolExecutor(8) as clients:
        responses = [clients.submit(server.predict, content) for content in contents[:8]]
        wait_until(lambda: any(response.done() for response in responses))
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 9\r\n\r\n1".encode())
            time.sleep(0.1)
            assert server.program.end(signal.SIGTERM) < 10
        assert {response.result().status_code for response in responses} == {200}
    assert server.program.returncode == 0
    assert len(server.program.output.splitlines()) <= 3, server.program.output
