"""Commands by number: run once across restarts, attached to while they run, refused where they differ."""

import asyncio
import os
import signal

import pytest

from consilience.conf.errors import OutcomeUnknown, SandboxLost, TrajectoryDiverged
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.probe import open_sandbox
from consilience.sandboxes.protocol import Limits, SandboxSpec
from consilience.sandboxes.trajectory import TrajectoryLog
from consilience.sandboxes.trajectory_box import LoggedSandbox, normalized, verify

SPEC = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20, wall_s=10))


def counting(argv, stdin, files):
    files["n"] = str(int(files.get("n", b"0")) + 1).encode()
    return result(b"run %s" % files["n"])


class SlowFake(FakeSandbox):
    async def exec(self, argv, **options):
        await asyncio.sleep(0.05)
        return await super().exec(argv, **options)


def test_a_client_that_starts_again_gets_the_same_answers_and_nothing_runs_twice(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        await box.write("f", b"1")
        answers = [await box.exec(["a"]), await box.run_python("b"), await box.read("f")]
        with pytest.raises(FileNotFoundError):
            await box.read("none")
        log = TrajectoryLog(tmp_path)  # another process, the same box
        again = LoggedSandbox(fake, log)
        again.rewind()
        fake.files["f"] = b"changed meanwhile"
        await again.write("f", b"1")
        assert [await again.exec(["a"]), await again.run_python("b"), await again.read("f")] == answers
        with pytest.raises(FileNotFoundError):
            await again.read("none")
        assert fake.files == {"n": b"2", "f": b"changed meanwhile"}
        assert (await again.exec(["new"])).stdout == b"run 3"  # beyond the log they run
        assert TrajectoryLog(tmp_path).events[0] == {"what": "client goes on", "number": 1}

    asyncio.run(used())


def test_shells_snapshots_and_ended_programs_are_answered_from_the_log(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        await box.write("f", b"x" * 1000)
        answers = [await box.shell("a"), await box.snapshot(), await box.shell("b", session="s")]
        assert (await (await box.spawn(["p"])).wait()).is_ok
        await box.restore(answers[1])
        again = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        again.rewind(2)
        assert [
            await again.shell("a"),
            await again.snapshot(),
            await again.shell("b", session="s"),
        ] == answers
        fake.files["f"] = b"after"
        num_calls = len(fake.calls)
        ended = await again.spawn(["p"])
        assert (await ended.wait()).is_ok and await ended.read() == b"" and len(fake.calls) == num_calls
        with pytest.raises(BrokenPipeError):
            await ended.write(b"more")
        await again.restore(answers[1])
        assert fake.files["f"] == b"after"

    asyncio.run(used())


def test_a_program_that_lives_is_attached_to_and_one_of_a_dead_process_is_not_started_again(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        program = await box.spawn(["p"])
        await program.write(b"first")
        box.rewind(1)
        assert await box.spawn(["p"]) is program and box.next_number == 2
        box.rewind(1)
        with pytest.raises(TrajectoryDiverged):
            await box.spawn(["q"])
        again = LoggedSandbox(fake, TrajectoryLog(tmp_path))  # its process is gone, nobody heard the end
        again.rewind(1)
        with pytest.raises(OutcomeUnknown, match=r"command 1 .*spawn.* not run a second time"):
            await again.spawn(["p"])
        assert not fake.calls
        assert (await program.wait()) == (await program.wait()) and len(fake.calls) == 1
        assert TrajectoryLog(tmp_path).entries[0].outcome is not None

    asyncio.run(used())


def test_another_command_under_the_same_number_stops_before_anything_runs(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        await box.exec(["a"])
        box.rewind(1)
        with pytest.raises(TrajectoryDiverged, match=r"command 1 is exec .*'b'.*the log has exec .*'a'.*"):
            await box.exec(["b"])
        with pytest.raises(TrajectoryDiverged):
            await box.read("f")
        assert len(fake.calls) == 1 and (await box.exec(["a"])).stdout == b"run 1"
        with pytest.raises(ValueError, match="holds 1 commands"):
            box.rewind(3)

    asyncio.run(used())


def test_a_command_that_still_runs_is_attached_to(tmp_path):
    async def used():
        fake = SlowFake(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        asker = asyncio.create_task(box.exec(["slow"]))
        await asyncio.sleep(0.01)
        asker.cancel()  # its client is killed
        box.rewind(1)
        assert (await box.exec(["slow"])).stdout == b"run 1" and len(fake.calls) == 1
        assert box.next_number == 2

    asyncio.run(used())


def test_what_a_dead_process_sent_is_unknown_unless_it_may_be_repeated(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        log = TrajectoryLog(tmp_path)
        box = LoggedSandbox(fake, log)
        log.intend("write", {"path": "f", "data": b"1", "mode": 0o644}, is_idempotent=True)
        box.rewind(1)
        await box.write("f", b"1")  # sent again
        given = {"argv": ["a"], "stdin": b"", "cwd": None, "env": None, "timeout_s": None}
        log.intend("exec", given, is_idempotent=False)
        for _ in range(2):
            box.rewind(2)
            with pytest.raises(OutcomeUnknown, match=r"command 2 of .* not run a second time"):
                await box.exec(["a"])
        assert fake.calls == [] and fake.files == {"f": b"1"}
        assert TrajectoryLog(tmp_path).entries[0].outcome == {"data": None}

    asyncio.run(used())


def test_a_lost_box_leaves_its_command_without_a_result(tmp_path):
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(tmp_path))
        fake.lose()
        with pytest.raises(SandboxLost):
            await box.exec(["a"])
        log = TrajectoryLog(tmp_path)
        assert log.entries[0].outcome is None and log.events[0]["what"] == "lost"

    asyncio.run(used())


@pytest.mark.timeout(120)
def test_a_client_killed_between_intent_and_result_runs_a_real_command_never_twice(tmp_path):
    """The client is killed while `>> side` is being run over and over; what ran is what the log intended."""
    side = tmp_path / "side"
    pid = os.fork()
    if pid == 0:

        async def client():
            fake = FakeSandbox(lambda argv, stdin, files: side.open("ab").write(b"x") and b"")
            box = LoggedSandbox(fake, TrajectoryLog(tmp_path / "log"))
            while True:
                await box.exec(["append"])

        try:
            asyncio.run(client())
        finally:
            os._exit(1)
    while not side.exists() or side.stat().st_size < 200:
        os.sched_yield()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    async def successor():
        num_ran = side.stat().st_size
        log = TrajectoryLog(tmp_path / "log")
        assert num_ran <= len(log.entries) <= num_ran + 1  # intent first, then the effect
        unknown = [entry for entry in log.entries if entry.outcome is None]
        assert len(unknown) <= 1
        fake = FakeSandbox(lambda argv, stdin, files: side.open("ab").write(b"x") and b"")
        box = LoggedSandbox(fake, log)
        box.rewind()
        for entry in log.entries:
            if entry.outcome is None:
                with pytest.raises(OutcomeUnknown):
                    await box.exec(["append"])
            else:
                await box.exec(["append"])
        assert side.stat().st_size == num_ran

    asyncio.run(successor())


@pytest.mark.timeout(120)
def test_a_real_trajectory_is_verified_in_a_fresh_box_and_a_forged_result_is_found(tmp_path):
    async def used():
        box = LoggedSandbox(await open_sandbox(SPEC), TrajectoryLog(tmp_path))
        await box.write("a.py", b"print(sum(range(10)))")
        await box.exec(["python3", "a.py"])
        await box.exec(["sh", "-c", "echo x >> log; cat log; exit 3"])
        await box.exec(["sh", "-c", "date; mktemp; ls"])
        await box.read("log")
        await box.destroy()
        log = TrajectoryLog(tmp_path)
        assert log.pinned is not None and log.pinned["driver"] == "bwrap" and len(log.entries) == 5
        assert await verify(log, open_sandbox, SPEC) == []
        log.entries[1].outcome["stdout"] = b"46\n"
        (found,) = await verify(log, open_sandbox, SPEC)
        assert (found.seq, found.field, found.then, found.now) == (2, "stdout", b"46\n", b"45\n")

    asyncio.run(used())


def test_only_what_differs_from_run_to_run_is_masked():
    text = b"at 0x7f3a2c1b4d50 2026-11-22 19:01:02.5 /tmp/tmp.aB3dE6gH1j pid 4711, took 0.03 s, 45 apples"
    assert normalized(text) == b"at 0xADDRESS TIME /tmp/NAME pid PID, took SPAN, 45 apples"
    assert normalized(3) == 3 and normalized(None) is None


def test_in_memory_only_the_last_results_are_kept_and_older_ones_are_unknown():
    async def used():
        fake = FakeSandbox(counting)
        box = LoggedSandbox(fake, TrajectoryLog(None))
        for number in range(12):
            await box.exec([str(number)])
        for number in range(4, 12):
            box.rewind(number + 1)
            assert (await box.exec([str(number)])).stdout == b"run %d" % (number + 1)
        box.rewind(1)
        with pytest.raises(OutcomeUnknown):
            await box.exec(["0"])
        assert len(fake.calls) == 12

    asyncio.run(used())
