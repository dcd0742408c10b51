"""The results of the notebook, and whether its committed outputs are complete and up to date."""

import re
from copy import deepcopy

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from notebooks import KERNEL, NOTEBOOK, code_cells, digest, execute, read

MAX_BYTES = 500_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|Users|var|work|usr)/|[A-Z]:\\\\")


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The notebook after a short run."""
    return execute(read(), tmp_path_factory.mktemp("notebook"), SEEDS=(1,), EPOCHS=6)


@pytest.fixture(params=["short run", "committed"])
def notebook(request):
    return request.getfixturevalue("short_run") if request.param == "short run" else read()


def table(notebook, column):
    """Rows of the first table with this column, as lists of cells that start with the name of the row."""
    texts = [out.data["text/plain"] for cell in code_cells(notebook) for out in cell.outputs if "data" in out]
    lines = next(text.splitlines() for text in texts if column in text.splitlines()[0])
    return [re.split(r"  +", line.strip()) for line in lines[1:] if re.search(r"  \d", line)]


# ---- results ---------------------------------------------------------------------------------------------------------


def test_training_ends_early_and_the_short_baseline_has_as_many_steps(notebook):
    rows = {name: int(steps.split()[0]) for name, steps, *_ in table(notebook, "steps")}
    assert list(rows) == ["Trainer", "ImportanceTrainer", "Trainer, as few steps"]
    assert rows["ImportanceTrainer"] == rows["Trainer, as few steps"] < rows["Trainer"]


def test_most_flipped_labels_are_suspects(notebook):
    for row in table(notebook, "suspects that were flipped"):
        _, flipped, suspects, found = map(int, row)
        assert flipped == 71, "5 % of 1,437"
        assert found > flipped / 2
        assert found > suspects / 2, "by chance it would be 5 %"


def test_failing_cells_raise(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise ValueError('failed')")])
    with pytest.raises(CellExecutionError, match="raise ValueError"):
        execute(broken, tmp_path)


# ---- committed outputs -----------------------------------------------------------------------------------------------


def kinds(cell):
    """MIME types of the outputs of a cell, or names of their streams."""
    return [kind for out in cell.outputs for kind in sorted(out.get("data", ())) or [out.get("name")]]


def faults(notebook, short_run):
    """Faults of a notebook with its outputs, compared with a short run."""
    if notebook.metadata != {"digest": digest(notebook), "kernelspec": KERNEL, "language_info": {"name": "python"}}:
        yield "the code was changed, or the metadata has further entries: run python tests/command_line/notebooks.py"
    for number, (cell, run) in enumerate(zip(code_cells(notebook), code_cells(short_run), strict=True), 1):
        if cell.execution_count != number:
            yield f"cell {number} was run as number {cell.execution_count}"
        if any(out.output_type == "error" for out in cell.outputs):
            yield f"cell {number} failed"
        elif kinds(cell) != kinds(run):
            yield f"cell {number} shows {kinds(cell)}, but a run shows {kinds(run)}"
        if any(out.get("name") == "stderr" for out in cell.outputs):
            yield f"cell {number} writes to stderr"
        if cell.metadata.keys() - {"tags"}:
            yield f"cell {number} has metadata other than tags"
    if found := ABSOLUTE_PATH.search(nbformat.writes(notebook)):
        yield f"contains a path: {found.group()}"


def test_committed_outputs_are_complete(short_run):
    assert list(faults(read(), short_run)) == []
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    shown = [kind for cell in code_cells(read()) for kind in kinds(cell)]
    assert shown.count("image/png") >= 6
    assert shown.count("text/html") >= 3


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda cells: cells[3].outputs.clear(), r"shows \[\]"),
        (lambda cells: cells[2].update(execution_count=7), "cell 3 was run as number 7"),
        (lambda cells: cells[4].outputs.append(nbformat.v4.new_output("error", ename="E")), "failed"),
        (lambda cells: cells[1].outputs[0].update(name="stderr"), "writes to stderr"),
        (lambda cells: cells[1].outputs[0].update(text="/home/someone/run"), "contains a path: /home/"),
        (lambda cells: cells[1].update(source="pass"), "the code was changed"),
        (lambda cells: cells[1].metadata.update(execution={}), "metadata other than tags"),
    ],
    ids=["no output", "other order", "error", "warning", "path", "changed code", "metadata"],
)
def test_faults_are_found(short_run, change, fault):
    notebook = deepcopy(read())
    change(code_cells(notebook))
    assert any(re.search(fault, found) for found in faults(notebook, short_run))
