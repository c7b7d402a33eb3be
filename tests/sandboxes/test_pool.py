"""The pool: warm, bounded, emptied between leases, and nothing abnormal is used twice."""

from __future__ import annotations

import asyncio

import pytest

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.pool import SandboxPool
from consilience.sandboxes.probe import open_sandbox
from consilience.sandboxes.protocol import ExecStatus, Limits, SandboxSpec

SPEC = SandboxSpec()


class Opener:
    """Opens fakes whose commands end with the status their name says; counts what is alive."""

    def __init__(self, *, failures: int = 0) -> None:
        self.boxes: list[FakeSandbox] = []
        self.failures = failures

    async def __call__(self, spec: SandboxSpec) -> FakeSandbox:
        await asyncio.sleep(0.001)
        if self.failures:
            self.failures -= 1
            raise SandboxUnavailable("none today")

        def script(argv, stdin, files):
            return result(b"", status=ExecStatus(argv[0]), exit_code=0 if argv[0] == "ok" else None)

        self.boxes.append(FakeSandbox(script))
        return self.boxes[-1]

    @property
    def num_alive(self) -> int:
        return sum(box._lost is None for box in self.boxes)


def test_a_box_is_reused_after_a_reset_with_a_new_lease_id():
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, opener=opener)
        first = await pool.lease()
        await first.write("f", b"1")
        await pool.release(first)
        second = await pool.lease()
        assert (first.id, second.id) == (f"{opener.boxes[0].id}#1", f"{opener.boxes[0].id}#2")
        assert opener.boxes[0].files == {} and opener.boxes[0].num_resets == 1
        await pool.close()
        assert pool.describe()["leases"] == 2 and opener.num_alive == 0

    asyncio.run(used())


def test_boxes_are_opened_before_they_are_needed_and_never_more_than_size():
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 3, opener=opener)
        await pool.start()
        await asyncio.sleep(0.05)
        assert len(opener.boxes) == 3 and pool.counts.leases == 0
        peak = running = 0

        async def job(box):
            nonlocal peak, running
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0.002)
            running -= 1
            return box.id

        ids = await pool.run_all([job] * 30)
        assert peak == 3 and len(set(ids)) == 30
        assert len(opener.boxes) == 3
        await pool.close()

    asyncio.run(used())


@pytest.mark.parametrize("status", ["timeout", "oom", "pids", "disk", "output_capped", "sandbox_lost"])
def test_after_an_abnormal_outcome_a_box_is_destroyed_and_replaced(status):
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, opener=opener)
        box = await pool.lease()
        await box.exec([status])
        await box.exec(["ok"])
        await pool.release(box)
        other = await pool.lease()
        assert other.id.split("#")[0] != box.id.split("#")[0] and opener.num_alive == 1
        assert pool.counts.discarded == 1 and pool.counts.resets == 0
        await pool.close()

    asyncio.run(used())


@pytest.mark.parametrize("status", ["ok", "nonzero", "denied"])
def test_ordinary_outcomes_keep_the_box(status):
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, opener=opener)
        box = await pool.lease()
        await box.exec([status])
        await pool.release(box)
        await pool.lease()
        await pool.close()
        assert len(opener.boxes) == 1 and pool.counts.resets == 1

    asyncio.run(used())


def test_a_box_is_retired_after_its_uses():
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, uses_per_box=2, opener=opener)
        for _ in range(5):
            await pool.release(await pool.lease())
        await (await pool.lease()).exec(["ok"])
        assert len(opener.boxes) == 3 and pool.counts.retired == 2
        await pool.close()

    asyncio.run(used())


def test_a_box_that_dies_on_lease_or_in_reset_is_replaced_and_counted():
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, opener=opener)
        box = await pool.lease()
        opener.boxes[0].lose()
        with pytest.raises(SandboxLost):
            await box.exec(["ok"])
        await pool.release(box)
        again = await pool.lease()
        opener.boxes[1].lose()
        await pool.release(again)
        assert (await (await pool.lease()).exec(["ok"])).is_ok
        assert pool.counts.lost >= 1 and pool.counts.discarded == 2
        await pool.close()

    asyncio.run(used())


