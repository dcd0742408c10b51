"""Runs notebooks.

`python tests/command_line/notebooks.py` runs the notebook in `scripts` and saves it with its outputs.
"""

import hashlib
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "importance_sampling.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Digest of the code. Outputs are outdated if the digest in the metadata differs."""
    return hashlib.sha256("\n".join(cell.source for cell in code_cells(notebook)).encode()).hexdigest()[:16]


def execute(notebook, folder, **parameters):
    """Run a copy of a notebook in a folder, which also holds temporary files, and return it with its outputs.

    Parameters are assigned in a cell that is inserted after the one tagged `parameters`, and removed after the run.
    """
    notebook = deepcopy(notebook)
    assignments = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    tagged = [place for place, cell in enumerate(notebook.cells, 1) if "parameters" in cell.metadata.get("tags", ())]
    if parameters:
        notebook.cells.insert(*tagged, assignments)
    client = NotebookClient(
        notebook,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    variables = {"TMPDIR": str(folder), "IPYTHONDIR": str(folder), "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env={**os.environ, **variables})
    notebook.cells = [cell for cell in notebook.cells if cell is not assignments]
    notebook.metadata = {"digest": digest(notebook), "kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(read(), folder), NOTEBOOK)
