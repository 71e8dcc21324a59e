"""Makes anew what the documents show of real runs: the notebook's outputs, the printed text, the screenshots.

    python tests/make_docs.py                                   # all of them, on an idle machine
    python tests/make_docs.py notebook texts pictures page      # or some of them

All state lies in empty folders, and there is no internet, so the images are the drawn ones. The pictures need Chromium
(`apt-get install chromium`), `pip install playwright`, and the ports 4200 and 5000 free: both servers run there.
"""

import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from support.project import PROJECT, Project, free_port, runs_of
from workflow.files import sha256

import nbformat
import numpy as np
import requests
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = PROJECT / "ml_workflow.ipynb"
PICTURES = PROJECT / "img"
NOISE = (  # what TensorFlow, MLflow and tqdm print to stderr, whatever the settings
    r"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR\n",
    r"I0000 .*\n",
    r"(Successfully registered model|Registered model) .*\n",
    r"Created version .*\n",
    r".*TqdmWarning: IProgress not found.*\n.*\n",  # no moving bars without ipywidgets
)
TRAININGS = (  # for the pictures; the last but one is looked at, the last one while it trains
    ["--epochs", "5"],
    ["--epochs", "45", "--backbone", "none"],
    ["--epochs", "30", "--learning-rate", "0.01", "--batch-size", "16"],
    [],
    ["--epochs", "600", "--learning-rate", "0.0005"],
)
TRIALS = "12"
DRAW = "python sample_images/draw.py photos --count 50 --seed 1"  # images that no run of make_texts() trains on
SCORE = "python predict.py photos --score"
WIDTH, SETTLED = 1200, 3000  # pixels; ms after which the pages move no more
COLUMNS = ("params.`epochs`", "params.`learning_rate`", "params.`batch_size`", "metrics.`val_loss`")
COLUMNS += ("metrics.`test_accuracy`", "metrics.`test_loss`")
BROWSER = {  # what the pages remember: light colours, no assistant beside the page, the columns of the runs' table
    "color-scheme": '"light"',
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
    'MLflowLocalStorage-1.1-ExperimentPage-["1"]-ReactComponentState': json.dumps({"selectedColumns": COLUMNS}),
}
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def offline() -> dict[str, str]:
    """The setting by which a program's requests to the internet are refused, and to this machine are not."""
    return {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}


def in_kind(text: str) -> str:
    """The text without what differs from run to run: numbers, digests, names of runs, white space."""
    text = re.sub(r"'[a-z]+-[a-z]+'|[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9a-f]{12,}\b", "#", text)
    return " ".join(re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", text).split())


def sources_digest(notebook) -> str:
    return sha256([cell.source for cell in notebook.cells])


def execute(notebook, folder: Path):
    """The notebook with the outputs that it has when it is executed with its state in the folder."""
    project = Project(folder)
    environment = project.environment(IPYTHONDIR=str(project.home / "ipython"))
    client = NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(PROJECT)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(without_noise, cell.outputs) if output]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed": sources_digest(notebook),  # a cell that is changed later shows
    }
    return notebook


def without_noise(output):
    """The output without NOISE; None when nothing is left."""
    if output.output_type == "stream" and output.name == "stderr":
        output.text = re.sub("|".join(NOISE), "", output.text)
        return output if output.text.strip() else None
    if output.output_type == "display_data" and list(output.data.values()).count("") and "image/png" not in output.data:
        return None  # a progress bar that has gone
    return output


def make_notebook() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), Path(folder)), NOTEBOOK)


def region(name: str) -> str:
    return rf"(<!-- {name}: tests/make_docs.py -->\n).*?(\n<!-- end -->)"


def read_region(document: str, name: str) -> str:
    """What the document shows of the last time that make_texts() ran."""
    return re.search(region(name), (PROJECT / document).read_text(), re.DOTALL)[0]


def replace_region(document: str, name: str, text: str) -> None:
    """Puts the text where the document has the region of that name, which has to be there once."""
    path = PROJECT / document
    content, count = re.subn(region(name), lambda m: m[1] + text + m[2], path.read_text(), flags=re.DOTALL)
    assert count == 1, f"{document}: {name}"
    path.write_text(content)


def log_lines(output: str) -> list[str]:
    """The lines of a run's log without the time and the numbers of its tasks."""
    lines = re.findall(r"^\d\d:\d\d:\d\d\.\d{3} \| (.*)$", output, re.MULTILINE)
    return [re.sub(r"(Task run '[a-z_]+)-[0-9a-f]+'", r"\1'", line) for line in lines]


def shortened(lines: list[str], word: str) -> list[str]:
    """The lines, of those with the word only the first two and the last."""
    with_word = [line for line in lines if word in line]
    left_out = set(with_word[2:-1])
    return [line if line not in left_out else "..." for line in lines if line not in left_out or line == with_word[2]]


