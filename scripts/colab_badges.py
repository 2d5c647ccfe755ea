"""Give the notebooks a badge that opens them in Colab, and a first cell that installs BLIPren there.

    python scripts/colab_badges.py OWNER/REPOSITORY

The address of the repository on GitHub is an argument, so that a fork's badges open the fork. Run again, it replaces both.
"""

import argparse
import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BADGE = re.compile(r"^\[!\[Open in Colab\].*\n\n")


def add_badge(path: Path, repository: str) -> None:
    """Write badge and install cell into a notebook. The cell does nothing where BLIPren is installed."""
    notebook = nbformat.read(path, as_version=4)
    address = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{path.name}"
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})\n\n"
    first = notebook.cells[0]
    first.source = badge + BADGE.sub("", first.source)
    install = new_code_cell(
        "from importlib.util import find_spec\n\n"
        'if find_spec("blipren") is None:\n'
        f'    %pip install -q "blipren[trl] @ git+https://github.com/{repository}"',
        id="install",
    )
    notebook.cells = [first, install, *(cell for cell in notebook.cells[1:] if cell.id != "install")]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="OWNER/REPOSITORY on GitHub")
    repository = parser.parse_args().repository
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        add_badge(notebook, repository)
        print(f"{notebook.name} opens from {repository}")
