"""What sandboxes cost and keep on this machine: starts, commands, throughput, density, leaks, floods.

    python bench/sandbox.py [--quick] [--driver auto|bwrap|docker] [--table NAME ...]

Tables: create (cold, and from a host's warm pool), exec (through the runner; the aim is a median under 5 ms),
rate (commands a second, by boxes at once), density (boxes alive per GiB), leaks (owners killed with SIGKILL,
half of them while they open a box; the aim is that nothing of 1,000 is left once a host has looked, which it
does every minute), flood (this process's memory while programs
print without end; the aim is flat). Wall times include whatever else this machine does; its load is beside.
`--quick` takes a twentieth of the samples. The exit status is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from consilience.sandboxes import cgroups
from consilience.sandboxes.bwrap_driver import RUNNER_INSIDE
from consilience.sandboxes.docker_driver import engine_socket
from consilience.sandboxes.host import HostLimits, SandboxHost
from consilience.sandboxes.host_reaper import labelled_containers, reap_leftovers
from consilience.sandboxes.janitor import read_mark
from consilience.sandboxes.probe import available, open_sandbox
from consilience.sandboxes.protocol import Limits, Sandbox, SandboxSpec

TABLES = ("exec", "create", "rate", "density", "flood", "leaks")
EXEC_AIM_MS = 5.0
FLOOD_AIM_BYTES = 16 << 20  # above what the command's own cap keeps (sandboxes.md, invariant I4)
LEAK_PATIENCE_S = 20.0


async def timed(work: Callable[[], Awaitable[object]], num: int) -> list[float]:
    """Milliseconds of `num` calls after one that does not count, sorted."""
    await work()
    took_ms = []
    for _ in range(num):
        began = time.perf_counter()
        await work()
        took_ms.append((time.perf_counter() - began) * 1e3)
    return sorted(took_ms)


def row(name: str, took_ms: list[float]) -> float:
    """Prints minimum, median and 95th percentile; the median."""
    median, p95 = statistics.median(took_ms), took_ms[int(0.95 * (len(took_ms) - 1))]
    print(f"  {name:34s} {took_ms[0]:8.2f} {median:8.2f} {p95:8.2f} ms  ({len(took_ms)} x)", flush=True)
    return median


def num_of(full: int, is_quick: bool) -> int:
    return max(5, full // 20) if is_quick else full


async def measure_exec(spec: SandboxSpec, is_quick: bool) -> bool:
    box = await open_sandbox(spec)
    num = num_of(400, is_quick)
    await box.write("file", b"x" * 1000)
    median = row("exec true", await timed(lambda: box.exec(["true"]), num))
    row("exec python3 -c pass", await timed(lambda: box.exec(["python3", "-c", "pass"]), num // 4 + 1))
    row("run_python print(1)", await timed(lambda: box.run_python("print(1)"), num))
    row("read 1 kB", await timed(lambda: box.read("file"), num))
    row("write 1 kB", await timed(lambda: box.write("file", b"x" * 1000), num))
    row("reset", await timed(box.reset, num))
    await box.destroy()
    return verdict(f"exec true: median {median:.2f} ms", f"under {EXEC_AIM_MS:g} ms", median < EXEC_AIM_MS)


async def measure_create(spec: SandboxSpec, is_quick: bool) -> bool:
    num = num_of(60, is_quick)

    async def cold() -> None:
        await (await open_sandbox(spec)).destroy()

    row("cold: start, verify, destroy", await timed(cold, num))
    host = SandboxHost(HostLimits(most_boxes=4))
    await host.keep_warm(spec, 4)

    async def warm() -> None:
        granted = await host.lease("bench", spec)
        await host.release(granted.box_id, granted.key)

    took_ms = []
    for _ in range(num):
        while (await host.metrics())["warm"] < 4:  # only the lease is timed, not its replacement
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        await warm()
        took_ms.append((time.perf_counter() - began) * 1e3)
    row("from the warm pool", sorted(took_ms))
    hits = (await host.metrics())["warm_hits"]
    await host.close()
    return verdict(f"{hits:.0f} of {num} leases found a box ready", "all of them", hits == num)


async def measure_rate(spec: SandboxSpec, is_quick: bool) -> bool:
    num = num_of(2000, is_quick)
    for size in (1, 2, 4):
        boxes = [await open_sandbox(spec) for _ in range(size)]
        for name, run in (
            ("exec true", lambda box: box.exec(["true"])),
            ("run_python, a small program", lambda box: box.run_python("print(sum(range(1000)))")),
        ):
            rate = await rate_of(boxes, run, num // size)
            print(f"  {name:34s} {rate:8.0f} a second, {size} boxes at once", flush=True)
        await asyncio.gather(*(box.destroy() for box in boxes))
    return True


async def rate_of(boxes: list[Sandbox], run: Callable[[Sandbox], Awaitable[object]], num_each: int) -> float:
    """Commands a second, `num_each` in each box, one after the other there."""

    async def user(box: Sandbox) -> None:
        for _ in range(num_each):
            await run(box)

    began = time.perf_counter()
    await asyncio.gather(*map(user, boxes))
    return num_each * len(boxes) / (time.perf_counter() - began)


async def measure_density(spec: SandboxSpec, is_quick: bool) -> bool:
    """Boxes alive, idle after one command; what the machine has less by them, kernel's share included."""
    num = num_of(100, is_quick)
    before = free_bytes()
    boxes = [await open_sandbox(spec) for _ in range(num)]
    for box in boxes:
        await box.exec(["true"])
    each = max(1, (before - free_bytes()) / num)
    print(f"  {num} boxes alive: {each / 2**20:.2f} MiB each, {2**30 / each:.0f} per GiB", flush=True)
    began = time.perf_counter()
    await asyncio.gather(*(box.destroy() for box in boxes))
    print(f"  all destroyed in {time.perf_counter() - began:.2f} s", flush=True)
    return True


