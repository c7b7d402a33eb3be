"""Distillation on tiny checkpoints: KL falls, a student equal to its teacher has nothing to learn."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import small_trainer
import torch
from small_trainer import GradientKeeper, small_model

from consilience.distill.balance import UpdateBalance
from consilience.distill.objectives import OBJECTIVES, Objective
from consilience.distill.samples import by_teacher, score_request
from consilience.distill.train import (
    DistillSettings,
    TeacherSide,
    train_distill,
    train_phase,
)
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.publishing import verify
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.teachers.heads import HeadCache
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

CONFIG = replace(small_trainer.CONFIG, initializer_range=0.2)  # teachers of two seeds really disagree
AHEAD = replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))
META = CheckpointMeta(stage="distill", seed=3, step=0, special_tokens={"<bos>": 0})
SEEDS = {"code": 1, "math": 2}


def model(seed=0):
    return small_model(seed, CONFIG)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Two teachers as checkpoint folders; "code" weighs double where a test asks for it."""
    root = tmp_path_factory.mktemp("teachers")
    (root / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    for name, seed in SEEDS.items():
        save_checkpoint(root / name, model(seed), root / "tokenizer.json", replace(META, domain=name))
    return TeacherRegistry([TeacherRecord(name, root / name, (name,)) for name in SEEDS])


def side(registry, folder):
    store = HiddenStore(folder)
    return TeacherSide(registry, TeacherScheduler(registry, load_model_teacher, store), store, HeadCache())


def record(uid, teacher, tokens, mask=None):
    mask = tuple(mask or (1,) * len(tokens))
    return RolloutRecord(
        uid=uid,
        group=uid,
        domain=teacher or "math",
        effort="chat",
        teacher=teacher,
        prompt_ids=(3, 9, 17),
        token_ids=tuple(tokens),
        logprobs=tuple(-1.0 if m else float("nan") for m in mask),
        loss_mask=mask,
        weight_version=tuple(0 if m else -1 for m in mask),
        finish=FinishReason.STOP,
        outcome=Outcome(OutcomeKind.GRADED),
    )


def samples(step=0, teachers=("math", "code", "math", "code")):
    generator = torch.Generator().manual_seed(step)
    return [
        record(
            f"{step}/{i}",
            teacher,
            torch.randint(2, 40, (6 + i,), generator=generator).tolist(),
            [1] * (6 + i),
        )
        for i, teacher in enumerate(teachers)
    ]


def phase(engine, records, teachers, **settings):
    scored = teachers.scheduler.score([score_request(r) for r in records])
    return train_phase(engine, records, scored, teachers, DistillSettings(10, **settings), 5)


def test_positions_to_score_are_those_whose_next_token_the_student_sampled():
    r = record("a", "math", (5, 6, 30, 31, 7), mask=(1, 1, 0, 0, 1))
    request = score_request(r)
    # Tokens 3 4 (sampled), 5 6 (an observation), 7 (sampled) of the stream: one to the left of each.
    assert request.positions == (2, 3, 6) and request.token_ids == (3, 9, 17, 5, 6, 30, 31, 7)
    assert (request.uid, request.teacher) == ("a", "math")


def test_the_reported_kl_is_that_of_the_two_models_own_logits(registry, tmp_path):
    records = [*samples(), record("o", "math", (5, 6, 30, 31, 7), mask=(1, 1, 0, 0, 1))]
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
    assert report["token_share"] == {"code+math": 1.0}


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


def answers(step):
    return [*samples(step), record(f"{step}/free", None, (5, 1))]


class CountingSampler:
    """Hands out the samples of a step; counts calls and publications."""

    def __init__(self):
        self.calls, self.announced = [], []

    def publish(self, weights, announced, version):
        verify(weights, announced)
        self.announced.append((announced.digest, version))

    def generate(self, jobs, on_progress=None, *, durable=None):
        self.calls.append(jobs[0].step)
        return answers(jobs[0].step)


class PowerCut(MemorySink):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def scalars(self, step, values):
        super().scalars(step, values)
        if step == self.at:
            raise KeyboardInterrupt


def run(folder, registry, sampler, *, seed=0, every_s=1e9, log=None, teachers=None, balance="weights", **how):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer-source.json").write_text("{}")
    engine = TorchEngine(model(seed), OptimizerSettings(lr=0.01))
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer-source.json", META, every_s=every_s
    )
    start, cursor = checkpoints.resume()
    log = log or MemorySink()
    result = train_distill(
        engine,
        sampler,
        lambda step: [SimpleNamespace(uid=r.uid, step=step) for r in answers(step)],
        teachers or side(registry, folder / "hidden"),
        DistillSettings(3, seed=2, balance=balance),
        store=RolloutStore(folder / "rollouts"),
        decode=lambda ids: " ".join(map(str, ids)),
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(earlier=cursor.get("clock")),
        progress=SilentProgress(),
        start=start,
        earlier=cursor.get("rows", ()),
        **how,
    )
    return engine, log, result


