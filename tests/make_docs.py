"""Regenerate what the documents show of real runs: notebook outputs, printed text and screenshots.

    python tests/make_docs.py                   # everything, on an idle machine
    python tests/make_docs.py notebook          # the notebook's outputs
    python tests/make_docs.py runs              # text and screenshots, all from one set of runs

The runs have empty state folders and no internet. The notebook uses the synthetic images. The other runs use the lab's
photos if LAB_SERVER can serve them, and the synthetic images otherwise. The photos are not published here, so no text
or screenshot may show one.

Text and screenshots need Chromium (`apt-get install chromium`), `pip install playwright`, and the ports 4200 and 5000
for the two servers.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from support.project import PROJECT, Project, artifact, free_port, runs_of
from workflow.files import sha256
from workflow.records import Artifact
from workflow.settings import settings

import nbformat
import numpy as np
import requests
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = PROJECT / "ml_workflow.ipynb"
PICTURES = PROJECT / "docs/img"
LAB_SERVER = PROJECT.parent / "shared/tools/serve_lab_images.py"  # serves the lab's photos with GitHub's paths
MAX_BYTES = 60_000  # of a screenshot
NOISE = (  # TensorFlow, MLflow and tqdm print these to stderr with any setting
    r"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR\n",
    r"I0000 .*\n",
    r"(Successfully registered model|Registered model) .*\n",
    r"Created version .*\n",
    r".*TqdmWarning: IProgress not found.*\n.*\n",  # progress bars need ipywidgets
)
MORE_RUNS = (  # compared with the first run, which has the defaults
    ["--epochs", "5", "--learning-rate", "0.003"],
    ["--epochs", "45", "--backbone", "none"],
    ["--epochs", "30", "--learning-rate", "0.01", "--batch-size", "16"],
)
LONG_RUN = ("--epochs", "600", "--learning-rate", "0.0005")  # long enough for a screenshot while it trains
USER = {"LOGNAME": "student"}  # shown by MLflow as the creator of the runs
TRIALS = "12"
DRAW, SCORE = (  # score on new images
    "python sample_images/draw.py photos --count 50 --seed 1",
    "python predict.py photos --score --model models:/apples-oranges@champion",
)
WIDTH_PIXELS, SETTLE_MS = 1200, 3000  # of the screenshots; pages finish moving within this time
COLUMNS = ("params.`epochs`", "params.`learning_rate`", "params.`batch_size`")
COLUMNS += ("metrics.`test_accuracy`", "metrics.`test_loss`")
LOCAL_STORAGE = {  # settings of the pages: light colors, no assistant panel, the columns of the table of runs
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
    """Return a setting that blocks requests to the internet but not to this machine."""
    return {"HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}


@contextlib.contextmanager
def lab_photos(project: Project) -> Iterator[None]:
    """Let the project's runs download the lab's photos from this machine, if they are here."""
    if not LAB_SERVER.exists():
        print(f"{LAB_SERVER} is missing: the runs use the synthetic images", file=sys.stderr)
        yield
        return
    with subprocess.Popen([sys.executable, LAB_SERVER, "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        project.lab_url = server.stdout.readline().strip() + settings.lab_url.partition(".com")[2]
        try:
            yield
        finally:
            server.terminate()


def normalize(text: str) -> str:
    """Return the text with numbers, digests, run names and white space normalized, because they differ between runs."""
    text = re.sub(r"'[a-z]+-[a-z]+'|[0-9a-f]{8}-[0-9a-f-]{27}|\b[0-9a-f]{12,}\b", "#", text)
    return " ".join(re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", text).split())


def sources_digest(notebook) -> str:
    return sha256([cell.source for cell in notebook.cells])


def execute(notebook, folder: Path):
    """Execute the notebook with its state in the folder, and return it with its outputs."""
    project = Project(folder)
    environment = project.environment(IPYTHONDIR=str(project.home / "ipython"))
    del environment["MPLBACKEND"]  # set in this process by workflow.settings; the notebook chooses another one
    client = NotebookClient(
        notebook, timeout=600, iopub_timeout=60, record_timing=False, resources={"metadata": {"path": str(PROJECT)}}
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(without_noise, cell.outputs) if output]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed": sources_digest(notebook),  # test_notebook.py compares it with the current cells
    }
    return notebook


def without_noise(output):
    """Return the output without NOISE, or None if nothing remains."""
    if output.output_type == "stream" and output.name == "stderr":
        output.text = re.sub("|".join(NOISE), "", output.text)
        return output if output.text.strip() else None
    if output.output_type == "display_data" and list(output.data.values()).count("") and "image/png" not in output.data:
        return None  # a finished progress bar
    return output


def make_notebook() -> None:
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), Path(folder)), NOTEBOOK)


def region(name: str) -> str:
    return rf"(<!-- {name}: tests/make_docs.py -->\n).*?(\n<!-- end -->)"


def find_document(name: str) -> Path:
    """Return the document that has the named region."""
    documents = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")]
    (path,) = [path for path in documents if re.search(region(name), path.read_text(), re.DOTALL)]
    return path


def read_region(name: str) -> str:
    """Return the named region, as the last call of make_runs() wrote it."""
    return re.search(region(name), find_document(name).read_text(), re.DOTALL)[0]


def replace_region(name: str, text: str) -> None:
    """Replace the content of the named region."""
    path = find_document(name)
    path.write_text(re.sub(region(name), lambda m: m[1] + text + m[2], path.read_text(), flags=re.DOTALL))


def log_lines(output: str) -> list[str]:
    """Return the log lines of a run without times and task numbers."""
    lines = re.findall(r"^\d\d:\d\d:\d\d\.\d{3} \| (.*)$", output, re.MULTILINE)
    return [re.sub(r"(Task run '[a-z_]+)-[0-9a-f]+'", r"\1'", line) for line in lines]


def shorten(lines: list[str], word: str) -> list[str]:
    """Keep only the first two and the last of the lines that contain the word, with "..." between them."""
    omitted = [line for line in lines if word in line][2:-1]
    return ["..." if line in omitted else line for line in lines if line not in omitted[1:]]


def hide_machine(project: Project, text: str) -> str:
    """Return the text as a run with an activated environment and default ports prints it."""
    places = {f"{project.folder}/": "", sys.executable: "python", project.lab_url or settings.lab_url: settings.lab_url}
    ports = {f":{project.mlflow_port}/": ":5000/", f":{project.prefect_port}/": ":4200/"}
    for old, new in (places | ports | {f"{PROJECT}/": ""}).items():
        text = text.replace(old, new)
    changes = rf'ML_WORKFLOW_\w+=\S+ |cd (prefect_home|{project.folder}) && |PATH=\S+:"\$PATH" '
    changes += rf"|PREFECT_SERVER_API_PORT=\d+ | --port {project.mlflow_port}\b"
    return re.sub(changes, "", text).replace(str(project.folder), "~/ml_workflow").strip()


def execute_command(project: Project, command: str, **settings: str) -> str:
    """Return a shell command with its prompt, followed by its output."""
    end = project.execute(["bash", "-c", command], **settings)
    assert end.returncode == 0, end.stdout + end.stderr
    return f"$ {command}\n{end.stdout.strip()}"


def console(*parts: str) -> str:
    return "```console\n" + "\n".join(parts) + "\n```"


def write_environment(project: Project) -> None:
    """Write the packages and paths of this environment, as if it were `venv` in ~/ml_workflow."""
    packages = "keras|mlflow|optuna|prefect|prefect-dask|psutil|requests|tensorflow"
    commands = (
        "which python",
        "python -m pip --version",
        f"python -m pip list | grep -E '^({packages}) '",
        "which prefect mlflow",
    )
    text = console(*(execute_command(project, command) for command in commands))
    replace_region("environment", text.replace(sys.prefix, "~/ml_workflow/venv"))


def write_first_run(project: Project) -> None:
    """Write the output of a first run without servers and internet, and of predict.py after it."""
    start = time.monotonic()
    end = project.run(**USER, **offline())
    seconds = time.monotonic() - start
    assert end.returncode == 0, end.stderr
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    printed = hide_machine(project, end.stdout)
    replace_region("first run", f"After {seconds:.0f} s ({machine}):\n\n```\n{printed}\n```")
    lines = [line for line in log_lines(end.stdout + end.stderr) if "features computed" not in line]  # if it is slow
    log = shorten(lines, " - epoch ")
    replace_region("log", "```\n" + "\n".join(log) + "\n```")

    rows = json.loads(artifact(project, runs_of(project)[-1], Artifact.IMAGES).read_text())
    images = (dict(zip(rows["columns"], row, strict=True)) for row in rows["data"])
    files = [image["file"] for image in images if image["split"] == "test"]
    tested = {Path(file).parent: f"dataset/images/{file}" for file in files}
    replace_region("predict", console(execute_command(project, f"python predict.py {' '.join(tested.values())}")))
    drawing = execute_command(project, DRAW).strip()
    score = execute_command(project, SCORE)
    replace_region("score", console(drawing, omit_predictions(score)))


def omit_predictions(score: str) -> str:
    """Return the command of --score and its last paragraph, without the predictions."""
    command, last = score.partition("\n")[0], score.rpartition("\n\n")[2]
    return f"{command}\n...\n{last}"


def write_endpoint(project: Project) -> None:
    """Write the response of the endpoint to the command in the same document."""
    command = re.search(r"```bash\n(\(printf .*?)\n```", find_document("endpoint").read_text(), re.DOTALL)[1]
    with project.scoring_server() as url:
        command = command.replace("http://127.0.0.1:5001/invocations", url)
        response = execute_command(project, command).removeprefix(f"$ {command}\n")
    replace_region("endpoint", f"```json\n{json.dumps(json.loads(response), indent=1)}\n```")


def write_mlflow_run(project: Project) -> None:
    """Write the output of `mlflow run`."""
    command = "mlflow run . -P epochs=20 --env-manager local --experiment-name ml-workflow"
    source = f"-P source={project.lab_url or settings.lab_url}"  # hide_machine() shows the default instead
    end = project.execute(
        ["bash", "-c", f"cd {PROJECT} && {command} {source}"],
        **offline(),
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{project.mlflow_port}",
    )
    assert end.returncode == 0, end.stderr
    messages = [line.partition("INFO ")[2].strip() for line in end.stderr.splitlines()]
    first, last = (line for line in messages if re.match(r"mlflow\.projects(\.backend\.local)?: ===", line))
    lines = [hide_machine(project, first), "...", *hide_machine(project, end.stdout).splitlines(), last]
    replace_region("mlflow run", console(f"$ {command}", *lines))


@contextlib.contextmanager
def open_browser() -> Iterator:
    """Yield a page of Chromium with the settings in LOCAL_STORAGE."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(bypass_csp=True)  # take_screenshot() adds a style
        script = "for (const [name, value] of Object.entries(%s)) localStorage[name] ??= value"
        page.add_init_script(script % json.dumps(LOCAL_STORAGE))
        yield page
        browser.close()