async def measure_flood(spec: SandboxSpec, is_quick: bool) -> bool:
    box = await open_sandbox(spec)
    await box.exec(["sh", "-c", "yes | head -c 1000000"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    drained = 0
    for script in ("yes", "yes >&2", "yes & yes >&2", "cat /dev/zero"):
        done = await box.exec(["sh", "-c", script], timeout_s=0.5 if is_quick else 3.0)
        drained += done.stdout_bytes + done.stderr_bytes
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    await box.destroy()
    said = f"{drained / 1e9:.2f} GB printed, peak memory of the harness grew by {grown / 2**20:.1f} MiB"
    return verdict(said, f"under {FLOOD_AIM_BYTES >> 20} MiB", grown < FLOOD_AIM_BYTES)


def measure_leaks(spec: SandboxSpec, num: int) -> bool:
    """Owners that are killed: every second one while it opens a box, the others while a command runs."""
    marks = set()
    for number in range(num):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                asyncio.run(own(spec, writer))
            finally:
                os._exit(1)
        os.close(writer)
        if number % 2:
            os.read(reader, 1)  # its command runs
        else:
            time.sleep(0.001 * (number % 100))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        marks.add(pid)
    deadline = time.monotonic() + LEAK_PATIENCE_S
    while (left := leftovers(marks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for what in left[:10]:
        print(f"  left until a host looks: {what}")
    reap_leftovers()
    reaped, left = len(left), leftovers(marks)
    for what in left[:10]:
        print(f"  left by the host's reaper: {what}")
    said = f"{num} owners killed; {reaped} processes, groups and containers left for the host's reaper, then"
    return verdict(f"{said} {len(left)}", "none", not left)


async def own(spec: SandboxSpec, writer: int) -> None:
    """(owner) A box with a command in it, until the end."""
    box = await open_sandbox(spec)
    command = asyncio.create_task(box.exec(["sh", "-c", "sleep 1000 & sleep 1000"]))
    await asyncio.sleep(0.01)
    os.write(writer, b"x")
    await command


def leftovers(pids: set[int]) -> list[str]:
    """Processes that carry the mark of one of these owners, their control groups and containers; and runners
    whose bubblewrap is gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        owners = [read_mark(os.fsdecode(word)) for word in words]
        if any(owner is not None and owner.pid in pids for owner in owners):
            found.append(f"process {folder.name} {b' '.join(words)[:80]!r}")
        if RUNNER_INSIDE.encode() in words and not any(owners) and is_orphan(folder):
            found.append(f"runner {folder.name}")
    where = cgroups.find_hierarchy()
    if isinstance(where, cgroups.Hierarchy):
        for group in {*where.memory.glob("consilience-*"), *where.pids.glob("consilience-*")}:
            if group.name.split("-")[1].isdigit() and int(group.name.split("-")[1]) in pids:
                found.append(f"group {group}")
    for name, owner in labelled_containers(engine_socket()):
        if owner.split(":")[1:2] and owner.split(":")[1] in set(map(str, pids)):
            found.append(f"container {name}")
    return found


def is_orphan(process: Path) -> bool:
    """Whether a runner (a folder of /proc) has lost what started it; the parent of its forks is a runner."""
    try:
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        words = Path("/proc", parent, "cmdline").read_bytes().split(b"\0")
        if RUNNER_INSIDE.encode() in words or any(read_mark(os.fsdecode(word)) for word in words):
            return False
        time.sleep(0.2)  # it may be ending
        return bool((process / "cmdline").read_bytes())
    except OSError:
        return False


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def verdict(found: str, aim: str, is_met: bool) -> bool:
    print(f"  {'ok' if is_met else 'MISSED'}: {found}; the aim is {aim}", flush=True)
    return is_met


MEASURES = {
    "exec": measure_exec,
    "create": measure_create,
    "rate": measure_rate,
    "density": measure_density,
    "flood": measure_flood,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", default="auto", choices=("auto", "bwrap", "docker"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--owners", type=int, default=1000, help="killed in the table leaks")
    parser.add_argument("--table", nargs="+", choices=TABLES, default=TABLES)
    chosen = parser.parse_args()
    for offer in available():
        print(offer)
    spec = SandboxSpec(driver=chosen.driver, limits=Limits(memory_bytes=128 << 20, workspace_bytes=8 << 20))
    is_met = True
    for table in TABLES:
        if table not in chosen.table:
            continue
        print(f"\n{table} (load {os.getloadavg()[0]:.1f})", flush=True)
        if table == "leaks":
            is_met &= measure_leaks(spec, num_of(chosen.owners, chosen.quick))
        else:
            is_met &= asyncio.run(MEASURES[table](spec, chosen.quick))
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
