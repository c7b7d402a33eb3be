"""One entry of the table of attacks: what a program in a box does, what must be seen, which outcome it has.

A program of kind "python" runs in a fork of the runner, "isolated" in an interpreter of its own, "sh" in a
shell. `probes` builds the third sort: many attempts, each of which must be refused.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from consilience.sandboxes.blocking import BlockingSandbox
from consilience.sandboxes.protocol import ExecResult, Isolation

BREACH, TRIED = b"BREACH", b"tried"
PRELUDE = """
import ctypes, errno, os, platform, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = platform.machine() == "x86_64"
count = 0
def attempt(name, work):
    global count
    count += 1
    try:
        found = work()
    except (OSError, ValueError, OverflowError):
        return
    if found:
        print("BREACH", name, repr(found)[:200], flush=True)
def call(x86, arm, *arguments):
    number = x86 if X86 else arm
    if number is None:
        return None
    words = (ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    done = libc.syscall(ctypes.c_long(number), *words)
    return None if done == -1 else done
def opened(path, flags=os.O_RDONLY):
    os.close(os.open(path, flags | os.O_NONBLOCK))
    return path
def written(path, text=b"1"):
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)
    return path
def held(path, size=1):
    with open(path, "rb") as file:
        return file.read(size) or None
"""


@dataclass(frozen=True)
class Attack:
    """`expect` and `by_rlimit` are outcomes, several of them in one text; `by_rlimit` where no cgroup counts.

    says, hides     bytes that must, must not, be in stdout or stderr
    level           the weakest isolation at which it must hold
    limits          changes to the suite's limits; such an attack gets a box of its own
    within_s        longest wall time of the command
    ends_box        the program may take its box with it; then its successor must work
    arrange, check  the host's part before (its value is formatted into the program) and after
    is_long         only `make attacks` runs it
    """

    id: str
    what: str
    program: str
    expect: str = "ok"
    by_rlimit: str = ""
    kind: str = "python"
    says: bytes = b""
    hides: bytes = BREACH
    level: Isolation = Isolation.BWRAP_USER
    limits: dict[str, Any] = field(default_factory=dict)
    stdin: bytes = b""
    timeout_s: float = 4.0
    within_s: float | None = None
    ends_box: bool = False
    arrange: Callable[[BlockingSandbox], dict[str, Any]] | None = None
    check: Callable[[BlockingSandbox, ExecResult], None] | None = None
    is_long: bool = False

    def run(self, box: BlockingSandbox, values: dict[str, Any]) -> ExecResult:
        program = self.program
        for name, value in values.items():
            program = program.replace(f"<{name}>", str(value))
        if self.kind == "python":
            return box.run_python(program, stdin=self.stdin, timeout_s=self.timeout_s)
        argv = ["python3", "-I", "-c", program] if self.kind == "isolated" else ["sh", "-c", program]
        return box.exec(argv, stdin=self.stdin, timeout_s=self.timeout_s)

    def outcomes(self, box: BlockingSandbox) -> set[str]:
        is_counted = box.enforced.memory_cap == "cgroup"
        return set((self.expect if is_counted or not self.by_rlimit else self.by_rlimit).split())


def probes(attack_id: str, what: str, body: str, **more: Any) -> Attack:
    """An attack of many attempts; it must get through all of them, and none may succeed."""
    program = PRELUDE + textwrap.dedent(body) + "\nprint('tried' if count else 'nothing', flush=True)\n"
    return Attack(attack_id, what, program, says=TRIED, **more)


def python(attack_id: str, what: str, body: str, **more: Any) -> Attack:
    return Attack(attack_id, what, "import os, signal, socket, sys, time\n" + textwrap.dedent(body), **more)


def shell(attack_id: str, what: str, body: str, **more: Any) -> Attack:
    return Attack(attack_id, what, textwrap.dedent(body), kind="sh", **more)