def take_screenshot(page, name: str, url: str, height: int, text: str, *actions: Callable) -> None:
    """Wait until a page shows the text, perform the actions and take a screenshot."""
    page.set_viewport_size({"width": WIDTH_PIXELS, "height": height})
    page.goto(url)
    page.get_by_text(text).locator("visible=true").first.wait_for()
    page.add_style_tag(content="[data-assistant-ui] { display: none !important }")
    for action in actions:
        page.wait_for_timeout(SETTLE_MS)
        action(page)
    page.wait_for_timeout(SETTLE_MS)
    page.screenshot(path=PICTURES / f"{name}.png")
    page.goto("about:blank")  # an animated page would keep the processor busy
    shrink(PICTURES / f"{name}.png")


def shrink(path: Path) -> None:
    """Reduce the colors of a picture until its file has fewer than MAX_BYTES."""
    picture = Image.open(path).convert("RGB")
    for colors in (128, 64, 32, 16):
        picture.quantize(colors).save(path, optimize=True)
        if path.stat().st_size < MAX_BYTES:
            return
    raise AssertionError(f"{path} is too large")


def click(text: str) -> Callable:
    return lambda page: page.get_by_text(text, exact=True).last.click()


def scroll(pixels: int) -> Callable:
    def turn_wheel(page):
        page.mouse.move(WIDTH_PIXELS * 0.6, 700)  # below the graph, where the wheel would zoom
        page.mouse.wheel(0, pixels)

    return turn_wheel


