"""Files and folders that are complete or absent."""

import pytest

from blipren.training.errors import UserError
from blipren.training.files import complete_or_absent_folder, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "älter\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_bytes() == "älter\n".encode() and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_when_its_block_succeeds(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyError), complete_or_absent_folder(out) as folder:
        (folder / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    out.mkdir()  # an empty folder is taken
    with complete_or_absent_folder(out) as folder:
        (folder / "all").touch()
        assert not list(out.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in out.iterdir()] == ["all"]
    with pytest.raises(UserError, match="not an empty folder"), complete_or_absent_folder(out):
        pass
    assert (out / "all").exists()
