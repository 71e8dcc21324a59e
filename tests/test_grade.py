"""grade.py on a student's solution, on the same solution with defects, and on misuse; real servers, real runs."""

import json
import re
import shutil
import sqlite3
from contextlib import closing

import grade
from support.images import ImageServer, closing_server
from support.project import PROJECT, Project

import pytest
import requests

STUDENT = PROJECT / "tests/student"
REQUIREMENTS = (STUDENT / "requirements.txt").read_text()
AUTOLOG = "    mlflow.keras.autolog(log_models=False, log_datasets=False)\n"
DEFECTS = (  # old and new code, and the criteria that the solution no longer meets
    ("(wait_for=[downloaded])", "()", {"The tasks form one chain"}),
    (f"test):\n{AUTOLOG}", "test):\n", {"Autologging in evaluate"}),
    ('"batch_size": BATCH_SIZE', "", {"Epochs and batch size are logged"}),
    ("images.batch(BATCH_SIZE)", "images.batch(BATCH_SIZE).prefetch(1)", set()),  # autologging cannot see the size
    ("mlflow.enable_system", "mlflow.disable_system", {"System metrics are logged"}),
    ('    mlflow.log_artifact("fruit.weights.h5", "weights")\n', "", {"The weights are an artifact"}),
    ("        register_model(model_file)\n", "", {"The model is registered"}),
)


class Student:
    """A student's solution and servers."""

    def __init__(self, project: Project, images: str):
        self.project, self.images = project, images
        self.prefect = f"http://127.0.0.1:{project.prefect_port}"
        self.mlflow = f"http://127.0.0.1:{project.mlflow_port}"

    def run(self, name: str, defects: tuple = ()):
        """Run the solution with the defects, and return its repository."""
        folder = shutil.copytree(STUDENT, self.project.folder / name)
        script = folder / "ml_workflow.py"
        for old, new, _ in defects:
            assert script.read_text().count(old) == 1, old
            script.write_text(script.read_text().replace(old, new))
        settings = {"MLFLOW_TRACKING_URI": self.mlflow, "PREFECT_API_URL": f"{self.prefect}/api", "IMAGES": self.images}
        end = self.project.execute(["bash", "-c", f"cd {name} && python ml_workflow.py"], **settings)
        assert end.returncode == 0, end.stderr
        return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory, photos, databases):
    project = Project(tmp_path_factory.mktemp("student"), databases)
    with project.prefect_server(), project.mlflow_server(), closing_server(ImageServer(photos)) as images:
        yield Student(project, images.url)


@pytest.fixture
def call_grade(monkeypatch, capsys):
    """A function that calls the program, and returns its exit status and output."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["grade.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            grade.main()
        return (end.value.code, *capsys.readouterr())

    return call


def fail_flow_run(prefect: str) -> str:
    """Add a failed run of the newest flow to Prefect, and return its name."""
    flow = requests.post(f"{prefect}/api/flows/filter", json={}, timeout=30).json()[0]["id"]
    run = requests.post(
        f"{prefect}/api/flow_runs/", json={"flow_id": flow, "state": {"type": "RUNNING"}}, timeout=30
    ).json()
    url, state = f"{prefect}/api/flow_runs/{run['id']}/set_state", {"type": "FAILED", "name": "Failed"}
    requests.post(url, json={"state": state, "force": True}, timeout=30).raise_for_status()
    return run["name"]


def dump(project: Project) -> list[str]:
    with closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        return list(database.iterdump())


@pytest.mark.slow
def test_minimal_solution_meets_all_criteria(student, call_grade):
    folder = student.run("complete")
    before = dump(student.project)
    status, out, _ = call_grade(folder, "--prefect", student.prefect, "--mlflow", student.mlflow)
    assert (status, "not met" in out) == (0, False), out
    assert "3 values of loss, accuracy, val_loss, val_accuracy" in out
    assert "weights/fruit.weights.h5" in out
    assert "FINISHED, by ml_workflow.py" in out
    assert dump(student.project) == before


@pytest.mark.slow
def test_each_of_six_defects_is_named(student, call_grade):
    folder = student.run("defective", DEFECTS)
    failed = fail_flow_run(student.prefect)
    addresses = ("--prefect", f"{student.prefect}/api/", "--mlflow", student.mlflow)
    status, out, _ = call_grade(folder, *addresses, "--json")
    checks = {check["criterion"]: check for check in json.loads(out)}
    unmet = {criterion for criterion, check in checks.items() if not check["is_met"]}
    assert status == 1
    assert unmet == set().union(*(criteria for *_, criteria in DEFECTS))
    assert f"{failed}: Failed" in checks["A flow run has completed"]["evidence"]
    assert checks["Epochs and batch size are logged"]["evidence"] == "no batch size"


def unmet_in_source(tmp_path, *changes: tuple[str, str]) -> set[str]:
    """Return the unmet criteria of the solution's source after these replacements."""
    code = (STUDENT / "ml_workflow.py").read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "ml_workflow.py").write_text(code)
    modules = grade.read_modules(tmp_path, [tmp_path / "ml_workflow.py"])
    return {check.criterion for check in grade.grade_source(modules) if not check.is_met}