def graph_option(text: str) -> Callable:
    """Choose an option of Prefect's graph and close the menu."""

    def choose(page):
        page.get_by_role("button", name="Run Graph Options").click()
        page.get_by_text(text).click()
        page.mouse.click(WIDTH_PIXELS * 0.75, 60)

    return choose


def compare_by(parameters: tuple[str, ...], metrics: tuple[str, ...]) -> Callable:
    """Compare the runs by these parameters and metrics instead of the default ones."""

    def choose(page):
        for number, names in enumerate((parameters, metrics)):
            box = page.get_by_role("combobox").nth(number)
            box.click()
            for _ in range(4):
                box.press("Backspace")
            for name in names:
                box.press_sequentially(name)
                box.press("Enter")
            box.press("Escape")

    return choose


def hide_path(page) -> None:
    """Hide the path of the artifact on this machine."""
    page.get_by_text("Path:").first.evaluate("element => element.style.visibility = 'hidden'")


def close_sidebar(page) -> None:
    page.get_by_role("button", name="Toggle sidebar").click()


def close_dialog(page) -> None:
    """Close the dialog about new pages that MLflow's registry opens on the first visit."""
    page.keyboard.press("Escape")


def show_epoch_metrics(page) -> None:
    """Show loss and accuracy: of training and validation one value per epoch, and of the test images."""
    page.get_by_placeholder("Search metric charts").fill("^(val_|test_|)(accuracy|loss)$")


