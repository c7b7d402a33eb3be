"""Creation at a pace, and a breaker that stops it: typed errors, one probe, recovery."""

import asyncio

import pytest

from consilience.conf.errors import CreationPaused, SandboxUnavailable
from consilience.sandboxes.fake import FakeSandbox
from consilience.sandboxes.host_creation import Breaker, PacedCreator
from consilience.sandboxes.protocol import SandboxSpec

SPEC = SandboxSpec()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def failed_breaker(**options):
    clock = Clock()
    breaker = Breaker(window=4, pause_s=30, clock=clock, **options)
    for _ in range(2):
        breaker.fail(breaker.enter(), "daemon down")
    return breaker, clock


def test_half_of_the_window_failing_opens_it_and_the_error_says_why_and_until_when():
    breaker, clock = failed_breaker()
    assert breaker.is_open and breaker.num_openings == 1
    clock.now = 10
    with pytest.raises(CreationPaused, match=r"2 of the last 2 .* next try is in 20.0 s; .* daemon down"):
        breaker.enter()
    assert issubclass(CreationPaused, SandboxUnavailable)


def test_after_the_pause_one_probe_goes_through_and_the_others_wait_for_its_outcome():
    breaker, clock = failed_breaker()
    clock.now = 30
    assert breaker.enter() is True
    with pytest.raises(CreationPaused, match="under way"):
        breaker.enter()
    breaker.succeed(True)
    assert not breaker.is_open
    breaker.fail(breaker.enter(), "once")  # the failures of before are forgotten
    assert breaker.enter() is False


def test_a_probe_that_fails_opens_it_again_for_the_whole_pause():
    breaker, clock = failed_breaker()
    clock.now = 31
    breaker.fail(breaker.enter(), "still down")
    assert breaker.num_openings == 2
    clock.now = 60
    with pytest.raises(CreationPaused, match=r"in 1\.0 s"):
        breaker.enter()
    clock.now = 61
    assert breaker.enter() is True


def test_what_began_before_the_opening_decides_nothing_and_a_broken_off_probe_frees_the_next():
    breaker, clock = failed_breaker()
    clock.now = 30
    assert breaker.enter() is True
    breaker.succeed(False)  # an old one ends now
    breaker.fail(False, "an old one too")
    assert breaker.is_open and breaker.num_openings == 1
    breaker.give_up(True)
    assert breaker.enter() is True


def test_few_failures_among_successes_do_not_open_it():
    breaker = Breaker(window=10)
    for number in range(100):
        breaker.enter()
        if number % 3:
            breaker.succeed(False)
        else:
            breaker.fail(False, "now and then")
    assert not breaker.is_open


class SlowOpener:
    def __init__(self):
        self.num_running = self.most = 0
        self.order = []
        self.fails = False

    async def __call__(self, spec):
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        try:
            await asyncio.sleep(0.002)
            self.order.append(spec.image)
            if self.fails:
                raise SandboxUnavailable("none today")
            return FakeSandbox()
        finally:
            self.num_running -= 1


def test_a_storm_is_paced_and_served_in_order():
    async def storm():
        opener = SlowOpener()
        creator = PacedCreator(opener, Breaker(), start_pace=1, most_pace=1)
        specs = [SandboxSpec(image=str(i)) for i in range(50)]
        await asyncio.gather(*map(creator.create, specs))
        assert opener.most == 1 and opener.order == [str(i) for i in range(50)]
        assert creator.num_created == 50 and creator.num_running == 0

    asyncio.run(storm())


def test_the_pace_grows_by_one_a_round_up_to_its_bound_and_is_halved_by_a_failure():
    async def used():
        opener = SlowOpener()
        creator = PacedCreator(opener, Breaker(), start_pace=2, most_pace=4)
        for _ in range(30):
            await creator.create(SPEC)
            creator.latencies_s.clear()  # this machine's noise is not under test
        assert creator.pace == 4
        await asyncio.gather(*(creator.create(SPEC) for _ in range(20)))
        assert opener.most == 4
        opener.fails = True
        with pytest.raises(SandboxUnavailable, match="none today"):
            await creator.create(SPEC)
        assert creator.pace == 2 and creator.num_failed == 1

    asyncio.run(used())


def test_creation_that_gets_three_times_slower_is_slowed_down():
    async def used():
        took_s = 0.002

        async def opener(spec):
            await asyncio.sleep(took_s)
            return FakeSandbox()

        creator = PacedCreator(opener, Breaker(), start_pace=8, most_pace=8)
        for _ in range(10):
            await creator.create(SPEC)
        creator.latencies_s.clear()
        creator._best_s, took_s = 0.01, 0.05
        for _ in range(8):
            await creator.create(SPEC)
        assert creator.pace == 4

    asyncio.run(used())


def test_a_caller_that_gives_up_while_it_waits_leaves_its_turn_to_the_next():
    async def used():
        opener = SlowOpener()
        creator = PacedCreator(opener, Breaker(), start_pace=1, most_pace=1)
        tasks = [asyncio.create_task(creator.create(SandboxSpec(image=str(i)))) for i in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[1], asyncio.CancelledError) and opener.order == ["0", "2", "3"]
        assert creator.num_running == 0

    asyncio.run(used())


def test_a_start_pace_outside_its_bounds_is_refused():
    with pytest.raises(ValueError, match="start_pace"):
        PacedCreator(SlowOpener(), Breaker(), start_pace=9, most_pace=4)
