"""Judge of the code domain: the candidate runs in a box, the verdict falls outside of it.

Function calls by value (sandboxes.md 5.5, tier B): each case is a process of its own that receives the
candidate's source and one hidden input, never an expected output, nor how many cases there are, nor which
this is. What comes back is one JSON text that must equal what this side knows. A candidate that forges it
still has to know the answer; silence, noise, a second reply, an early exit, a hang or a crash are failure.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.interface import Completion, Tier
from consilience.sandboxes.protocol import ExecStatus

TIER = Tier.CALLS
MAX_SOURCE = 8_192  # characters of a candidate
MAX_REPLY = 16_384  # characters of one value as JSON
MAX_DEPTH = 16
TIMEOUT_S = 4.0  # wall time of all cases of one candidate
FENCE = "```"

NOTHING = object()  # in the place of a value that did not come

# Runs in a fork of the box's interpreter. What the candidate prints goes to stderr; only plain values count.
HARNESS = """
import json, os, sys
source, x = json.loads(sys.stdin.buffer.read())
channel = os.dup(1)
os.dup2(2, 1)
namespace = {"__name__": "candidate"}
exec(compile(source, "candidate.py", "exec"), namespace)
y = namespace["FUNCTION"](x)
def is_plain(y, depth=0):
    if depth > 16: return False
    if type(y) in (list, tuple): return all(is_plain(v, depth + 1) for v in y)
    if type(y) is dict: return all(type(k) is str and is_plain(v, depth + 1) for k, v in y.items())
    return y is None or type(y) in (str, int, float, bool)
with os.fdopen(channel, "w") as reply:
    reply.write(json.dumps([y], allow_nan=False) if is_plain(y) else "")
"""


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "passed"} of metadata {"inputs": [value], "outputs": [value], "function": name}.

    function takes one value ("f" if not given); values are JSON-plain, and equal in type too
    passed   share of hidden cases whose output equals the expected one
    correct  1.0 if all do
    reward   correct, or metadata["pass_reward"] times passed
    SandboxLost when the box died (infrastructure). RewardError without a box.
    """
    if sandbox is None:
        raise RewardError("the code judge needs a sandbox; set needs_sandbox for this domain")
    expected = metadata["outputs"]
    source = candidate_source(completion.text)
    passed = 0.0
    function = metadata.get("function", "f")
    if f"def {function}" in source and len(source) <= MAX_SOURCE:
        outputs = run_candidate(source, metadata["inputs"], sandbox, function)
        passed = sum(map(same_value, outputs, expected)) / len(expected)
    correct = float(passed == 1.0)
    return {
        "reward": correct or metadata.get("pass_reward", 0.0) * passed,
        "correct": correct,
        "passed": passed,
    }


def candidate_source(text: str) -> str:
    """The answer's code: inside its first fence, or all of it."""
    _, fence, rest = text.partition(FENCE)
    if not fence:
        return text.strip()
    code = rest.partition(FENCE)[0]
    first, newline, body = code.partition("\n")
    return (body if newline and first.strip() in ("", "python", "py", "python3") else code).strip()


def run_candidate(source: str, inputs: Sequence[Any], sandbox: Any, function: str = "f") -> list[Any]:
    """function(x) for every input, NOTHING where no one plain value came back. The cases share `TIMEOUT_S`.

    They run in an order of their own for each candidate, each in an emptied box. SandboxLost when the box is
    gone or broke its protocol.
    """
    if not function.isidentifier():
        raise RewardError(f"the function's name is {function!r}; an identifier is needed")
    harness = HARNESS.replace("FUNCTION", function)
    outputs: list[Any] = [NOTHING] * len(inputs)
    deadline = time.monotonic() + TIMEOUT_S
    for place in shuffled(len(inputs), source):
        try:
            request = json.dumps([source, inputs[place]]).encode()
        except UnicodeEncodeError:
            return outputs
        sandbox.empty()  # takes seconds after a flood of folders, and counts
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return outputs
        result = sandbox.run_python(harness, stdin=request, timeout_s=left_s)
        if result.status in (ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR, ExecStatus.DENIED):
            raise SandboxLost(f"the judge box answered {result.status.value}")
        if result.status is ExecStatus.OK:
            outputs[place] = read_value(result.stdout)
        elif result.status is not ExecStatus.NONZERO:
            return outputs  # a limit was met: the box is not asked again
    return outputs


def shuffled(num: int, source: str) -> list[int]:
    """0 to num - 1 in an order that follows from the candidate, so that a repeated grading is the same."""
    order = list(range(num))
    random.Random(hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()).shuffle(order)
    return order


def read_value(reply: bytes) -> Any:
    """The one value of a reply `[value]`; NOTHING if it is not plain: too long or deep, NaN, infinite."""
    if len(reply) > MAX_REPLY:
        return NOTHING
    try:
        value = json.loads(reply, parse_constant=_refuse, parse_float=_finite)
        is_plain = type(value) is list and len(value) == 1 and _depth(value) <= MAX_DEPTH
    except (ValueError, RecursionError):
        return NOTHING
    return value[0] if is_plain else NOTHING


def same_value(got: Any, want: Any) -> bool:
    """Equal in type and value, all the way down: 1, 1.0 and True are three values."""
    if type(got) is not type(want):
        return False
    if isinstance(got, list):
        return len(got) == len(want) and all(map(same_value, got, want))
    if isinstance(got, dict):
        return got.keys() == want.keys() and all(same_value(got[key], want[key]) for key in got)
    return got == want


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no plain number")


def _finite(text: str) -> float:
    """1e999 would be read as infinite."""
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
