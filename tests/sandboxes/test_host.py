"""The host: a box for one owner, reaped when that is silent, found again by a successor, never reused."""

import asyncio

import pytest

from consilience.conf.errors import CreationPaused, SandboxLost, SandboxUnavailable, TrajectoryDiverged
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.host import HostLimits, SandboxHost
from consilience.sandboxes.host_creation import Breaker
from consilience.sandboxes.protocol import SandboxSpec
from consilience.sandboxes.trajectory import TrajectoryLog

SPEC = SandboxSpec()
QUICK = HostLimits(ttl_s=0.2, sweep_s=0.02, lease_limit_s=2.0)


class Opener:
    """Fakes; `sleep` as a command takes 50 ms and then leaves a file. Counts what lives."""

    def __init__(self):
        self.boxes = []
        self.is_broken = False

    async def __call__(self, spec):
        await asyncio.sleep(0.001)
        if self.is_broken:
            raise SandboxUnavailable("none today")
        box = SlowFake(lambda argv, stdin, files: result(argv[-1].encode()))
        self.boxes.append(box)
        return box

    @property
    def num_alive(self):
        return sum(box._lost is None for box in self.boxes)


class SlowFake(FakeSandbox):
    async def exec(self, argv, **options):
        if argv[0] == "sleep":
            await asyncio.sleep(0.05)
            self.files["slept"] = b"once"
        return await super().exec(argv, **options)


def host_test(limits=QUICK, **options):
    """Runs `async body(host, opener)`; at its end nothing is alive."""

    def decorate(body):
        def test():
            async def run():
                opener = Opener()
                host = SandboxHost(limits, opener=opener, **options)
                await body(host, opener)
                await host.close()
                assert opener.num_alive == 0

            asyncio.run(run())

        test.__name__ = body.__name__
        return test

    return decorate


async def settled(condition):
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


@host_test()
async def test_a_box_serves_one_owner_and_is_destroyed_after_it(host, opener):
    first = await host.lease("a", SPEC)
    await host.call(first.box_id, first.key, "write", "f", b"1")
    assert await host.call(first.box_id, first.key, "read", "f") == b"1"
    await host.release(first.box_id, first.key)
    with pytest.raises(SandboxLost, match="not on lease"):
        await host.call(first.box_id, first.key, "read", "f")
    second = await host.lease("a", SPEC)
    assert second.box_id != first.box_id
    await settled(lambda: opener.num_alive == 1)


@host_test()
async def test_warm_boxes_are_ready_before_they_are_asked_for_and_made_up(host, opener):
    await host.keep_warm(SPEC, 2)
    await settled(lambda: opener.num_alive == 2)
    boxes = [await host.lease("a", SPEC) for _ in range(2)]
    assert {b.box_id for b in boxes} == {b.id for b in opener.boxes[:2]}
    await settled(lambda: opener.num_alive == 4)
    found = await host.metrics()
    assert (found["warm_hits"], found["warm"], found["leased"], found["created"]) == (2, 2, 2, 4)
    assert found["create_p95_ms"] >= found["create_p50_ms"] > 0


@host_test()
async def test_a_warm_box_that_died_while_it_waited_is_not_handed_out(host, opener):
    await host.keep_warm(SPEC, 1)
    await settled(lambda: opener.num_alive == 1)
    opener.boxes[0].lose()
    granted = await host.lease("a", SPEC)
    assert granted.box_id != opener.boxes[0].id


@host_test()
async def test_a_silent_owner_loses_its_boxes_and_one_that_beats_keeps_them(host, opener):
    dead, alive = await host.lease("dead", SPEC), await host.lease("alive", SPEC)
    for _ in range(30):
        assert await host.beat("alive") == 1
        await asyncio.sleep(0.02)
    assert opener.num_alive == 1
    with pytest.raises(SandboxLost, match="silent"):
        await host.call(dead.box_id, dead.key, "read", "f")
    await host.call(alive.box_id, alive.key, "exec", ["true"])
    assert (await host.metrics())["reaped"] == 1


