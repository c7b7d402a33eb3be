"""Fuzzing of the prompt protocol: conversations, damaged turns and stray tokens against its promises.

    python -m consilience.rollout.fuzzing --seconds 600 --seed 0

Case `number` of a seed is always the same one. The first case that breaks a promise
(rollout/protocol_checks.py), or raises anything but ProtocolError, is made smaller, written to a file in
`--failures` and printed; tests/rollout/test_fuzzing.py replays the files that are kept there.
`--reference encoding_dsv4.py` also compares each case with a checkpoint's own encoder, `--tokenizer` uses
a checkpoint's tokenizer.json.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import ConsilienceError
from consilience.rollout.fuzz_cases import fuzz_tokenizer, make_case
from consilience.rollout.protocol_checks import Case, Reference, check
from consilience.rollout.tokenizer import Tokenizer

SLOWEST_S = 10.0  # a case is a few kilobytes and takes milliseconds; slower means time runs away
SHRINK_TRIES = 3000


def failure_of(case: Case, tokenizer: Tokenizer, reference: Reference | None = None) -> str:
    """What is wrong with how `case` is treated: error and place. "" if nothing is."""
    return _try(case, tokenizer, reference)[0]


def shrink(case: Any, is_failing: Callable[[Any], bool], tries: int = SHRINK_TRIES) -> Any:
    """The smallest case found that still fails, by leaving out ever smaller pieces."""
    progress = True
    while progress and tries > 0:
        progress = False
        for smaller in _smaller(case):
            tries -= 1
            if tries <= 0:
                break
            if is_failing(smaller):
                case, progress = smaller, True
                break
    return case


def run(seconds: float, seed: int, failures: Path, tokenizer: Tokenizer, reference: Reference | None) -> int:
    """Fuzz for `seconds`: 0 if every promise held, else 1 with the failing case in `failures`."""
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    for number in itertools.count():
        if time.monotonic() - began >= seconds:
            break
        case = make_case(seed, number, tokenizer)
        failure, outcome = _try(case, tokenizer, reference)
        if failure:
            small = shrink(case, lambda c, f=failure: _kind(failure_of(c, tokenizer, reference)) == _kind(f))
            print(f"seed {seed}, case {number}: {failure}\n{_save(small, failure, failures)}")
            return 1
        outcomes[f"{case['kind']} {outcome}"] += 1
    spent, total = time.monotonic() - began, sum(outcomes.values())
    print(f"seed {seed}: {total} cases in {spent:.0f} s, {total / spent:.0f} a second, no promise broken")
    for outcome, count in sorted(outcomes.items()):
        print(f"  {count:8d}  {outcome}")
    return 0


def _try(case: Case, tokenizer: Tokenizer, reference: Reference | None) -> tuple[str, str]:
    """(what is wrong or "", outcome)."""
    began = time.monotonic()
    try:
        outcome = check(case, tokenizer, reference)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = [frame for frame in frames if frame.name != "_promise"][-1]
        return f"{type(error).__name__} at {place.name}:{place.lineno}: {error}", ""
    if time.monotonic() - began > SLOWEST_S:
        return f"Slow: took {time.monotonic() - began:.0f} s", ""
    return "", outcome


def _kind(failure: str) -> str:
    """Error and place without the message, which changes while a case shrinks."""
    return ":".join(failure.split(":")[:2])


def _smaller(value: Any) -> Iterator[Any]:
    """Values with something left out, the largest pieces first."""
    if isinstance(value, str):
        yield from (value[:start] + value[end:] for start, end in _windows(len(value)))
    if isinstance(value, list):
        yield from (value[:start] + value[end:] for start, end in _windows(len(value)))
        for i, inner in enumerate(value):
            yield from ([*value[:i], smaller, *value[i + 1 :]] for smaller in _smaller(inner))
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
        for key, inner in value.items():
            yield from ({**value, key: smaller} for smaller in _smaller(inner))


def _windows(length: int) -> Iterator[tuple[int, int]]:
    size = length
    while size:
        yield from ((start, start + size) for start in range(0, length, size))
        size //= 2


def _save(case: Case, failure: str, folder: Path) -> str:
    """Write the case to a file named by its content; what to print about it."""
    text = json.dumps(case)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    file.write_text(json.dumps({"failure": failure[:500], "case": case}, indent=1) + "\n", encoding="utf-8")
    return f"{text}\nkept in {file}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fuzzing", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"))
    parser.add_argument("--reference", type=Path, help="a checkpoint's encoding/encoding_dsv4.py")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json or its folder")
    options = parser.parse_args(words)
    try:
        tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else fuzz_tokenizer()
        reference = Reference(options.reference) if options.reference else None
    except ConsilienceError as error:
        print(error, file=sys.stderr)
        return 2
    return run(options.seconds, options.seed, options.failures, tokenizer, reference)


if __name__ == "__main__":
    sys.exit(main())
