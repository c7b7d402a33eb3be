import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.lease import fence, fenced_epochs, take_lease


def test_epochs_only_grow_whoever_asks(tmp_path):
    leases = [take_lease(tmp_path / "log", owner) for owner in ("a", "b", "a")]
    assert [lease.epoch for lease in leases] == [0, 1, 2]
    (tmp_path / "log" / "00000007.lease").touch()
    assert take_lease(tmp_path / "log", "c").epoch == 8


def test_a_fence_ends_one_say_and_only_that(tmp_path):
    a, b = take_lease(tmp_path, "a"), take_lease(tmp_path, "b")
    fence(tmp_path, [a.epoch])
    assert a.is_fenced and not b.is_fenced and fenced_epochs(tmp_path) == [0]
    b.must_hold()
    with pytest.raises(EngineError, match="taken over"):
        a.must_hold()
    fence(tmp_path)
    assert b.is_fenced and not take_lease(tmp_path, "c").is_fenced


def test_a_folder_without_leases_has_nothing_to_fence(tmp_path):
    fence(tmp_path / "none")
    assert fenced_epochs(tmp_path / "none") == []
