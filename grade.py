"""Grade a solution to the lab: print whether each criterion is met, and the evidence.

    python grade.py REPOSITORY [--prefect URL] [--mlflow URL] [--json]

The newest completed run of the flow is graded, with the MLflow run that was active during it. Nothing is written to the
repository or to the servers. Exit status: 0 if all criteria are met, 1 if some are not, 2 if the repository or a server
cannot be read.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves this folder out

import argparse
import ast
import fnmatch
import json
import re
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from workflow.cli import Parser, command_line
from workflow.errors import WorkflowError, first_line
from workflow.settings import settings
from workflow.text import printable

import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

FLOW = "ml_workflow"
STEPS = {  # by the step that a task's name contains: numbers of required parameters and returned values
    "download": (0, 0),
    "preprocess": (0, 3),  # returns the training, validation and test datasets
    "train": (2, 1),  # accepts the training and validation datasets, returns the model's file name
    "evaluate": (2, 0),  # accepts the file name and the test dataset
}
CONSTANTS = {  # patterns for their names, and the functions that use them
    "tracking URI": ("TRACKING|MLFLOW", "set_tracking_uri"),
    "experiment": ("EXPERIMENT", "set_experiment"),
}
PACKAGES = {"Prefect": r"\bprefect\b", "MLflow": r"\bmlflow\b", "Keras": r"\b(keras|tensorflow)"}
IGNORED = ("venv", "prefect_home", "mlruns", "mlartifacts")
SKIPPED = ("tests", *IGNORED)  # folders that are not part of a solution
PICTURE = re.compile(r"""!\[[^\]]*\]\(\s*(?:<([^>]+)>|([^)\s]+))|<img[^>]*\ssrc=["']?([^"'>]+)""", re.I)  # in Markdown
BADGE = re.compile(r"\.svg\b|^http.*(badge|shields)", re.I)
TEXTS = (".py", ".ipynb", ".md", ".txt", ".gitignore")
WEIGHTS = (".h5", ".hdf5", ".ckpt", ".index", ".npz")
OPTIMIZER = {"optimizer name": "opt(imizer)?_name", "learning rate": "opt(imizer)?_learning_rate"}
TEST_METRICS = {
    "test loss": "(test|eval).*loss|loss.*(test|eval).*",
    "test accuracy": "(test|eval).*acc.*|.*acc.*(test|eval).*",
}
MAX_RUNS, TIMEOUT_SECONDS = 1000, 10
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Check(NamedTuple):
    """A criterion, whether the solution meets it, and the evidence."""

    criterion: str
    is_met: bool
    evidence: str


class Module(NamedTuple):
    """A Python file of the solution."""

    name: str
    tree: ast.Module

    def at(self, node: Any) -> str:
        return f"{self.name}:{node.lineno}"

    def find_calls(self, function: str) -> list[ast.Call]:
        """Return the calls to an MLflow function, such as `autolog` for `mlflow.keras.autolog()`."""
        origins = {"mlflow": "mlflow"}  # of imported names
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                origins |= {each.asname or each.name: prefix + each.name for each in node.names}
        calls = []
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call):
                first, dot, rest = ast.unparse(call.func).partition(".")
                name = origins.get(first, "") + dot + rest
                is_registering = function == "register_model" and "registered_model_name=" in ast.unparse(call)
                if name.startswith("mlflow.") and (name.endswith(f".{function}") or is_registering):
                    calls.append(call)
        return calls

    def find_decorated(self, decorator: str) -> dict[str, Function]:
        """Return the functions with a decorator, `flow` or `task`, by their names in Prefect."""
        functions: dict[str, Function] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for expression in node.decorator_list:
                    options = expression.keywords if isinstance(expression, ast.Call) else []
                    if last_name(expression.func if isinstance(expression, ast.Call) else expression) == decorator:
                        names = [option.value for option in options if option.arg == "name"]
                        name = names[0].value if names and isinstance(names[0], ast.Constant) else node.name
                        functions[str(name)] = node
        return functions