def show_parameters(page) -> None:
    """List only the test metrics of a run, so that its parameters are in view."""
    page.get_by_placeholder("Search metrics").fill("test_")


def widen_names(page) -> None:
    """Widen the column with the names of the runs to its content."""
    page.locator(".ag-header-cell", has_text="Run Name").locator(".ag-header-cell-resize").dblclick()


def take_predict_page(project: Project, page) -> None:
    """Show the page of serve.py with a new apple, noise, and a file that is not an image.

    The page shows training photos, so the newest model must be one of synthetic images.
    """
    (folder := project.home / "uploads").mkdir()
    execute_command(project, "python sample_images/draw.py --hard new --count 1 --seed 1")
    shutil.copy(project.folder / "new/apples/photo-01.jpeg", folder / "apple.jpeg")
    noise = np.random.default_rng(5).integers(0, 256, (12, 16, 3), "uint8")
    Image.fromarray(noise).resize((640, 480), Image.Resampling.NEAREST).save(folder / "noise.jpeg")
    (folder / "letter.jpeg").write_text("not an image")
    program = project.start("--port", "0", script="serve.py")
    program.read_until("^Serving at http")
    files = [folder / name for name in ("letter.jpeg", "noise.jpeg", "apple.jpeg")]
    address = re.search(r"Serving at (http\S+)", program.output)[1]
    take_screenshot(page, "page", address, 820, "choose photos", lambda page: page.set_input_files("#files", files))
    program.end(signal.SIGINT)


