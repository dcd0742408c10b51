"""Runs notebooks. `python tests/notebooks.py` runs that of the scripts, and writes its outputs into it."""

import hashlib
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "scripts" / "importance_sampling.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Of all code, so that it is seen whether outputs are of an older one."""
    return hashlib.sha256("\n".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()[:16]


def execute(notebook, folder, **parameters):
    """A copy with the outputs of a run in a folder, where its temporary files are, too.

    Parameters are assigned after the cell with that tag, in a cell that the copy does not have.
    """
    notebook = deepcopy(notebook)
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    tagged = [place for place, cell in enumerate(notebook.cells, 1) if "parameters" in cell.metadata.get("tags", ())]
    if parameters:
        notebook.cells.insert(*tagged, given)
    client = NotebookClient(
        notebook,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    ours = {"TMPDIR": str(folder), "IPYTHONDIR": str(folder), "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env={**os.environ, **ours})
    notebook.cells = [cell for cell in notebook.cells if cell is not given]
    notebook.metadata = {"digest": digest(notebook), "kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(read(), folder), NOTEBOOK)
