"""Things read in the background are given once they are there, and their errors where they are taken."""

import threading

import pytest

from consilience.conf.errors import EngineError
from consilience.teachers.read_ahead import ReadAhead, WarmFiles


def test_what_was_read_or_raised_is_taken():
    assert ReadAhead(lambda: 7, "seven").take() == 7
    with pytest.raises(KeyError, match="gone"):
        ReadAhead(lambda: {}["gone"], "nothing").take()


def test_a_read_that_takes_too_long_is_named():
    go = threading.Event()
    ahead = ReadAhead(lambda: go.wait(20), "head of 'math'")
    with pytest.raises(EngineError, match="head of 'math' could not be read within 0 s"):
        ahead.take(0.05)
    go.set()
    assert ahead.take() is True


def test_all_weight_files_of_a_folder_are_read_and_nothing_else(tmp_path):
    sizes = {"a.safetensors": 9 << 20, "b.safetensors": 5, "tokenizer.json": 100}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert WarmFiles(tmp_path).finish() == (9 << 20) + 5
    assert WarmFiles(tmp_path / "missing").finish() == 0
