"""Judge of programs from stdin to stdout (sandboxes.md 5.5, tier A): nothing that it compares is in a box.

Each case is a fresh process in an emptied box: the candidate's own main program, with one input on its stdin.
Its capped output comes here; the expected one never leaves. Exit codes and stderr are no evidence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.code_scores import candidate_source, shuffled
from consilience.rewards.interface import Completion, Tier
from consilience.sandboxes.protocol import ExecStatus

TIER = Tier.PROGRAM
MAX_SOURCE = 65_536  # characters of a program
TIMEOUT_S = 7.0  # wall time of all cases; emptying the box after the last may take two more
TOLERANCE = 1e-6  # of `numbers`, absolute and relative: what six printed digits say


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "passed"} of metadata {"inputs": [text], "outputs": [text], "checker": name}.

    checker  "lines" (white space at line ends apart), "tokens" (any white space), "numbers" (to 1e-6)
    SandboxLost when the box died. RewardError without a box, or for a checker that does not exist.
    """
    if sandbox is None:
        raise RewardError("the program judge needs a sandbox; set needs_sandbox for this domain")
    name = metadata.get("checker", "lines")
    if name not in CHECKERS:
        raise RewardError(f"checker {name!r} does not exist; there are {', '.join(sorted(CHECKERS))}")
    expected = metadata["outputs"]
    source = candidate_source(completion.text)
    passed = 0.0
    if source and len(source) <= MAX_SOURCE:
        outputs = run_program(source, metadata["inputs"], sandbox)
        passed = sum(
            got is not None and CHECKERS[name](got, want) for got, want in zip(outputs, expected, strict=True)
        ) / len(expected)
    correct = float(passed == 1.0)
    return {"reward": correct, "correct": correct, "passed": passed}


def run_program(source: str, inputs: Sequence[str], sandbox: Any) -> list[str | None]:
    """What the program printed for every input, None where it met a limit or printed no text."""
    outputs: list[str | None] = [None] * len(inputs)
    deadline = time.monotonic() + TIMEOUT_S
    for place in shuffled(len(inputs), source):
        sandbox.empty()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return outputs
        try:
            result = sandbox.run_python(source, stdin=inputs[place].encode(), timeout_s=left_s)
        except UnicodeEncodeError:
            return outputs
        if result.status in (ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR):
            raise SandboxLost(f"the judge box answered {result.status.value}")
        if result.status not in (ExecStatus.OK, ExecStatus.NONZERO):
            return outputs
        outputs[place] = result.stdout.decode("utf-8", "replace") if result.status is ExecStatus.OK else None
    return outputs


def same_lines(got: str, want: str) -> bool:
    clean = lambda text: [line.rstrip() for line in text.rstrip().split("\n")]
    return clean(got) == clean(want)


def same_tokens(got: str, want: str) -> bool:
    return got.split() == want.split()


def same_numbers(got: str, want: str) -> bool:
    """Finite numbers only, as many as expected."""
    try:
        found, wanted = [float(word) for word in got.split()], [float(word) for word in want.split()]
    except ValueError:
        return False
    if len(found) != len(wanted) or not all(map(math.isfinite, found)):
        return False
    return all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(found, wanted))


CHECKERS: dict[str, Callable[[str, str], bool]] = {
    "lines": same_lines,
    "tokens": same_tokens,
    "numbers": same_numbers,
}
