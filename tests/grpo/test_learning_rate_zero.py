"""At learning rate 0 nothing drifts: not a bit of the weights, not a bit between sampler and trainer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from native_sampler import NativeSampler

from consilience.grpo.train import GrpoSettings, GrpoStage, train_grpo
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.quantization import Quantization
from consilience.model.transformer import Transformer
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

CONFIG = replace(TINY, vocab_size=80, index_topk=8)
META = CheckpointMeta(stage="grpo", seed=3, step=0, special_tokens={"<bos>": 0})
STEPS = 3


def policy(quantization="off"):
    model = initialize(Transformer(CONFIG), 0)
    model.quantize(Quantization.from_name(quantization))
    return model


def run(folder, lr, *, exact=True, trainer="off", sampler="off"):
    """Metrics rows, the publications on the disk, the workers' sampler."""
    (folder / "tokenizer-source.json").write_text("{}")
    engine = TorchEngine(policy(trainer), OptimizerSettings(lr=lr), exact=exact)
    workers, log = NativeSampler(policy(sampler), exact=exact), MemorySink()
    store = RolloutStore(folder / "rollouts", quantization=sampler)
    stage = GrpoStage(
        engine,
        policy(trainer),
        GrpoSettings(STEPS, seed=2),
        store=store,
        decode=str,
        checkpoints=StageCheckpoints(
            folder / "c", engine, folder / "tokenizer-source.json", META, every_s=1e9
        ),
        log=log,
        clock=StageClock(),
        progress=SilentProgress(),
    )
    jobs_of = lambda step: [SimpleNamespace(uid=f"{step}/{g}/{i}") for g in range(2) for i in range(3)]
    train_grpo(stage, workers, jobs_of)
    return log.rows, store.publications.publications, {v for r in store.read() for v in r.weight_version}


@pytest.mark.parametrize("quantization", ["off", "fp4_fp8"])
def test_over_a_run_neither_weights_nor_log_probabilities_drift_by_a_bit(tmp_path, quantization):
    rows, publications, versions = run(tmp_path, 0.0, trainer=quantization, sampler=quantization)
    assert len(rows) == STEPS and versions == set(range(STEPS))
    assert [p.version for p in publications] == list(range(STEPS + 1))
    for publication in publications[1:]:
        drifted = [n for n, t in publication.tensors.items() if t != publications[0].tensors[n]]
        assert drifted == [] and publication.digest == publications[0].digest
    for row in rows:  # the gradient is there, so a step was taken
        assert row["grad_norm"] > 0 and row["lr"] == 0.0
        assert row["mismatch_max"] == row["mean_abs_log_ratio"] == row["mean_kl"] == 0.0


def test_without_exact_mode_the_weights_stand_still_and_the_mismatch_does_not_grow(tmp_path):
    rows, publications, _ = run(tmp_path, 0.0, exact=False)
    assert len({p.digest for p in publications}) == 1
    assert 0 < max(row["mismatch_max"] for row in rows) < 1e-4  # fp32 in two orders of summation


def test_at_another_learning_rate_every_matrix_moves_so_the_measure_is_not_blind(tmp_path):
    rows, publications, _ = run(tmp_path, 1e-3)
    assert len({p.digest for p in publications}) == STEPS + 1
    first, last = publications[0].tensors, publications[-1].tensors
    still = [n for n in first if first[n] == last[n] and len(first[n].shape) == 2]
    # GRPO's loss reaches no indexer (it only picks), answers are too short for the widest compressor, and
    # nothing trains a hash table
    apart = ("indexer", "layers.2.attn.compressor", "tid2eid")
    assert [n for n in still if not any(part in n for part in apart)] == []
    assert all(row["mismatch_max"] == 0.0 for row in rows) and rows[-1]["mean_abs_log_ratio"] > 0


def test_a_quantised_sampler_under_an_unquantised_trainer_has_a_mismatch_that_every_step_logs(tmp_path):
    rows, publications, _ = run(tmp_path, 0.0, trainer="off", sampler="fp4_fp8")
    assert {p.quantization for p in publications} == {"fp4_fp8"}
    assert all(row["mismatch_max"] > 1e-3 and row["mean_abs_log_ratio"] > 1e-4 for row in rows)