READ = 'read("train"), read("validation"), read("test")'
RETURNED = f"    return {READ}"
PREPARE = ("def build_network", f"def prepare():\n{AUTOLOG}\n\ndef build_network")
FIT = "    model.fit(train, validation_data=validation, epochs=EPOCHS, verbose=0)\n"
REGISTER = ("    mlflow.register_model(logged.model_uri, EXPERIMENT)\n", "")


@pytest.mark.parametrize(
    "changes",
    [
        [(AUTOLOG, ""), ("    mlflow.set_experiment", "    mlflow.autolog()\n    mlflow.set_experiment")],
        [('@flow(name="ml_workflow")', "@flow")],  # Prefect names it ml-workflow
        [("def train_model(", "async def train_model(")],
        [("def train_model(train, validation)", 'def train_model(train, validation, epochs=3, *, rate=0.1) -> "str"')],
        [("@task(cache_policy=NO_CACHE)\ndef download_data", '@task(name="Download data")\ndef get')],
        [("TRACKING_URI", "MLFLOW_SERVER")],
        [(RETURNED, f"    result = {READ}\n    return result")],
        [(RETURNED, f"    return [{READ}]")],
        [("def preprocess_data():", "def preprocess_data() -> tuple[object, ...]:")],
        [("MODEL_FILE\n", "MODEL_FILE\n\n    def pair():\n        return 1, 2\n")],
        [("path.write_bytes(response.content)", "path.write_bytes(response.content)\n    return None")],
        [(AUTOLOG, ""), ("    with mlflow.start_run", "    prepare()\n    with mlflow.start_run"), PREPARE],
        [(AUTOLOG, ""), ("    ml_workflow()\n", "    prepare()\n    ml_workflow()\n"), PREPARE],
        [
            ("import mlflow\n", "import mlflow\nfrom mlflow import set_experiment as choose\n"),
            ("mlflow.set_experiment", "choose"),
        ],
        [("import mlflow\n", "import mlflow as ml\n"), ("mlflow.", "ml.")],
        [(", pip_requirements", ", registered_model_name=EXPERIMENT, pip_requirements"), REGISTER],
    ],
)
def test_other_ways_to_write_it_are_accepted(tmp_path, changes):
    assert unmet_in_source(tmp_path, *changes) == set()


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        (("datasets=False)", "datasets=False, disable=True)"), "Autologging in train"),
        (
            ("def train_model(train, validation)", "def train_model(train)"),
            "The tasks have the lab's inputs and outputs",
        ),
        (('read("train"), ', ""), "The tasks have the lab's inputs and outputs"),
        (("def evaluate_model", "def assess_model"), "Each step is a task"),
        (('EXPERIMENT = "fruit"', 'FRUIT = "fruit"'), "Tracking URI and experiment are constants"),
        (("mlflow.set_tracking_uri(TRACKING_URI)", "pass"), "mlflow.set_tracking_uri() is called"),
        (('name="ml_workflow"', 'name="fruit"'), "A flow is named ml_workflow"),
        (("import os", "import os os"), "A flow is named ml_workflow"),
        (REGISTER, "mlflow.register_model() is called"),
        (
            ("set_tracking_uri(TRACKING_URI)", 'set_tracking_uri("http://host")'),
            "Tracking URI and experiment are constants",
        ),
        (("set_experiment(EXPERIMENT)", 'set_experiment("fruit")'), "Tracking URI and experiment are constants"),
        ((f"validation):\n{AUTOLOG}", "validation):\n"), "Autologging in train"),
        ((f"test):\n{AUTOLOG}", f"test):\n    def unused():\n    {AUTOLOG}\n"), "Autologging in evaluate"),
    ],
)
def test_defect_in_the_source_is_named(tmp_path, change, criterion):
    assert criterion in unmet_in_source(tmp_path, change)


@pytest.mark.parametrize(
    "changes",
    [
        [(AUTOLOG, ""), PREPARE],  # which nothing calls
        [(AUTOLOG, ""), (FIT, FIT + AUTOLOG)],
        [(AUTOLOG, ""), ("    ml_workflow()\n", f"    ml_workflow()\n{AUTOLOG}")],
        [(AUTOLOG, ""), ("        evaluate_model(", f"    {AUTOLOG}        evaluate_model(")],
    ],
)
def test_autologging_that_training_does_not_reach(tmp_path, changes):
    assert "Autologging in train" in unmet_in_source(tmp_path, *changes)


def test_evidence_for_an_empty_script(tmp_path):
    (tmp_path / "main.py").touch()
    checks = list(grade.grade_source(grade.read_modules(tmp_path, [tmp_path / "main.py"])))
    assert [check.criterion for check in checks if check.is_met] == []
    assert not any(re.search(r"\b0\b", check.evidence) for check in checks)


