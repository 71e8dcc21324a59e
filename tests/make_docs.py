"""Makes anew what the documents show of real runs: the notebook's outputs, the printed text, the screenshots.

    python tests/make_docs.py                   # all of them, on an idle machine
    python tests/make_docs.py notebook          # or one of the two parts
    python tests/make_docs.py runs

All state lies in empty folders, and there is no internet, so the images are the drawn ones. The texts and the pictures
are all of one set of runs. They need Chromium (`apt-get install chromium`), `pip install playwright`, and the ports
4200 and 5000 free: both servers run there.
"""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
OTHERS = (  # runs to compare with the first one, which has the defaults
    ["--epochs", "5"],
    ["--epochs", "45", "--backbone", "none"],
    ["--epochs", "30", "--learning-rate", "0.01", "--batch-size", "16"],
)
LIVE = ("--epochs", "600", "--learning-rate", "0.0005")  # of the run whose picture is taken while it trains
OWNER = {"LOGNAME": "student"}  # whom MLflow shows as the one who made a run
TRIALS = "12"
SCORE = (  # images that the run before has not trained on
    "python sample_images/draw.py photos --count 50 --seed 1",
    "python predict.py photos --score --model models:/apples-oranges@champion",
)
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
    """What the document shows of the last time that make_runs() ran."""
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


def show(project: Project, command: str, least: str = "", **settings: str) -> str:
    """The command as it is typed, and all that it prints, which has to contain `least`."""
    end = project.execute(["bash", "-c", command], **settings)
    assert end.returncode == 0, end.stdout + end.stderr
    assert least in end.stdout, end.stdout
    return f"$ {command}\n{end.stdout.strip()}"


def console(*shown: str) -> str:
    return "```console\n" + "\n".join(shown) + "\n```"


def tell_environment(project: Project) -> None:
    """What stands where in the environment in which this script runs, as if it were `venv` in ~/ml_workflow."""
    packages = "keras|mlflow|optuna|prefect|prefect-dask|psutil|requests|tensorflow"
    commands = (
        "which python",
        "python -m pip --version",
        f"python -m pip list | grep -E '^({packages}) '",
        "which prefect mlflow",
    )
    text = console(*(show(project, command) for command in commands))
    replace_region("lab_report.md", "environment", text.replace(sys.prefix, "~/ml_workflow/venv"))


def tell_first_run(project: Project) -> None:
    """Writes what a first run without servers and without internet prints, and what predict.py prints after it."""
    start = time.monotonic()
    end = project.run(**OWNER, **offline())
    seconds = time.monotonic() - start
    assert end.returncode == 0, end.stderr
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    printed = neutral(project, end.stdout)
    replace_region("README.md", "first run", f"After {seconds:.0f} s ({machine}):\n\n```\n{printed}\n```")
    log = shortened(log_lines(end.stdout + end.stderr), " - epoch ")
    replace_region("lab_report.md", "log", "```\n" + "\n".join(log) + "\n```")

    images = [f"sample_images/{name}" for name in ("apples/drawn-apple-09.jpeg", "oranges/drawn-orange-02.jpeg")]
    predicted = show(project, f"python predict.py {' '.join(images)}", "(champion)")
    replace_region("lab_report.md", "predict", console(predicted))
    drawn = show(project, SCORE[0]).strip()
    scored = show(project, SCORE[1], "images were classified correctly")
    replace_region("README.md", "score", console(drawn, after_answers(scored)))


def after_answers(scored: str) -> str:
    """The command of --score and its last paragraph, without the answers to the images."""
    command, last = scored.partition("\n")[0], scored.rpartition("\n\n")[2]
    return f"{command}\n...\n{last}"


def tell_endpoint(project: Project) -> None:
    """Writes what the endpoint answers to the command of the README."""
    command = re.search(r"```bash\n(\(printf .*?)\n```", (PROJECT / "README.md").read_text(), re.DOTALL)[1]
    with project.scoring_server() as url:
        here = command.replace("http://127.0.0.1:5001/invocations", url)
        answer = show(project, here, '"label"').removeprefix(f"$ {here}\n")
    replace_region("README.md", "endpoint", f"```json\n{json.dumps(json.loads(answer), indent=1)}\n```")


def tell_mlflow_run(project: Project) -> None:
    """Writes what one `mlflow run` prints."""
    command = "mlflow run . -P epochs=20 --env-manager local --experiment-name ml-workflow"
    there = ["bash", "-c", f"cd {PROJECT} && {command}"]
    end = project.execute(there, **offline(), MLFLOW_TRACKING_URI=f"http://127.0.0.1:{project.mlflow_port}")
    assert end.returncode == 0, end.stderr
    told = [line.partition("INFO ")[2].strip() for line in end.stderr.splitlines()]
    begins, ends = (line for line in told if re.match(r"mlflow\.projects(\.backend\.local)?: ===", line))
    lines = [begins, "...", *neutral(project, end.stdout).splitlines(), ends]
    replace_region("lab_report.md", "mlflow run", console(f"$ {command}", *lines))


