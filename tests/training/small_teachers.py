"""Tiny teachers as checkpoint folders, samples, and distillation runs of milliseconds, for several tests."""

import json
from dataclasses import replace
from types import SimpleNamespace

import small_trainer
import torch
from small_trainer import small_model

from consilience.distill.samples import by_teacher, score_request
from consilience.distill.train import DistillSettings, TeacherSide, train_distill, train_phase
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

CONFIG = replace(small_trainer.CONFIG, initializer_range=0.2)  # teachers of two seeds really disagree
META = CheckpointMeta(stage="distill", seed=3, step=0, special_tokens={"<bos>": 0})
EOS = 1


def model(seed=0):
    return small_model(seed, CONFIG)


def registry_of(root, seeds):
    """Teachers name -> seed as checkpoint folders under `root`; made once."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    for name, seed in seeds.items():
        if not (root / name).is_dir():
            save_checkpoint(root / name, model(seed), root / "tokenizer.json", replace(META, domain=name))
    return TeacherRegistry([TeacherRecord(name, root / name, (name,)) for name in seeds])


class CountingLoader:
    """Loads model teachers, notes which, and changes the states of samples that `spoil` names by tokens."""

    def __init__(self, spoil=()):
        self.loaded, self.scored, self.spoil = [], [], set(spoil)

    def __call__(self, record):
        self.loaded.append(record.name)
        teacher, score = load_model_teacher(record), None
        score = teacher.score

        def noted(token_ids, positions):
            self.scored += [(record.name, tuple(ids)) for ids in token_ids]
            found = score(token_ids, positions)
            bad = [tuple(ids) in self.spoil for ids in token_ids]
            return [state * float("nan") if is_bad else state for state, is_bad in zip(found, bad)]

        teacher.score = noted
        return teacher


def side(registry, folder, loader=load_model_teacher, may_load=True, heads=None, **store):
    """The teachers' side over a store in `folder`; settings of the store by name."""
    states = HiddenStore(folder, **store)
    scheduler = TeacherScheduler(registry, loader, states, may_load=may_load)
    return TeacherSide(registry, scheduler, states, heads or HeadCache())


def record(uid, teacher, tokens, **changes):
    """An episode all of whose tokens the student sampled."""
    made = RolloutRecord(
        uid=uid,
        group=uid,
        domain=(teacher or "math").split("+")[0],
        effort="chat",
        teacher=teacher,
        prompt_ids=(3, 9, 17),
        token_ids=tuple(tokens),
        logprobs=(-1.0,) * len(tokens),
        loss_mask=(1,) * len(tokens),
        weight_version=(0,) * len(tokens),
        finish=FinishReason.STOP,
        outcome=Outcome(OutcomeKind.GRADED),
    )
    return replace(made, **changes)


def samples(step=0, teachers=("math", "code", "math", "code")):
    """Samples of 6, 7, … random tokens, one for each teacher named."""
    generator = torch.Generator().manual_seed(step)
    return [
        record(f"{step}/{i}", teacher, torch.randint(2, 40, (6 + i,), generator=generator).tolist())
        for i, teacher in enumerate(teachers)
    ]


def phase(engine, records, teachers, step=5, **settings):
    """One phase as `train_distill` runs it; what it reports."""
    scored = teachers.scheduler.score([score_request(c) for r in records for c in by_teacher(r)])
    return train_phase(engine, records, scored, teachers, DistillSettings(10, **settings), step)


class Sampler:
    """Hands out the samples of a step; counts calls."""

    def __init__(self, answers):
        self.calls, self.answers = [], answers

    def publish(self, weights, announced, version):
        pass

    def generate(self, jobs, on_progress=None, *, durable=None):
        self.calls.append(jobs[0].step)
        return self.answers(jobs[0].step)


def run(folder, teachers, sampler, *, steps=3, engine=None, log=None, every_s=1e9, ahead=None, **settings):
    """A whole stage in `folder`, resumed where it was cut short: (engine, log, result).

    ahead  how its student samples ahead, if it does: arguments of `train_distill`
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer-source.json").write_text("{}")
    engine = engine or TorchEngine(model(), OptimizerSettings(lr=0.01))
    source = folder / "tokenizer-source.json"
    checkpoints = StageCheckpoints(folder / "checkpoints", engine, source, META, every_s=every_s)
    start, cursor = checkpoints.resume()
    log = log or MemorySink()
    result = train_distill(
        engine,
        sampler,
        lambda step: [SimpleNamespace(uid=r.uid, step=step) for r in sampler.answers(step)],
        teachers,
        DistillSettings(steps, **{"seed": 2, **settings}),
        store=RolloutStore(folder / "rollouts"),
        decode=lambda ids: " ".join(map(str, ids)),
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(earlier=cursor.get("clock")),
        progress=SilentProgress(),
        start=start,
        earlier=cursor.get("rows", ()),
        **(ahead or {}),
    )
    return engine, log, result
