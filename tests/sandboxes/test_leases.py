"""Leases: renewed by any sign of life, ended by silence, taken over with a key of their own."""

import pytest

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.leases import LeaseTable


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def table(ttl_s=10.0):
    clock = Clock()
    return LeaseTable(ttl_s, clock), clock


def test_a_lease_is_valid_for_its_key_only_and_until_it_is_dropped():
    leases, _ = table()
    lease = leases.grant("box-1", "a")
    leases.check("box-1", lease.key)
    with pytest.raises(SandboxLost, match="taken over by a"):
        leases.check("box-1", "guess")
    leases.drop("box-1")
    with pytest.raises(SandboxLost, match="not on lease"):
        leases.check("box-1", lease.key)


def test_silence_ends_all_leases_of_an_owner_and_a_heartbeat_keeps_all():
    leases, clock = table(ttl_s=10)
    for box in ("b1", "b2"):
        leases.grant(box, "silent")
    kept = leases.grant("b3", "alive")
    for _ in range(4):
        clock.now += 3
        assert leases.beat("alive") == 1
        ended = leases.end_silent(3)
    assert ended == ["b1", "b2"] and leases.owners == {"alive"} and len(leases) == 1
    leases.check("b3", kept.key)


def test_ten_seconds_are_still_alive_and_a_little_more_is_not():
    leases, clock = table(ttl_s=10)
    leases.grant("b", "a")
    clock.now += 10
    assert leases.end_silent(10) == []
    clock.now += 0.001
    assert leases.end_silent(0.001) == ["b"]


def test_a_successor_takes_a_box_over_and_its_former_holder_is_shut_out():
    leases, clock = table(ttl_s=10)
    old = leases.grant("b", "dead")
    clock.now += 8
    new = leases.grant("b", "successor")
    with pytest.raises(SandboxLost, match="taken over by successor"):
        leases.check("b", old.key)
    clock.now += 8  # the dead owner's time is over, the successor's is not
    assert leases.end_silent(8) == []
    leases.check("b", new.key)
    assert leases.held_by("dead") == [] and leases.held_by("successor") == ["b"]


def test_time_in_which_the_host_itself_stood_still_does_not_count():
    leases, clock = table(ttl_s=10)
    leases.grant("b", "a")
    clock.now += 1
    assert leases.end_silent(1) == []
    clock.now += 1000  # stopped: nobody could be heard
    assert leases.end_silent(1) == []
    silent_s = 2  # the second before, and the one of the look itself
    while not leases.end_silent(1):
        clock.now += 1
        silent_s += 1
    assert silent_s == 11


def test_a_ttl_must_be_positive():
    with pytest.raises(ValueError, match="above 0"):
        LeaseTable(0)
