"""The committed notebook: complete outputs that match the code, and no traces of the machine that ran it."""

import re

import ml_workflow
from make_docs import NOTEBOOK, execute, normalize, sources_digest
from support.project import PROJECT
from workflow.model import head

import nbformat
import pytest

REMEDY = "run `python tests/make_docs.py notebook`"
SHOWS = r"print\(|display\(|Picture\(|plt\.|pd\.|\.summary\(|\.rename\(|\.reset_index\("  # such a cell has output


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def normalize_outputs(cell) -> list[tuple]:
    """Return the outputs of a cell without values that differ from run to run."""
    return [
        (output.output_type, sorted(output.get("data", {})), normalize(output.get("text") or output.data["text/plain"]))
        for output in cell.outputs
    ]


def texts(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(output.get("text") or output.data["text/plain"] for output in outputs)


def test_notebook_has_all_its_outputs(notebook):
    assert notebook.metadata.executed == sources_digest(notebook), REMEDY
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), REMEDY
    for cell in cells:
        assert bool(cell.outputs) == bool(re.search(SHOWS, cell.source)), cell.source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.source


def test_notebook_shows_the_current_constants_and_network(notebook):
    shown = texts(notebook)
    for name in ("BACKBONE", "BATCH_SIZE", "EPOCHS", "LEARNING_RATE", "DROPOUT", "SEED"):
        assert re.search(rf"{name} +{re.escape(str(getattr(ml_workflow, name)))}$", shown, re.MULTILINE), REMEDY
    model = head.build_head(2, ml_workflow.DROPOUT)
    assert f"{model.count_params():,}" in shown, REMEDY
    assert all(type(layer).__name__ in shown for layer in model.layers), REMEDY


def test_notebook_contains_no_machine_path(notebook):
    assert not re.search(r"(/(home|root|tmp|Users|var)/|[A-Z]:\\\\)", texts(notebook))
    assert str(PROJECT) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_executed_notebook_has_the_committed_kinds_of_output(notebook, tmp_path):
    committed = [normalize_outputs(cell) for cell in code_cells(notebook)]
    executed = [normalize_outputs(cell) for cell in code_cells(execute(notebook, tmp_path))]
    assert executed == committed