def neutral(project: Project, text: str) -> str:
    """What a run printed, as it is in a clone whose environment is activated and whose servers have their own ports."""
    places = {f"{project.folder}/": "", sys.executable: "python"}
    ports = {f":{project.mlflow_port}/": ":5000/", f":{project.prefect_port}/": ":4200/"}
    for old, new in (places | ports | {f"{PROJECT}/": ""}).items():
        text = text.replace(old, new)
    return re.sub(r"ML_WORKFLOW_\w+=\S+ ", "", text).strip()


def make_texts() -> None:
    """Writes what a first run without servers and without internet prints, and what predict.py prints after it."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        (project.folder / "sample_images").symlink_to(PROJECT / "sample_images")
        start = time.monotonic()
        end = project.run(**offline())
        seconds = time.monotonic() - start
        assert end.returncode == 0, end.stderr
        images = [f"sample_images/{name}" for name in ("apples/drawn-apple-09.jpeg", "oranges/drawn-orange-02.jpeg")]
        predicted = project.run(*images, script="predict.py")
        assert predicted.returncode == 0, predicted.stderr
        drawn = project.run(*DRAW.split()[2:], script=DRAW.split()[1])
        assert drawn.returncode == 0, drawn.stderr
        scored = project.run(*SCORE.split()[2:], script=SCORE.split()[1])
        assert scored.returncode == 0, scored.stderr
        score = scored.stdout.rstrip().rpartition("\n\n")[2]
        printed, log = (
            neutral(project, end.stdout),
            shortened(log_lines(end.stdout + end.stderr), " - epoch "),
        )
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    replace_region("README.md", "first run", f"After {seconds:.0f} s ({machine}):\n\n```\n{printed}\n```")
    replace_region("README.md", "score", f"```console\n$ {DRAW}\n$ {SCORE}\n...\n{score}\n```")
    replace_region("lab_report.md", "log", "```\n" + "\n".join(log) + "\n```")
    command = f"$ python predict.py {' '.join(images)}"
    replace_region("lab_report.md", "predict", f"```console\n{command}\n{predicted.stdout.strip()}\n```")


def take(page, name: str, url: str, height: int, text: str, *actions: Callable) -> None:
    """Takes the picture of a page, when it shows the text and after the actions."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.goto("about:blank")  # else a change behind the # loads nothing
    page.goto(url)
    page.get_by_text(text).locator("visible=true").first.wait_for()
    page.add_style_tag(content="[data-assistant-ui] { display: none !important }")
    for action in actions:
        page.wait_for_timeout(SETTLED)
        action(page)
    page.wait_for_timeout(SETTLED)
    page.screenshot(path=PICTURES / f"{name}.png")
    Image.open(PICTURES / f"{name}.png").convert("RGB").quantize(128).save(PICTURES / f"{name}.png", optimize=True)


def click(text: str) -> Callable:
    return lambda page: page.get_by_text(text, exact=True).last.click()


def scroll(pixels: int) -> Callable:
    def turn_wheel(page):
        page.mouse.move(WIDTH * 0.6, 700)  # below the graph, where the wheel would magnify
        page.mouse.wheel(0, pixels)

    return turn_wheel


def choose_metrics(*names: str) -> Callable:
    """Compares the runs by these metrics, instead of by the first there is."""

    def choose(page):
        box = page.get_by_role("combobox").nth(1)
        box.click()
        box.press("Backspace")
        for name in names:
            box.press_sequentially(name)
            box.press("Enter")
        box.press("Escape")

    return choose


def hide_path(page) -> None:
    """Takes away where the artifact lies on this machine."""
    page.get_by_text("Path:").first.evaluate("element => element.style.visibility = 'hidden'")


def take_prefect(page, url: str, flow_run: str) -> None:
    artifacts = requests.post(f"{url}/artifacts/filter", json={}, timeout=30).json()
    (report,) = [a["id"] for a in artifacts if a["flow_run_id"] == flow_run and a["key"] == "report"]
    url = url.removesuffix("/api")
    run = f"{url}/flow-runs/flow-run/{flow_run}"
    take(page, "prefect-graph", run, 560, "Completed")
    take(page, "prefect-logs", run, 900, "Completed", scroll(470))
    take(page, "prefect-report", f"{url}/artifacts/artifact/{report}", 1260, "How good is it?")


def close_sidebar(page) -> None:
    page.get_by_role("button", name="Toggle sidebar").click()


