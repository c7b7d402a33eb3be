"""Judge of the code domain: the candidate runs in a box, the verdict falls outside of it.

Function calls by value (sandboxes.md 5.5, tiers A and B): the box receives the candidate's source and
the hidden inputs, never an expected output. What comes back is one JSON list that must equal, value by
value, what this side knows. A candidate that forges that list still has to know the answers; silence,
noise, an early exit, a hang or a crash are all failure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.interface import Completion
from consilience.sandboxes.protocol import ExecStatus

MAX_SOURCE = 8_192  # characters of a candidate
MAX_VALUE = 1_024  # characters of one output
TIMEOUT_S = 2.0  # wall time of all cases of one candidate
FENCE = "```"

# Runs in a fork of the box's interpreter, one for all cases of a candidate. What the candidate prints
# goes to stderr; only text of a bounded length counts as an output.
HARNESS = f"""
import json, os, sys
source, inputs = json.loads(sys.stdin.buffer.read())
channel = os.dup(1)
os.dup2(2, 1)
namespace = {{"__name__": "candidate"}}
exec(compile(source, "candidate.py", "exec"), namespace)
outputs = []
for x in inputs:
    try:
        y = namespace["f"](x)
    except Exception:
        y = None
    outputs.append(y if type(y) is str and len(y) <= {MAX_VALUE} else None)
with os.fdopen(channel, "w") as reply:
    reply.write(json.dumps(outputs))
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
    """f(x) for every input; all None unless exactly one value a case came back.

    SandboxLost when the box is gone or broke its protocol.
    """
    nothing: list[str | None] = [None] * len(inputs)
    try:
        request = json.dumps([source, list(inputs)]).encode()
    except UnicodeEncodeError:
        return nothing
    result = sandbox.run_python(HARNESS, stdin=request, timeout_s=TIMEOUT_S)
    if result.status in (ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR, ExecStatus.DENIED):
        raise SandboxLost(f"the judge box answered {result.status.value}")
    if result.status not in (ExecStatus.OK, ExecStatus.NONZERO):
        return nothing
    return _outputs(result.stdout, len(inputs)) or nothing


def _outputs(reply: bytes, num: int) -> list[str | None] | None:
    """The reply as `num` texts or Nones; None if it is anything else."""
    try:
        values = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or len(values) != num:
        return None
    return [value if isinstance(value, str) else None for value in values]
