"""SFT and GRPO on 2 and 4 ranks end where one process does: gradients, weights and reports to 1e-5."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from graded_records import record
from small_trainer import AHEAD, small_model
from stage_ranks import StageParts, assert_ranks_agree, assert_same

from consilience.grpo.async_train import train_grpo_ahead
from consilience.grpo.corrections import Corrections
from consilience.grpo.sft import SupervisedSettings, train_supervised
from consilience.grpo.supervised_batches import Example
from consilience.grpo.train import GrpoSettings, GrpoStage, train_grpo
from consilience.model.checkpoint import load_official
from consilience.model.ranks import ALONE
from consilience.rollout.publishing import verify
from consilience.rollout.store import RolloutStore
from consilience.training.anticipatory_routing import AnticipatoryRouting, AnticipatorySettings
from tests.rank_processes import on_ranks

torch.set_num_threads(1)


def examples():
    generator = torch.Generator().manual_seed(5)
    sizes = [9, 30, 14, 21, 11, 26, 17, 12, 23]
    ids = [torch.randint(2, 40, (size,), generator=generator).tolist() for size in sizes]
    return [Example(tuple(i), tuple(float(at >= 4) for at in range(len(i)))) for i in ids]


def sft(ranks, folder, mode="off"):
    parts = StageParts(small_model(0, AHEAD), ranks, folder)
    settings = SupervisedSettings(
        3, 128, row_tokens=32, micro_tokens=64, warmup=0, balance_weight=0.01, indexer_weight=0.1
    )
    routing = AnticipatoryRouting(AnticipatorySettings(mode, delay=1), 3)
    train_supervised(
        parts.engine, [examples()], settings, anticipatory=routing, start=parts.start, **parts.named()
    )
    return parts.left()


class RankSampler:
    """Answers with two groups of three by the weights published last; a `Sampler` and `RolloutStreams`."""

    def __init__(self):
        self.policy, self.due, self.versions = small_model(0, AHEAD), [], []

    def publish(self, weights, announced, version):
        verify(weights, announced)
        self.versions.append(version)
        load_official(self.policy, weights)

    def generate(self, jobs, on_progress=None, *, durable=None):
        version = self.versions[-1]
        made = []
        for number, job in enumerate(jobs):
            generator = torch.Generator().manual_seed(100 * int(job.uid.split("/")[0]) + number)
            size = 3 + 4 * number
            ids = [*torch.randint(2, 40, (size,), generator=generator).tolist(), 1]
            answer = record(job.uid, ids, float(number % 3 == 0), group=f"g{number // 3}", policy=self.policy)
            # The sampler is a little off, so that ratios, corrections and mismatch have something to say.
            off = tuple(x + 0.01 * (number - 2) for x in answer.logprobs)
            made.append(replace(answer, logprobs=off, weight_version=(version,) * len(ids)))
        return made

    def hand_over(self, jobs, durable):
        self.due.append((jobs, durable))

    def hear(self):
        jobs, durable = self.due.pop(0)
        durable.keep(self.generate(jobs))


def jobs_of(step):
    return [SimpleNamespace(uid=f"{step}/{name}") for name in "abcdef"]


def grpo(ranks, folder, mode="sync", corrections=None):
    parts = StageParts(small_model(0, AHEAD), ranks, folder)
    settings = GrpoSettings(
        2, row_tokens=32, micro_tokens=64, warmup=0, seed=2, corrections=corrections or Corrections()
    )
    stage = GrpoStage(
        parts.engine, small_model(3, AHEAD), settings, RolloutStore(folder / "rollouts"), str, **parts.named()
    )
    sampler = RankSampler() if ranks.is_first else None
    if mode == "sync":
        result = train_grpo(stage, sampler, jobs_of, start=parts.start)
    else:
        result = train_grpo_ahead(stage, sampler, jobs_of, max_age=1, start=parts.start)
    assert sampler is None or sampler.versions == [0, 1, 2]
    assert (folder / "rollouts" / "ledger.log").exists()
    left = parts.left()
    return left | {"result": result, "rows": [without_health(row) for row in left["rows"]]}


def without_health(row):
    """What is the same on every rank: phase health is known to the rank that samples."""
    shared = ("reward", "age_max", "mismatch", "sampler_", "clip", "mean_", "max_", "masked", "grad", "lr")
    return {k: v for k, v in row.items() if k.startswith(shared) or k in ("step", "train_tokens", "mtp_loss")}


def test_two_ranks_train_sft_as_one_process_does(tmp_path):
    one = sft(ALONE, tmp_path / "one")
    two = assert_ranks_agree(on_ranks(2, sft, tmp_path / "two", folder=tmp_path))
    assert len(one["gradients"]) == 3 and len(one["rows"]) == 3
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [2, 4])
def test_sft_under_anticipatory_routing_is_that_of_one_process(size, tmp_path):
    one = sft(ALONE, tmp_path / "one", "always")
    several = assert_ranks_agree(on_ranks(size, sft, tmp_path / "more", "always", folder=tmp_path))
    assert_same(several, one)
    again = on_ranks(size, sft, tmp_path / "again", "always", folder=tmp_path)
    assert_same(again[0], several, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("mode", "corrections"), [("sync", None), ("sync", Corrections(token_truncate=2.0)), ("async", None)]
)
def test_grpo_is_that_of_one_process(size, mode, corrections, tmp_path):
    one = grpo(ALONE, tmp_path / "one", mode, corrections)
    several = assert_ranks_agree(on_ranks(size, grpo, tmp_path / "more", mode, corrections, folder=tmp_path))
    assert len(one["gradients"]) == 4 and one["rows"][0]["sampler_gap_max"] > 0.01
    assert_same(several, one)
