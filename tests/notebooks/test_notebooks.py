"""Every notebook runs from top to bottom at small size, those in the repository keep their outputs, badges open them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURES = {"attention-and-failures": "worst.png", "quickstart": "attention.png", "your-photos": "report/samples.png"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_its_outputs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in kept if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in kept) >= 3
    assert all(cell["execution_count"] for cell in notebook.cells if cell["cell_type"] == "code")
    for name, value in {"SCENES": "24", "STEPS": "2", "WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    if path.stem in PICTURES:
        assert (tmp_path / "work" / PICTURES[path.stem]).is_file()


def test_badges_open_the_notebooks_of_a_repository(tmp_path):
    for folder in ("notebooks", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for repository in ("someone/else", "owner/project"):  # again: replaced
        command = [sys.executable, str(tmp_path / "scripts" / "colab_badges.py"), repository]
        subprocess.run(command, check=True, capture_output=True)
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        first, second = ("".join(cell["source"]) for cell in cells[:2])
        assert first.startswith("[![Open in Colab](") and "someone" not in first + second
        assert f"](https://colab.research.google.com/github/owner/project/blob/main/notebooks/{path.name})" in first
        assert "git+https://github.com/owner/project" in second
        assert len(cells) == len(json.loads((ROOT / "notebooks" / path.name).read_text())["cells"]) + 1