def take_training(project: Project, page, ui: str) -> None:
    """Show a run in Prefect while it trains."""
    run = project.start(*LONG_RUN, **USER, **offline())
    run.read_until("epoch 60 of")
    flow_run = runs_of(project)[-1].data.tags["prefect_flow_run"]
    actions = graph_option("Hide dependency arrows"), click("Artifacts")  # arrows would cross the names
    take_screenshot(page, "prefect-progress", f"{ui}/flow-runs/flow-run/{flow_run}", 1120, "Running", *actions)
    run.end()


def take_prefect(page, ui: str, flow_run: str) -> None:
    run = f"{ui}/flow-runs/flow-run/{flow_run}"
    completed = page.locator(".flow-run-state-type-count").nth(2)
    take_screenshot(page, "prefect-dashboard", f"{ui}/dashboard", 660, "Flow Runs", lambda _: completed.click())
    take_screenshot(page, "prefect-graph", run, 560, "Completed", graph_option("Dependency grid"))
    take_screenshot(page, "prefect-logs", run, 900, "Completed", scroll(505))


def take_report(project: Project, page, ui: str) -> None:
    """Show the report of a run on the synthetic images that are hard to classify."""
    execute_command(project, "python sample_images/draw.py --hard hard")
    end = project.run("--source", "hard", **USER, **offline())
    assert end.returncode == 0, end.stderr
    flow_run = runs_of(project)[-1].data.tags["prefect_flow_run"]
    artifacts = requests.post(f"{ui}/api/artifacts/filter", json={}, timeout=30).json()
    (report,) = [a["id"] for a in artifacts if a["flow_run_id"] == flow_run and a["key"] == "report"]
    address, more = f"{ui}/artifacts/artifact/{report}", page.get_by_text("Would more photos help?")
    take_screenshot(page, "prefect-report", address, 1500, "How good is it?")
    take_screenshot(
        page,
        "prefect-report-curve",
        address,
        680,
        "How good is it?",
        lambda _: more.evaluate("e => e.scrollIntoView()"),
    )


def take_comparison(page, name: str, url: str, runs: list, parameters, metrics) -> None:
    run_ids = quote(json.dumps([run.info.run_id for run in runs]))
    compare = f"{url}/#/compare-runs?runs={run_ids}&experiments=%5B%221%22%5D&workflowType=machine_learning"
    choose = compare_by(parameters, metrics)
    take_screenshot(page, name, compare, 640, "Parallel Coordinates Plot", close_sidebar, choose)


def take_mlflow(page, url: str, runs: list) -> None:
    query = "?workflowType=machine_learning"
    run = f"{url}/#/experiments/{runs[0].info.experiment_id}/runs/{runs[0].info.run_id}"
    take_screenshot(
        page, "mlflow-runs", f"{url}/#/experiments/1/runs{query}", 480, "matching runs", close_sidebar, widen_names
    )
    take_screenshot(page, "mlflow-run", f"{run}{query}", 1240, "About this run", close_sidebar, show_parameters)
    take_screenshot(
        page, "mlflow-metrics", f"{run}/model-metrics{query}", 990, "cv_accuracy", close_sidebar, show_epoch_metrics
    )
    take_screenshot(
        page, "mlflow-system", f"{run}/system-metrics{query}", 1350, "cpu_utilization_percentage", close_sidebar
    )
    open_plot = [click("weights"), click("learning_curves.png"), hide_path]
    take_screenshot(page, "mlflow-artifacts", f"{run}/artifacts{query}", 480, "weights", close_sidebar, *open_plot)
    compared = runs[:-1]  # the long run would stretch the axes
    take_comparison(page, "mlflow-compare", url, compared, ("epochs", "learning_rate"), ("val_loss", "test_loss"))
    take_screenshot(
        page, "mlflow-registry", f"{url}/#/models{query}", 330, "apples-oranges", close_dialog, close_sidebar
    )
    take_screenshot(
        page, "mlflow-version", f"{url}/#/models/apples-oranges/versions/1{query}", 604, "champion", close_sidebar
    )