@contextlib.contextmanager
def open_browser() -> Iterator:
    """A page of a Chromium that remembers BROWSER."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        page = browser.new_page(bypass_csp=True)  # take() adds a style
        remember = "for (const [name, value] of Object.entries(%s)) localStorage[name] ??= value"
        page.add_init_script(remember % json.dumps(BROWSER))
        yield page
        browser.close()


def take(page, name: str, url: str, height: int, text: str, *actions: Callable) -> None:
    """Takes the picture of a page, when it shows the text and after the actions."""
    page.set_viewport_size({"width": WIDTH, "height": height})
    page.goto(url)
    page.get_by_text(text).locator("visible=true").first.wait_for()
    page.add_style_tag(content="[data-assistant-ui] { display: none !important }")
    for action in actions:
        page.wait_for_timeout(SETTLED)
        action(page)
    page.wait_for_timeout(SETTLED)
    page.screenshot(path=PICTURES / f"{name}.png")
    page.goto("about:blank")  # a page that moves would keep the processor busy
    Image.open(PICTURES / f"{name}.png").convert("RGB").quantize(128).save(PICTURES / f"{name}.png", optimize=True)


def click(text: str) -> Callable:
    return lambda page: page.get_by_text(text, exact=True).last.click()


def scroll(pixels: int) -> Callable:
    def turn_wheel(page):
        page.mouse.move(WIDTH * 0.6, 700)  # below the graph, where the wheel would magnify
        page.mouse.wheel(0, pixels)

    return turn_wheel


def graph_option(text: str) -> Callable:
    """Chooses an option of Prefect's graph, and closes the list of options."""

    def choose(page):
        page.get_by_role("button", name="Run Graph Options").click()
        page.get_by_text(text).click()
        page.mouse.click(WIDTH * 0.75, 60)

    return choose


def compare_by(parameters: tuple[str, ...], metrics: tuple[str, ...]) -> Callable:
    """Compares the runs by these parameters and metrics, instead of by the first there are."""

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
    """Takes away where the artifact lies on this machine."""
    page.get_by_text("Path:").first.evaluate("element => element.style.visibility = 'hidden'")


def close_sidebar(page) -> None:
    page.get_by_role("button", name="Toggle sidebar").click()


def close_dialog(page) -> None:
    """Closes what MLflow's registry says of its new pages when it is opened for the first time."""
    page.keyboard.press("Escape")


def per_epoch(page) -> None:
    """Shows the metrics that have a value per epoch."""
    page.get_by_placeholder("Search metric charts").fill("^(accuracy|loss|val_loss)$")


def take_page(project: Project, page) -> None:
    """The page of predict.py, with an apple that the model has not seen, noise, and a file that is no image."""
    (shown := project.home / "shown").mkdir()
    shutil.copy(min((project.folder / "photos/apples").iterdir()), shown / "apple.jpeg")
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), "uint8")
    Image.fromarray(noise).resize((640, 480)).save(shown / "noise.jpeg")
    (shown / "letter.jpeg").write_text("no image")
    program = project.start("--page", script="predict.py")
    program.read_until("^Try it at http")
    files = [shown / name for name in ("letter.jpeg", "noise.jpeg", "apple.jpeg")]
    address = program.output.splitlines()[-1].split()[3]
    take(page, "page", address, 820, "choose photos", lambda page: page.set_input_files("#files", files))
    program.end(signal.SIGINT)


def take_training(project: Project, page, ui: str) -> None:
    """A run in Prefect while it trains."""
    live = project.start(*LIVE, **OWNER, **offline())
    live.read_until("epoch 60 of")
    flow_run = runs_of(project)[-1].data.tags["prefect_flow_run"]
    actions = graph_option("Hide dependency arrows"), click("Artifacts")  # which would run through the names
    take(page, "prefect-progress", f"{ui}/flow-runs/flow-run/{flow_run}", 1120, "Running", *actions)
    live.end()


def take_prefect(page, ui: str, flow_run: str) -> None:
    artifacts = requests.post(f"{ui}/api/artifacts/filter", json={}, timeout=30).json()
    (report,) = [a["id"] for a in artifacts if a["flow_run_id"] == flow_run and a["key"] == "report"]
    run = f"{ui}/flow-runs/flow-run/{flow_run}"
    completed = page.locator(".flow-run-state-type-count").nth(2)
    take(page, "prefect-dashboard", f"{ui}/dashboard", 660, "Flow Runs", lambda _: completed.click())
    take(page, "prefect-graph", run, 560, "Completed", graph_option("Dependency grid"))
    take(page, "prefect-logs", run, 900, "Completed", scroll(505))
    take(page, "prefect-report", f"{ui}/artifacts/artifact/{report}", 1380, "How good is it?")


def take_comparison(page, name: str, url: str, runs: list, parameters, metrics) -> None:
    listed = quote(json.dumps([run.info.run_id for run in runs]))
    compare = f"{url}/#/compare-runs?runs={listed}&experiments=%5B%221%22%5D&workflowType=machine_learning"
    choose = compare_by(parameters, metrics)
    take(page, name, compare, 640, "Parallel Coordinates Plot", close_sidebar, choose)


