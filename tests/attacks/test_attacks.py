"""Every attack of the table on every driver present, with the four invariants checked after each."""

from __future__ import annotations

import time

import file_attacks
import kernel_attacks
import memory_attacks
import network_attacks
import output_attacks
import privilege_attacks
import pytest
import resource_attacks
from attack import Attack
from conftest import IS_LONG_RUN, NOT_ENFORCED, PRESENT
from invariants import Host, Inside, check_answers, check_empty

from consilience.conf.errors import SandboxLost

TABLES = (
    resource_attacks,
    memory_attacks,
    output_attacks,
    file_attacks,
    kernel_attacks,
    privilege_attacks,
    network_attacks,
)
ATTACKS = [attack for table in TABLES for attack in table.ATTACKS]
LATE_S = 0.5  # what a driver may take to end a command, its box full of spinning processes


def _rows() -> list:
    """(driver, attack) where the driver claims to hold against it; the others are named in the summary."""
    rows = []
    for driver, (level, _) in PRESENT.items():
        for attack in ATTACKS:
            if level < attack.level:
                NOT_ENFORCED.append(f"{driver}:{attack.id}")
            elif IS_LONG_RUN or not attack.is_long:
                rows.append(pytest.param(driver, attack, id=f"{driver}-{attack.id}"))
    return rows


@pytest.mark.parametrize(("driver", "attack"), _rows())
def test_the_attack_is_met_and_leaves_nothing_behind(boxes, driver: str, attack: Attack):
    box = boxes.get(driver, attack)
    inside = Inside(box)
    values = attack.arrange(box) if attack.arrange else {}
    host = Host()
    began = time.monotonic()
    is_alive = True
    try:
        result = attack.run(box, values)
        took = time.monotonic() - began
        assert result.status.value in attack.outcomes(box), (result.status, result.stderr[-400:])
        output = result.stdout + result.stderr
        assert attack.says in output, output[-400:]
        assert not attack.hides or attack.hides not in output, output[-400:]
        limit_s = (attack.within_s if attack.within_s is not None else attack.timeout_s) + LATE_S
        assert took < limit_s, f"it took {took:.2f} s"
        if attack.check is not None:
            attack.check(box, result)
        check_answers(box)
    except SandboxLost:
        assert attack.ends_box, "the program ended its box"
        is_alive = False
        boxes.drop(box)
        inside.check(is_alive=False)  # before the successor, which may be given the same namespace number
        box = boxes.get(driver, attack)
        check_answers(box)
    if is_alive:
        inside.check(is_alive=True)
    host.check(box_output(attack))
    if is_alive:
        host.check_descriptors()
    check_empty(box)


def box_output(attack: Attack) -> int:
    from conftest import LIMITS

    return attack.limits.get("output_bytes", LIMITS.output_bytes)


def test_ids_are_distinct():
    ids = [attack.id for attack in ATTACKS]
    assert len(set(ids)) == len(ids)