def take_comparison(page, name: str, url: str, runs: list, *metrics: str) -> None:
    listed = quote(json.dumps([run.info.run_id for run in runs]))
    compare = f"{url}/#/compare-runs?runs={listed}&experiments=%5B%221%22%5D&workflowType=machine_learning"
    take(page, name, compare, 640, "Parallel Coordinates Plot", close_sidebar, choose_metrics(*metrics))


def take_mlflow(page, url: str, runs: list) -> None:
    looked_at, query = runs[-2].info.run_id, "?workflowType=machine_learning"
    run = f"{url}/#/experiments/{runs[0].info.experiment_id}/runs/{looked_at}"
    take(page, "mlflow-runs", f"{url}/#/experiments/1/runs{query}", 480, "matching runs", close_sidebar)
    take(page, "mlflow-run", f"{run}{query}", 1100, "About this run", close_sidebar)
    take(page, "mlflow-metrics", f"{run}/model-metrics{query}", 1340, "cv_accuracy", close_sidebar)
    take(page, "mlflow-system", f"{run}/system-metrics{query}", 900, "cpu_utilization_percentage", close_sidebar)
    picture = [click("weights"), click("learning_curves.png"), hide_path]
    take(page, "mlflow-artifacts", f"{run}/artifacts{query}", 480, "weights", close_sidebar, *picture)
    take_comparison(page, "mlflow-compare", url, runs, "val_loss", "test_loss")
    take(page, "mlflow-registry", f"{url}/#/models/apples-oranges{query}", 760, "champion", close_sidebar)


def take_search(page, url: str, runs: list) -> None:
    """The trials of a search, below their parent and compared."""

    def expand(page):
        page.get_by_role("row").filter(has_text="tune ").get_by_role("button").first.click()

    children = [run for run in runs if MLFLOW_PARENT_RUN_ID in run.data.tags]
    assert len(children) == int(TRIALS)
    page_of_runs = f"{url}/#/experiments/1/runs?workflowType=machine_learning"
    take(page, "mlflow-trials", page_of_runs, 920, "matching runs", close_sidebar, expand)
    take_comparison(page, "mlflow-search", url, children, "val_loss")


def make_pictures() -> None:
    """Trains with both servers up, the way the lab does, and takes the pictures of their pages."""
    from playwright.sync_api import sync_playwright

    settings = offline() | {"LOGNAME": "student"}
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder, sync_playwright() as playwright:
        project = Project(Path(folder), mlflow_port=5000, prefect_port=4200)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page()
        remember = "for (const [name, value] of Object.entries(%s)) localStorage[name] ??= value"
        page.add_init_script(remember % json.dumps(BROWSER))
        with project.prefect_server() as prefect_url, project.mlflow_server() as mlflow_url:
            for arguments in TRAININGS[:-1]:
                end = project.run(*arguments, **settings)
                assert end.returncode == 0, end.stderr
            live = project.start(*TRAININGS[-1], **settings)
            live.read_until("epoch 60 of")
            flow_run = runs_of(project)[-1].data.tags["prefect_flow_run"]
            live_page = f"{prefect_url.removesuffix('/api')}/flow-runs/flow-run/{flow_run}"
            take(page, "prefect-progress", live_page, 1120, "Running", click("Artifacts"))
            live.end()
            runs = runs_of(project)
            take_prefect(page, prefect_url, runs[-2].data.tags["prefect_flow_run"])
            take_mlflow(page, mlflow_url, runs)
            end = project.run("--trials", TRIALS, script="tune.py", timeout=10 * 60, **settings)
            assert end.returncode == 0, end.stderr
            take_search(page, mlflow_url, runs_of(project)[len(runs) :])
        browser.close()


def make_page() -> None:
    """Takes the picture of the page of predict.py, with an apple, noise, and a file that is no image."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        project, shown = Project(Path(folder) / "project"), Path(folder, "shown")
        end = project.run(**offline())
        assert end.returncode == 0, end.stderr
        shown.mkdir()
        shutil.copy(PROJECT / "sample_images/apples/drawn-apple-02.jpeg", shown / "apple.jpeg")
        noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), "uint8")
        Image.fromarray(noise).resize((640, 480)).save(shown / "noise.jpeg")
        (shown / "letter.jpeg").write_text("no image")
        program = project.start("--page", script="predict.py")
        program.read_until("^Try it at http")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(bypass_csp=True)  # take() adds a style

        def choose(page):
            page.set_input_files("#files", [shown / name for name in ("letter.jpeg", "noise.jpeg", "apple.jpeg")])

        take(page, "page", program.output.splitlines()[-1].split()[3], 820, "choose photos", choose)
        browser.close()
        program.end(signal.SIGINT)


if __name__ == "__main__":
    parts = {"notebook": make_notebook, "texts": make_texts, "pictures": make_pictures, "page": make_page}
    for part in sys.argv[1:] or parts:
        parts[part]()
