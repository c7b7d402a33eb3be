"""Judge of patches by hidden test suites (sandboxes.md 5.5, tier C).

Candidate and tests must share a process here, so nothing that happens in it is believed alone. The patch is
read strictly and applied outside (`patches.py`), in a box that the agent never had; tests enter over stdin,
under random names, each beside a twin that must fail (`canaries.py`); every test must report, once, with the
run's nonce (`suite_run.py`). A pass is at times, and always where something is suspicious, run again in the
same box with the base's text in the changed files: tests that pass then are passed by something else.

What remains: a candidate that reads the tests in its own process and forges each result by what its test
expects cannot be excluded. Prefer tiers A and B.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from typing import Any

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.canaries import Disguised, disguise
from consilience.rewards.code_scores import FENCE
from consilience.rewards.interface import Completion, Tamper, Tier
from consilience.rewards.patches import PatchError, apply_patch
from consilience.rewards.suite_run import LimitMet, place_tree, run_suite

TIER = Tier.SUITE
TIMEOUT_S = 5.0  # wall time of all test files of one tree
MIN_TIMEOUT_S = 0.05
AUDITED_SHARE = 0.05
SUSPICIOUS = re.compile(
    r"_getframe|currentframe|f_back|f_locals|f_globals|gc\.get_|sys\.modules|settrace|setprofile|unittest|pytest|"
    r"__eq__|__import__|builtins|atexit|os\.write|os\._exit|fdopen|/proc/|ctypes|inspect"
)


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "passed", "dropped"} of the patch an episode left, or else wrote as its text.

    metadata  base {path: text}, tests {path: source}, fails_before and passes_before ["path::id"], allowed
              patterns of paths that a patch may change
    passed    share of the required tests that passed; dropped: protected paths that the patch touched
    Tamper when a test and its twin pass, or tests pass with the patch taken back. SandboxLost when the box
    died, or does not grade the base in time either. RewardError without a box.
    """
    if sandbox is None:
        raise RewardError("the suite judge needs a sandbox; set needs_sandbox for this domain")
    nothing = {"reward": 0.0, "correct": 0.0, "passed": 0.0, "dropped": 0.0}
    patch = completion.patch if completion.patch is not None else patch_text(completion.text)
    try:
        applied = apply_patch(patch, metadata["base"], allowed=metadata.get("allowed", ("*.py",)))
    except PatchError:
        return nothing
    tree = {path: text for path, text in {**metadata["base"], **applied.files}.items() if text is not None}
    try:
        passed = passed_tests(tree, metadata["tests"], sandbox)
    except LimitMet:
        require_base(metadata, sandbox)
        return {**nothing, "dropped": float(len(applied.dropped))}
    required = [*metadata["fails_before"], *metadata["passes_before"]]
    share = sum(name in passed for name in required) / len(required)
    if share == 1.0 and is_audited(patch, has_dropped=bool(applied.dropped)):
        audit(metadata, applied.files, sandbox)
    correct = float(share == 1.0)
    return {"reward": correct, "correct": correct, "passed": share, "dropped": float(len(applied.dropped))}


def patch_text(text: str) -> str:
    """The diff of an answer: inside its first fence, or all of it."""
    _, fence, rest = text.partition(FENCE)
    return rest.partition(FENCE)[0].partition("\n")[2] if fence else text


def passed_tests(
    tree: Mapping[str, str], tests: Mapping[str, str], sandbox: Any, *, is_fresh: bool = True
) -> set[str]:
    """The ids ("path::name") that passed on a tree, each file in a process of its own; all share `TIMEOUT_S`.

    Tamper when a test and its twin pass. LimitMet, SandboxLost.
    """
    if is_fresh:
        sandbox.begin()
    place_tree(tree, sandbox)
    passed: set[str] = set()
    deadline = time.monotonic() + TIMEOUT_S
    for path, source in tests.items():
        suite = disguise(source)
        report = run_suite(suite, sandbox, timeout_s=max(MIN_TIMEOUT_S, deadline - time.monotonic()))
        if report is not None:
            names = {name for hidden, name in suite.tests.items() if report[hidden]}
            _refuse_twins(report, suite, names, path)
            passed |= {f"{path}::{name}" for name in names}
    return passed


def _refuse_twins(report: Mapping[str, bool], suite: Disguised, passed: set[str], path: str) -> None:
    """Tamper where a test and its twin both pass: a wrong answer may meet the twin's expectation alone."""
    forged = [name for hidden, name in suite.twins.items() if report[hidden] and name in passed]
    if forged:
        raise Tamper(
            f"{len(forged)} of {len(suite.twins)} tests passed together with what must then fail, as "
            f"{path}::{forged[0]}"
        )


def is_audited(patch: str, *, has_dropped: bool) -> bool:
    """Whether a pass is run again without the patch: what is suspicious, and a share of the rest."""
    drawn = int.from_bytes(hashlib.sha256(patch.encode("utf-8", "replace")).digest()[:4]) / 2**32
    added = "\n".join(line for line in patch.split("\n") if line.startswith("+"))
    return has_dropped or SUSPICIOUS.search(added) is not None or drawn < AUDITED_SHARE


def audit(metadata: Mapping[str, Any], changed: Mapping[str, str | None], sandbox: Any) -> None:
    """The counterfactual run: the same box with all that was left in it, the changed files as they were."""
    new = [path for path in changed if path not in metadata["base"]]
    if new:
        sandbox.exec(["rm", "-f", "--", *new])
    try:
        passed = passed_tests(metadata["base"], metadata["tests"], sandbox, is_fresh=False)
    except LimitMet:
        return
    still = [name for name in metadata["fails_before"] if name in passed]
    if still:
        raise Tamper(f"{still[0]} passes although the patch was taken back")


def require_base(metadata: Mapping[str, Any], sandbox: Any) -> None:
    """SandboxLost unless a new box grades the base tree within its limits."""
    sandbox.renew()
    try:
        passed_tests(metadata["base"], metadata["tests"], sandbox)
    except LimitMet as error:
        raise SandboxLost(f"the base tree itself meets a limit of the judge box: {error}") from None


def faults_of_task(metadata: Mapping[str, Any], gold: str, sandbox: Any) -> list[str]:
    """Why a task may not be used; empty if gold passes, and base and an empty stub fail as they must."""
    base, tests = metadata["base"], metadata["tests"]
    fails, keeps = set(metadata["fails_before"]), set(metadata["passes_before"])
    applied = apply_patch(gold, base, allowed=metadata.get("allowed", ("*.py",)))
    gold_tree = {path: text for path, text in {**base, **applied.files}.items() if text is not None}
    faults: list[str] = [f"the gold patch touches {path}" for path in applied.dropped]
    if not fails:
        faults.append("no test fails before")
    try:
        faults += [
            f"{name} fails with the gold patch"
            for name in sorted((fails | keeps) - passed_tests(gold_tree, tests, sandbox))
        ]
        before = passed_tests(base, tests, sandbox)
        faults += [f"{name} passes without the patch" for name in sorted(fails & before)]
        faults += [f"{name} fails without the patch" for name in sorted(keeps - before)]
        stub = {path: "" if path in applied.files else text for path, text in gold_tree.items()}
        if fails <= passed_tests(stub, tests, sandbox):
            faults.append("an empty stub passes")
    except (Tamper, LimitMet) as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults
