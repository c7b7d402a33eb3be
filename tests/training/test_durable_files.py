"""A file or folder is the old one or the new one, never a part."""

import errno
import os
import resource

import pytest

from consilience.training.durable_files import is_disk_full, replace_folder, write_text_atomically


def test_a_write_that_fails_keeps_the_old_text_and_leaves_nothing(tmp_path):
    path = tmp_path / "deep/er/file.json"
    write_text_atomically(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_text_atomically(path, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_disk_full(caught.value)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.json"]


def test_a_full_disk_is_known_through_causes_and_compiled_messages():
    try:
        try:
            raise OSError(errno.EDQUOT, "quota")
        except OSError as error:
            raise RuntimeError("wrapped") from error
    except RuntimeError as error:
        assert is_disk_full(error)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "never written", tmp_path / "a")
    assert (tmp_path / "a/file").read_text() == "old" and os.listdir(tmp_path) == ["a"]
