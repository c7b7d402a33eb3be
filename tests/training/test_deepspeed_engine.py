"""DeepSpeed's ZeRO trains like one process, whatever the stage, the ranks and what each rank's rows reach."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.ranks import ALONE
from consilience.model.transformer import Transformer
from consilience.training.deepspeed_engine import MASTER_FILE, DeepSpeedEngine
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, OptimizerSettings, TorchEngine
from tests.rank_processes import on_ranks
from tests.training.v4_ranks import (
    CONFIG,
    SETTINGS,
    assert_close,
    copies,
    packed_rows,
    supervised,
    train,
    v4_model,
)

pytestmark = pytest.mark.row("updates", "deepspeed")

torch.set_num_threads(1)
TOLERANCE = 1e-5  # fp32: of each tensor's largest value, the order in which partial sums are added


def bf16_model(seed=0):
    model = Transformer(CONFIG, torch.bfloat16)
    model.load_state_dict(v4_model(seed=seed).state_dict())
    return model


def outcome(engine, num_steps=3):
    """Gradients of a first step, weights and reports after all."""
    report, load = supervised(engine, packed_rows())
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, num_steps - 1, first=1)]
    return gradients, copies(engine.model.state_dict()), reports


@functools.cache
def expected(kind, num_steps=3):
    return outcome(TorchEngine(v4_model(), replace(SETTINGS, kind=kind)), num_steps)


def zero(ranks, kind, stage, num_steps=3, **options):
    settings = replace(SETTINGS, kind=kind)
    return outcome(DeepSpeedEngine(v4_model(), settings, ranks=ranks, zero_stage=stage, **options), num_steps)


def check(found, reference):
    """All ranks have the reference's gradients, weights and reports, and the bits of each other."""
    for one, other in zip(found[0][:2], reference[:2]):
        assert one.keys() == other.keys()
    assert_close(found[0][0], reference[0], TOLERANCE)
    assert_close(found[0][1], reference[1], TOLERANCE, is_update=True)
    for own, reported in zip(found[0][2], reference[2]):
        assert own == pytest.approx(reported, rel=TOLERANCE)
    for other in found[1:]:
        for one, same in zip(found[0][:2], other[:2]):
            assert all(np.array_equal(one[name], same[name]) for name in one)
        assert other[2] == found[0][2]


