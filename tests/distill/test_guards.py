"""Each published failure is seen where it is and nowhere else; its counter-measure does what it says."""

from dataclasses import replace

import pytest
import torch
from small_teachers import EOS, Sampler, model, phase, record, registry_of, run, samples, side
from small_trainer import GradientKeeper

from consilience.distill.guards import (
    ADVICE,
    GuardSettings,
    cut_at,
    failures,
    full_length,
    guard_samples,
    length_share,
    repeated_share,
    spoken,
    token_factors,
)
from consilience.distill.train import DistillSettings
from consilience.rollout.records import FinishReason

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {"code": 1, "math": 2})


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [([1, 2, 1, 2, 1], 2, 0.5), ([1, 2, 3, 4], 2, 0.0), ([7] * 11, 2, 0.9), ([1, 2], 3, 0.0), ([], 1, 0.0)],
)
def test_repeated_n_grams_are_those_that_came_before(ids, n, share):
    assert repeated_share(ids, n) == pytest.approx(share)


def test_what_a_phase_shows_is_measured_on_all_and_a_sample_that_repeats_leaves_if_asked():
    good, loop = record("a", "math", range(2, 22)), record("b", "math", [5, 6] * 20)
    cut = record("c", "math", range(2, 14), finish=FinishReason.LENGTH)
    seen = [good, loop, cut]
    kept, numbers = guard_samples(seen, GuardSettings(ngram=4))
    assert kept == seen and numbers["masked_repeated"] == 0
    assert numbers["length_mean"] == 72 / 3 and numbers["truncated_share"] == pytest.approx(1 / 3)
    assert numbers["repeating_share"] == pytest.approx(1 / 3)
    assert numbers["repeated_share"] == pytest.approx(35 / 37 / 3)
    kept, numbers = guard_samples(seen, GuardSettings(ngram=4, mask_repeated=True))
    assert kept == [good, cut] and numbers["masked_repeated"] == 1
    assert guard_samples([loop], GuardSettings(ngram=4, mask_repeated=True))[0] == [loop]
    assert guard_samples([], GuardSettings()) == ([], {})


def test_observations_count_neither_for_repetition_nor_for_length():
    observed = record("a", "math", [5, 6] * 20, loss_mask=(1,) * 6 + (0,) * 34)
    assert guard_samples([observed], GuardSettings(ngram=8))[1]["repeated_share"] == 0


def test_a_horizon_cuts_behind_its_share_of_the_sampled_tokens():
    r = record("a", "math", range(2, 12), loss_mask=(1, 1, 0, 1, 1, 0, 1, 1, 1, 1))  # eight sampled
    assert cut_at(r, 1.0) is r
    assert cut_at(r, 0.5).token_ids == (2, 3, 4, 5, 6) and cut_at(r, 0.5).num_sampled == 4
    assert cut_at(r, 0.01).token_ids == (2,)
    assert len(cut_at(r, 0.5).logprobs) == len(cut_at(r, 0.5).weight_version) == 5


def test_factors_fall_along_the_sample_weigh_its_end_and_leave_its_sum():
    r = record("a", "math", [9, 30, 8, EOS], loss_mask=(1, 0, 1, 1))
    assert token_factors(r, GuardSettings(eos=EOS)).tolist() == [1, 0, 1, 1]
    late = token_factors(r, GuardSettings(late_weight=0.5))  # 1, 0.75, 0.5 of 2.25 in all
    assert late.tolist() == pytest.approx([1 / 0.75, 0, 1, 0.5 / 0.75])
    ends = token_factors(r, GuardSettings(eos_weight=4.0, eos=EOS))
    assert ends.tolist() == pytest.approx([0.5, 0, 0.5, 2])
    assert [sum(late), sum(ends)] == pytest.approx([3, 3])
    assert token_factors(record("b", "math", [9]), GuardSettings(late_weight=0.1)) == [1]


