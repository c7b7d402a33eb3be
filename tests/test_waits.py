"""No wait without a limit: every call that may block for ever has a timeout, or says why it needs none.

What is looked for: `ray.get` and `ray.wait`; `get`, `join`, `wait`, `acquire`, `result`, `communicate`,
`recv`, `accept`, `shutdown` on anything; subprocess calls; `flock`; `os.read`, `waitpid`, `wait4`; `select`;
`with` a lock or an executor; connections. A wait inside `asyncio.timeout` has a limit. Where a limit makes no
sense, the line ends with `# no limit: ` and the reason. What this cannot see: a read on a file object, an
await of a bare future.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("rollout", "grpo", "distill", "teachers", "rewards", "sandboxes", "training", "tasks", "cli")
REASON = re.compile(r"#.*\bno limit: (\S+ ){2,}\S+")  # three words at least
LOCK = re.compile(r"(^|_)(lock|guard|mutex|semaphore|condition)$", re.IGNORECASE)
# method -> how many positional arguments it has once its timeout is among them
METHODS = {"get": 2, "join": 1, "wait": 1, "acquire": 2, "result": 1, "communicate": 2, "exception": 1}
# function by its dotted name -> the same
FUNCTIONS = {
    "ray.get": 99,
    "ray.wait": 99,
    "subprocess.run": 99,
    "subprocess.call": 99,
    "subprocess.check_call": 99,
    "subprocess.check_output": 99,
    "select.select": 4,
    "connection.wait": 2,
    "asyncio.wait": 99,
    "asyncio.wait_for": 2,
    "futures.wait": 2,
    "futures.as_completed": 2,
    "urlopen": 3,
    "urllib.request.urlopen": 3,
    "socket.create_connection": 2,
    "http.client.HTTPConnection": 99,
}
ALWAYS = {"recv", "recv_bytes", "recv_into", "accept"}  # the limit is set elsewhere, if it is
NO_WAIT = {"os.waitpid": "WNOHANG", "os.wait4": "WNOHANG", "fcntl.flock": "LOCK_NB", "fcntl.lockf": "LOCK_NB"}


def waits(source: str) -> Iterator[tuple[int, str]]:
    """(line, code) of every wait without a limit or a reason."""
    lines = source.splitlines()
    for node, is_limited in _nodes(ast.parse(source), False):
        found = not is_limited and (_is_limitless(node) if isinstance(node, ast.Call) else _locks(node))
        if not found:
            continue
        last = node.items[-1].context_expr if isinstance(node, ast.With | ast.AsyncWith) else node
        if not any(REASON.search(line) for line in lines[node.lineno - 1 : last.end_lineno]):
            yield node.lineno, ast.unparse(node).splitlines()[0]


def _nodes(node: ast.AST, is_limited: bool) -> Iterator[tuple[ast.Call | ast.With | ast.AsyncWith, bool]]:
    """Calls and `with` blocks, each with whether an `asyncio.timeout` stands around it."""
    if isinstance(node, ast.Call | ast.With | ast.AsyncWith):
        yield node, is_limited
    if isinstance(node, ast.AsyncWith):
        is_limited |= any(_name(item.context_expr).startswith("asyncio.timeout") for item in node.items)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        is_limited = False  # it may run elsewhere
    for child in ast.iter_child_nodes(node):
        yield from _nodes(child, is_limited)


def _name(node: ast.AST) -> str:
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def _is_limitless(call: ast.Call) -> bool:
    name = _name(call)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    timeout = next((v for k, v in keywords.items() if k in ("timeout", "timeout_s", "limit_s")), None)
    if any(isinstance(v, ast.Constant) and v.value is False for k, v in keywords.items() if k in _POLITE):
        return False
    has_timeout = timeout is not None and not (isinstance(timeout, ast.Constant) and timeout.value is None)
    if name in NO_WAIT:
        return NO_WAIT[name] not in ast.unparse(call)
    if name in FUNCTIONS:
        return not has_timeout and len(call.args) < FUNCTIONS[name]
    if name == "os.read" or method in ALWAYS:
        return True
    if method == "shutdown":
        return not (keywords or call.args) or "True" in ast.unparse(call)
    if method not in METHODS or has_timeout:
        return False
    if not call.args:
        return True
    if isinstance(call.args[0], ast.Constant) and call.args[0].value is None:
        return True
    if method == "communicate":
        return len(call.args) < 2
    # `get(key)`, `join(words)`, `wait(seconds)`: an argument that is no flag is a key, or the timeout itself
    first = call.args[0]
    is_flag = isinstance(first, ast.Constant) and first.value is True
    return is_flag and len(call.args) < METHODS[method]


_POLITE = ("block", "blocking", "wait")


def _locks(block: ast.With | ast.AsyncWith) -> bool:
    for item in block.items:
        name = _name(item.context_expr)
        if LOCK.search(name) or name.endswith("PoolExecutor"):
            return True
    return False


@pytest.mark.parametrize(
    "code",
    [
        "ray.get(ref)",
        "ray.get([a, b])",
        "ray.wait(refs, num_returns=1)",
        "ray.get(ref, timeout=None)",
        "queue.get()",
        "queue.get(True)",
        "queue.get(block=True)",
        "future.result()",
        "future.result(None)",
        "thread.join()",
        "event.wait()",
        "self._process.wait()",
        "lock.acquire()",
        "with self._lock: pass",
        "async def f():\n async with self._lock: pass",
        "with ThreadPoolExecutor(3) as threads: pass",
        "threads.shutdown(wait=True)",
        "ray.shutdown()",
        "subprocess.run(command, check=True)",
        "process.communicate()",
        "process.communicate(data)",
        "fcntl.flock(file, fcntl.LOCK_EX)",
        "os.waitpid(pid, 0)",
        "os.read(fd, 100)",
        "end.recv(1 << 16)",
        "connection.wait(sources)",
        "select.select([a], [], [])",
        "async def f():\n token = await self._ready.get()",
        "async def f():\n async with asyncio.timeout(3):\n  def g(): queue.get()",
        "queue.get()  # no limit",
        "queue.get()  # no limit: because",
    ],
)
def test_the_rule_itself_catches_what_it_should(code):
    assert len(list(waits(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "ray.get(ref, timeout=limit_s)",
        "ray.wait(refs, timeout=1.0)",
        "queue.get(timeout=1)",
        "queue.get(True, 5)",
        "queue.get(block=False)",
        "names.get(key)",
        "', '.join(names)",
        "event.wait(0.5)",
        "thread.join(timeout=left_s)",
        "lock.acquire(timeout=3)",
        "lock.acquire(blocking=False)",
        "threads.shutdown(wait=False)",
        "subprocess.run(command, timeout=20)",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "os.waitpid(pid, os.WNOHANG)",
        "connection.wait(sources, 1.0)",
        "async def f():\n async with asyncio.timeout(3):\n  await self._ready.get()",
        "with clock.phase('train'): pass",
        "with torch.no_grad(): pass",
        "queue.get()  # no limit: idle until the end",
        "with self._lock:  # no limit: held for a few statements\n pass",
    ],
)
def test_the_rule_itself_leaves_alone_what_has_a_limit(code):
    assert list(waits(code)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_waits_for_ever(room):
    found = {
        f"{file.relative_to(ROOT)}:{line}": code
        for file in sorted((ROOT / room).rglob("*.py"))
        for line, code in waits(file.read_text(encoding="utf-8"))
    }
    assert found == {}, "give each a limit, or end its line with '# no limit: ' and the reason"
