"""Choosing a box: the strongest there is, never a weaker one than asked for, and a refusal that helps."""

from __future__ import annotations

import asyncio

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.probe import available, choose, open_sandbox
from consilience.sandboxes.protocol import Isolation, SandboxSpec


def test_this_machine_offers_at_least_one_isolating_driver():
    assert [str(o) for o in available() if o.is_available and o.level >= Isolation.BWRAP_USER]


def test_offers_come_strongest_first_then_what_is_lacking_with_reasons():
    offers = available()
    usable = [offer.level for offer in offers if offer.is_available]
    assert usable == sorted(usable, reverse=True) and usable[-1] is Isolation.RLIMIT
    lacking = offers[len(usable) :]
    assert all(not offer.is_available and offer.reason for offer in lacking)
    assert {offer.driver for offer in offers} == {"docker", "bwrap", "insecure_subprocess"}
    assert "NOT A SECURITY BOUNDARY" in str(offers[len(usable) - 1])


def test_auto_opens_the_strongest_and_the_record_agrees_with_the_offer():
    strongest = available()[0]

    async def opened():
        box = await open_sandbox(SandboxSpec(min_isolation=strongest.level))
        enforced, told = box.enforced, await box.exec(["echo", "x"])
        await box.destroy()
        return enforced, told

    enforced, told = asyncio.run(opened())
    assert (enforced.level, enforced.driver) == (strongest.level, strongest.driver)
    assert enforced.memory_cap == strongest.memory_cap
    assert told.is_ok


def test_a_level_beyond_this_machine_is_refused_with_what_there_is_and_what_to_do():
    strongest = available()[0]
    with pytest.raises(SandboxUnavailable) as refused:
        asyncio.run(open_sandbox(SandboxSpec(min_isolation=Isolation.VM)))
    text = str(refused.value)
    assert "need vm" in text and strongest.level.label in text
    assert f"set sandbox.min_isolation={strongest.level.label}" in text


@pytest.mark.parametrize("driver", ["bwrap", "docker"])
def test_a_named_driver_is_not_replaced_by_another(driver):
    levels = [o.level for o in available() if o.driver == driver and o.is_available]
    spec = SandboxSpec(driver=driver, min_isolation=Isolation.VM)
    with pytest.raises(SandboxUnavailable, match=f"need vm by {driver}"):
        choose(spec)
    if not levels:
        with pytest.raises(SandboxUnavailable, match="none here"):
            choose(SandboxSpec(driver=driver, min_isolation=Isolation.NONE))


def test_the_insecure_fallback_is_never_chosen_for_somebody():
    with pytest.raises(SandboxUnavailable, match="allow_insecure"):
        choose(SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE))
    with pytest.raises(SandboxUnavailable, match="need bwrap_user by insecure_subprocess"):
        choose(SandboxSpec(driver="insecure_subprocess", allow_insecure=True))
    chosen = choose(SandboxSpec("insecure_subprocess", min_isolation=Isolation.RLIMIT, allow_insecure=True))
    assert chosen.__name__ == "open_insecure"


def test_an_image_the_engine_lacks_makes_docker_unavailable_not_an_error():
    offers = {o.driver: o for o in available(image="consilience/no-such-image:0")}
    assert not offers["docker"].is_available and offers["docker"].reason


def test_an_unknown_driver_is_refused_with_the_allowed_ones():
    with pytest.raises(SandboxUnavailable, match=r"'podman'; allowed are auto, docker, bwrap"):
        choose(SandboxSpec(driver="podman"))
