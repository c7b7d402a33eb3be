"""The token log: what was acknowledged comes back, whatever happens to the last writes or to their writer."""

import copy
import resource
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import EngineError
from consilience.rollout.engine import NewTokens
from consilience.rollout.frame_file import FRAME_BYTES, HEADER_BYTES, read_frames
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.log_frames import LoggedEpisode, LoggedTurn, crc_of
from consilience.rollout.log_replay import replay
from consilience.rollout.token_log import TokenLog


def new_tokens(version, *rows):
    new = NewTokens(version)
    for row in rows:
        new.add(*row)
    return new


def fp32(value):
    return float(np.float32(value))


def test_a_turn_by_hand(tmp_path):
    log = TokenLog(take_lease(tmp_path, "w0"))
    log.open("j#0", "j", 0, (5, 6, 7), 42)
    log.step(new_tokens(3, ("j#0", 0, 11, -0.5)))
    log.step(new_tokens(4, ("j#0", 1, 12, -0.25), ("j#0", 2, 1, fp32(-0.1))))
    log.end("j#0", "stop")
    log.results("j#0", ["out\udcff"], [["box-1", "bwrap_user"]])
    log.sync()
    fence(tmp_path)
    found = replay(tmp_path)
    assert found.faults == {}
    turn = LoggedTurn(
        crc_of((5, 6, 7)),
        42,
        [11, 12, 1],
        [-0.5, -0.25, fp32(-0.1)],
        [3, 4, 4],
        "stop",
        ["out\udcff"],
        [["box-1", "bwrap_user"]],
    )
    assert found.episodes == {"j": LoggedEpisode("j", 0, [turn])}


class Model:
    """What a log was told, frame by frame, and drawn operations that tell it."""

    def __init__(self, log, data):
        self.log, self.data = log, data
        self.episodes: dict[str, LoggedEpisode] = {}
        self.open: dict[str, LoggedTurn] = {}  # request uid -> turn being decoded
        self.snapshots = [{}]  # [i]: after i frames
        self.num_acknowledged = 0

    def act(self):
        draw = self.data.draw
        ended = [e for e in self.episodes.values() if e.turns[-1].finish and e.turns[-1].results is None]
        kinds = (
            ["open", "step", "step", "step", "sync"] + ["end"] * bool(self.open) + ["results"] * bool(ended)
        )
        kind = draw(st.sampled_from(kinds))
        if kind == "open":
            answered = [e.uid for e in self.episodes.values() if e.turns[-1].results is not None]
            uid = draw(st.sampled_from([*answered, f"j{len(self.episodes)}"]))
            episode = self.episodes.setdefault(uid, LoggedEpisode(uid, self.log.lease.epoch))
            turn, number = LoggedTurn(crc_of((1, 2)), draw(st.integers(0, 2**62))), len(episode.turns)
            self.log.open(f"{uid}#{number}", uid, number, (1, 2), turn.seed)
            episode.turns.append(turn)
            self.open[f"{uid}#{number}"] = turn
        elif kind == "step":
            self.step()
        elif kind == "end":
            uid = draw(st.sampled_from(sorted(self.open)))
            self.log.end(uid, "stop")
            self.open.pop(uid).finish = "stop"
        elif kind == "results":
            episode = draw(st.sampled_from(ended))
            turn = episode.turns[-1]
            turn.results, turn.boxes = [draw(st.text(max_size=5))], [["b", "fake"]]
            self.log.results(f"{episode.uid}#{len(episode.turns) - 1}", turn.results, turn.boxes)
        else:
            self.log.sync()
            self.num_acknowledged = len(self.snapshots) - 1
            return
        if kind != "step" or self.stepped:
            self.snapshots.append(copy.deepcopy(self.episodes))

    def step(self):
        draw, new = self.data.draw, NewTokens(self.data.draw(st.integers(0, 3)))
        for uid, turn in self.open.items():
            for _ in range(draw(st.integers(0, 2))):
                token, logprob = draw(st.integers(0, 2**31 - 1)), fp32(draw(st.floats(-50, 0)))
                new.add(uid, len(turn.token_ids), token, logprob)
                turn.token_ids.append(token)
                turn.logprobs.append(logprob)
                turn.versions.append(new.weight_version)
        self.stepped = bool(new.uids)
        self.log.step(new)


