"""What a sandboxed command costs here: exec, run_python, read, write, reset, starts, a pool's throughput.

    python -m bench.sandbox_exec [--driver auto|bwrap|docker|insecure_subprocess] [--num 200] [--size 2]

Prints one line a measurement: minimum, median and 95th percentile in milliseconds. Other load on
the machine shows up in it; the load average is printed beside.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable

from consilience.sandboxes.pool import SandboxPool
from consilience.sandboxes.probe import available, open_sandbox
from consilience.sandboxes.protocol import Isolation, SandboxSpec


async def measure(name: str, work: Callable[[], Awaitable[object]], num: int) -> None:
    await work()
    took_ms = []
    for _ in range(num):
        began = time.perf_counter()
        await work()
        took_ms.append((time.perf_counter() - began) * 1e3)
    took_ms.sort()
    p95 = took_ms[int(0.95 * (num - 1))]
    print(f"{name:28s} {took_ms[0]:8.2f} {statistics.median(took_ms):8.2f} {p95:8.2f} ms")


async def start_and_destroy(spec: SandboxSpec) -> None:
    await (await open_sandbox(spec)).destroy()


async def throughput(spec: SandboxSpec, size: int, num: int) -> None:
    pool = SandboxPool(spec, size, uses_per_box=10**6)
    boxes = [await pool.lease() for _ in range(size)]
    for box in boxes:
        await pool.release(box)

    async def job(box) -> None:
        await box.run_python("print(sum(i * i for i in range(1000)))")

    began = time.perf_counter()
    await pool.run_all([job] * num)
    seconds = time.perf_counter() - began
    await pool.close()
    print(f"pool of {size}, lease + run_python + reset: {num / seconds:.0f} programs/s")


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--driver", default="auto")
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--size", type=int, default=2)
    chosen = parser.parse_args()
    for offer in available():
        print(offer)
    is_insecure = chosen.driver == "insecure_subprocess"
    level = Isolation.RLIMIT if is_insecure else Isolation.BWRAP_USER
    spec = SandboxSpec(driver=chosen.driver, min_isolation=level, allow_insecure=is_insecure)
    box = await open_sandbox(spec)
    print(f"\n{box.enforced.level.label}, load {os.getloadavg()[0]:.1f}; minimum, median, p95")
    await box.write("file", b"x" * 1000)
    await measure("exec true", lambda: box.exec(["true"]), chosen.num)
    await measure("exec python3 -c pass", lambda: box.exec(["python3", "-c", "pass"]), chosen.num // 4)
    await measure("run_python print(1)", lambda: box.run_python("print(1)"), chosen.num)
    await measure("read 1 kB", lambda: box.read("file"), chosen.num)
    await measure("write 1 kB", lambda: box.write("file", b"x" * 1000), chosen.num)
    await measure("reset", box.reset, chosen.num)
    await box.destroy()
    await measure("start, verify and destroy", lambda: start_and_destroy(spec), 10)
    await throughput(spec, chosen.size, chosen.num * 2)


if __name__ == "__main__":
    asyncio.run(main())
