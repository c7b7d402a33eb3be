"""The proof as stages and the command make it: trainer's side by packed rows, worker's side by decoding."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_trainer
import torch
from native_sampler import NativeSampler

from consilience.cli import prove as proving
from consilience.cli.stage import StageContext
from consilience.conf.errors import ConfigError, WeightsRefused
from consilience.conf.load import from_plain
from consilience.model.checkpoint import to_official
from consilience.model.exact import exact_mode
from consilience.model.quantization import Quantization
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.proof import decoded_logprobs, fixed_prompts
from consilience.rollout.publication_log import read_publications
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint
from consilience.training.expert_engine import ExpertEngine
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from consilience.training.torch_engine import OptimizerSettings, TorchEngine
from tests.rank_processes import on_ranks

torch.set_num_threads(1)


def policy(seed=0, quantization="off"):
    model = small_trainer.small_model(seed)
    model.quantize(Quantization.from_name(quantization))
    return model


def config(**groups):
    plain = {
        "task": {"domains": {"code": {"kind": "code", "max_tokens": 32}}},
        "engine": {"device": "cpu", "threads": 1},
        "rollout": {"max_length": 64, "num_workers": 2},
    }
    return from_plain({**plain, **groups})


def context(root, **groups):
    run = RunFolder(root)
    folder = run.stage("grpo-code").create()
    return StageContext("grpo/code", "code", config(**groups), folder, run, {}, SilentProgress())


@pytest.mark.parametrize("quantization", ["off", "fp4_fp8"])
def test_packed_rows_and_decoding_agree_to_the_last_bit_in_exact_mode(quantization):
    model = policy(quantization=quantization)
    prompts = fixed_prompts(model.config.vocab_size, 64)
    with exact_mode():
        assert proving.trainer_logprobs(model, prompts, True) == decoded_logprobs(model, prompts)


def test_a_stage_records_what_it_proved(tmp_path):
    given = context(tmp_path)
    store = RolloutStore(given.folder.rollouts)
    found = proving.prove_start(given, NativeSampler(policy(3)), TorchEngine(policy()), 6, store)
    row = found["proof"]
    assert (row["num_workers"], row["num_tensors"]) == (1, len(to_official(policy())))
    assert row["quantization"] == ["off", "off"] and 0 <= row["mismatch_max"] < 1e-4
    assert json.loads((given.folder.path / "proofs.jsonl").read_text()) == row
    (publication,) = read_publications(given.folder.rollouts / "publications.log")
    assert publication.version == 6  # the changed weights are no version that a token can have
    off = context(tmp_path / "off", rollout={"proof": "off", "max_length": 64})
    assert proving.prove_start(off, NativeSampler(policy(3)), TorchEngine(policy()), 6, store) == {}


def test_a_stage_whose_worker_computes_with_something_else_does_not_go_on(tmp_path):
    given = context(tmp_path)
    store = RolloutStore(given.folder.rollouts)
    with pytest.raises(WeightsRefused, match="the worker: version 0: prompt 0, position"):
        proving.prove_start(given, NativeSampler(policy(3, "fp8")), TorchEngine(policy()), 0, store)
    assert not (given.folder.path / proving.PROOFS).exists()


def test_a_quantised_sampler_under_an_unquantised_trainer_is_proven_and_its_mismatch_written_down(tmp_path):
    given = context(tmp_path, rollout={"quantization": "fp4_fp8", "max_length": 64})
    store = RolloutStore(given.folder.rollouts)
    row = proving.prove_start(given, NativeSampler(policy(3, "fp4_fp8")), TorchEngine(policy()), 0, store)[
        "proof"
    ]
    assert row["quantization"] == ["off", "fp4_fp8"]
    assert row["mismatch_max"] > 1e-3 and row["mismatch_mean"] > 1e-4
    assert store.publications.trace(0).quantization == "fp4_fp8"


def test_samples_of_another_model_than_the_trained_one_are_refused_unless_they_are_measured(tmp_path):
    other = {"quantization": "fp4", "proof": "off", "max_length": 64}
    with pytest.raises(
        ConfigError, match=r"rollout\.quantization is fp4, engine\.quantization off.*proof=start"
    ):
        context(tmp_path, rollout=other)
    context(tmp_path, rollout=other, engine={"quantization": "fp4"})
    context(tmp_path, rollout={**other, "proof": "start"})


def test_the_command_proves_real_workers_of_a_checkpoint(tmp_path, capsys):
    from consilience.cli.ray_session import close_session

    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    sizes = replace(small_trainer.CONFIG, vocab_size=tokenizer.padded_vocab_size(16))
    model = small_trainer.small_model(0, sizes)
    meta = CheckpointMeta(
        stage="base", seed=1, step=2, special_tokens=dict(tokenizer.special_ids), family="official"
    )
    save_checkpoint(tmp_path / "c", model, tmp_path / "tokenizer.json", meta)
    cfg = config(generate={"checkpoint": str(tmp_path / "c")})
    try:
        assert proving.prove(cfg) == 0
    finally:
        close_session()
    said = capsys.readouterr().out
    assert f"2 workers (shared_memory) hold the {len(to_official(model))} tensors" in said
    assert "252 log-probabilities are the trainer's to the last bit, under changed weights too" in said


CUT = [("fsdp", "off"), ("fsdp", "fp4_fp8"), ("experts", "off"), ("experts", "fp4_fp8"), ("zero 3", "off")]


def cut_engine(kind, quantization, ranks):
    model = policy(quantization=quantization)
    if kind == "fsdp":
        from consilience.training.fsdp_engine import FsdpEngine

        return FsdpEngine(model, ranks=ranks)
    if kind == "experts":
        return ExpertEngine(model, ranks=ranks, expert_ranks=ranks.size)
    from consilience.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(model, OptimizerSettings(kind="adamw"), ranks=ranks, zero_stage=3)


def proven_cut(ranks, root, kind, quantization):
    """A proof of a model cut over the ranks, and the weights after it."""
    given = context(root, engine={"quantization": quantization, "device": "cpu", "threads": 1})
    engine = cut_engine(kind, quantization, ranks)
    sampler = NativeSampler(policy(3, quantization)) if ranks.is_first else None
    store = RolloutStore(given.folder.rollouts)
    found = proving.prove_start(given, sampler, engine, 6, store)
    assert ("publications" in vars(store)) == ranks.is_first  # the others leave its files alone
    return found["proof"], {n: t.numpy() for n, t in (engine.gather_weights() or {}).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "quantization"), CUT)
def test_a_model_cut_over_ranks_proves_what_a_whole_one_does_and_keeps_its_weights(
    kind, quantization, tmp_path
):
    cut = (tmp_path / "cut", kind, quantization)
    (proof, weights), (other, nothing) = on_ranks(2, proven_cut, *cut, folder=tmp_path)
    assert proof == other and not nothing
    given = context(tmp_path / "whole", engine={"quantization": quantization, "device": "cpu", "threads": 1})
    store = RolloutStore(given.folder.rollouts)
    sampler, engine = NativeSampler(policy(3, quantization)), TorchEngine(policy(quantization=quantization))
    whole = proving.prove_start(given, sampler, engine, 6, store)
    assert proof == whole["proof"] and proof["num_tokens"] > 0
    assert all(
        np.array_equal(weights[name], tensor.numpy()) for name, tensor in to_official(policy()).items()
    )
    assert json.loads((tmp_path / "cut" / "stages" / "grpo-code" / proving.PROOFS).read_text()) == proof


def fooled_cut(ranks, root):
    given = context(root)
    sampler = NativeSampler(policy(3, "fp8")) if ranks.is_first else None
    store = RolloutStore(given.folder.rollouts)
    proving.prove_start(given, sampler, cut_engine("fsdp", "off", ranks), 0, store)


@pytest.mark.slow
def test_a_worker_that_computes_with_something_else_is_found_by_a_cut_model_too(tmp_path):
    with pytest.raises(AssertionError, match="the worker: version 0: prompt 0, position"):
        on_ranks(2, fooled_cut, tmp_path / "cut", folder=tmp_path, limit_s=30.0)