@host_test()
async def test_a_successor_finds_the_box_as_it_is_and_the_former_owner_is_shut_out(host, opener):
    old = await host.lease("dead", SPEC)
    await host.call(old.box_id, old.key, "write", "f", b"1")
    new = await host.find("successor", old.box_id)
    assert await host.call(new.box_id, new.key, "read", "f") == b"1"
    for verb, args in (("write", ("f", b"2")), ("exec", (["true"],))):
        with pytest.raises(SandboxLost, match="taken over by successor"):
            await host.call(old.box_id, old.key, verb, *args)
    with pytest.raises(SandboxLost):
        await host.release(old.box_id, old.key)
    assert await host.leave("dead") == 0
    assert await host.leave("successor") == 1 and await host.find("x", old.box_id) is None


@host_test()
async def test_a_command_whose_caller_is_gone_runs_to_its_end_once(host, opener):
    old = await host.lease("dead", SPEC)
    call = asyncio.create_task(host.call(old.box_id, old.key, "exec", ["sleep"]))
    await asyncio.sleep(0.01)
    call.cancel()
    new = await host.find("successor", old.box_id)
    await settled(lambda: "slept" in opener.boxes[0].files)
    assert [argv for argv, _ in opener.boxes[0].calls] == [["sleep"]]
    assert await host.call(new.box_id, new.key, "read", "slept") == b"once"


@host_test()
async def test_a_box_that_died_is_not_found(host, opener):
    granted = await host.lease("a", SPEC)
    opener.boxes[0].lose()
    with pytest.raises(SandboxLost):
        await host.call(granted.box_id, granted.key, "exec", ["true"])
    assert await host.find("b", granted.box_id) is None
    assert (await host.metrics())["lost"] == 1


@host_test(HostLimits(most_boxes=2, lease_limit_s=0.05))
async def test_no_more_boxes_than_allowed_and_who_waits_too_long_is_told(host, opener):
    first = await host.lease("a", SPEC)
    await host.lease("a", SPEC)
    with pytest.raises(SandboxUnavailable, match="2 are on lease, 2 are allowed"):
        await host.lease("a", SPEC)
    await host.release(first.box_id, first.key)
    await host.lease("a", SPEC)
    assert (await host.metrics())["refused"] == 1


@host_test(HostLimits(most_boxes=4, lease_limit_s=30))
async def test_a_storm_of_five_hundred_is_served_in_order_and_never_above_the_bound(host, opener):
    order = []

    async def user(number):
        granted = await host.lease(f"u{number}", SPEC)
        order.append(number)
        assert len(host._held) <= 4
        await host.release(granted.box_id, granted.key)

    await asyncio.gather(*map(user, range(500)))
    assert sorted(order) == list(range(500))
    # fair: nobody is served long before or after its turn (four at once may swap)
    assert max(abs(place - number) for place, number in enumerate(order)) <= 8


@host_test(HostLimits(most_boxes=1, most_waiting=1, lease_limit_s=5))
async def test_beyond_the_bounded_queue_a_lease_is_refused_at_once(host, opener):
    await host.lease("a", SPEC)
    waiting = asyncio.create_task(host.lease("b", SPEC))
    await asyncio.sleep(0.01)
    with pytest.raises(SandboxUnavailable, match="1 callers already wait"):
        await host.lease("c", SPEC)
    await host.leave("a")
    assert (await waiting).box_id


@host_test(QUICK, breaker=Breaker(window=4, pause_s=0.1))
async def test_when_nothing_can_be_made_the_breaker_opens_and_closes_again_by_itself(host, opener):
    opener.is_broken = True
    kinds = []
    for _ in range(4):
        with pytest.raises(SandboxUnavailable) as caught:
            await host.lease("a", SPEC)
        kinds.append(type(caught.value))
    assert kinds == [SandboxUnavailable, SandboxUnavailable, CreationPaused, CreationPaused]
    opener.is_broken = False
    await asyncio.sleep(0.12)
    await host.lease("a", SPEC)
    found = await host.metrics()
    assert (found["failures"], found["breaker_openings"], found["leased"]) == (2, 1, 1)


@host_test(HostLimits(idle_s=0.05, sweep_s=0.02))
async def test_warm_boxes_go_when_nobody_came_for_long(host, opener):
    await host.keep_warm(SPEC, 2)
    await settled(lambda: opener.num_alive == 2)
    await settled(lambda: opener.num_alive == 0)


