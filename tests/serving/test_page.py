"""The page to try a model: its predictions, and the requests that it refuses."""

import asyncio
import base64
import http.server
import io
import json
import signal
import threading
from contextlib import contextmanager
from types import SimpleNamespace

from lib.mutants import mutate

from support.images import encoded, odd_images
from support.project import Project
from workflow.serving.access import Limits
from workflow.serving.page import make_router

import httpx
import numpy as np
import pytest
import requests
from fastapi import FastAPI
from PIL import Image

SEND = {"Content-Type": "application/octet-stream"}


@contextmanager
def page(project: Project):
    """Start the page; yield its URL."""
    program = project.start("--port", "0", script="serve.py")
    try:
        program.read_until("^Serving at http")
        yield program.output.splitlines()[-1].split()[2]
    finally:
        program.end(signal.SIGINT)
        assert program.returncode == 0, program.output


@pytest.fixture(scope="module")
def url(trained):
    with page(trained) as url:
        yield url


def send(url: str, content: bytes, route: str = "predict", **headers: str) -> requests.Response:
    return requests.post(f"{url}/{route}", content, headers=SEND | headers, timeout=60)


def test_page_predicts_like_predict_py_and_shows_the_nearest(trained, url, photos):
    files = sorted(photos.rglob("*.jpeg"))[::5]
    predicted = json.loads(trained.run("--json", *map(str, files), script="predict.py").stdout)
    for path, expected in zip(files, predicted, strict=True):
        (prediction,) = send(url, path.read_bytes()).json()["predictions"]
        assert prediction["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)
        assert (prediction["label"], prediction["unknown"]) == (expected["label"], expected["unknown"])
        photo = requests.get(f"{url}/photo", {"file": prediction["nearest"]}, timeout=60)
        assert (photo.status_code, photo.headers["content-type"]) == (200, "image/jpeg")
    model = requests.get(f"{url}/model", timeout=60).json()
    assert model["origin"].startswith("models:/apples-oranges/1 (champion), run ")
    assert model["classes"] == ["apples", "oranges"]
    assert model["explainable"]


@pytest.mark.slow
@pytest.mark.survived("image: HEIC in predict.py, the page, the endpoint and an explanation")
def test_heic_is_predicted_alike_everywhere(trained, url, heic_photos):
    files = sorted(heic_photos.rglob("*.HEIC"))[::4]
    predicted = json.loads(trained.run("--json", *map(str, files), script="predict.py").stdout)
    bodies = [path.read_bytes() for path in files]
    inputs = [base64.b64encode(body).decode() for body in bodies]
    endpoint = requests.post(f"{url}/invocations", json={"inputs": inputs}, timeout=60).json()["predictions"]
    for body, *predictions in zip(bodies, predicted, endpoint, strict=True):
        (prediction,) = send(url, body).json()["predictions"]
        for other in predictions:
            assert other["probabilities"] == pytest.approx(prediction["probabilities"], abs=1e-6)
        assert Image.open(io.BytesIO(send(url, body, "explain").content)).size == (400, 400)
    assert len(predicted) == 2


def test_explanation_has_the_aspect_ratio_of_the_photo(url):
    photo = Image.new("RGB", (300, 100), "green")
    response = send(url, encoded(photo, "PNG"), "explain")
    assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert Image.open(io.BytesIO(response.content)).size == (400, 133)


def test_model_without_a_backbone_has_no_explanation():
    registered = SimpleNamespace(origin="models:/a-b/1", class_names=["a", "b"])
    serving = SimpleNamespace(registered=registered, has_backbone=False)
    app = FastAPI()
    app.include_router(make_router(SimpleNamespace(serving=serving), Limits()))

    async def request() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:5001") as client:
            return await client.get("/model"), await client.post("/explain", content=b"1", headers=SEND)

    model, response = asyncio.run(request())
    assert model.json()["explainable"] is False
    assert response.status_code == 404
    assert "backbone" in response.text


@pytest.mark.refused("page: hostile files")
def test_hostile_files_are_refused_as_by_predict_py(trained, url, photos, tmp_path):
    random, whole = np.random.default_rng(3), (photos / "apples/apple-1.jpeg").read_bytes()
    contents = [b"text", whole[:2000], encoded(Image.new("1", (10_000, 5_000)), "PNG")]
    contents += [mutate(whole, random) for _ in range(20)]
    contents += odd_images(Image.open(photos / "oranges/orange-1.jpeg")).values()
    for number, content in enumerate(contents):
        (tmp_path / f"{number:03}").write_bytes(content)
    predicted = json.loads(trained.run("--json", str(tmp_path), script="predict.py").stdout)
    classified, explained = ([send(url, content, route) for content in contents] for route in ("predict", "explain"))
    assert [reply.json().get("error") for reply in classified] == [item.get("error") for item in predicted]
    assert {reply.status_code for reply in classified} == {200, 400}
    assert [reply.status_code for reply in explained] == [reply.status_code for reply in classified]
    reasons = [reply.json() for reply in explained if reply.status_code == 400]
    assert reasons == [reply.json() for reply in classified if reply.status_code == 400]


@pytest.mark.refused("page: another origin or host name, a huge body, a file of another run")
def test_requests_of_other_pages_are_refused(url, photos):
    whole = (photos / "apples/apple-1.jpeg").read_bytes()
    for route in ("predict", "explain"):
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
            assert send(url, whole, route, **headers).status_code == 403
        assert send(url, bytes(50_000_001), route).status_code == 413
    assert requests.get(url, headers={"Host": "evil.example"}, timeout=60).status_code == 403
    for file in ("/etc/passwd", "../evaluation.json", "apples/none.jpeg", ""):
        assert requests.get(f"{url}/photo", {"file": file}, timeout=60).status_code == 404
    first = requests.get(url, timeout=60)
    assert "default-src 'none'" in first.headers["Content-Security-Policy"]
    assert first.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "http" not in first.text.replace("http-equiv", "")  # nothing is loaded from elsewhere


@pytest.mark.slow
def test_photo_changed_since_the_run_is_not_shown(project, photos, prefect, tmp_path):
    mine = tmp_path / "mine"
    for kind in ("apples", "oranges"):
        (mine / kind).mkdir(parents=True)
        for path in (photos / kind).iterdir():
            (mine / kind / path.name).write_bytes(path.read_bytes())
    assert project.run("--source", str(mine), "--epochs", "1", **prefect).returncode == 0
    (mine / "apples/apple-1.jpeg").write_bytes((photos / "apples/apple-2.jpeg").read_bytes())
    with page(project) as url:
        assert requests.get(f"{url}/photo", {"file": "apples/apple-1.jpeg"}, timeout=60).status_code == 404
        assert requests.get(f"{url}/photo", {"file": "apples/apple-2.jpeg"}, timeout=60).status_code == 200


@pytest.mark.slow
def test_page_works_in_a_browser(url, photos, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright and a Chromium")
    apple = (photos / "apples/apple-2.jpeg").read_bytes()
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), "uint8")
    for name, content in (
        ("<img src=x onerror=alert(1)>.jpeg", apple),
        ("noise.png", encoded(Image.fromarray(noise), "PNG")),
        ("letter.jpeg", b"no image"),
    ):
        (tmp_path / name).write_bytes(content)
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab, errors = browser.new_page(), []
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(url)
        tab.set_input_files("#files", sorted(tmp_path.iterdir()))
        tab.get_by_text("3 of 3 photos processed").wait_for()
        names = [card.inner_text() for card in tab.query_selector_all(".card")]
        assert sorted("Probably none of the classes" in text for text in names) == [False, False, True]
        assert any("not an image: unknown format" in text for text in names)
        assert any(text.startswith("<img src=x onerror=alert(1)>.jpeg\napples\n") for text in names)
        buttons = tab.get_by_role("button", name="What the model looked at")
        assert buttons.count() == 2
        buttons.first.click()
        tab.get_by_role("button", name="Show the photo").click()
        tab.wait_for_function("document.querySelectorAll('[aria-pressed=false]').length === 1")
        tab.set_input_files("#files", 2 * sorted(photos.rglob("*.jpeg")))
        tab.get_by_text("43 of 43 photos processed").wait_for()
        image = f"<img src='{url}/photo?file=apples/apple-1.jpeg' onload='this.id=1' onerror='this.id=2'>"
        with serve_page(image) as foreign_url:
            tab.goto(foreign_url)
            tab.locator("img[id='2']").wait_for(state="attached")
        assert errors == []
        browser.close()


@contextmanager
def serve_page(content: str):
    """Serve a page of another origin; yield its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