def test_script_is_the_file_with_the_most_steps(tmp_path):
    (tmp_path / "draft.py").write_text('@flow(name="ml_workflow")\ndef main():\n    pass\n')
    shutil.copy(STUDENT / "ml_workflow.py", tmp_path)
    modules = grade.read_modules(tmp_path, sorted(tmp_path.iterdir()))
    assert [check for check in grade.grade_source(modules) if not check.is_met] == []


def grade_files(tmp_path, name: str, content: str | bytes) -> dict[str, grade.Check]:
    """Return the checks of the solution's files after one is replaced."""
    folder = shutil.copytree(STUDENT, tmp_path / "solution")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "my runs.png").touch()
    return {check.criterion: check for check in grade.grade_files(folder, list(grade.list_files(folder)))}


def make_notebook(*outputs: dict) -> str:
    cell = {"cell_type": "code", "execution_count": 1, "source": ["1"], "outputs": outputs}
    return json.dumps({"cells": [cell]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("requirements.txt", REQUIREMENTS.encode("utf-16")),  # from PowerShell
        ("requirements.txt", f"# packages\n{REQUIREMENTS}".replace("\n", "  # newest\n")),
        (".gitignore", "**/venv/\nprefect_home/*\nmlruns/**\n/mlartifacts/\n"),
        (".gitignore", ".venv/\nprefect_home\n**/mlruns/**\nmlart*/\n"),
        ("lab_report.md", '![runs](runs.png "The runs")'),
        ("lab_report.md", '<img width="500" src="runs.png">'),
        ("lab_report.md", "![runs](my%20runs.png)"),
        ("lab_report.md", "![runs](<my runs.png>)"),
        ("lab_report.md", "![runs](./runs.png?raw=true)"),
        ("REPORT.MD", "![runs](runs.png)\n![runs](runs.png)\n"),
    ],
)
def test_other_ways_to_write_files_are_accepted(tmp_path, name, content):
    assert [check for check in grade_files(tmp_path, name, content).values() if not check.is_met] == []


@pytest.mark.parametrize(
    ("name", "content", "criterion", "evidence"),
    [
        ("requirements.txt", f"# {' '.join(REQUIREMENTS.split())}", "requirements.txt lists the packages", "Prefect"),
        (".gitignore", "# venv\n.mlruns\nvenv.py", ".gitignore lists generated files", "venv is missing, prefect_home"),
        ("notebook.ipynb", make_notebook(), "The notebook has been executed", "no outputs"),
        ("notebook.ipynb", make_notebook({"output_type": "error"}), "The notebook has been executed", "error"),
        ("lab_report.md", "![built](build.svg)", "A report in Markdown has screenshots", "no pictures"),
        ("lab_report.md", "![](https://host/badge/x.png)", "A report in Markdown has screenshots", "no pictures"),
        ("lab_report.md", '<img src="absent.png">', "A report in Markdown has screenshots", "absent.png"),
    ],
)
def test_defect_in_a_file_is_named(tmp_path, name, content, criterion, evidence):
    check = grade_files(tmp_path, name, content)[criterion]
    assert (check.is_met, evidence in check.evidence) == (False, True), check.evidence


@pytest.mark.parametrize(("name", "is_test"), [("test_loss", True), ("loss_test", True), ("val_loss", False)])
def test_names_of_test_metrics(name, is_test):
    check = grade.check_names("", grade.TEST_METRICS, {name: 0.5, name.replace("loss", "accuracy"): 0.5})
    assert (check.is_met, "no test accuracy" in check.evidence) == (is_test, not is_test)


def test_whole_models_are_not_weights():
    assert [name.endswith(grade.WEIGHTS) for name in ("fruit.keras", "fruit.weights.h5")] == [False, True]


def test_only_files_of_the_solution_are_graded(tmp_path):
    (tmp_path / "mlartifacts").mkdir()
    shutil.copy(grade.__file__, tmp_path / "mlartifacts/copied.py")
    (tmp_path / "grade.py").symlink_to(grade.__file__)
    (tmp_path / "broken.py").symlink_to(tmp_path / "absent.py")
    shutil.copy(STUDENT / "ml_workflow.py", tmp_path)
    assert list(grade.list_files(tmp_path)) == [tmp_path / "ml_workflow.py"]


@pytest.mark.parametrize("given", ["no folder", "no Prefect", "another program"])
def test_misuse_ends_with_status_2_in_one_line(call_grade, tmp_path, image_server, unused_port, given):
    folder = tmp_path / "absent" if given == "no folder" else STUDENT
    url = image_server.url if given == "another program" else f"http://127.0.0.1:{unused_port}"
    status, out, err = call_grade(folder, "--prefect", url)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert (str(folder) if given == "no folder" else url) in err