@host_test(HostLimits(most_boxes=1))
async def test_close_ends_boxes_on_lease_and_those_who_wait_are_told(host, opener):
    granted = await host.lease("a", SPEC)
    waiting = asyncio.create_task(host.lease("b", SPEC))
    running = asyncio.create_task(host.call(granted.box_id, granted.key, "exec", ["sleep"]))
    await asyncio.sleep(0.01)
    await host.close()
    with pytest.raises(SandboxUnavailable, match="closed"):
        await waiting
    with pytest.raises(asyncio.CancelledError):
        await running
    with pytest.raises(SandboxUnavailable, match="closed"):
        await host.lease("c", SPEC)


@host_test()
async def test_only_its_verbs_reach_a_box(host, opener):
    granted = await host.lease("a", SPEC)
    for verb in ("destroy", "reset", "_check"):
        with pytest.raises(ValueError, match="no verb of a leased box"):
            await host.call(granted.box_id, granted.key, verb)


@host_test()
async def test_only_a_programs_own_verbs_reach_it_and_only_with_the_key(host, opener):
    granted = await host.lease("a", SPEC)
    number = await host.call(granted.box_id, granted.key, "spawn", ["cat"])
    with pytest.raises(ValueError, match="no verb of a program"):
        await host.talk(granted.box_id, granted.key, number, "_run")
    with pytest.raises(ValueError, match="1 were spawned there"):
        await host.talk(granted.box_id, granted.key, 1, "wait")
    with pytest.raises(SandboxLost, match="taken over"):
        await host.talk(granted.box_id, "guess", number, "wait")
    assert (await host.talk(granted.box_id, granted.key, number, "wait")).exit_code == 0


@host_test()
async def test_a_successor_gets_the_answer_of_the_command_its_predecessor_died_waiting_for(host, opener):
    old = await host.lease("dead", SPEC)
    await host.call(old.box_id, old.key, "write", "f", b"1")
    call = asyncio.create_task(host.call(old.box_id, old.key, "exec", ["sleep", "long"]))
    await asyncio.sleep(0.01)
    call.cancel()
    for _ in range(2):  # while it runs, and once it has answered
        new = await host.find("successor", old.box_id)
        await host.rewind(new.box_id, new.key, 2)
        assert (await host.call(new.box_id, new.key, "exec", ["sleep", "long"])).stdout == b"long"
    assert [argv for argv, _ in opener.boxes[0].calls] == [["sleep", "long"]]
    await host.call(new.box_id, new.key, "exec", ["next"])
    await host.rewind(new.box_id, new.key, 4)  # it never got here: this is its first time
    await host.call(new.box_id, new.key, "exec", ["next"])
    assert [argv[0] for argv, _ in opener.boxes[0].calls] == ["sleep", "next", "next"]


@host_test()
async def test_another_command_than_the_one_that_was_begun_is_refused(host, opener):
    granted = await host.lease("a", SPEC)
    await host.call(granted.box_id, granted.key, "exec", ["one"])
    await host.rewind(granted.box_id, granted.key, 1)
    with pytest.raises(TrajectoryDiverged, match="nothing was run"):
        await host.call(granted.box_id, granted.key, "exec", ["other"])
    with pytest.raises(SandboxLost, match="not where its log says"):
        await host.rewind(granted.box_id, granted.key, 5)
    with pytest.raises(SandboxLost, match="taken over"):
        await host.rewind(granted.box_id, "guess", 1)


def test_a_host_that_is_told_to_writes_each_boxs_trajectory(tmp_path):
    async def run():
        host = SandboxHost(HostLimits(log_folder=str(tmp_path)), opener=Opener())
        granted = await host.lease("a", SPEC)
        await host.call(granted.box_id, granted.key, "exec", ["one"])
        await host.close()
        log = TrajectoryLog(tmp_path / granted.box_id)
        assert [entry.op for entry in log.entries] == ["exec"] and log.entries[0].outcome["stdout"] == b"one"
        assert log.pinned["driver"] == "fake" and log.events == [{"what": "destroyed"}]

    asyncio.run(run())
