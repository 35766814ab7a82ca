import os
import resource
import stat
from pathlib import Path

import pytest
import torch

from textcond.apps.files import check_output
from textcond.files import atomic_file, read_tensors, remove_partials, write_mark, write_tensors


@pytest.mark.parametrize(
    ("name", "kind", "mend"),
    [
        ("missing/a.png", FileNotFoundError, "make it first"),
        ("file.txt/a.png", NotADirectoryError, "is a file, not a folder"),
        ("folder", IsADirectoryError, "name a file in it"),
        ("pipe", ValueError, "not a regular file"),
        ("x" * 300 + ".png", OSError, "too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_and_the_mend_named(tmp_path, name, kind, mend):
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(kind, match=mend):
        check_output(tmp_path / name)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that refuses files even for root")
def test_a_folder_that_accepts_no_file_is_named():
    with pytest.raises(OSError, match="cannot write in /proc"):
        check_output("/proc/a.png")


def test_checking_an_output_leaves_nothing_behind_and_keeps_what_is_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    assert check_output(tmp_path / "a.png") == (tmp_path / "a.png").resolve()
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_link_is_followed_and_kept(tmp_path):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "link.bin").symlink_to("real.bin")
    with atomic_file(tmp_path / "link.bin") as file:
        file.write(b"new")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real.bin").read_bytes() == b"new"


def test_a_failure_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write():
        with atomic_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_takes_no_more_is_told_with_the_name_of_the_file(tmp_path):
    def write():
        with atomic_file(tmp_path / "a.bin") as file:
            file.write(b"x" * 5000)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.bin .*free some space"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_every_writer_is_whole_or_leaves_what_was_there(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_mark(tmp_path / "a.json", {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match=r"cannot write .*a\.safetensors .*free some space"):
            write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        with pytest.raises(OSError, match=r"cannot write .*a\.json .*free some space"):
            write_mark(tmp_path / "a.json", {"step": 2})
    assert read_tensors(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert '"step": 1' in (tmp_path / "a.json").read_text()
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / "a.bin").touch()
    with atomic_file(tmp_path / "b.bin") as file:
        os.link(file.name, tmp_path / ".textcond-killed.partial")
        assert Path(file.name).match(".textcond-*.partial")
    (tmp_path / "b.bin").unlink()
    remove_partials(tmp_path, older_than=60)  # another process may be writing it
    assert (tmp_path / ".textcond-killed.partial").exists()
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
