"""A small data set and a tiny model."""

import pytest

from tests.data.tools import encoded, make_model, picture, write_folder


@pytest.fixture
def photo_folder(tmp_path):
    """Twelve images with two captions each and a split column: 8 train, 2 validation, 2 test."""
    splits = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    rows = [
        {
            "file_name": f"images/{i:02d}.jpg",
            "captions": [f"picture number {i} in colours", f"smooth colours, the {i}th"],
            "split": s,
        }
        for i, s in enumerate(splits)
    ]
    return write_folder(
        tmp_path / "photos", rows, {row["file_name"]: encoded(picture(i)) for i, row in enumerate(rows)}
    )


@pytest.fixture(scope="session")
def tiny_vision(tmp_path_factory):
    """A tiny random SigLIP tower: 32x32 pixels, 16 patches, 32 wide."""
    from tests.tiny_models import make_vision

    return make_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    from tests.tiny_models import make_llm

    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_vision, tiny_llm):
    """A checkpoint folder: SigLIP of 16 patches x 32 and a Llama."""
    return make_model(tmp_path_factory.mktemp("model") / "checkpoint", tiny_vision, tiny_llm)