def take_mlflow(page, url: str, runs: list, looked_at) -> None:
    query = "?workflowType=machine_learning"
    run = f"{url}/#/experiments/{looked_at.info.experiment_id}/runs/{looked_at.info.run_id}"
    take(page, "mlflow-runs", f"{url}/#/experiments/1/runs{query}", 480, "matching runs", close_sidebar)
    take(page, "mlflow-run", f"{run}{query}", 935, "About this run", close_sidebar)
    take(page, "mlflow-metrics", f"{run}/model-metrics{query}", 625, "cv_accuracy", close_sidebar, per_epoch)
    take(page, "mlflow-system", f"{run}/system-metrics{query}", 990, "cpu_utilization_percentage", close_sidebar)
    picture = [click("weights"), click("learning_curves.png"), hide_path]
    take(page, "mlflow-artifacts", f"{run}/artifacts{query}", 480, "weights", close_sidebar, *picture)
    take_comparison(page, "mlflow-compare", url, runs, ("epochs", "learning_rate"), ("val_loss", "test_loss"))
    take(page, "mlflow-registry", f"{url}/#/models{query}", 330, "apples-oranges", close_dialog, close_sidebar)
    take(page, "mlflow-version", f"{url}/#/models/apples-oranges/versions/1{query}", 604, "champion", close_sidebar)


def take_search(project: Project, page, url: str) -> None:
    """The trials of a search, below their parent, and the complete ones compared."""

    def expand(page):
        page.get_by_role("row").filter(has_text="tune ").get_by_role("button").first.click()

    end = project.run("--trials", TRIALS, script="tune.py", **OWNER, **offline())
    assert end.returncode == 0, end.stderr
    children = [run for run in runs_of(project) if MLFLOW_PARENT_RUN_ID in run.data.tags]
    assert len(children) == int(TRIALS)
    page_of_runs = f"{url}/#/experiments/1/runs?workflowType=machine_learning"
    take(page, "mlflow-trials", page_of_runs, 920, "matching runs", close_sidebar, expand)
    complete = [run for run in children if "val_loss" in run.data.metrics]
    parameters = ("epochs", "batch_size", "learning_rate", "dropout")
    take_comparison(page, "mlflow-search", url, complete, parameters, ("val_loss",))


def make_retraining(project: Project, page, ui: str) -> None:
    """Serves the flow, and delivers photos to it twice: what the terminal shows, the form, and the list of runs."""
    draw, more = (f"python sample_images/draw.py delivery --count {count} --seed 1" for count in (20, 30))
    serve = 'python ml_workflow.py --source delivery --serve --cron "0 6 * * 1"'
    ask = "prefect deployment run ml_workflow/retrain"
    show(project, draw)
    served = project.start(*shlex.split(serve)[2:], **OWNER, PREFECT_RUNNER_POLL_FREQUENCY="1")
    served.read_until("Served as ml_workflow/retrain")
    shown = [f"$ {draw}", f"$ {serve}", neutral(project, served.output)]
    for before in ("", "", more):
        if before:
            show(project, before)
            shown.append(f"$ {before}")
        show(project, ask, PREFECT_API_URL=f"{ui}/api")
        printed = len(served.output)
        served.read_until("Flow run '.*Finished in state")
        told = [line for line in log_lines(served.output[printed:]) if " - epoch " not in line]
        shown += [f"$ PREFECT_API_URL=http://127.0.0.1:4200/api {ask}", *told]
    (deployment,) = requests.post(f"{ui}/api/deployments/filter", json={}, timeout=30).json()
    address = f"{ui}/deployments/deployment/{deployment['id']}"
    take(page, "prefect-form", f"{address}/run", 1740, "only_new")
    take(page, "prefect-retraining", f"{ui}/runs", 1026, "Skipped")
    served.end(signal.SIGINT)
    replace_region("lab_report.md", "retraining", console(*shown))


def make_runs() -> None:
    """Makes one set of runs, first without servers and then with both, and shows it in all texts and pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lab-") as folder, open_browser() as page:
        project = Project(Path(folder), mlflow_port=5000, prefect_port=4200)
        for name in ("sample_images", "predict.py", "ml_workflow.py"):
            (project.folder / name).symlink_to(PROJECT / name)
        tell_environment(project)
        tell_first_run(project)
        take_page(project, page)
        with project.prefect_server() as prefect_api, project.mlflow_server() as mlflow_url:
            ui = prefect_api.removesuffix("/api")
            for arguments in OTHERS:
                end = project.run(*arguments, **OWNER, **offline())
                assert end.returncode == 0, end.stderr
            take_training(project, page, ui)
            runs = runs_of(project)
            take_prefect(page, ui, runs[0].data.tags["prefect_flow_run"])
            take_mlflow(page, mlflow_url, runs, runs[0])
            tell_endpoint(project)
            tell_mlflow_run(project)
            take_search(project, page, mlflow_url)
            make_retraining(project, page, ui)


if __name__ == "__main__":
    parts = {"notebook": make_notebook, "runs": make_runs}
    for part in sys.argv[1:] or parts:
        parts[part]()
