"""Judge of the code domain: the candidate runs in a box, the verdict falls outside of it.

Function calls by value (sandboxes.md 5.5, tier B): each case is a process of its own that receives the
candidate's source and one hidden input, never an expected output, nor how many cases there are, nor which
this is. What comes back is one JSON text that must equal what this side knows. A candidate that forges it
still has to know the answer; silence, noise, a second reply, an early exit, a hang or a crash are failure.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.interface import Completion, Tier
from consilience.sandboxes.protocol import ExecStatus

TIER = Tier.CALLS
MAX_SOURCE = 8_192  # characters of a candidate
MAX_VALUE = 1_024  # characters of one output
TIMEOUT_S = 4.0  # wall time of all cases of one candidate
FENCE = "```"

# Runs in a fork of the box's interpreter. What the candidate prints goes to stderr; only text of a bounded
# length counts as an output.
HARNESS = f"""
import json, os, sys
source, x = json.loads(sys.stdin.buffer.read())
channel = os.dup(1)
os.dup2(2, 1)
namespace = {{"__name__": "candidate"}}
exec(compile(source, "candidate.py", "exec"), namespace)
y = namespace["f"](x)
with os.fdopen(channel, "w") as reply:
    reply.write(json.dumps(y if type(y) is str and len(y) <= {MAX_VALUE} else None))
"""


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "passed"}.

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
    if "def f" in source and len(source) <= MAX_SOURCE:
        outputs = run_candidate(source, metadata["inputs"], sandbox)
        passed = sum(got == want for got, want in zip(outputs, expected)) / len(expected)
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


def run_candidate(source: str, inputs: Sequence[str], sandbox: Any) -> list[str | None]:
    """f(x) for every input, None where no one text came back. The cases share `TIMEOUT_S`.

    They run in an order of their own for each candidate. SandboxLost when the box is gone or broke its
    protocol.
    """
    outputs: list[str | None] = [None] * len(inputs)
    left_s = TIMEOUT_S
    for place in shuffled(len(inputs), source):
        try:
            request = json.dumps([source, inputs[place]]).encode()
        except UnicodeEncodeError:
            return outputs
        result = sandbox.run_python(HARNESS, stdin=request, timeout_s=left_s)
        if result.status in (ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR, ExecStatus.DENIED):
            raise SandboxLost(f"the judge box answered {result.status.value}")
        if result.status is ExecStatus.OK:
            outputs[place] = _text(result.stdout)
        elif result.status is not ExecStatus.NONZERO:
            return outputs  # a limit was met: the box is not asked again
        left_s -= result.wall_s
        if left_s <= 0:
            return outputs
    return outputs


def shuffled(num: int, source: str) -> list[int]:
    """0 to num - 1 in an order that follows from the candidate, so that a repeated grading is the same."""
    order = list(range(num))
    random.Random(hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()).shuffle(order)
    return order


def _text(reply: bytes) -> str | None:
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) and len(value) <= MAX_VALUE else None