def last_name(expression: ast.expr) -> str:
    """Return the last name of an expression: `autolog` for `mlflow.keras.autolog`."""
    return ast.unparse(expression).rpartition(".")[2]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def list_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a repository, except this one and those in hidden, generated and test folders."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not (path.name.startswith(".") or path.name in SKIPPED or (path / "pyvenv.cfg").exists()):
                yield from list_files(path)
        elif path.is_file() and not path.samefile(__file__):  # a broken link is not a file
            yield path


def read_modules(folder: Path, files: list[Path]) -> list[Module]:
    """Parse the Python files; treat one with a syntax error as empty."""
    modules = []
    for path in files:
        if path.suffix == ".py":
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                tree = ast.Module([], [])
            modules.append(Module(path.relative_to(folder).as_posix(), tree))
    return modules


def is_flow(name: str) -> bool:
    """Return whether a flow has the lab's name. Prefect replaces underscores in a function's name with hyphens."""
    return name.replace("-", "_") == FLOW


def find_step(name: str) -> str | None:
    """Return the step that a task's name contains."""
    return next((step for step in STEPS if step in name.lower()), None)


def grade_source(modules: list[Module]) -> Iterator[Check]:
    """Yield the criteria for the Python files; tasks, flow and constants are in the file that defines the flow."""
    scripts = [module for module in modules if any(map(is_flow, module.find_decorated("flow")))]
    script = max(scripts, key=lambda module: len(find_tasks(module)), default=None)
    yield Check(f"A flow is named {FLOW}", script is not None, script.name if script else "no @flow has this name")
    script = script or Module("", ast.Module([], []))
    tasks = find_tasks(script)
    missing = [f"no task for {step}" for step in STEPS if step not in tasks]
    places = [f"{script.at(task)} {task.name}" for task in tasks.values()]
    yield Check("Each step is a task", not missing, ", ".join(missing or places))
    problems = missing + [problem for step, task in tasks.items() for problem in check_signature(step, task)]
    evidence = "; ".join(problems) or f"{len(tasks)} tasks as specified"
    yield Check("The tasks have the lab's inputs and outputs", not problems, evidence)
    for step in ("train", "evaluate"):
        lines = find_autologging(script, tasks, step)
        evidence = ", ".join(lines) or f"no call to autolog() applies to {step}"
        yield Check(f"Autologging in {step}", bool(lines), evidence)
    yield grade_constants(script, modules)
    for name in ("set_tracking_uri", "set_experiment", "register_model"):
        lines = [module.at(call) for module in modules for call in module.find_calls(name)]
        yield Check(f"mlflow.{name}() is called", bool(lines), ", ".join(lines) or "no call")


def find_tasks(script: Module) -> dict[str, Function]:
    """Return the tasks by step."""
    return {step: task for name, task in script.find_decorated("task").items() if (step := find_step(name))}


def find_autologging(script: Module, tasks: dict[str, Function], step: str) -> list[str]:
    """Return where autologging is turned on for a step: before it, and not in the task of another step."""
    callers = [function for name, function in script.find_decorated("flow").items() if is_flow(name)]
    callers += [task for name, task in tasks.items() if name == step]
    others = [task for name, task in tasks.items() if name != step]
    nodes = [node for node in ast.walk(script.tree) if isinstance(node, Function) and node not in others]
    functions = {node.name: node for node in nodes}
    executed = find_executed([script.tree, *(statement for caller in callers for statement in caller.body)], functions)
    users = {"fit" if step == "train" else step, *(caller.name for caller in callers)}
    for statement in script.tree.body:  # such as a function
        calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        lines = [call.lineno for call in calls if users & {*ast.unparse(call.func).split(".")}]
        executed -= {call for call in calls if lines and call.lineno > max(lines)}
    calls = [call for call in script.find_calls("autolog") if call in executed]
    return [script.at(call) for call in calls if "disable=True" not in ast.unparse(call)]


