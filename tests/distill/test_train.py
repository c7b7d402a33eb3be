"""A phase on tiny checkpoints: KL falls, a student equal to its teacher has nothing to learn."""

from dataclasses import replace

import pytest
import torch
from small_teachers import model, phase, record, registry_of, samples, side
from small_trainer import CONFIG, GradientKeeper, small_model

from consilience.distill.balance import UpdateBalance
from consilience.distill.objectives import OBJECTIVES, Objective
from consilience.distill.samples import by_teacher, score_request
from consilience.distill.train import DistillSettings, train_phase
from consilience.teachers.registry import TeacherRegistry
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

SEEDS = {"code": 1, "math": 2}
AHEAD = replace(CONFIG, initializer_range=0.2, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), SEEDS)


def test_positions_to_score_are_those_whose_next_token_the_student_sampled():
    r = record("a", "math", (5, 6, 30, 31, 7), loss_mask=(1, 1, 0, 0, 1))
    request = score_request(r)
    # Tokens 3 4 (sampled), 5 6 (an observation), 7 (sampled) of the stream: one to the left of each.
    assert request.positions == (2, 3, 6) and request.token_ids == (3, 9, 17, 5, 6, 30, 31, 7)
    assert (request.uid, request.teacher) == ("a", "math")


def test_the_reported_kl_is_that_of_the_two_models_own_logits(registry, tmp_path):
    records = [*samples(), record("o", "math", (5, 6, 30, 31, 7), loss_mask=(1, 1, 0, 0, 1))]
    records.append(record("long", "code", tuple(range(2, 40))))  # longer than a row and a micro-batch
    engine = GradientKeeper(model())
    report = phase(engine, records, side(registry, tmp_path), mini_batches=1, row_tokens=32, micro_tokens=32)
    for name, seed in SEEDS.items():
        kl = []
        for r in records:
            if r.teacher != name:
                continue
            ids = torch.tensor([r.prompt_ids + r.token_ids])
            with torch.no_grad():
                p, q = (
                    torch.log_softmax(m.head(m.hidden(ids))[0].double(), -1) for m in (model(), model(seed))
                )
            own = (p.exp() * (p - q)).sum(-1)[list(score_request(r).positions)]
            assert report["kl_by_sample"][r.uid] == pytest.approx(float(own.mean()), rel=1e-3)
            kl += own.tolist()
        assert report["kl"][name] == pytest.approx(sum(kl) / len(kl), rel=1e-3)  # fp32 against fp64
        assert report["kl"][name] > 1e-3
        assert report["kl_p99"][name] == pytest.approx(float(torch.tensor(kl).quantile(0.99)), rel=1e-3)
        assert report["kl_max"][name] == pytest.approx(max(kl), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sampled_token"])
def test_the_objective_falls_when_the_student_trains(registry, tmp_path, name):
    engine = TorchEngine(model(), OptimizerSettings(lr=0.01, weight_decay=0.0))
    teachers, settings = side(registry, tmp_path), {"objective": Objective(name, top_k=8), "warmup": 0}
    found = [phase(engine, samples(), teachers, **settings) for _ in range(4)]
    assert engine.num_steps == 8
    assert ("objective" in found[0]) == (name != "reverse_kl")
    for teacher in SEEDS:
        first, last = (report.get("objective", report["kl"])[teacher] for report in (found[0], found[-1]))
        assert last < 0.7 * first, teacher


def test_the_sampled_token_needs_no_more_than_the_stored_states_and_moves_the_student(registry, tmp_path):
    engine = GradientKeeper(model())
    settings = {"objective": Objective("sampled_token"), "mini_batches": 1}
    report = phase(engine, samples(), side(registry, tmp_path), **settings)
    assert max(float(g.abs().max()) for g in engine.steps[0].values()) > 0
    for r in samples():  # the mean of log p − log q of the tokens that the student took
        assert r.uid in report["kl_by_sample"]
    own = []
    for r in [r for r in samples() if r.teacher == "math"]:
        ids = torch.tensor([r.prompt_ids + r.token_ids])
        with torch.no_grad():
            p, q = (
                m.head(m.hidden(ids))[0].double().log_softmax(-1) for m in (model(), model(SEEDS["math"]))
            )
        at = list(score_request(r).positions)
        own += [float((p - q)[t, ids[0, t + 1]]) for t in at]
    assert report["objective"]["math"] == pytest.approx(sum(own) / len(own), rel=1e-3, abs=1e-4)


def test_shares_of_prompts_tokens_loss_and_update_are_each_domains(registry, tmp_path):
    records = samples(teachers=["math", "code", "math"])
    report = phase(GradientKeeper(model()), records, side(registry, tmp_path), mini_batches=1)
    tokens = {"math": 6 + 8, "code": 7}
    assert report["prompt_share"] == pytest.approx({"math": 2 / 3, "code": 1 / 3})
    assert report["token_share"] == pytest.approx({name: n / 21 for name, n in tokens.items()})
    loss = {name: report["kl"][name] * n for name, n in tokens.items()}
    assert report["loss_share"] == pytest.approx({name: x / sum(loss.values()) for name, x in loss.items()})
    alone = {}  # each domain by itself, its gradient at the hidden states with the same denominator
    for name in tokens:
        balance = UpdateBalance({"math": 1.0, "code": 1.0})
        teachers = side(registry, tmp_path / name)
        mine = [r for r in records if r.teacher == name]
        scored = teachers.scheduler.score([score_request(r) for r in mine])
        train_phase(
            GradientKeeper(model()), mine, scored, teachers, DistillSettings(10, mini_batches=1), 5, balance
        )
        alone[name] = balance.state()["pulled"][name] * tokens[name]
    wanted = {name: x / sum(alone.values()) for name, x in alone.items()}
    assert report["update_share"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("normalisation", ["tokens", "teacher", "sequences"])
def test_a_teachers_share_of_the_update_is_its_weight_within_2_percent(registry, tmp_path, normalisation):
    weights = {"math": 1.0, "code": 3.0}
    weighted = TeacherRegistry([replace(r, weight=weights[r.name]) for r in registry])
    teachers, balance = side(weighted, tmp_path), UpdateBalance(weights)
    settings = DistillSettings(10, mini_batches=2, normalisation=normalisation, balance="update")
    found = []
    for step in range(24):
        records = samples(step, ["math", "math", "code", "math", "math", "code"])  # twice the tokens
        scored = teachers.scheduler.score([score_request(r) for r in records])
        report = train_phase(GradientKeeper(model()), records, scored, teachers, settings, step, balance)
        found.append(report["update_share"]["code"])
    assert sum(found[8:]) / 16 == pytest.approx(0.75, abs=0.02)
    plain = phase(GradientKeeper(model()), records, teachers, normalisation=normalisation)
    assert abs(plain["update_share"]["code"] - 0.75) > 0.05  # what it would be by itself


@pytest.mark.parametrize("normalisation", ["tokens", "teacher", "sequences"])
def test_several_teachers_of_a_prompt_add_their_weighted_gradients(registry, tmp_path, normalisation):
    weights = {"math": 1.0, "code": 2.5}
    weighted = TeacherRegistry([replace(r, weight=weights[r.name]) for r in registry])

    def gradient(folder, teachers):
        engine, records = GradientKeeper(model()), samples(teachers=teachers)
        its = side(weighted, folder)
        scored = its.scheduler.score([score_request(c) for r in records for c in by_teacher(r)])
        settings = DistillSettings(10, mini_batches=1, normalisation=normalisation, mtp_weight=0.0)
        return engine, train_phase(engine, records, scored, its, settings, 5)

    both, report = gradient(tmp_path / "both", ["code+math"] * 3)
    alone = {name: gradient(tmp_path / name, [name] * 3) for name in weights}
    for name, found in both.steps[0].items():  # fp32 sums in another order
        wanted = sum(engine.steps[0][name] for engine, _ in alone.values())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7, msg=name)
    assert report["head_loads"] == [{"distinct": 2, "loads": 2}]
    for name, (_, its) in alone.items():
        assert report["kl"][name] == pytest.approx(its["kl"][name], rel=1e-6)
    uid = samples()[0].uid
    assert report["kl_by_sample"][uid] == pytest.approx(
        sum(its["kl_by_sample"][uid] for _, its in alone.values()) / 2, rel=1e-6
    )
    assert report["token_share"] == {"code": 1.0}


def test_two_names_of_one_checkpoint_share_states_and_head(registry, tmp_path):
    math = next(r for r in registry if r.name == "math")
    others = [r for r in registry if r.name != "math"]
    named = TeacherRegistry([*others, math, replace(math, name="also", domains=("also",))])
    teachers = side(named, tmp_path)
    records = samples(teachers=["math", "code", "also", "code", "math", "also"])
    scored = teachers.scheduler.score([score_request(r) for r in records])
    assert sorted(scored.loads) == ["code", "math"]
    report = train_phase(
        GradientKeeper(model()), records, scored, teachers, DistillSettings(10, mini_batches=1), 0
    )
    assert report["head_loads"] == [{"distinct": 2, "loads": 2}] and set(report["kl"]) == {
        "math",
        "code",
        "also",
    }


def test_the_prediction_block_follows_the_student_and_the_student_does_not_notice(registry, tmp_path):
    ends, found = {}, []
    for weight in (0.0, 3.0):
        engine = TorchEngine(small_model(0, AHEAD), OptimizerSettings(lr=0.01, grad_clip=0.05))
        teachers = side(registry, tmp_path / str(weight))
        for _ in range(3):
            report = phase(engine, samples(), teachers, warmup=0, mtp_weight=weight)
            assert ("mtp_loss" in report) == (weight > 0)
            found += [report["mtp_loss"]] if weight else []
        ends[weight] = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    assert all(torch.equal(p, ends[3.0][n]) for n, p in ends[0.0].items() if not n.startswith("mtp."))
    assert not torch.equal(ends[0.0]["mtp.0.e_proj.weight"], ends[3.0]["mtp.0.e_proj.weight"])
    assert all(found[-1][name] < found[0][name] for name in SEEDS)


class Noting(GradientKeeper):
    """Keeps the largest gradient before anybody decides what to do with it."""

    def forward_backward(self, *args):
        found = super().forward_backward(*args)
        self.largest = max(float(p.grad.abs().max()) for p in self.model.parameters() if p.grad is not None)
        return found


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient(registry, tmp_path):
    engine = Noting(model(SEEDS["math"]))
    report = phase(engine, samples(teachers=["math"] * 3), side(registry, tmp_path), mini_batches=1)
    other = Noting(model())
    moved = phase(other, samples(teachers=["math"] * 3), side(registry, tmp_path / "b"), mini_batches=1)
    assert abs(report["kl"]["math"]) <= 1e-6
    assert report["top1_agreement"]["math"] == 1.0
    assert engine.largest < 1e-4 * other.largest
    assert (report["skipped_updates"], len(engine.steps)) == (1, 0)
    assert (moved["skipped_updates"], len(other.steps)) == (0, 1)


@pytest.mark.parametrize("normalisation", ["tokens", "teacher", "sequences"])
def test_cutting_a_mini_batch_into_rows_changes_no_gradient(registry, tmp_path, normalisation):
    found = []
    for i, cut in enumerate(({}, {"row_tokens": 32, "micro_tokens": 32, "chunk_tokens": 3})):
        engine = GradientKeeper(model())
        phase(
            engine,
            samples(),
            side(registry, tmp_path / str(i)),
            mini_batches=1,
            normalisation=normalisation,
            **cut,
        )
        found += engine.steps
    for name in found[0]:  # fp32 sums in another order
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-6, msg=name)


def test_every_mini_batch_loads_each_head_in_it_once(registry, tmp_path):
    records = samples(teachers=["math", "code"] * 4 + ["math"])
    teachers = side(registry, tmp_path)
    report = phase(GradientKeeper(model()), records, teachers, mini_batches=2, row_tokens=32)
    assert report["head_loads"] == [{"distinct": 2, "loads": 2}] * 2
    one = phase(GradientKeeper(model()), samples(1, ["math"] * 3), teachers, mini_batches=3)
    assert one["head_loads"] == [{"distinct": 1, "loads": 1}] * 3
    assert len(teachers.store) == 0  # states are used once and freed
