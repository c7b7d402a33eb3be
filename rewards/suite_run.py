"""One test file in one process of a box: its report counts only if it is whole (sandboxes.md 5.5, tier C).

The tests come over stdin and are never in a file that the candidate could read beforehand. A report is a line
with the run's nonce, a test's name and its outcome; every name must come exactly once, in order, then the end
record. stdout of candidate and tests goes to stderr. An exit code says nothing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.rewards.canaries import Disguised
from consilience.sandboxes.protocol import ExecStatus

# The workspace comes last on the path, after all that the harness itself imports: no file of the candidate
# stands in for a module of the library.
HARNESS = """
import sys
place = sys.path.pop(0)
import json, os, types, unittest
sys.path.append(place)
def main(write=os.write, dumps=json.dumps, test_case=unittest.TestCase):
    nonce, source, names = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    os.dup2(2, 1)
    suite = types.ModuleType("suite")
    sys.modules["suite"] = suite
    exec(compile(source, "suite.py", "exec"), suite.__dict__)
    ready = set()
    for name in names:
        owner, _, method = name.rpartition(".")
        try:
            if not owner:
                suite.__dict__[method]()
            elif issubclass(suite.__dict__[owner], test_case):
                kind = suite.__dict__[owner]
                if owner not in ready:
                    kind.setUpClass()
                    ready.add(owner)
                kind(method).debug()
            else:
                getattr(suite.__dict__[owner](), method)()
            outcome = "passed"
        except BaseException:
            outcome = "failed"
        write(channel, (nonce + dumps([name, outcome]) + "\\n").encode())
    write(channel, (nonce + dumps(["END", len(names)]) + "\\n").encode())
main()
"""
LIMITS = (ExecStatus.TIMEOUT, ExecStatus.OOM, ExecStatus.PIDS, ExecStatus.DISK, ExecStatus.OUTPUT_CAPPED)


class LimitMet(Exception):
    """The run met a limit of its box: the candidate's fault, if the base tree grades there in time."""


def place_tree(tree: Mapping[str, str], sandbox: Any) -> None:
    """Writes a tree (path -> text) into the box's workspace. LimitMet for one that the box does not take."""
    try:
        for path, text in tree.items():
            sandbox.write(path, text.encode())
    except OSError as error:
        raise LimitMet(f"the tree cannot be written: {error}") from None


def run_suite(suite: Disguised, sandbox: Any, *, timeout_s: float) -> dict[str, bool] | None:
    """Whether each test and twin passed, by its name in the box; None for a report that is not whole.

    LimitMet; SandboxLost when the box is gone.
    """
    nonce = secrets.token_hex(16)
    request = json.dumps([nonce, suite.source, suite.order]).encode()
    result = sandbox.run_python(HARNESS, stdin=request, timeout_s=timeout_s)
    if result.status in (ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR, ExecStatus.DENIED):
        raise SandboxLost(f"the judge box answered {result.status.value}")
    if result.status in LIMITS:
        raise LimitMet(result.status.value)
    return read_report(result.stdout, nonce, suite.order)


def read_report(stdout: bytes, nonce: str, order: tuple[str, ...]) -> dict[str, bool] | None:
    """The outcomes by name; None unless every line is the expected one."""
    lines = stdout.split(b"\n")
    if lines[-1] or len(lines) != len(order) + 2:
        return None
    found: dict[str, bool] = {}
    for line, name in zip(lines, (*order, "END")):
        if not line.startswith(nonce.encode()):
            return None
        try:
            told = json.loads(line[len(nonce) :])
        except (ValueError, RecursionError):
            return None
        wanted = ([name, "passed"], [name, "failed"]) if name != "END" else (["END", len(order)],)
        if told not in wanted:
            return None
        found[name] = told[1] == "passed"
    del found["END"]
    return found
