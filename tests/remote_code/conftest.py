"""The loopback Hub, from which a process without our package loads a checkpoint, and a tiny checkpoint and photo."""

import pytest

from tests.hub.conftest import hub  # noqa: F401
from tests.hub.tiny import picture, write_llm, write_model, write_vision


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return write_vision(root / "vision"), write_llm(root / "llm")


@pytest.fixture(scope="session")
def full(bases, tmp_path_factory):
    """A full checkpoint, saved by the installed package."""
    return write_model(tmp_path_factory.mktemp("full") / "model", *bases)


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    picture(3, (64, 48)).save(path)
    return path
