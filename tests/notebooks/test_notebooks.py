"""Every notebook runs from top to bottom at small size, and the one in the repository keeps its outputs."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_its_outputs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in kept if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in kept) >= 3
    for name, value in {"SCENES": "24", "STEPS": "2", "WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "work" / "attention.png").is_file()
