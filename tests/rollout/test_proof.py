"""The proof: it passes for an engine that computes with what it was given, and names what another one did."""

import copy
import math

import pytest
import small_policy
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.checkpoint import to_official
from consilience.model.exact import exact_mode, log_softmax
from consilience.model.quantization import Quantization
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import build_fake_worker
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.proof import (
    WholeTrainer,
    changed_weights,
    compare_logprobs,
    decoded_logprobs,
    fixed_prompts,
    prove,
)
from consilience.rollout.publishing import announce, tensor_records
from consilience.rollout.worker import RolloutWorker

torch.set_num_threads(1)

PROMPTS = fixed_prompts(small_policy.CONFIG.vocab_size, 40)


def policy(seed=0, quantization="off"):
    model = small_policy.policy(seed).float()
    model.quantize(Quantization.from_name(quantization))
    return model


@torch.no_grad()
def logprobs(model, prompts, exact):
    """What a trainer computes: whole rows at once."""
    with exact_mode(exact):
        ids = torch.tensor([list(p) for p in prompts])
        logits = model.head(model.hidden(ids)).float()
        each = log_softmax(logits.flatten(0, 1)).view_as(logits)
        chosen = each[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return tuple(map(tuple, chosen.tolist()))


class Workers:
    """Two engines in this process, as the proof sees a pool of workers."""

    def __init__(self, make=NativeEngine, quantization="off"):
        self.engines = {
            f"worker {i}": (make if i else NativeEngine)(
                policy(5 + i, quantization), max_rows=2, max_length=64
            )
            for i in range(2)
        }
        self.versions = []

    def publish(self, weights, announced, version):
        self.versions.append(version)
        for engine in self.engines.values():
            engine.publish(weights, announced, version)

    def evidence(self, prompts, exact):
        return {name: engine.evidence(prompts, exact) for name, engine in self.engines.items()}


def proven(workers, model, quantization="off", **settings):
    publication = announce(to_official(model), 4, quantization)
    return prove(workers, WholeTrainer(model, logprobs), publication, PROMPTS, **settings)


def test_engines_that_do_as_told_are_proven_and_end_with_the_published_weights():
    workers, model = Workers(), policy()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    proof = proven(workers, model)
    assert (proof.num_workers, proof.num_tensors) == (2, len(to_official(model)))
    assert proof.num_tokens == 4 * 39
    assert 0 < proof.mismatch_max < 1e-4  # two orders of summation in fp32, log-probs of size 10
    assert workers.versions == [4, -1, 4]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    expected = tensor_records(to_official(model))
    for engine in workers.engines.values():
        assert tensor_records(to_official(engine.model)) == expected and engine.state().weight_version == 4
    assert proven(workers, model, is_exact=True).mismatch_max == 0.0


class Forgetful(NativeEngine):
    """Keeps the attention sinks it has, as some engines' reload does, and says so when asked."""

    def publish(self, weights, announced, version):
        kept = {n: t.clone() for n, t in to_official(self.model).items() if n.endswith("attn_sink")}
        super().publish(weights, announced, version)
        if version == -1:
            for name, tensor in to_official(self.model).items():
                if name in kept:
                    tensor.copy_(kept[name])


def test_an_engine_that_keeps_old_sinks_is_named_with_the_tensor_and_both_digests():
    found = r"worker 1: version -1: tensor layers\.0\.attn\.attn_sink: found float32 \[4\] sha256 .*expected"
    with pytest.raises(WeightsRefused, match=found):
        proven(Workers(Forgetful), policy())


class Pretending(NativeEngine):
    """Exports what it was given and computes with other sinks."""

    def evidence(self, prompts, exact):
        told = super().evidence(prompts, exact)
        if self.state().weight_version != -1:
            return told
        model = copy.deepcopy(self.model)
        for name, tensor in to_official(model).items():
            if name.endswith("layers.2.attn.attn_sink"):
                tensor.zero_()
        with exact_mode(exact):
            return type(told)(told.tensors, decoded_logprobs(model, prompts), told.device)


def test_an_engine_that_computes_with_something_else_is_named_with_prompt_position_and_both_values():
    found = r"worker 1: version -1: prompt 0, position \d+: found log-probability -\d.*, expected -\d.*holds"
    with pytest.raises(WeightsRefused, match=found):
        proven(Workers(Pretending), policy())


class Deaf(NativeEngine):
    def publish(self, weights, announced, version):
        if version == 4 and self.state().weight_version == -1:
            return  # the last publication is lost
        super().publish(weights, announced, version)


def test_an_engine_that_misses_one_publication_is_found():
    with pytest.raises(WeightsRefused, match="worker 1: version 4: tensor"):
        proven(Workers(Deaf), policy())


def test_every_tensor_of_the_changed_weights_is_another_and_fits_the_model():
    model = policy()
    with torch.no_grad():
        model.layers[0].attn.attn_sink.zero_()
    weights = to_official(model)
    changed = changed_weights(weights)
    same = [n for n, t in weights.items() if torch.equal(t, changed[n])]
    assert same == []
    assert all(t.dtype == changed[n].dtype and t.shape == changed[n].shape for n, t in weights.items())
    assert all(bool(changed[n].isfinite().all()) for n in weights)
    assert tensor_records(changed) == tensor_records(changed_weights(weights))


def test_decoding_token_by_token_gives_the_trainer_s_bits_in_exact_mode_and_nearly_so_without():
    model = policy()
    with exact_mode():
        assert decoded_logprobs(model, PROMPTS) == logprobs(model, PROMPTS, True)
    gaps = torch.tensor(decoded_logprobs(model, PROMPTS)) - torch.tensor(logprobs(model, PROMPTS, False))
    assert 0 < gaps.abs().max() < 1e-4


def test_log_probs_are_compared_to_the_bit_unless_a_tolerance_is_given_and_nan_never_passes():
    compare_logprobs(((-1.0, -2.0),), ((-1.0, -2.0),), 3, "w")
    with pytest.raises(WeightsRefused, match=r"w: version 3: prompt 0, position 2: .*-2\.5, expected -2\.0"):
        compare_logprobs(((-1.0, -2.5),), ((-1.0, -2.0),), 3, "w")
    compare_logprobs(((-1.0, -2.5),), ((-1.0, -2.0),), 3, "w", tolerance=0.5)
    for tolerance in (0.0, math.inf):
        with pytest.raises(WeightsRefused, match="position 1"):
            compare_logprobs(((math.nan,),), ((-1.0,),), 3, "w", tolerance)


def test_a_proof_that_could_not_tell_changed_weights_apart_is_refused():
    def blind(model, prompts, exact):
        return tuple(tuple(-0.01 * (t + 1) for t in range(len(p) - 1)) for p in prompts)

    class Fakes(Workers):
        def __init__(self):
            super().__init__()
            self.engines = {"fake": FakeRolloutEngine(lambda *_: [1])}

    model = policy()
    with pytest.raises(WeightsRefused, match="blind"):
        prove(Fakes(), WholeTrainer(model, blind), announce(to_official(model), 4), PROMPTS, tolerance=1e-6)


def test_prompts_are_fixed_cross_the_windows_and_fit_the_engine():
    assert fixed_prompts(61, 40) == PROMPTS and {len(p) for p in PROMPTS} == {40}
    long = fixed_prompts(129280, 1 << 20)
    assert {len(p) for p in long} == {160} and max(map(max, long)) > 1 << 16
    assert {len(p) for p in fixed_prompts(61, 1)} == {2}


def test_an_engine_that_cannot_tell_says_what_to_do():
    worker = build_fake_worker()
    assert len(worker.evidence(PROMPTS, True).logprobs) == 4
    silent = RolloutWorker(object(), worker.tokenizer)  # pyright: ignore[reportArgumentType]
    with pytest.raises(EngineError, match=r"cannot prove its weights; set rollout\.proof=off"):
        silent.evidence(PROMPTS, True)
    for each in (worker, silent):
        each.close()