def told_log(folder, data, **options):
    model = Model(
        TokenLog(take_lease(Path(folder), "w", survives_power=data.draw(st.booleans())), **options), data
    )
    for _ in range(data.draw(st.integers(1, 30))):
        model.act()
    return model


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_whatever_is_torn_off_the_state_is_one_before_and_no_acknowledged_frame_is_missing(data):
    with tempfile.TemporaryDirectory() as folder:
        model = told_log(folder, data)
        (path,) = Path(folder).glob("*.log")
        whole = path.read_bytes()
        frames = read_frames(path).payloads
        ends = [HEADER_BYTES]
        for payload in frames:
            ends.append(ends[-1] + FRAME_BYTES + len(payload))
        least = ends[model.num_acknowledged] if model.num_acknowledged else 0
        cut = data.draw(st.integers(least, max(least, len(whole))))
        path.write_bytes(whole[:cut])
        fence(Path(folder))
        num = len(read_frames(path).payloads)
        assert model.num_acknowledged <= num
        found = replay(Path(folder))
        assert found.faults == {} and found.episodes == model.snapshots[num]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_lost_or_doubled_write_leaves_a_state_that_was_and_never_goes_unseen(data):
    with tempfile.TemporaryDirectory() as folder:
        model = told_log(folder, data)
        model.log.sync()
        model.log.step(new_tokens(0))
        (path,) = Path(folder).glob("*.log")
        whole = path.read_bytes()
        if not whole:
            return
        ends = [HEADER_BYTES]
        for payload in read_frames(path).payloads:
            ends.append(ends[-1] + FRAME_BYTES + len(payload))
        first = data.draw(st.integers(0, len(ends) - 2))
        last = data.draw(st.integers(first, len(ends) - 2))
        piece = whole[ends[first] : ends[last + 1]]
        new = data.draw(st.sampled_from([b"", piece + piece, b"\0" * len(piece)]))
        path.write_bytes(whole[: ends[first]] + new + whole[ends[last + 1] :])
        fence(Path(folder))
        found = replay(Path(folder))
        if new == piece + piece:
            assert found.episodes == model.snapshots[-1] and found.faults == {}
            return
        assert found.episodes == model.snapshots[first]
        behind = [struct.unpack_from("<I", whole, at + 8)[0] for at in ends[last + 1 : -1]]
        if max(behind, default=0) > first:  # a frame that is still there knows of the lost one
            assert list(found.faults) == [path.name]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_segments_rotate_and_replay_as_one(data):
    with tempfile.TemporaryDirectory() as folder:
        model = told_log(folder, data, segment_bytes=200)
        model.log.sync()
        fence(Path(folder))
        assert replay(Path(folder)).episodes == model.snapshots[-1]
        paths = sorted(Path(folder).glob("*.log"))
        if len(paths) < 3:
            return
        # The end of a sealed segment is lost: the next one knows how long it was.
        payload = read_frames(paths[0]).payloads[-1]
        paths[0].write_bytes(paths[0].read_bytes()[: -FRAME_BYTES - len(payload)])
        found = replay(Path(folder))
        assert paths[1].name in found.faults and found.episodes in model.snapshots


def begun(folder, uid="j", num=3):
    log = TokenLog(take_lease(folder, "w"))
    log.open(f"{uid}#0", uid, 0, (1,), 0)
    for i in range(num):
        log.step(new_tokens(0, (f"{uid}#0", i, i, -1.0)))
    return log


