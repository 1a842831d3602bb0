"""Files that are there whole or not at all. Killed writers are in tests/porting/test_killed.py."""

import os
import stat
from contextlib import suppress

import pytest

from rbn_core import RBNValueError
from rbn_core.files import replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".bin")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


def test_what_is_there_stays_until_the_block_has_ended_well(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with suppress(KeyError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"old"
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_bytes(b"")
            temporary.chmod(0o400)  # as MindSpore does
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["link", "real"]


def test_where_no_file_can_be_is_said(tmp_path):
    with pytest.raises(RBNValueError, match=r"expected a folder to write a into, got .*absent"):
        replacing(tmp_path / "absent" / "a").__enter__()
    with pytest.raises(RBNValueError, match="expected to write a file, got the folder"):
        replacing(tmp_path).__enter__()
    assert names(tmp_path) == []
