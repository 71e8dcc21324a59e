"""grade.py on a student's solution, on the same solution with defects, and on misuse; real servers, real runs."""

import json
import shutil
import sqlite3
from contextlib import closing

import grade
from support.images import ImageServer, closing_server
from support.project import PROJECT, Project

import pytest

STUDENT = PROJECT / "tests/student"
AUTOLOG = "    mlflow.keras.autolog(log_models=False, log_datasets=False)\n"
DEFECTS = (  # old and new code, and the criteria that the solution no longer meets
    ("(wait_for=[downloaded])", "()", {"The tasks are one chain"}),
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
def student(tmp_path_factory, photos):
    project = Project(tmp_path_factory.mktemp("student"))
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


def dump(project: Project) -> list[str]:
    with closing(sqlite3.connect(project.folder / "mlflow.db")) as database:
        return list(database.iterdump())


def test_minimal_solution_meets_all_criteria(student, call_grade):
    folder = student.run("complete")
    before = dump(student.project)
    status, out, _ = call_grade(folder, "--prefect", student.prefect, "--mlflow", student.mlflow)
    assert (status, "not met" in out) == (0, False), out
    assert "3 values of loss, accuracy, val_loss, val_accuracy" in out
    assert "weights/fruit.weights.h5" in out
    assert dump(student.project) == before


def test_each_of_six_defects_is_named(student, call_grade):
    folder = student.run("defective", DEFECTS)
    addresses = ("--prefect", f"{student.prefect}/api/", "--mlflow", student.mlflow)
    status, out, _ = call_grade(folder, *addresses, "--json")
    unmet = {check["criterion"] for check in json.loads(out) if not check["is_met"]}
    assert status == 1
    assert unmet == set().union(*(criteria for *_, criteria in DEFECTS))


def unmet_in_source(tmp_path, *changes: tuple[str, str]) -> set[str]:
    """Return the unmet criteria of the solution's source after these replacements."""
    code = (STUDENT / "ml_workflow.py").read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "ml_workflow.py").write_text(code)
    modules = grade.read_modules(tmp_path, [tmp_path / "ml_workflow.py"])
    return {check.criterion for check in grade.grade_source(modules) if not check.is_met}


@pytest.mark.parametrize(
    "changes",
    [
        [(AUTOLOG, ""), ("    mlflow.set_experiment", "    mlflow.autolog()\n    mlflow.set_experiment")],
        [('@flow(name="ml_workflow")', "@flow")],  # Prefect names it ml-workflow
        [("def train_model(", "async def train_model(")],
        [("def train_model(train, validation)", 'def train_model(train, validation, epochs=3, *, rate=0.1) -> "str"')],
        [("@task(cache_policy=NO_CACHE)\ndef download_data", '@task(name="Download data")\ndef get')],
        [("TRACKING_URI", "MLFLOW_SERVER")],
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
    ],
)
def test_defect_in_the_source_is_named(tmp_path, change, criterion):
    assert criterion in unmet_in_source(tmp_path, change)


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