def test_after_a_takeover_the_old_owner_acknowledges_nothing_and_its_frames_are_ignored(tmp_path):
    old = begun(tmp_path)
    fence(tmp_path, [0])
    lease = take_lease(tmp_path, "next")
    logged = replay(tmp_path)
    new = TokenLog(lease)
    new.claim([(logged.episodes["j"], ["j#0"])])
    new.step(new_tokens(1, ("j#0", 3, 99, -2.0)))
    old.step(new_tokens(0, ("j#0", 3, 55, -3.0)))  # it was only frozen
    with pytest.raises(EngineError, match="taken over"):
        old.sync()
    fence(tmp_path)
    (turn,) = replay(tmp_path).episodes["j"].turns
    assert (turn.token_ids, turn.versions) == ([0, 1, 2, 99], [0, 0, 0, 1])
    with pytest.raises(EngineError, match="taken over"):
        TokenLog(lease)


def test_a_claim_torn_in_the_middle_leaves_the_old_owner_s_episode(tmp_path):
    begun(tmp_path)
    fence(tmp_path)
    logged = replay(tmp_path)
    new = TokenLog(take_lease(tmp_path, "next"))
    new.claim([(logged.episodes["j"], ["j#0"])])
    (path,) = tmp_path.glob("00000001-*.log")
    path.write_bytes(path.read_bytes()[:-1])
    fence(tmp_path)
    found = replay(tmp_path)
    assert found.episodes == logged.episodes and found.episodes["j"].epoch == 0


def test_live_owners_are_not_read_and_only_what_is_asked_for_is(tmp_path):
    begun(tmp_path, "a"), begun(tmp_path, "b"), begun(tmp_path, "c")
    fence(tmp_path, [0, 1])
    assert set(replay(tmp_path).episodes) == {"a", "b"}
    assert set(replay(tmp_path, only=["b", "c"]).episodes) == {"b"}


@pytest.mark.parametrize("row, fault", [((2, 7, -1.0), "written twice"), ((5, 1, -1.0), "token 5 follows 3")])
def test_an_episode_whose_frames_contradict_each_other_is_quarantined_alone(tmp_path, row, fault):
    log = begun(tmp_path)
    log.step(new_tokens(0, ("j#0", 2, 2, -1.0)))  # the same again is nothing
    log.open("k#0", "k", 0, (1,), 0)
    log.step(new_tokens(0, ("k#0", 0, 4, -1.0)))
    fence(tmp_path)
    assert set(replay(tmp_path).episodes) == {"j", "k"}
    log.step(new_tokens(0, ("j#0", *row)))
    found = replay(tmp_path)
    assert set(found.episodes) == {"k"} and fault in found.faults["j"]


def test_a_job_that_begins_again_after_quarantine_is_sound(tmp_path):
    log = begun(tmp_path)
    log.step(new_tokens(0, ("j#0", 9, 7, -1.0)))
    fence(tmp_path)
    assert replay(tmp_path).faults
    begun(tmp_path, num=1)
    fence(tmp_path)
    found = replay(tmp_path)
    assert found.faults == {} and found.episodes["j"].turns[0].token_ids == [0]


def test_tokens_of_a_stream_that_was_broken_off_are_left_out(tmp_path):
    log = begun(tmp_path)
    log.step(new_tokens(0, ("gone#0", 7, 7, -1.0), ("j#0", 3, 8, -1.0)))
    fence(tmp_path)
    assert replay(tmp_path).episodes["j"].turns[0].token_ids == [0, 1, 2, 8]


def test_a_full_disk_shows_nothing_loses_nothing_and_goes_on_once_there_is_room(tmp_path):
    log = begun(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log._file.num_bytes + 10, limit[1]))
    try:
        with pytest.raises(EngineError, match="free space there and resume"):
            log.step(new_tokens(0, ("j#0", 3, 8, -1.0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    fence(tmp_path, [])
    (tmp_path / "00000000.fenced").touch()
    assert replay(tmp_path).episodes["j"].turns[0].token_ids == [0, 1, 2]
    (tmp_path / "00000000.fenced").unlink()
    log.step(new_tokens(0, ("j#0", 4, 9, -1.0)))
    log.sync()
    fence(tmp_path)
    assert replay(tmp_path).episodes["j"].turns[0].token_ids == [0, 1, 2, 8, 9]
