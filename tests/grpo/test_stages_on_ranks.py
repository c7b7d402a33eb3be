"""SFT and GRPO on 2 and 4 ranks end where one process does: gradients, weights and reports to 1e-5."""

import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graded_records import record
from small_trainer import AHEAD, small_model
from stage_ranks import (
    SETTINGS,
    StageParts,
    assert_cut_same,
    assert_divided_same,
    assert_ranks_agree,
    assert_same,
)

from consilience.grpo.async_train import train_grpo_ahead
from consilience.grpo.corrections import Corrections
from consilience.grpo.sft import SupervisedSettings, train_supervised
from consilience.grpo.supervised_batches import Example
from consilience.grpo.train import GrpoSettings, GrpoStage, train_grpo
from consilience.model.checkpoint import load_official
from consilience.model.quantization import Quantization
from consilience.model.ranks import ALONE
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.publishing import verify
from consilience.rollout.store import RolloutStore
from consilience.rollout.token_routing import TokenRouting
from consilience.training.anticipatory_routing import AnticipatoryRouting, AnticipatorySettings
from consilience.training.expert_engine import divide_like
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("SFT", "torch")

torch.set_num_threads(1)


def examples():
    generator = torch.Generator().manual_seed(5)
    sizes = [9, 30, 14, 21, 11, 26, 17, 12, 23]
    ids = [torch.randint(2, 40, (size,), generator=generator).tolist() for size in sizes]
    return [Example(tuple(i), tuple(float(at >= 4) for at in range(len(i)))) for i in ids]


def policy(quantization):
    model = small_model(0, AHEAD)
    model.quantize(Quantization.from_name(quantization))
    return model


def sft(
    ranks,
    folder,
    mode="off",
    context=1,
    optimizer=SETTINGS,
    kind="torch",
    exact=False,
    quantization="off",
    saves=True,
    **given,
):
    model = policy(quantization)
    parts = StageParts(model, ranks.with_context(context), folder, optimizer, kind, exact, saves)
    settings = SupervisedSettings(
        3, 128, row_tokens=32, micro_tokens=64, warmup=0, balance_weight=0.01, indexer_weight=0.1, **given
    )
    routing = AnticipatoryRouting(AnticipatorySettings(mode, delay=1), 3)
    train_supervised(
        parts.engine, [examples()], settings, anticipatory=routing, start=parts.start, **parts.named()
    )
    return parts.left()


class RankSampler:
    """Answers with two groups of three by the weights published last; a `Sampler` and `RolloutStreams`."""

    def __init__(self, replays=False):
        self.replays = replays
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
            if self.replays:
                made[-1] = with_replay(made[-1], generator)
        return made

    def hand_over(self, jobs, durable):
        self.due.append((jobs, durable))

    def hear(self):
        jobs, durable = self.due.pop(0)
        durable.keep(self.generate(jobs))


def with_replay(answer, generator):
    """The record with experts and kept sets by chance, which a trainer has to follow."""
    num, layers = len(answer.token_ids), range(AHEAD.num_hash_layers, AHEAD.num_hidden_layers)
    shape = len(answer.prompt_ids) + num, len(layers), AHEAD.n_routed_experts
    experts = torch.rand(shape, generator=generator).topk(AHEAD.num_experts_per_tok).indices.numpy()
    experts = experts.astype(np.uint8)
    experts[-1] = 255  # nothing was sampled after it
    others = torch.randint(2, 40, (num, 9), generator=generator).numpy()
    sets = [np.union1d(row, [token]) for row, token in zip(others, answer.token_ids)]
    return replace(answer, routing=TokenRouting.of(tuple(layers), experts), kept=KeptSets.of(sets))


def jobs_of(step):
    return [SimpleNamespace(uid=f"{step}/{name}") for name in "abcdef"]


def grpo(
    ranks,
    folder,
    mode="sync",
    corrections=None,
    context=1,
    replays=False,
    kind="torch",
    exact=False,
    quantization="off",
    saves=True,
):
    model = policy(quantization)
    parts = StageParts(model, ranks.with_context(context), folder, kind=kind, exact=exact, saves=saves)
    settings = GrpoSettings(
        2,
        row_tokens=32,
        micro_tokens=64,
        warmup=0,
        seed=2,
        corrections=corrections or Corrections(),
        replay_routing=replays,
        replay_kept_sets=replays,
    )
    reference = small_model(3, AHEAD)
    if kind == "fsdp":
        from consilience.training.fsdp_model import cut_model

        cut_model(reference.requires_grad_(False), ranks)
    divide_like(reference, parts.engine)
    store = RolloutStore(folder / "rollouts")
    stage = GrpoStage(parts.engine, reference, settings, store, str, **parts.named())
    sampler = RankSampler(replays) if ranks.is_first else None
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


@functools.cache
def alone(stage, *given, **named):
    """What one process leaves of a stage; several tests compare with the same."""
    with tempfile.TemporaryDirectory() as folder:
        return stage(ALONE, Path(folder) / "one", *given, **named)


