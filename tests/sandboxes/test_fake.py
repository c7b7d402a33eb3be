"""The fake keeps the protocol's promises that tests lean on."""

from __future__ import annotations

import asyncio

import pytest

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation


def test_commands_are_scripted_and_kept():
    def script(argv, stdin, files):
        files["made"] = stdin
        return result(b"no", exit_code=2) if argv[0] == "fail" else b"yes " + argv[-1].encode()

    async def used():
        box = FakeSandbox(script, files={"given": b"1"})
        assert (await box.exec(["echo", "x"], stdin=b"in")).stdout == b"yes x"
        assert (await box.run_python("code")).stdout == b"yes code"
        failed = await box.exec(["fail"])
        assert (failed.status, failed.exit_code) == (ExecStatus.NONZERO, 2)
        assert await box.read("given") == b"1" and await box.read("/workspace/./made") == b""
        assert box.calls == [(["echo", "x"], b"in"), (["python", "code"], b""), (["fail"], b"")]
        await box.write("a/b", b"2")
        await box.reset()
        assert box.files == {} and box.num_resets == 1

    asyncio.run(used())


def test_files_raise_as_in_a_real_box():
    async def used():
        box = FakeSandbox(files={"big": b"x" * 10})
        with pytest.raises(FileNotFoundError):
            await box.read("absent")
        for path in ("../x", "/etc/passwd", "", "a/../../x"):
            with pytest.raises(PermissionError):
                await box.write(path, b"")
        with pytest.raises(OSError, match="10 bytes"):
            await box.read("big", max_bytes=9)
        with pytest.raises(ValueError, match="argv"):
            await box.exec([])

    asyncio.run(used())


def test_a_lost_or_destroyed_box_raises_and_timeouts_are_typed():
    async def used():
        box, other = FakeSandbox(), FakeSandbox().with_level(Isolation.CONTAINER)
        box.lose("power cut")
        with pytest.raises(SandboxLost, match="power cut"):
            await box.exec(["true"])
        await other.destroy()
        with pytest.raises(SandboxLost, match="destroyed"):
            await other.reset()
        assert box.id != other.id and other.enforced.level is Isolation.CONTAINER

    asyncio.run(used())
    assert result(exit_code=None).status is ExecStatus.TIMEOUT


def test_shells_streamed_programs_and_snapshots_are_scripted_too():
    async def used():
        box = FakeSandbox(lambda argv, stdin, files: b" ".join(a.encode() for a in argv) + stdin)
        first, second = await box.shell("cd /", session="s"), await box.shell("ls", session="s")
        process = await box.spawn(["cat"], stdin=b" a")
        await process.write(b"b")
        read = await process.read(3), await process.read(), await process.read()
        await box.write("f", b"x")
        snapshot = await box.snapshot()
        await box.write("g", b"y")
        await box.restore(snapshot)
        return first, second, read, await process.wait(), box.files

    first, second, read, ended, files = asyncio.run(used())
    assert (first.stdout, first.shell, second.shell) == (b"shell s cd /", "new", "kept")
    assert read == (b"cat", b" ab", b"") and ended.is_ok and ended.stdout_bytes == 6
    assert files == {"f": b"x"}