def find_executed(nodes: list[ast.AST], functions: dict[str, Function]) -> set[ast.AST]:
    """Return these nodes and their children, with the bodies of functions only where a function is used."""
    executed: set[ast.AST] = set()
    while nodes:
        node = nodes.pop()
        if node not in executed and not isinstance(node, Function):
            executed.add(node)
            nodes += ast.iter_child_nodes(node)
            if isinstance(node, ast.Name | ast.Attribute) and last_name(node) in functions:
                nodes += functions[last_name(node)].body
    return executed


def check_signature(step: str, task: Function) -> Iterator[str]:
    """Yield each way in which a task's inputs and outputs differ from the lab's."""
    inputs, outputs = STEPS[step]
    parameters = task.args
    required = (
        len(parameters.posonlyargs + parameters.args) - len(parameters.defaults) + parameters.kw_defaults.count(None)
    )
    if required != inputs:
        yield f"{task.name} has {count(required, 'required parameter')}, not {inputs}"
    returned = count_returned(task)
    if returned != outputs:
        yield f"{task.name} returns {count(returned, 'value')}, not {outputs}"


def count_returned(task: Function) -> int:
    """Return how many values a function returns, according to its annotation or its return statements."""
    annotation = task.returns
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return 0
    if isinstance(annotation, ast.Subscript) and last_name(annotation.value).lower() == "tuple":
        types = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if "..." not in map(ast.unparse, types):
            return len(types)
    nodes = find_executed([*task.body], {})
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    tuples = {ast.unparse(target): node.value for node in assigned for target in node.targets}
    values = [node.value for node in nodes if isinstance(node, ast.Return) and node.value]
    values = [tuples.get(ast.unparse(value), value) for value in values if ast.unparse(value) != "None"]
    return max((len(value.elts) if isinstance(value, ast.Tuple | ast.List) else 1 for value in values), default=0)