def test_two_ranks_train_sft_as_one_process_does(tmp_path):
    one = alone(sft)
    two = assert_ranks_agree(on_ranks(2, sft, tmp_path / "two", folder=tmp_path))
    assert len(one["gradients"]) == 3 and len(one["rows"]) == 3
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.row("SFT, anticipatory", "torch")
def test_sft_under_anticipatory_routing_is_that_of_one_process(size, tmp_path):
    one = alone(sft, "always")
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
@pytest.mark.row("GRPO, {mode}", "torch")
def test_grpo_is_that_of_one_process(size, mode, corrections, tmp_path):
    one = alone(grpo, mode, corrections)
    several = assert_ranks_agree(on_ranks(size, grpo, tmp_path / "more", mode, corrections, folder=tmp_path))
    assert len(one["gradients"]) == 4 and one["rows"][0]["sampler_gap_max"] > 0.01
    assert_same(several, one)


@pytest.mark.row("rows cut over ranks: SFT", "torch")
def test_two_ranks_that_cut_rows_train_sft_as_one_process_does(tmp_path):
    one = alone(sft)
    two = assert_ranks_agree(on_ranks(2, sft, tmp_path / "two", "off", 2, folder=tmp_path))
    assert_same(two, one)


ALL = Corrections(
    token_truncate=1.01, sequence_truncate=1.05, sequence_mask=(0.9, 1.3), geometric_mask=(0.9, 1.1)
)


