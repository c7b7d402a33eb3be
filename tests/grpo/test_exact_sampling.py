"""In exact mode the log-probabilities that a trainer recomputes are the sampler's, to the last bit."""

from dataclasses import replace

import pytest
import torch

from consilience.grpo.advantage import group_advantages
from consilience.grpo.corrections import Corrections
from consilience.grpo.train import GrpoSettings, train_phase
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.quantization import Quantization
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.token_routing import stitched
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

CONFIG = replace(TINY, vocab_size=80, index_topk=8)
SHARED = tuple(range(5, 45))  # a prefix that all prompts have


def policy(quantization):
    model = initialize(Transformer(CONFIG), 0)
    model.quantize(Quantization.from_name(quantization))
    return model


def sampled(quantization, exact, temperature, **cut):
    """Records of three groups with prompts and answers of different lengths, five rows at a time."""
    engine = NativeEngine(policy(quantization), max_rows=5, max_length=200, exact=exact, records_routing=True)
    requests = [
        Request(
            uid=f"{group}-{i}",
            prompt_ids=SHARED + tuple(range(50, 53 + 7 * group)),
            sampling=SamplingParams(
                temperature=temperature, max_tokens=60 + 15 * i, seed=10 * group + i, **cut
            ),
            group=str(group),
        )
        for group in range(3)
        for i in range(3)
    ]
    engine.submit(requests)
    done = {}
    while len(done) < len(requests):
        done |= {c.uid: c for c in engine.step()}
    return [record(request, done[request.uid]) for request in requests]


def record(request, completed):
    tokens = completed.token_ids
    reward = float(request.uid.endswith("0"))
    length = len(request.prompt_ids) + len(tokens)
    return RolloutRecord(
        uid=request.uid,
        group=request.group,
        domain="math",
        effort="chat",
        teacher=None,
        prompt_ids=request.prompt_ids,
        token_ids=tokens,
        logprobs=completed.logprobs,
        loss_mask=(1,) * len(tokens),
        weight_version=(0,) * len(tokens),
        finish=FinishReason.STOP,
        outcome=Outcome(OutcomeKind.GRADED),
        reward=reward,
        reward_parts={"correct": reward},
        kept=completed.kept,
        routing=stitched(length, [(length - 1, completed.routing)]),
    )


def report_of(records, quantization, exact, temperature, **given):
    engine = TorchEngine(policy(quantization), OptimizerSettings(lr=1e-3), exact=exact)
    advantages = group_advantages([r.reward for r in records], [r.group for r in records])
    settings = GrpoSettings(1, temperature=temperature, row_tokens=512, **given)
    return train_phase(engine, policy(quantization), records, advantages, settings, 1)


def mismatch(*given):
    return report_of(*given)["mismatch_max"]


@pytest.mark.parametrize(
    ("quantization", "temperature"),
    [("off", 1.0), ("off", 0.8), ("fp4", 1.0), ("fp8", 1.0), ("fp4_fp8", 1.0)],
)
def test_sampler_and_trainer_do_not_differ_by_a_bit_in_exact_mode(quantization, temperature):
    records = sampled(quantization, True, temperature)
    assert mismatch(records, quantization, True, temperature) == 0.0
    assert mismatch(records, quantization, False, temperature) > 0.0  # so the measure is not blind


@pytest.mark.parametrize("quantization", ["off", "fp4"])
def test_in_exact_mode_no_measure_of_mismatch_is_above_zero_and_no_routing_would_differ(quantization):
    records = sampled(quantization, True, 0.8)
    names = ("kl_k1", "kl_k3", "gap_max", "out_of_bounds")
    for corrections in (Corrections(), Corrections(token_truncate=2.0, geometric_mask=(0.999, 1.002))):
        found = report_of(records, quantization, True, 0.8, replay_routing=True, corrections=corrections)
        assert [found[f"sampler_{name}"] for name in names] == [0.0] * 4
        assert found["routing_differs"] == 0.0 and 0.99 < found["routing_replayed"] < 1.0
    found = report_of(records, quantization, False, 0.8, replay_routing=True)
    assert min(found[f"sampler_{name}"] for name in ("kl_k3", "gap_max")) > 0.0


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20, "min_p": 0.02}])
def test_a_truncated_sampler_and_a_trainer_that_replays_its_sets_do_not_differ_by_a_bit(cut):
    records = sampled("off", True, 0.8, **cut)
    given = {"replay_routing": True, "replay_kept_sets": True}
    assert report_of(records, "off", True, 0.8, **given)["sampler_gap_max"] == 0.0
    assert 0 < report_of(records, "off", False, 0.8, **given)["sampler_gap_max"] < 1e-4
    # Without the sets the trainer's own distribution is another one.
    assert report_of(records, "off", True, 0.8, replay_routing=True)["sampler_gap_max"] > 0.02
