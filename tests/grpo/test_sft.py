"""Supervised training: loss where the weights are, one update however it is cut, exact resume."""

from dataclasses import replace

import pytest
import torch
from small_trainer import AHEAD, CONFIG, GradientKeeper, small_model

from consilience.conf.errors import ConfigError
from consilience.grpo.sft import (
    SupervisedSettings,
    indexer_warmup_step,
    micro_batches_of,
    supervised_step,
    train_supervised,
)
from consilience.grpo.supervised_batches import Example
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.anticipatory_routing import look_up_choices
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.fake_engine import FakeTrainEngine
from consilience.training.metrics import MemorySink
from consilience.training.packing import pack
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

META = CheckpointMeta(stage="sft", seed=3, step=0, special_tokens={"<bos>": 0})


def example(*token_ids, loss_from=1):
    return Example(token_ids, [float(i >= loss_from) for i in range(len(token_ids))])


def packed_of(examples, row_tokens=32):
    return pack(
        [e.token_ids for e in examples],
        [e.loss_weight for e in examples],
        quantum=32,
        max_row_tokens=row_tokens,
    )


def gradients(packed, **settings):
    engine = GradientKeeper(small_model())
    report = supervised_step(engine, packed, SupervisedSettings(1, 64, **settings), 0)
    return engine.steps[-1], report


def numbers(seed, num):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 40, (num,), generator=generator).tolist()


EXAMPLES = [example(*numbers(i, 9 + 2 * i), loss_from=4) for i in range(7)]


def test_the_loss_is_the_mean_over_weighted_tokens_worked_through_plain_logits():
    weights = [0.0, 0.0, 0.5, 1.0, 1.0]
    ids = [3, 9, 17, 4, 1]
    _, report = gradients(packed_of([Example(ids, weights)]))
    with torch.no_grad():
        m = small_model()
        logp = torch.log_softmax(m.head(m.hidden(torch.tensor([ids])))[0].double(), -1)
    by_hand = -sum(w * float(logp[t - 1, ids[t]]) for t, w in enumerate(weights) if t) / 2.5
    assert report["nll"] == pytest.approx(by_hand, rel=1e-5)  # fp32 logits against fp64 sums


def test_a_target_without_weight_changes_no_gradient():
    # Token 6 of the end is seen by nobody and predicted without weight: any other will do.
    one, _ = gradients(packed_of([Example([3, 9, 17, 4, 6], [0, 0, 1, 1, 0])]))
    other, _ = gradients(packed_of([Example([3, 9, 17, 4, 33], [0, 0, 1, 1, 0])]))
    paid, _ = gradients(packed_of([Example([3, 9, 17, 4, 33], [0, 0, 1, 1, 1])]))
    # Other tokens make other embedding rows and hash routes, none of which carries loss; but an expert with
    # another number of tokens may sum in another order, which is up to the processor's library.
    largest = float(one["head.weight"].abs().max())
    assert all((one[n] - other[n]).abs().max() <= 1e-6 * max(largest, one[n].abs().max()) for n in one)
    assert not torch.allclose(one["head.weight"], paid["head.weight"], atol=1e-4)


@pytest.mark.parametrize(("balance_weight", "indexer_weight"), [(0.0, 0.0), (3.0, 2.0)])
def test_micro_batches_leave_the_gradient_of_a_step_unchanged(balance_weight, indexer_weight):
    packed, weights = (
        packed_of(EXAMPLES),
        {"balance_weight": balance_weight, "indexer_weight": indexer_weight},
    )
    assert len(packed.token_ids) >= 4 and len({*packed.rows.tolist()}) < len(EXAMPLES)
    whole, all_at_once = gradients(packed, micro_tokens=100_000, **weights)
    cut, row_by_row = gradients(packed, micro_tokens=32, **weights)
    assert row_by_row.get("indexer_kl", 0) == pytest.approx(all_at_once.get("indexer_kl", 0), rel=1e-5)
    assert whole.keys() == cut.keys() and row_by_row["nll"] == pytest.approx(all_at_once["nll"], rel=1e-6)
    for name in whole:  # fp32 sums in another order
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_counts_the_load_of_all_its_tokens_and_of_no_padding():
    packed = packed_of(EXAMPLES)
    num_tokens = sum(len(e.token_ids) for e in EXAMPLES)
    assert packed.token_ids.size > num_tokens
    loads = []
    for micro_tokens in (100_000, 32):
        engine = GradientKeeper(small_model())
        supervised_step(engine, packed, SupervisedSettings(1, 64, micro_tokens=micro_tokens), 0)
        loads.append(engine.expert_load)
    assert loads[0] == loads[1] and set(loads[0]) == {0, 1}
    assert all(sum(load) == num_tokens * CONFIG.num_experts_per_tok for load in loads[0].values())


def test_auxiliary_losses_add_gradient_only_where_they_are_asked_for():
    packed = packed_of([example(*numbers(1, 30))])
    plain, report = gradients(packed)
    more, with_indexer = gradients(packed, balance_weight=1.0, indexer_weight=1.0)
    names = {n for n in more if n not in plain or not torch.allclose(more[n], plain[n], atol=1e-7)}
    assert any("indexer" in n for n in names) and any("gate" in n for n in names)
    assert "indexer_kl" in with_indexer and "indexer_kl" not in report
    assert with_indexer["nll"] == pytest.approx(report["nll"], rel=1e-6)