@pytest.mark.row("updates", "deepspeed, ZeRO-2")
def test_two_ranks_train_like_one_process(tmp_path):
    # Five micro-batches: the second rank has one less, and only the first has rows that reach HCA's entries.
    check(on_ranks(2, zero, "muon", 2, 2, folder=tmp_path), expected("muon", 2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates", "deepspeed, ZeRO-{stage}")
def test_stage_and_ranks_change_nothing(stage, kind, size, tmp_path):
    found = on_ranks(size, zero, kind, stage, folder=tmp_path)
    check(found, expected(kind))


def zero_in_context(ranks):
    return zero(ranks.with_context(2), "muon", 1, 2)


@pytest.mark.slow
@pytest.mark.row("rows cut over ranks: updates", "deepspeed, ZeRO-1")
def test_two_ranks_that_cut_rows_train_like_one_process(tmp_path):
    check(on_ranks(2, zero_in_context, folder=tmp_path), expected("muon", 2))


def divided(ranks):
    """As `outcome`, with the weights put together at the end; and what a rank holds of the trunk's."""
    engine = DeepSpeedEngine(v4_model(), replace(SETTINGS, kind="adamw"), ranks=ranks, zero_stage=3)
    report, load = supervised(engine, packed_rows())
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, first=1)]
    empty = all(p.numel() == 0 for p in engine.model.layers.parameters())
    with engine.whole_weights():
        weights = copies(engine.model.state_dict())
    return gradients, weights, reports, empty


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.row("updates", "deepspeed, ZeRO-3")
def test_zero_3_trains_like_one_process(size, tmp_path):
    found = on_ranks(size, divided, folder=tmp_path)
    check([each[:3] for each in found], expected("adamw"))
    assert all(each[3] for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates", "deepspeed, ZeRO-{stage}, offload")
def test_offload_changes_nothing(stage, tmp_path):
    check(on_ranks(2, offloaded, stage, folder=tmp_path), expected("muon", 2))


def offloaded(ranks, stage):
    return zero(ranks, "muon", stage, 2, offload=True)


class Three(nn.Module):
    """Three weights, of which a micro-batch reads one; embedding and head have weight decay."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Module(), nn.Module(), nn.Module()
        for number, part in enumerate(self.children()):
            part.weight = nn.Parameter(torch.full((2, 3), number + 1.0))

    def forward(self, name):
        return getattr(self, name).weight


def named_loss(model, given):
    name, factor = given
    if factor == "broken":
        raise ValueError("a loss of its own")
    return factor * model(name).sum(), {f"of_{name}": 1.0}


ADAMW = OptimizerSettings(kind="adamw", lr=0.1, grad_clip=4.0, eps=1e-8)
MICRO_BATCHES = [("embed", 2.0), ("norm", 3.0), ("embed", 4.0)]


def uneven(ranks, stage):
    """One rank's losses read the embedding, the other's the norm, nobody's the head."""
    model = Three()
    if stage is None:
        engine = TorchEngine(model, ADAMW)
    else:
        engine = DeepSpeedEngine(model, ADAMW, ranks=ranks, zero_stage=stage)
    reports = [engine.forward_backward(named_loss, MICRO_BATCHES, {"of_norm": 2.0})]
    reports.append(engine.forward_backward(named_loss, MICRO_BATCHES[:1], {}))
    gradients = {name: grad.flatten().tolist() for name, grad in engine.gradients().items()}
    reports.append(engine.step(0.5))
    return reports, gradients, [p.flatten().tolist() for p in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates", "deepspeed, ZeRO-{stage}")
def test_ranks_whose_losses_reach_other_parameters_add_up_the_right_ones(stage, tmp_path):
    reports, gradients, weights = uneven(ALONE, None)
    assert gradients == {"embed.weight": [8.0] * 6, "norm.weight": [3.0] * 6}
    for found in on_ranks(2, uneven, stage, folder=tmp_path):
        assert found[0] == [pytest.approx(report) for report in reports]
        assert found[1] == gradients
        assert found[2] == [pytest.approx(weight) for weight in weights]
        assert found[2][2] == [3.0] * 6  # no gradient, so no decay either


def failures(ranks, stage):
    engine = DeepSpeedEngine(Three(), ADAMW, ranks=ranks, zero_stage=stage)
    said = []
    for factor in (float("nan"), "broken"):
        with pytest.raises((EngineError, ValueError)) as found:
            engine.forward_backward(named_loss, [*MICRO_BATCHES, ("norm", factor)], {})
        said.append((type(found.value).__name__, str(found.value)))
    engine.forward_backward(named_loss, [("norm", 2e37)] * 20, {})  # finite losses, their sum is not
    with pytest.raises(EngineError) as found:
        engine.step()
    said.append((type(found.value).__name__, str(found.value)))
    with pytest.raises(EngineError, match="no gradient to apply"):
        engine.step()
    with pytest.raises(EngineError, match="denominator tokens is 0"):
        engine.forward_backward(named_loss, MICRO_BATCHES, {"tokens": 0})
    untouched = [p.flatten().tolist() for p in engine.model.parameters()]
    engine.forward_backward(named_loss, MICRO_BATCHES, {})
    gradients = {name: grad.flatten().tolist() for name, grad in engine.gradients().items()}
    return said, untouched, gradients


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates", "deepspeed, ZeRO-{stage}")
def test_what_fails_on_one_rank_fails_on_all_and_leaves_nothing(stage, tmp_path):
    first, second = on_ranks(2, failures, stage, folder=tmp_path)
    nan, broken, gradient = zip(first[0], second[0])
    assert nan[0] == nan[1] and nan[0][0] == "EngineError"
    assert nan[0][1].startswith("step 0: the loss of micro-batch 3 is nan; no parameter was changed")
    text = "step 0: rank 1 failed in micro-batch 3 (ValueError: a loss of its own)"
    assert broken == (("EngineError", text), ("ValueError", "a loss of its own"))
    assert gradient[0] == gradient[1] and "the gradient of norm.weight is not finite" in gradient[0][1]
    for _, untouched, gradients in (first, second):
        assert untouched == [[1.0] * 6, [2.0] * 6, [3.0] * 6]
        assert gradients == {"embed.weight": [6.0] * 6, "norm.weight": [3.0] * 6}


def make(kind, ranks, model):
    """An engine by "torch" or the stage; with a star for AdamW alone."""
    settings = replace(SETTINGS, kind="adamw") if kind.endswith("*") else SETTINGS
    if kind.startswith("torch"):
        return TorchEngine(model, settings, ranks=ranks)
    return DeepSpeedEngine(model, settings, ranks=ranks, zero_stage=int(kind[0]))


def whole(engine, **options):
    return engine.whole_weights(**options) if isinstance(engine, DeepSpeedEngine) else nullcontext()


def saved(ranks, kind, model_of, folder):
    """Two updates, then a checkpoint; weights after a third."""
    engine = make(kind, ranks, model_of())
    train(engine, 2)
    engine.save(folder)
    with whole(engine):
        if ranks.is_first:
            write_tensors(folder / "model.safetensors", engine.model.state_dict())
    ranks.barrier()
    train(engine, 1, first=2)
    with whole(engine):
        return copies_of(engine.model)


def resumed(ranks, kind, model_of, folder):
    """The third update by another engine; what it then saves."""
    engine = make(kind, ranks, model_of(seed=1))
    with whole(engine, is_changed=True):
        engine.model.load_state_dict(read_tensors(folder / "model.safetensors"))
    engine.load(folder)
    assert engine.num_steps == 2
    engine.save(folder / f"again-{kind}-{ranks.size}")
    ranks.barrier()
    again = folder / f"again-{kind}-{ranks.size}"
    states = [read_tensors(at / OPTIMIZER_FILE) for at in (folder, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    train(engine, 1, first=2)
    with whole(engine):
        return copies_of(engine.model)


def copies_of(model):
    """Weights as numpy arrays; bf16 ones as fp32."""
    return copies({name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items()})


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.row("checkpoints", "deepspeed, ZeRO-2")
def test_a_run_goes_on_with_other_ranks_stages_and_engines(tmp_path):
    folder = tmp_path / "state"
    expected = on_ranks(2, saved, "2", v4_model, folder, folder=tmp_path)[0]
    for number, (size, kind) in enumerate([(2, "2"), (2, "1"), (1, "torch"), (3, "1")]):
        (tmp_path / str(number)).mkdir()
        found = on_ranks(size, resumed, kind, v4_model, folder, folder=tmp_path / str(number))[0]
        assert_close(found, expected, TOLERANCE, is_update=True)
        assert (size, kind) != (2, "2") or same(found, expected)


@pytest.mark.slow
@pytest.mark.row("checkpoints", "deepspeed, ZeRO-2")
def test_a_run_of_the_torch_engine_goes_on_under_zero(tmp_path):
    folder = tmp_path / "state"
    expected = on_ranks(1, saved, "torch", v4_model, folder, folder=tmp_path)[0]
    found = on_ranks(2, resumed, "2", v4_model, folder, folder=tmp_path)[0]
    assert_close(found, expected, TOLERANCE, is_update=True)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["3*", "torch*", "2*"])
@pytest.mark.row("checkpoints", "deepspeed, ZeRO-3")
def test_a_run_under_zero_3_goes_on_with_any_engine(after, tmp_path):
    folder = tmp_path / "state"
    expected = on_ranks(2, saved, "3*", v4_model, folder, folder=tmp_path)[0]
    found = on_ranks(1 if after == "torch*" else 2, resumed, after, v4_model, folder, folder=tmp_path)[0]
    assert_close(found, expected, TOLERANCE, is_update=True)
    assert after != "3*" or same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "2"])
@pytest.mark.row("checkpoints, bf16", "deepspeed, ZeRO-{stage}")
def test_a_bf16_run_goes_on_bit_by_bit_from_its_masters(stage, tmp_path):
    folder = tmp_path / "state"
    expected = on_ranks(2, saved, stage, bf16_model, folder, folder=tmp_path)[0]
    masters = read_tensors(folder / MASTER_FILE)
    rounded = read_tensors(folder / "model.safetensors")
    assert all(torch.equal(master.bfloat16(), rounded[name]) for name, master in masters.items())
    assert any(not torch.equal(master, rounded[name].float()) for name, master in masters.items())
    assert same(on_ranks(2, resumed, stage, bf16_model, folder, folder=tmp_path)[0], expected)


@pytest.mark.slow
def test_a_state_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "state"
    engine = TorchEngine(v4_model(), SETTINGS)
    engine.save(folder)
    states = read_tensors(folder / OPTIMIZER_FILE)
    write_tensors(folder / OPTIMIZER_FILE, states | {"muon.momentum.norm.weight": torch.zeros(2)})
    assert "muon.momentum.norm.weight is not a state of" in on_ranks(1, refusal, folder, folder=tmp_path)[0]
    write_tensors(folder / OPTIMIZER_FILE, states | {"adamw.exp_avg.norm.weight": torch.zeros(2)})
    assert "has shape [2], expected [16]" in on_ranks(1, refusal, folder, folder=tmp_path)[0]


def refusal(ranks, folder):
    engine = DeepSpeedEngine(v4_model(), SETTINGS, ranks=ranks)
    with pytest.raises(CheckpointError) as found:
        engine.load(folder)
    return str(found.value)


def bf16_gradients(ranks, stage):
    model = bf16_model()
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    engine = DeepSpeedEngine(model, SETTINGS, ranks=ranks, zero_stage=stage)
    supervised(engine, packed_rows())
    gradients = copies(engine.gradients())
    engine.step()
    assert kept == {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    return gradients, sorted(kept)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates, bf16", "deepspeed, ZeRO-{stage}")
def test_bf16_gradients_are_summed_in_fp32_and_fp32_parameters_stay_so(stage, size, tmp_path):
    model = bf16_model()
    total = {}

    class Collecting:
        def forward_backward(self, loss_fn, parts, denominators):
            for part in parts:
                loss_fn(model, part)[0].backward()
                for name, p in model.named_parameters():
                    if p.grad is not None:
                        total[name] = total.get(name, 0.0) + p.grad.float()
                        p.grad = None

    supervised(Collecting(), packed_rows())
    for gradients, kept in on_ranks(size, bf16_gradients, stage, folder=tmp_path):
        assert gradients.keys() == total.keys()
        assert {name for name in kept if "hc_" in name} and "layers.0.attn.attn_sink" in kept
        assert_close(gradients, copies(total), 1e-6)  # five numbers added in fp32, in another order


def held(ranks, stage):
    engine = DeepSpeedEngine(bf16_model(), replace(SETTINGS, kind="adamw"), ranks=ranks, zero_stage=stage)
    supervised(engine, packed_rows())
    engine.gradients()
    return engine.held_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.row("updates, bf16", "deepspeed, ZeRO-{stage}")
def test_each_of_two_ranks_holds_half_of_masters_states_and_gradients(stage, tmp_path):
    sizes = [p.numel() for p in bf16_model().parameters() if p.requires_grad]
    for own in on_ranks(2, held, stage, folder=tmp_path):
        assert own["masters"] == pytest.approx(4 * sum(sizes) / 2, rel=0.01)
        assert own["states"] == pytest.approx(8 * sum(sizes) / 2, rel=0.01)
        assert own["gradients"] == own["masters"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"zero_stage": 0}, "engine.zero_stage is 0"),
        ({"zero_stage": 3}, "use engine.zero_stage=2, engine.kind=fsdp or optimizer.kind=adamw"),
        ({"expert_ranks": 2}, "engine.expert_ranks=2 with engine.kind=deepspeed"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_route(options, text):
    with pytest.raises(EngineError, match=text):
        DeepSpeedEngine(Three(), **options)


def test_fp64_parameters_are_refused():
    with pytest.raises(EngineError, match="the model has fp64 parameters"):
        DeepSpeedEngine(Three().double())
