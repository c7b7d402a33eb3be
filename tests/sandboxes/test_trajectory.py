"""The log: what was asked and answered comes back, a torn tail goes, a changed record is named."""

import json

import pytest

from consilience.conf.errors import TrajectoryBroken
from consilience.sandboxes.fake import result
from consilience.sandboxes.trajectory import (
    START,
    TrajectoryLog,
    _bound,
    hash_of,
    outcome_of,
    plain,
    unplain,
    value_of,
)

BIG = bytes(range(256)) * 8


def written(folder, num=3):
    log = TrajectoryLog(folder)
    log.pin({"driver": "fake", "level": "none"})
    for number in range(1, num + 1):
        entry = log.intend("exec", {"argv": ["echo", str(number)], "stdin": BIG}, is_idempotent=False)
        log.settle(entry, outcome_of(result(b"out %d" % number + BIG)))
    log.close()
    return folder / "log.jsonl"


def test_the_first_records_by_hand(tmp_path):
    log = TrajectoryLog(tmp_path)
    log.pin({"driver": "fake"})
    log.intend("read", {"path": "f", "max_bytes": 5}, is_idempotent=True)
    first, second = (tmp_path / "log.jsonl").read_bytes().splitlines()
    head, _, body = first.partition(b" ")
    assert head.decode() == _bound(START, body) and json.loads(body)["facts"] == {"driver": "fake"}
    assert second.startswith(_bound(head.decode(), second[65:]).encode())
    record = json.loads(second[65:])
    assert (record["kind"], record["seq"], record["op"]) == ("intent", 1, "read")
    assert record["args_hash"] == hash_of("read", {"max_bytes": 5, "path": "f"})


def test_what_was_logged_comes_back_and_goes_on(tmp_path):
    written(tmp_path)
    log = TrajectoryLog(tmp_path)
    assert log.pinned == {"driver": "fake", "level": "none"} and len(log.entries) == 3
    assert unplain(log.entries[1].args) == {"argv": ["echo", "2"], "stdin": BIG}
    assert value_of(log.entries[2].outcome) == result(b"out 3" + BIG)
    log.note("client goes on", number=2)
    log.close()
    again = TrajectoryLog(tmp_path)
    assert again.events == [{"what": "client goes on", "number": 2}] and len(again.entries) == 3


def test_equal_bytes_are_kept_once_and_errors_are_raised_again(tmp_path):
    written(tmp_path)
    names = {path.name for path in (tmp_path / "blobs").iterdir()}
    assert len(names) == 6  # three argument texts, three outputs; the same stderr is in the line
    written(tmp_path / "other")
    assert {path.name for path in (tmp_path / "other" / "blobs").iterdir()} == names
    with pytest.raises(FileNotFoundError, match="no such file"):
        value_of(outcome_of(FileNotFoundError(2, "no such file")))
    assert value_of(outcome_of(None)) is None and value_of(outcome_of(b"\0")) == b"\0"


def test_a_torn_last_line_is_cut_off_wherever_it_tears(tmp_path):
    path = written(tmp_path, num=2)
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole), 37):
        path.write_bytes(whole[:cut])
        log = TrajectoryLog(tmp_path)
        assert log.entries[0].outcome is not None and log.entries[1].outcome is None
        log.note("after the tear")
        log.close()
        assert TrajectoryLog(tmp_path).events == [{"what": "after the tear"}]


def test_a_changed_byte_anywhere_is_found_and_its_record_named(tmp_path):
    path = written(tmp_path, num=2)
    whole = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(whole[:-1]) if byte == 10)]
    for place in range(0, len(whole) - 1, 29):
        if whole[place : place + 1] == b"\n":
            continue
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        number = sum(start <= place for start in starts) - 1
        with pytest.raises(TrajectoryBroken, match=f"at record {number} "):
            TrajectoryLog(tmp_path)


def test_a_record_taken_out_or_two_swapped_break_the_chain(tmp_path):
    path = written(tmp_path, num=2)
    lines = path.read_bytes().splitlines(keepends=True)
    for changed, number in (
        (lines[:2] + lines[3:], 2),
        (lines[1:], 0),
        ([lines[0], lines[2], lines[1], *lines[3:]], 1),
        ([*lines, lines[-1]], 5),
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(TrajectoryBroken, match=f"at record {number} "):
            TrajectoryLog(tmp_path)


def test_a_blob_that_is_gone_or_changed_is_named(tmp_path):
    written(tmp_path)
    blob = sorted((tmp_path / "blobs").iterdir())[0]
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + b"!")
    with pytest.raises(TrajectoryBroken, match=f"has changed: {blob.name}"):
        TrajectoryLog(tmp_path)
    blob.unlink()
    with pytest.raises(TrajectoryBroken, match=f"is missing: {blob.name}"):
        TrajectoryLog(tmp_path)


def test_the_hash_tells_commands_apart_and_ignores_the_order_of_names():
    same = hash_of("exec", {"argv": ["a"], "env": {"x": "1", "y": "2"}})
    assert same == hash_of("exec", {"env": {"y": "2", "x": "1"}, "argv": ("a",)})
    for other in (
        ("exec", {"argv": ["a"], "env": None}),
        ("read", {"argv": ["a"]}),
        ("exec", {"argv": ["a", ""]}),
    ):
        assert hash_of(*other) != same
    assert hash_of("w", {"d": b"1"}) != hash_of("w", {"d": "1"})
    assert unplain(plain({"a": [b"\xff", "t", None, 1.5]})) == {"a": [b"\xff", "t", None, 1.5]}
