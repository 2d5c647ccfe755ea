"""What every test may use: the shared real data, where it is present."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the real Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tiny_models: helpers, not tests
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("BLIPREN_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data():
    """Function from a folder name of the shared real data to its path; skips the test where it is absent."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"real data {name!r} is not in {SHARED_DATA} (set BLIPREN_SHARED_DATA to its folder)")
        return path

    return find


LONG_FILES = ("tests/notebooks", "tests/test_readme.py", "tests/stages", "tests/commands/test_screen.py", "tests/demo")


def pytest_collection_modifyitems(items):
    """Put the files of minutes first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FILES))