class Ahead(CountingSampler):
    """Streams that answer when they are listened to."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def hand_over(self, jobs, durable):
        self.begun.append((jobs[0].step, len(self.announced)))
        self._due = [*getattr(self, "_due", []), (jobs, durable)]

    def hear(self):
        jobs, durable = self._due.pop(0)
        durable.keep(self.generate(jobs, durable=durable))


def test_a_student_may_sample_ahead_and_with_nothing_ahead_it_is_the_same_run(registry, tmp_path):
    whole, log, result = run(tmp_path / "whole", registry, CountingSampler())
    same, its_log, its_result = run(tmp_path / "same", registry, Ahead(), max_age=0)
    a, b = whole.model.state_dict(), same.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a) and (its_log.rows, its_result) == (log.rows, result)
    sampler = Ahead()
    _, log, _ = run(tmp_path / "ahead", registry, sampler, max_age=1, is_whole=True)
    assert sampler.begun == [(0, 1), (1, 1), (2, 2)]  # (phase, publications before it)
    assert [row["step"] for row in log.rows] == [1, 2, 3] and all("age_max" in row for row in log.rows)


@pytest.mark.parametrize("balance", ["weights", "update"])
def test_a_killed_run_resumes_without_sampling_again_and_ends_bit_for_bit_equal(registry, tmp_path, balance):
    first, second = CountingSampler(), CountingSampler()
    whole, log, result = run(tmp_path / "whole", registry, CountingSampler(), balance=balance)
    with pytest.raises(KeyboardInterrupt):  # a checkpoint of 1 update; phase 1 is sampled and not saved
        run(tmp_path / "cut", registry, first, every_s=0.0, log=PowerCut(at=2), balance=balance)
    resumed, rest, again = run(tmp_path / "cut", registry, second, seed=9, balance=balance)
    assert (first.calls, second.calls) == ([0, 1], [2])
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert again == result
    assert [row["step"] for row in rest.rows] == [2, 3]
    assert {(row["teacher"], row["step"]) for row in result["kl"]} == {
        (t, s) for t in SEEDS for s in (1, 2, 3)
    }
    assert all(loads["loads"] == loads["distinct"] for loads in result["head_loads"])
    # A sample without a teacher is kept on disk and taught by nobody.
    assert "0/free" not in {row.uid for _, row in log.samples}


def test_states_scored_before_a_kill_are_not_scored_again(registry, tmp_path):
    before = side(registry, tmp_path / "r" / "hidden")
    requests = [score_request(r) for r in samples(0)]
    assert before.scheduler.score(requests).num_scored == 4
    _, log, _ = run(tmp_path / "r", registry, CountingSampler())
    assert [(row["reused"], row["teacher_loads"]) for row in log.rows] == [(4, 0), (0, 2), (0, 2)]


def test_publication_announces_the_digest_of_the_student(registry, tmp_path):
    sampler = CountingSampler()
    engine, _, _ = run(tmp_path / "r", registry, sampler)
    assert [version for _, version in sampler.announced] == [0, 1, 2, 3]
    assert sampler.announced[0][0] == weights_digest(to_official(model()))
    assert sampler.announced[-1][0] == weights_digest(to_official(engine.model))
