"""What teaches, what is masked, and that nothing masked is left in a loss or a denominator."""

from dataclasses import replace

import pytest
import torch
from small_teachers import CountingLoader, Sampler, model, record, registry_of, run, samples, side
from small_trainer import GradientKeeper

from consilience.distill.samples import score_request, training_samples, without
from consilience.rollout.records import FinishReason

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {"code": 1, "math": 2})


def test_what_has_no_teacher_was_aborted_or_sampled_nothing_teaches_nothing():
    good = record("a", "math", (5, 6))
    others = [
        record("b", None, (5, 6)),
        record("c", "math", (5, 6), finish=FinishReason.ABORT),
        record("d", "math", (5, 6), loss_mask=(0, 0)),
    ]
    assert training_samples([good, *others]) == [good]


def test_a_bad_teacher_of_several_takes_the_whole_sample_along():
    records = [record("a", "math+code", (5, 6)), record("b", "math", (5, 6))]
    kept, masked = without(records, {"a@code"})
    assert (kept, masked) == ([records[1]], [records[0]])


@pytest.mark.parametrize("normalisation", ["tokens", "teacher", "sequences"])
def test_a_masked_sample_is_counted_and_the_rest_trains_as_if_it_had_never_been(
    registry, tmp_path, normalisation
):
    all_of_them = samples(0)
    spoilt = all_of_them[2]
    loader = CountingLoader(spoil=[score_request(spoilt).token_ids])
    teachers = side(registry, tmp_path / "a" / "states", loader)
    settings = {"steps": 1, "mini_batches": 1, "normalisation": normalisation}
    engine, log, result = run(
        tmp_path / "a", teachers, Sampler(samples), engine=GradientKeeper(model()), **settings
    )
    assert log.rows[0]["masked_bad_states"] == 1
    rest = [r for r in all_of_them if r is not spoilt]
    teachers = side(registry, tmp_path / "b" / "states")
    other, its_log, its_result = run(
        tmp_path / "b", teachers, Sampler(lambda step: rest), engine=GradientKeeper(model()), **settings
    )
    assert its_log.rows[0]["masked_bad_states"] == 0
    assert result["kl"] == its_result["kl"]
    assert log.rows[0]["token_share"] == its_log.rows[0]["token_share"]
    for name, gradient in engine.steps[0].items():
        assert torch.equal(gradient, other.steps[0][name]), name


def test_the_masked_sample_is_recorded_as_seen_so_that_a_resume_does_not_ask_again(registry, tmp_path):
    spoilt = replace(samples(0)[1])
    loader = CountingLoader(spoil=[score_request(spoilt).token_ids])
    teachers = side(registry, tmp_path / "states", loader)
    _, log, _ = run(tmp_path, teachers, Sampler(samples), steps=2)
    assert [row["masked_bad_states"] for row in log.rows] == [1, 0]
    assert spoilt.uid not in {row.uid for _, row in log.samples}