def test_warming_up_moves_the_indexers_towards_dense_attention_and_nothing_else():
    packed = packed_of([example(*numbers(i, 30)) for i in range(4)])
    narrow = initialize(Transformer(replace(CONFIG, index_topk=2)), 0)
    settings = SupervisedSettings(40, 64, warmup=0, indexer_warmup=30, indexer_weight=1.0)
    engine = TorchEngine(narrow, OptimizerSettings(lr=0.02, weight_decay=0.1))
    before = {n: p.detach().clone() for n, p in narrow.named_parameters()}
    trained = {n for n, p in narrow.named_parameters() if p.requires_grad}
    found = [indexer_warmup_step(engine, packed, settings, step)["indexer_kl"] for step in range(30)]
    assert found[-1] < 0.5 * found[0]
    moved = {n for n, p in narrow.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".indexer." in n}
    assert {n for n, p in narrow.named_parameters() if p.requires_grad} == trained
    assert not any(m.sees_all for m in narrow.modules() if hasattr(m, "sees_all"))


def test_a_stage_warms_up_first_and_trains_everything_after(tmp_path):
    engine, log = TorchEngine(small_model()), MemorySink()
    checkpoints = StageCheckpoints(tmp_path, engine, None, META, every_s=1e9)
    settings = SupervisedSettings(4, 64, row_tokens=32, indexer_warmup=2, indexer_weight=0.5)
    heads = []
    log.scalars = lambda step, row, scalars=log.scalars: (
        heads.append(engine.model.head.weight.detach().clone()),
        scalars(step, row),
    )
    train_supervised(
        engine,
        [EXAMPLES],
        settings,
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(),
        progress=SilentProgress(),
    )
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_the_prediction_block_s_loss_is_reported_and_weighs_three_tenths_then_one():
    """Worked through plain logits: position t predicts t + 2. It teaches block and trunk."""
    ids = numbers(3, 12)
    packed = packed_of([example(*ids)])

    def step(at, **settings):
        engine = GradientKeeper(small_model(0, AHEAD))
        settings = SupervisedSettings(10, 64, warmup=0, decay_steps=4, **settings)
        return supervised_step(engine, packed, settings, at), engine.steps[-1]

    with torch.no_grad():
        m = small_model(0, AHEAD)
        streams, layout = m.streams(torch.tensor([ids]))
        hidden = m.mtp_hidden(streams, torch.tensor([[*ids[1:], 0]]), layout)[0][0]
        logp = torch.log_softmax(m.head(hidden).double(), -1)
    by_hand = -sum(float(logp[t, ids[t + 2]]) for t in range(10)) / 11  # the trunk's own denominator
    early, at_first = step(5)
    late, at_last = step(6)
    assert early["mtp_loss"] == pytest.approx(by_hand, rel=1e-5) == late["mtp_loss"]
    assert early["loss"] == pytest.approx(early["nll"] + 0.3 * by_hand, rel=1e-5)
    assert late["loss"] == pytest.approx(late["nll"] + 0.1 * by_hand, rel=1e-5)
    none, without = step(5, mtp_weight=0.0)
    assert "mtp_loss" not in none and not any(n.startswith("mtp.") for n in without)
    for name in ("mtp.0.e_proj.weight", "mtp.0.ffn.gate.weight"):
        torch.testing.assert_close(at_first[name], 3 * at_last[name], rtol=1e-4, atol=1e-7)
    for name in ("embed.weight", "head.weight", "layers.1.attn.wkv.weight"):
        share = at_first[name] - without[name]  # the loss of the block reaches the trunk, by its weight
        torch.testing.assert_close(share, 3 * (at_last[name] - without[name]), rtol=1e-2, atol=1e-6)
        assert share.norm() > 0.01 * without[name].norm()


def test_anticipatory_routing_prescribes_the_prediction_block_s_choices_too():
    """Choices of the same weights change nothing; those of other weights change the block's gradient."""
    packed, settings = packed_of(EXAMPLES), SupervisedSettings(10, 64, warmup=0)
    found = []
    for source in (None, 0, 1):
        engine, choices = GradientKeeper(small_model(0, AHEAD)), None
        if source is not None:
            other = small_model(source, AHEAD)
            choices = look_up_choices(other, micro_batches_of(packed, settings))
            assert sorted(choices) == [1, 2]  # one learned router in the trunk, one in the block
        report = supervised_step(engine, packed, settings, 0, choices)
        found.append((report["mtp_loss"], engine.steps[-1]["mtp.0.ffn.gate.weight"]))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1]) and not torch.equal(found[0][1], found[2][1])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_prediction_block_s_loss_falls_when_it_is_trained(kind):
    engine = TorchEngine(small_model(0, AHEAD), OptimizerSettings(lr=0.01, kind=kind))
    packed = packed_of(EXAMPLES)
    found = [
        supervised_step(engine, packed, SupervisedSettings(30, 64, warmup=0), step)["mtp_loss"]
        for step in range(30)
    ]
    assert found[-1] < 0.5 * found[0]