def grade_constants(script: Module, modules: list[Module]) -> Check:
    """Check that the tracking URI and the experiment are global variables, and used."""
    names = {
        name.id: name
        for statement in script.tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    problems, constants = [], []
    for kind, (pattern, function) in CONSTANTS.items():
        constants += [f"{script.at(node)} {name}" for name, node in names.items() if re.search(pattern, name)]
        if not any(re.search(pattern, name) for name in names):
            problems.append(f"no global variable for the {kind}")
        calls = [call for module in modules for call in module.find_calls(function)]
        values = [value for call in calls for value in (*call.args, *(option.value for option in call.keywords))]
        if values and all(isinstance(value, ast.Constant) for value in values):
            problems.append(f"{function}() is called with a literal")
    return Check("Tracking URI and experiment are constants", not problems, ", ".join(problems or constants))


def grade_files(folder: Path, files: list[Path]) -> Iterator[Check]:
    """Yield the criteria for the other files of the repository."""
    texts = {path.relative_to(folder).as_posix(): read_text(path) for path in files}
    listed = "\n".join(text for name, text in texts.items() if fnmatch.fnmatch(name.lower(), "*requirements*.txt"))
    listed = re.sub(r"(?m)(^|\s)#.*", "", listed.replace("\0", ""))  # no comments; PowerShell's UTF-16 leaves NULs
    missing = [f"{name} is not listed" for name, pattern in PACKAGES.items() if not re.search(pattern, listed, re.I)]
    yield Check("requirements.txt lists the packages", not missing, ", ".join(missing or PACKAGES))
    lines = [line.strip().replace(".venv", "venv") for line in texts.get(".gitignore", "").splitlines()]
    patterns = [re.sub(r"^(\*\*)?/|/\*{0,2}$", "", line) for line in lines]
    unlisted = [f"{name} is missing" for name in IGNORED if not any(fnmatch.fnmatch(name, each) for each in patterns)]
    yield Check(".gitignore lists generated files", not unlisted, ", ".join(unlisted or IGNORED))
    code = {name: text for name, text in texts.items() if name.endswith((".py", ".ipynb"))}
    uses = [[name for name, text in code.items() if part in text] for part in ("models:/", "load_model(")]
    evidence = ", ".join(uses[0]) if all(uses) else "no code loads a model from models:/"
    yield Check("A prediction uses the registered model", all(uses), evidence)
    notebooks = [check_notebook(name, text) for name, text in code.items() if name.endswith(".ipynb")]
    best = max(notebooks, key=lambda check: check.is_met, default=None)
    yield best or Check("The notebook has been executed", False, "no notebook")
    yield check_report(folder, {name: text for name, text in texts.items() if name.lower().endswith(".md")})


def check_report(folder: Path, documents: dict[str, str]) -> Check:
    """Check that a Markdown document has pictures other than badges, and that their files exist."""
    images = {name: ["".join(groups) for groups in PICTURE.findall(text)] for name, text in documents.items()}
    reports = {name: [each for each in pictures if not BADGE.search(each)] for name, pictures in images.items()}
    name, pictures = max(reports.items(), key=lambda report: len(report[1]), default=("", []))
    local = [unquote(urlsplit(picture).path) for picture in pictures if not picture.startswith("http")]
    absent = [f"{path} does not exist" for path in local if not (folder / name).parent.joinpath(path).is_file()]
    evidence = f"{name}: {count(len(pictures), 'picture')}" if pictures else "no pictures"
    return Check("A report in Markdown has screenshots", bool(pictures) and not absent, ", ".join(absent) or evidence)


def read_text(path: Path) -> str:
    is_text = path.suffix.lower() in TEXTS or path.stem in TEXTS
    return path.read_text(encoding="utf-8", errors="replace") if is_text else ""


def check_notebook(name: str, text: str) -> Check:
    """Check that all code cells of a notebook were executed without an error, and that there are outputs."""
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code" and cell["source"]]
        executed = [cell for cell in cells if cell["execution_count"]]
        outputs = [output["output_type"] for cell in cells for output in cell["outputs"]]
    except (ValueError, KeyError, TypeError):
        return Check("The notebook has been executed", False, f"{name} is not a notebook")
    evidence = f"{len(executed)} of {count(len(cells), 'code cell')} executed"
    problem = "no outputs" if not outputs else "an output is an error" if "error" in outputs else ""
    is_met = executed == cells and not problem
    return Check("The notebook has been executed", is_met, f"{name}: {problem or evidence}")


def read_prefect(url: str, kind: str, **filters: Any) -> list[dict[str, Any]]:
    """Return the objects of a kind, such as `flow_runs`, that match the filters."""
    response = requests.post(f"{url}/api/{kind}/filter", json=filters, timeout=TIMEOUT_SECONDS)
    response.raise_for_status()
    objects: list[dict[str, Any]] = response.json()
    return objects


def grade_prefect(url: str) -> tuple[list[Check], dict[str, Any] | None]:
    """Check the flow runs, and return the checks and the newest completed run."""
    names = {"flows": {"name": {"any_": [FLOW, FLOW.replace("_", "-")]}}}
    runs = [run for run in read_prefect(url, "flow_runs", **names, sort="START_TIME_DESC") if run["start_time"]]
    completed = [run for run in runs if run["state_name"] == "Completed"]  # not those with a name such as Cached
    named = completed[:1] + [run for run in runs[:1] if run not in completed]
    evidence = "; the newest is ".join(f"{run['name']}: {run['state_name']}" for run in named)
    check = Check("A flow run has completed", bool(completed), evidence or f"no run of {FLOW} was started")
    if not completed:
        return [check, Check("The tasks form one chain", False, "no completed flow run")], None
    tasks = read_prefect(url, "task_runs", flow_runs={"id": {"any_": [completed[0]["id"]]}})
    return [check, check_chain(tasks)], completed[0]


def check_chain(tasks: list[dict[str, Any]]) -> Check:
    """Check that each step depends on the previous one, and that every task is connected."""
    before = {
        task["id"]: {each["id"] for inputs in task["task_inputs"].values() for each in inputs if "id" in each}
        for task in tasks
    }
    step_of = {task["id"]: find_step(task["name"]) for task in tasks}
    gaps = []
    for first, second in pairwise(STEPS):
        earlier, later = ({run for run, step in step_of.items() if step == name} for name in (first, second))
        if not later or any(not earlier & find_ancestors(run, before) for run in later):
            gaps.append(f"{second} does not depend on {first}")
    linked = set().union(*before.values()) | {run for run in before if before[run]}
    gaps += [
        f"{task['name']} is not connected" for task in tasks if not step_of[task["id"]] and task["id"] not in linked
    ]
    return Check("The tasks form one chain", not gaps, ", ".join(gaps) or " > ".join(STEPS))


def find_ancestors(run: str, before: dict[str, set[str]]) -> set[str]:
    """Return the ids of all task runs that a task run depends on."""
    ancestors: set[str] = set()
    new = before[run]
    while new:
        ancestors |= new
        new = set().union(*(before.get(each, set()) for each in new)) - ancestors
    return ancestors


def find_runs(client: MlflowClient, flow_run: dict[str, Any] | None) -> list[Run]:
    """Return the MLflow runs active during a flow run, without child runs; the newest run if there is no flow run."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    newest = client.search_runs(experiments, order_by=["attributes.start_time DESC"], max_results=MAX_RUNS)
    runs = [run for run in newest if "mlflow.parentRunId" not in run.data.tags]
    if flow_run is None:
        return runs[:1]
    start, end = (1000 * datetime.fromisoformat(flow_run[f"{name}_time"]).timestamp() for name in ("start", "end"))
    return [run for run in runs if run.info.start_time <= end and (run.info.end_time or run.info.start_time) >= start]


def grade_mlflow(client: MlflowClient, flow_run: dict[str, Any] | None) -> Iterator[Check]:
    """Yield the criteria for the MLflow run; if there are several, for the one with the most metrics."""
    runs = find_runs(client, flow_run)
    lines = [f"{run.info.run_name}: {run.info.status}, by {run.data.tags.get('mlflow.source.name')}" for run in runs]
    evidence = "; ".join(lines) or "no run"
    is_one = flow_run is not None and [run.info.status for run in runs] == ["FINISHED"]
    yield Check("The flow run created one finished MLflow run", is_one, evidence)
    run = max(runs, key=lambda run: len(run.data.metrics), default=None)
    experiment = client.get_experiment(run.info.experiment_id).name if run else "no run"
    yield Check("The run is not in the Default experiment", bool(run) and experiment != "Default", experiment)
    parameters, metrics = (run.data.params, run.data.metrics) if run else ({}, {})
    for criterion, names in (
        ("Epochs and batch size are logged", {"epochs": "epochs", "batch size": "batch_size"}),
        ("Keras's parameters are autologged", OPTIMIZER),
    ):
        yield check_names(criterion, names, parameters)
    yield check_epochs(client, run)
    yield check_names("System metrics are logged", {"system metrics": "system/.*"}, metrics)
    yield check_names("Test metrics are logged", TEST_METRICS, metrics)
    files = list(list_artifacts(client, run)) if run else []
    weights = [file for file in files if file.endswith(WEIGHTS)]
    yield Check("The weights are an artifact", bool(weights), ", ".join(weights or files) or "no artifacts")
    versions = client.search_model_versions(f"run_id='{run.info.run_id}'") if run else []
    evidence = ", ".join(f"{version.name} version {version.version}" for version in versions)
    yield Check("The model is registered", bool(versions), evidence or "this run registered no version")


def check_names(criterion: str, patterns: dict[str, str], values: dict[str, Any]) -> Check:
    """Check that each pattern matches a parameter or metric. Autologging logs None for an unknown batch size."""
    logged = {name: value for name, value in values.items() if value != "None"}
    matches = {words: [name for name in logged if re.fullmatch(patterns[words], name)][:1] for words in patterns}
    missing = [f"no {words}" for words, names in matches.items() if not names]
    matching = [(name, logged[name]) for names in matches.values() for name in names]
    evidence = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in matching]
    return Check(criterion, not missing, ", ".join(missing or evidence))


def check_epochs(client: MlflowClient, run: Run | None) -> Check:
    """Check that loss, accuracy and their validation values are logged for each epoch, or until early stopping."""
    criterion = "Loss and accuracy are logged per epoch"
    if run is None:
        return Check(criterion, False, "no run")
    epochs, metrics = run.data.params.get("epochs"), run.data.metrics
    accuracy = next(
        (name for name in metrics if re.fullmatch("((sparse_)?categorical_|binary_)?acc(uracy)?", name)), "accuracy"
    )
    counts = {name: len(client.get_metric_history(run.info.run_id, name)) for name in ("loss", accuracy)}
    counts |= {f"val_{name}": len(client.get_metric_history(run.info.run_id, f"val_{name}")) for name in counts}
    expected = counts["loss"] if counts["loss"] and "stopped_epoch" in metrics else epochs
    wrong = [f"{name} has {count(number, 'value')}" for name, number in counts.items() if str(number) != str(expected)]
    evidence = f"{', '.join(wrong)}; epochs {epochs}" if wrong else f"{expected} values of {', '.join(counts)}"
    return Check(criterion, not wrong, evidence)


def list_artifacts(client: MlflowClient, run: Run, folder: str | None = None) -> Iterator[str]:
    """Yield the paths of a run's artifacts."""
    for artifact in client.list_artifacts(run.info.run_id, folder):
        if artifact.is_dir:
            yield from list_artifacts(client, run, artifact.path)
        else:
            yield artifact.path


def check_server(url: str, health: str, pattern: str) -> bool:
    """Return whether the expected server responds."""
    try:
        response = requests.get(f"{url}/{health}", timeout=TIMEOUT_SECONDS)
    except requests.RequestException:
        return False
    return response.ok and re.fullmatch(pattern, response.text.strip()) is not None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("repository", type=Path, help="folder with the solution")
    parser.add_argument("--prefect", default=settings.prefect_url, help="URL of the solution's Prefect server")
    parser.add_argument("--mlflow", default=settings.mlflow_url, help="URL of the solution's MLflow server")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    return parser.parse_args()


def grade(folder: Path, prefect_url: str, mlflow_url: str) -> list[Check]:
    """Return all criteria, in the order of the lab.

    Raises:
        WorkflowError: the folder does not exist or has no Python files, or a server does not respond
    """
    if not folder.is_dir():
        raise WorkflowError(f"{folder} is not a folder; pass the folder of the solution")
    files = list(list_files(folder))
    modules = read_modules(folder, files)
    if not modules:
        raise WorkflowError(f"{folder} has no Python files; pass the folder of the solution")
    for name, url, health, pattern in (
        ("Prefect", prefect_url, "api/health", "true"),
        ("MLflow", mlflow_url, "version", r"\d+\.\d+.*"),
    ):
        if not check_server(url, health, pattern):
            raise WorkflowError(f"no {name} server responds at {url}; start one, or use --{name.lower()} URL")
    in_prefect, flow_run = grade_prefect(prefect_url)
    in_mlflow = grade_mlflow(MlflowClient(mlflow_url), flow_run)
    return [*grade_source(modules), *grade_files(folder, files), *in_prefect, *in_mlflow]


def print_table(checks: list[Check]) -> None:
    """Print a line per criterion."""
    width = max(len(check.criterion) for check in checks)
    for check in checks:
        print(f"{'met' if check.is_met else 'not met':7}  {check.criterion:{width}}  {printable(check.evidence)}")
    print(f"{sum(check.is_met for check in checks)} of {len(checks)} criteria are met")


def main() -> None:
    with command_line("grade.py"):
        arguments = parse_arguments()
        urls = [url.rstrip("/").removesuffix("/api") for url in (arguments.prefect, arguments.mlflow)]
        try:
            checks = grade(arguments.repository, *urls)
        except (WorkflowError, MlflowException, OSError) as error:  # OSError: requests, and files that cannot be read
            print(f"grade.py: {first_line(error)}", file=sys.stderr)
            sys.exit(2)
        if arguments.json:
            print(json.dumps([check._asdict() for check in checks], indent=2))
        else:
            print_table(checks)
        sys.exit(not all(check.is_met for check in checks))


if __name__ == "__main__":
    main()