def test_a_lease_cannot_be_used_or_given_back_after_its_release():
    async def used():
        pool = SandboxPool(SPEC, 1, opener=Opener())
        box = await pool.lease()
        await pool.release(box)
        for work in (box.exec(["ok"]), box.read("x"), box.reset(), pool.release(box)):
            with pytest.raises(SandboxLost, match="released"):
                await work
        await pool.close()

    asyncio.run(used())


def test_a_failure_to_open_reaches_the_lease_and_the_next_one_tries_again():
    async def used():
        opener = Opener(failures=2)
        pool = SandboxPool(SPEC, 2, opener=opener)
        for _ in range(2):
            with pytest.raises(SandboxUnavailable, match="none today"):
                await pool.lease()
        boxes = [await pool.lease(), await pool.lease()]
        assert len(boxes) == opener.num_alive == 2 and pool.counts.open_failures == 2
        await pool.close()

    asyncio.run(used())


def test_a_job_that_raises_leaves_its_siblings_alone():
    async def used():
        pool = SandboxPool(SPEC, 2, opener=Opener())

        async def good(box):
            return (await box.exec(["ok"])).is_ok

        async def bad(box):
            raise KeyError("mine")

        done = await pool.run_all([good, bad, good])
        assert done[0] is True and isinstance(done[1], KeyError) and done[2] is True
        await pool.close()

    asyncio.run(used())


def test_closing_ends_leased_and_waiting_ones_and_destroys_all():
    async def used():
        opener = Opener()
        pool = SandboxPool(SPEC, 1, opener=opener)
        box = await pool.lease()
        waiting = [asyncio.create_task(pool.lease()) for _ in range(3)]
        await asyncio.sleep(0.01)
        await pool.close()
        await pool.close()
        for task in waiting:
            with pytest.raises(SandboxUnavailable, match="closed"):
                await task
        with pytest.raises(SandboxLost):
            await box.exec(["ok"])
        with pytest.raises(SandboxUnavailable, match="closed"):
            await pool.lease()
        assert opener.num_alive == 0

    asyncio.run(used())


def test_a_cancelled_wait_loses_no_box():
    async def used():
        pool = SandboxPool(SPEC, 1, opener=Opener())
        box = await pool.lease()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.lease()
        await pool.release(box)
        async with asyncio.timeout(1):
            await pool.release(await pool.lease())
        await pool.close()

    asyncio.run(used())


def test_sizes_below_one_are_refused():
    for size, uses in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            SandboxPool(SPEC, size, uses)


def test_real_boxes_serve_many_programs_and_a_hanging_one_harms_no_other():
    async def used():
        pool = SandboxPool(SandboxSpec(limits=Limits(wall_s=0.5)), 2, opener=open_sandbox)

        def job(number):
            async def run(box):
                code = "while True: pass" if number == 5 else f"print({number} ** 2)"
                told = await box.run_python(code)
                return told.status.value, told.stdout, box.id

            return run

        done = await pool.run_all([job(number) for number in range(20)])
        await pool.close()
        return done, pool.describe()

    done, counts = asyncio.run(used())
    assert [told[1] for told in done if told[0] == "ok"] == [b"%d\n" % n**2 for n in range(20) if n != 5]
    assert done[5][0] == "timeout" and len({told[2] for told in done}) == 20
    assert counts["discarded"] == 1 and counts["leases"] == 20


def test_a_lease_that_gets_no_box_is_an_error_after_its_limit_and_the_next_box_is_for_others():
    async def used():
        pool = SandboxPool(SPEC, 1, opener=Opener(), lease_limit_s=0.1)
        held = await pool.lease()
        with pytest.raises(SandboxUnavailable, match=r"none of 1 boxes got free in 0\.1 s; raise sandbox"):
            await pool.lease()
        await pool.release(held)
        again = await pool.lease()
        await pool.release(again)
        await pool.close()

    asyncio.run(used())