def run(folder, *, steps=6, every_s=1e9, seed=0, stop_at=None, settings=None):
    """Train to the end, or until a checkpoint of `stop_at` updates is there and the power goes."""
    (folder / "tokenizer-source.json").write_text("{}")
    engine = TorchEngine(small_model(seed), OptimizerSettings(lr=0.01))
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer-source.json", META, every_s=every_s
    )
    start, cursor = checkpoints.resume()
    sink = MemorySink()
    log = sink if stop_at is None else PowerCut(sink, stop_at)
    settings = settings or SupervisedSettings(steps, 60, row_tokens=64, warmup=2, decay_steps=2, seed=5)
    result = train_supervised(
        engine,
        [EXAMPLES[:3], EXAMPLES[3:]],
        settings,
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(earlier=cursor.get("clock")),
        progress=SilentProgress(),
        start=start,
    )
    return engine, sink, result, start


class PowerCut:
    """A sink that ends the run when update `at` is reported, before that update is saved."""

    def __init__(self, sink, at):
        self.sink, self.at = sink, at

    def scalars(self, step, values):
        self.sink.scalars(step, values)
        if step == self.at:
            raise KeyboardInterrupt


def test_a_run_killed_after_a_checkpoint_and_resumed_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, sink, result, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", every_s=0.0, stop_at=4)
    torch.manual_seed(77)
    resumed, rest, again, start = run(tmp_path / "cut", seed=9)
    assert start == 3
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert rest.rows == sink.rows[3:]
    assert (again["train_tokens"], again["final_nll"]) == (result["train_tokens"], result["final_nll"])
    assert not torch.equal(a["head.weight"], small_model().head.weight)


def test_training_lowers_the_loss_on_examples_it_repeats(tmp_path):
    _, sink, result, _ = run(tmp_path, steps=12)
    assert result["final_nll"] == sink.rows[-1]["nll"] < sink.rows[0]["nll"] - 0.1
    assert [row["step"] for row in sink.rows] == list(range(1, 13))
    assert max(row["lr"] for row in sink.rows) == 0.01 > sink.rows[-1]["lr"]


def batches_of(folder, groups, settings):
    """The packed rows of every step; nothing learns."""
    engine = FakeTrainEngine(small_model())
    train_supervised(
        engine,
        groups,
        settings,
        checkpoints=StageCheckpoints(folder, engine, folder, META, every_s=1e9),
        log=MemorySink(),
        clock=StageClock(),
        progress=SilentProgress(),
    )
    return [[packed for packed, _ in batch] for batch in engine.batches]


@pytest.mark.parametrize(("shares", "expected"), [((), 1.0), ((3.0, 1.0), 3.0)])
def test_groups_take_their_share_of_the_tokens_of_every_step(tmp_path, shares, expected):
    """Tokens 10 are of the first group, tokens 20 of the second; lengths differ on purpose."""
    groups = [[example(*[10] * 5)] * 3, [example(*[20] * 9)] * 2]
    batches = batches_of(tmp_path, groups, SupervisedSettings(2, 800, micro_tokens=100_000, shares=shares))
    assert len(batches) == 2
    for (packed,) in batches:
        first, second = ((packed.token_ids == token).sum() for token in (10, 20))
        assert first / second == pytest.approx(expected, rel=0.05)


def test_shares_hold_over_many_steps_that_are_shorter_than_an_example(tmp_path):
    groups = [[example(*[10] * 5)], [example(*[20] * 31)]]
    batches = batches_of(tmp_path, groups, SupervisedSettings(40, 20, warmup=0))
    first, second = (
        sum(int((packed.token_ids == token).sum()) for batch in batches for packed in batch)
        for token in (10, 20)
    )
    assert first == 400 and 400 <= second < 400 + 31


def test_examples_longer_than_a_step_still_give_every_step_one(tmp_path):
    batches = batches_of(tmp_path, [[example(*[10] * 30)]], SupervisedSettings(5, 8, warmup=0))
    assert [packed.num_tokens for batch in batches for packed in batch] == [30] * 5


def test_a_group_without_examples_is_refused_unless_its_share_is_zero(tmp_path):
    groups = [[example(1, 2, 3)], []]
    with pytest.raises(ConfigError, match="group 1 of 2 has no examples; raise num_examples"):
        batches_of(tmp_path, groups, SupervisedSettings(2, 8, warmup=0))
    assert len(batches_of(tmp_path, groups, SupervisedSettings(2, 8, warmup=0, shares=(1.0, 0.0)))) == 2


def test_rows_wider_than_a_micro_batch_are_micro_batches_of_their_own(tmp_path):
    examples = [example(*[10] * 60), example(*[11] * 50)]
    settings = SupervisedSettings(1, 110, row_tokens=64, micro_tokens=32, warmup=0)
    ((one, other),) = batches_of(tmp_path, [examples], settings)
    assert one.num_tokens + other.num_tokens == 110