def take_search(project: Project, page, url: str) -> None:
    """Show the trials of a search below their parent run, and compare the complete trials."""

    def expand(page):
        page.get_by_role("row").filter(has_text="tune ").get_by_role("button").first.click()

    end = project.run("--trials", TRIALS, script="tune.py", **USER, **offline())
    assert end.returncode == 0, end.stderr
    children = [run for run in runs_of(project) if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == int(TRIALS)
    page_of_runs = f"{url}/#/experiments/1/runs?workflowType=machine_learning"
    take_screenshot(page, "mlflow-trials", page_of_runs, 920, "matching runs", close_sidebar, expand)
    complete = [run for run in children if "val_loss" in run.data.metrics]
    parameters = ("epochs", "batch_size", "learning_rate", "dropout")
    take_comparison(page, "mlflow-search", url, complete, parameters, ("val_loss",))


def make_retraining(project: Project, page, ui: str) -> None:
    """Serve the flow, add images, and show the terminal, the form and the list of runs."""
    draw, draw_more = (f"python sample_images/draw.py delivery --count {count} --seed 1" for count in (20, 30))
    serve = 'python ml_workflow.py --source delivery --serve --cron "0 6 * * 1"'
    start_run = "prefect deployment run ml_workflow/retrain"
    execute_command(project, draw)
    served = project.start(*shlex.split(serve)[2:], **USER, PREFECT_RUNNER_POLL_FREQUENCY="1")
    served.read_until("ml_workflow/retrain")
    transcript = [f"$ {draw}", f"$ {serve}", hide_machine(project, served.output)]
    for preparation in ("", "", draw_more):
        if preparation:
            execute_command(project, preparation)
            transcript.append(f"$ {preparation}")
        execute_command(project, start_run, PREFECT_API_URL=f"{ui}/api")
        printed = len(served.output)
        served.read_until("Flow run '.*Finished in state")
        output = hide_machine(project, served.output[printed:])
        lines = [line for line in log_lines(output) if " - epoch " not in line]
        transcript += [f"$ PREFECT_API_URL=http://127.0.0.1:4200/api {start_run}", *lines]
    (deployment,) = requests.post(f"{ui}/api/deployments/filter", json={}, timeout=30).json()
    address = f"{ui}/deployments/deployment/{deployment['id']}"
    take_screenshot(page, "prefect-form", f"{address}/run", 1740, "only_new")
    take_screenshot(page, "prefect-retraining", f"{ui}/runs", 1026, "Cached")
    served.end(signal.SIGINT)
    replace_region("retraining", console(*transcript))


def make_runs() -> None:
    """Make one set of runs, first without and then with servers, and regenerate all text and screenshots."""
    PICTURES.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder, page = (
            stack.enter_context(tempfile.TemporaryDirectory(prefix="lab-")),
            stack.enter_context(open_browser()),
        )
        project = Project(Path(folder), mlflow_port=5000, prefect_port=4200)
        stack.enter_context(lab_photos(project))
        for name in ("sample_images", "predict.py", "ml_workflow.py"):
            (project.folder / name).symlink_to(PROJECT / name)
        write_environment(project)
        write_first_run(project)
        with project.prefect_server() as prefect_api, project.mlflow_server() as mlflow_url:
            ui = prefect_api.removesuffix("/api")
            for arguments in MORE_RUNS:
                end = project.run(*arguments, **USER, **offline())
                assert end.returncode == 0, end.stderr
            take_training(project, page, ui)
            runs = runs_of(project)
            take_prefect(page, ui, runs[0].data.tags["prefect_flow_run"])
            take_mlflow(page, mlflow_url, runs)
            write_endpoint(project)
            write_mlflow_run(project)
            take_report(project, page, ui)
            take_predict_page(project, page)
            take_search(project, page, mlflow_url)
            make_retraining(project, page, ui)


if __name__ == "__main__":
    parts = {"notebook": make_notebook, "runs": make_runs}
    for part in sys.argv[1:] or parts:
        parts[part]()
