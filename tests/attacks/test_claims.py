"""docs/sandboxes.md names every attack, and no attack that does not exist."""

import re
from pathlib import Path

from conftest import PRESENT
from test_attacks import ATTACKS

from consilience.sandboxes.protocol import Isolation

ROOT = Path(__file__).parents[2]


def test_each_claim_has_its_attack_and_each_attack_its_claim():
    page = (ROOT / "docs" / "sandboxes.md").read_text(encoding="utf-8")
    sessions = (ROOT / "tests" / "attacks" / "test_sessions.py").read_text(encoding="utf-8")
    named = set(re.findall(r"\b[RFOKNS]\d\d[a-f]?\b", page))
    there = {attack.id for attack in ATTACKS}
    there |= {name.upper() for name in re.findall(r"(?:\"|test_)([sS]\d\d)", sessions)}
    assert named == there


def test_the_insecure_driver_claims_nothing_and_every_other_everything():
    assert PRESENT["insecure"][0] is Isolation.RLIMIT
    weakest = min(level for name, (level, _) in PRESENT.items() if name != "insecure")
    above = {attack.id for attack in ATTACKS if not Isolation.RLIMIT < attack.level <= weakest}
    assert above <= {"R10"}  # only a cgroup caps processors