def with_context(ranks, folder):
    """Several stages in one group of processes, which cost more than the stages."""
    sharded = replace(SETTINGS, is_sharded=True)
    return [
        sft(ranks, folder / "ahead", "always", 2),
        sft(ranks, folder / "sharded", "off", 2, sharded),
        grpo(ranks, folder / "plain", context=2),
        grpo(ranks, folder / "corrected", "sync", ALL, 2),
        grpo(ranks, folder / "replayed", context=2, replays=True),
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.row("rows cut over ranks: SFT, GRPO", "torch")
def test_stages_whose_rows_are_cut_in_two_are_those_of_one_process(size, tmp_path):
    (folder := tmp_path / "more").mkdir()
    found = list(zip(*on_ranks(size, with_context, folder, folder=tmp_path)))
    several = [assert_ranks_agree(left) for left in found]
    one_by_one = [
        alone(sft, "always"),
        alone(sft),
        alone(grpo),
        alone(grpo, "sync", ALL),
        alone(grpo, replays=True),
    ]
    for one, more in zip(one_by_one, several):
        assert_same(more, one)


def cut_sft(ranks, folder):
    return sft(ranks, folder, kind="fsdp")


@pytest.mark.row("SFT", "fsdp")
def test_sft_with_a_model_cut_over_two_ranks_is_that_of_one_process(tmp_path):
    one = alone(sft)
    two = on_ranks(2, cut_sft, tmp_path / "two", folder=tmp_path)
    assert len(two[0]["rows"]) == 3
    assert_cut_same(two, one)


def cut_with_context(ranks, folder):
    return [
        sft(ranks, folder / "ahead", "always", 2, kind="fsdp"),
        grpo(ranks, folder / "corrected", "sync", ALL, 2, kind="fsdp", saves=False),
        grpo(ranks, folder / "replayed", context=2, replays=True, kind="fsdp", saves=False),
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.row("rows cut over ranks: SFT, GRPO", "fsdp")
def test_rows_and_model_are_cut_over_the_same_ranks(size, tmp_path):
    (folder := tmp_path / "more").mkdir()
    several = zip(*on_ranks(size, cut_with_context, folder, folder=tmp_path))
    one_by_one = [
        alone(sft, "always"),
        alone(grpo, "sync", ALL),
        alone(grpo, replays=True),
    ]
    for one, more in zip(one_by_one, several, strict=True):
        assert_cut_same(more, one)


MODES = [{"exact": True}, {"quantization": "fp8"}, {"quantization": "fp4_fp8"}]


def in_modes(ranks, folder, kind):
    folder.mkdir(exist_ok=True)
    return [
        run(ranks, folder / f"{run.__name__}-{number}", kind=kind, saves=False, **mode)
        for number, mode in enumerate(MODES)
        for run in (sft, grpo)
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("exact mode, quantised weights: SFT, GRPO", "fsdp")
def test_a_model_cut_over_two_ranks_computes_in_exact_mode_and_with_quantised_weights(tmp_path):
    one_by_one = in_modes(ALONE, tmp_path / "one", "torch")
    several = zip(*on_ranks(2, in_modes, tmp_path / "two", "fsdp", folder=tmp_path))
    ends = [next(iter(one["weights"].values())).tobytes() for one in one_by_one]
    assert len(set(ends)) == len(ends)  # every mode does something
    for one, more in zip(one_by_one, several, strict=True):
        assert_cut_same(more, one)


def cut_warmup(ranks, folder):
    return sft(ranks, folder, kind="fsdp", indexer_warmup=2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.row("SFT, indexers warm up", "fsdp")
def test_indexers_warm_up_in_a_model_cut_over_ranks_as_in_one_process(size, tmp_path):
    one = alone(sft, indexer_warmup=2)
    several = on_ranks(size, cut_warmup, tmp_path / "more", folder=tmp_path)
    assert one["gradients"][0].keys() < one["gradients"][2].keys()  # indexers alone, then everything
    assert_cut_same(several, one)


def cut_ahead(ranks, folder):
    return sft(ranks, folder, "always", kind="fsdp")


@pytest.mark.slow
@pytest.mark.row("SFT, anticipatory", "fsdp")
def test_anticipatory_routing_with_a_model_cut_over_two_ranks_is_that_of_one_process(tmp_path):
    two = on_ranks(2, cut_ahead, tmp_path / "two", folder=tmp_path)
    assert_cut_same(two, alone(sft, "always"))


def cut_grpo(ranks, folder):
    return [
        grpo(ranks, folder / "plain", kind="fsdp"),
        grpo(ranks, folder / "more", "async", Corrections(token_truncate=2.0), kind="fsdp", saves=False),
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("GRPO, sync and async", "fsdp")
def test_grpo_with_a_model_cut_over_two_ranks_is_that_of_one_process(tmp_path):
    (tmp_path / "two").mkdir()
    plain, corrected = zip(*on_ranks(2, cut_grpo, tmp_path / "two", folder=tmp_path))
    one = alone(grpo)
    more = alone(grpo, "async", Corrections(token_truncate=2.0))
    for several, single in ((plain, one), (corrected, more)):
        assert_cut_same(several, single)


def under_zero_3(ranks, folder):
    return [
        sft(ranks, folder / "plain", kind="zero3"),
        sft(ranks, folder / "ahead", "always", kind="zero3", saves=False),
        grpo(ranks, folder / "sync", kind="zero3"),
        grpo(ranks, folder / "async", "async", Corrections(token_truncate=2.0), kind="zero3", saves=False),
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("SFT, GRPO", "deepspeed, ZeRO-3")
def test_stages_under_zero_3_are_those_of_one_process(tmp_path):
    (tmp_path / "two").mkdir()
    found = zip(*on_ranks(2, under_zero_3, tmp_path / "two", folder=tmp_path))
    one_by_one = [
        alone(sft),
        alone(sft, "always"),
        alone(grpo),
        alone(grpo, "async", Corrections(token_truncate=2.0)),
    ]
    for several, one in zip(found, one_by_one):
        assert_cut_same(several, one)


def resumed_under_zero_3(ranks, folder):
    """Weights at the end, and those of the stage that had lost its last checkpoint, by two engines."""
    ends = [sft(ranks, folder, kind="zero3")]
    for kind in ("zero3", "torch"):
        ranks.barrier()
        if ranks.is_first:
            shutil.rmtree(folder / "checkpoints" / "step-000003")
        ranks.barrier()
        ends.append(sft(ranks, folder, kind=kind))
        assert [row["step"] for row in ends[-1]["rows"]] == [3]
    return [end["weights"] for end in ends]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.row("SFT, resumed", "deepspeed, ZeRO-3")
def test_a_stage_under_zero_3_goes_on_to_the_bit_and_with_a_whole_model(tmp_path):
    once, again, plain = on_ranks(2, resumed_under_zero_3, tmp_path / "two", folder=tmp_path)[0]
    assert once and all(np.array_equal(again[name], value) for name, value in once.items())
    assert_same(plain, once, tolerance=1e-6)


def divided_sft(ranks, folder):
    return sft(ranks, folder, kind="experts2")


@pytest.mark.row("SFT", "experts over 2 ranks")
def test_sft_with_experts_divided_over_two_ranks_is_that_of_one_process(tmp_path):
    two = on_ranks(2, divided_sft, tmp_path / "two", folder=tmp_path)
    assert len(two[0]["gradients"]) == 3
    assert_divided_same(two, alone(sft), 2)


def divided(ranks, folder, experts, context):
    """Several stages in one group of processes, experts over neighbours."""
    sharded, kind = replace(SETTINGS, is_sharded=True), f"experts{experts}"
    return [
        sft(ranks, folder / "ahead", "always", context, kind=kind),
        sft(ranks, folder / "sharded", "off", context, sharded, kind=kind, saves=False),
        grpo(ranks, folder / "plain", context=context, kind=kind),
        grpo(ranks, folder / "corrected", "async", ALL, context, kind=kind, saves=False),
        grpo(ranks, folder / "replayed", context=context, replays=True, kind=kind, saves=False),
    ]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("size", "experts", "context"), [(2, 2, 1), (4, 2, 1), (2, 2, 2), (4, 2, 2), (4, 4, 2)]
)
@pytest.mark.row("SFT, GRPO, {context} a row", "experts over {experts} ranks")
def test_stages_with_divided_experts_are_those_of_one_process(size, experts, context, tmp_path):
    (folder := tmp_path / "more").mkdir()
    several = list(zip(*on_ranks(size, divided, folder, experts, context, folder=tmp_path)))
    one_by_one = [
        alone(sft, "always"),
        alone(sft),
        alone(grpo),
        alone(grpo, "async", ALL),
        alone(grpo, replays=True),
    ]
    for one, more in zip(one_by_one, several):
        assert_divided_same(more, one, experts)