def test_the_ramp_ends_at_the_full_length():
    settings = GuardSettings(ramp_phases=4, ramp_from=0.2)
    assert [length_share(step, settings) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert length_share(0, GuardSettings()) == 1


@pytest.mark.parametrize(
    ("numbers", "seen"),
    [
        ({}, []),
        ({"length_mean": 19.0, "truncated_share": 0.3, "repeating_share": 0.1, "late_ratio": 3.0}, []),
        ({"truncated_share": 0.31}, ["length"]),
        ({"length_mean": 21.0}, ["length"]),
        ({"repeating_share": 0.11}, ["repetition"]),
        ({"eos_gap_at_end": 0.31}, ["eos"]),
        ({"eos_gap_elsewhere": 0.31, "late_ratio": 3.1}, ["eos", "late"]),
    ],
)
def test_failures_are_what_lies_beyond_the_thresholds(numbers, seen):
    flags = failures(numbers, 10.0, GuardSettings())
    assert [name for name in ADVICE if flags[f"guard_{name}"]] == seen
    assert failures(numbers, None, GuardSettings())["guard_length"] == (
        numbers.get("truncated_share", 0) > 0.3
    )
    assert all(f"{name}: distill.guard." in spoken(flags) for name in seen) and (spoken(flags) == "") == (
        not seen
    )


def test_a_ramp_is_not_taken_for_a_blow_up():
    settings = GuardSettings(ramp_phases=2, ramp_from=0.25)
    cut = {"truncated_share": 0.9, "length_mean": 10.0}
    first = full_length(cut, 0, settings)
    assert first == 40
    assert failures(cut, None, settings, 0)["guard_length"] == 0
    assert failures(cut | {"length_mean": 20.0}, first, settings, 1)["guard_length"] == 0
    assert (
        failures(cut | {"length_mean": 40.0}, first, settings, 2)["guard_length"] == 1
    )  # cut at the full length
    grown = {"truncated_share": 0.0, "length_mean": 79.0}
    assert failures(grown, first, settings, 2)["guard_length"] == 0
    assert failures(grown | {"length_mean": 81.0}, first, settings, 2)["guard_length"] == 1


def test_a_blow_up_is_in_the_metrics_of_its_phase_and_on_the_progress_line(registry, tmp_path):
    def answers(step):
        length = 8 if step == 0 else 30
        tokens = [5, 6, 7, 8] * 8 if step == 2 else range(2, 40)
        made = [record(f"{step}/{i}", name, list(tokens)[:length]) for i, name in enumerate(["math", "code"])]
        return [replace(r, finish=FinishReason.LENGTH) for r in made] if step else made

    guard = GuardSettings(ngram=4, mask_repeated=True, eos=EOS)
    _, log, _ = run(tmp_path, side(registry, tmp_path / "states"), Sampler(answers), guard=guard)
    flags = [(row["guard_length"], row["guard_repetition"]) for row in log.rows]
    assert flags == [(0, 0), (1, 0), (1, 1)]
    assert [row["masked_repeated"] for row in log.rows] == [0, 0, 0]  # all of phase 3 repeat
    assert log.rows[1]["length_mean"] == 30 and log.rows[0]["truncated_share"] == 0
    assert all(f"kl_tenth_{i}" in log.rows[2] for i in range(1, 11)) and log.rows[2]["late_ratio"] > 0


def test_weights_by_place_leave_each_samples_weight_and_move_the_gradient(registry, tmp_path):
    found = {}
    for name, guard in {"plain": GuardSettings(), "late": GuardSettings(late_weight=0.01)}.items():
        engine = GradientKeeper(model())
        report = phase(engine, samples(), side(registry, tmp_path / name), mini_batches=1, guard=guard)
        found[name] = engine.steps[0]["head.weight"], report
    assert found["plain"][1]["token_share"] == found["late"][1]["token_share"]
    assert found["plain"][1]["kl"] == found["late"][1]["kl"]
    assert not torch.allclose(found["plain"][0], found["late"][0])


def test_the_defaults_change_nothing_that_is_trained():
    assert (
        DistillSettings(1).guard == GuardSettings()
        and guard_samples(samples(), GuardSettings())[0] == samples()
    )
