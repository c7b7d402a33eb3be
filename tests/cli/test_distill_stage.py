"""What the configuration of distillation becomes: guards, the reference, shorter jobs, graded jobs."""

from pathlib import Path

import pytest

from consilience.cli import distill_stage
from consilience.cli.stage import StageContext
from consilience.conf.errors import ConfigError
from consilience.conf.load import compose
from consilience.distill.guards import GuardSettings
from consilience.tasks.fake_domain import FakeDomain
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.training.metrics import MetricsLog
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder


def context(cfg, root: Path, inputs=None):
    run = RunFolder(root)
    folder = run.stage("distill").create()
    return StageContext("distill", None, cfg, folder, run, inputs or {}, SilentProgress())


def jobs_of(folder, *overrides, step=0):
    (folder / "config.json").write_text("{}")
    registry = TeacherRegistry([TeacherRecord("one", folder, ("x", "y"))])
    domains = {name: FakeDomain(name, side=60) for name in "xy"}
    cfg = compose(["distill.prompts_per_step=4", "base.num_examples=9", "sft.num_examples=9", *overrides])
    return distill_stage.distill_jobs(cfg, domains, registry, step)


def test_the_guards_of_the_configuration_are_those_of_the_trainer_and_do_nothing_by_default():
    assert distill_stage.guard_settings(compose().distill.guard, 7) == GuardSettings(eos=7)
    cfg = compose(["distill.guard.mask_repeated=true", "distill.guard.ngram=5", "distill.guard.horizon=0.3"])
    found = distill_stage.guard_settings(cfg.distill.guard, 7)
    assert found == GuardSettings(mask_repeated=True, ngram=5, horizon=0.3, eos=7)


def test_a_ramp_lets_samples_grow_to_their_full_length(tmp_path):
    (full,) = {job.max_tokens for job in jobs_of(tmp_path)}
    ramp = ("distill.guard.ramp_phases=2", "distill.guard.ramp_from=0.5")
    for step, share in enumerate((0.5, 0.75, 1.0)):
        limits = {(job.max_tokens, job.sampling.max_tokens) for job in jobs_of(tmp_path, *ramp, step=step)}
        assert limits == {(round(share * full), round(share * full))}


def test_samples_are_graded_where_a_reward_is_asked_for_and_only_there(tmp_path):
    assert {job.reward for job in jobs_of(tmp_path)} == {""}
    graded = jobs_of(tmp_path, "distill.reward_weight=0.5", "distill.samples_per_prompt=2")
    assert {job.reward for job in graded} == {FakeDomain("x", side=60).reward} != {""}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.samples_per_prompt=1"], r"needs several samples of a prompt .*samples_per_prompt"),
        (["distill.samples_per_prompt=4", "distill.balance=update"], r"set one of them to weights or 0"),
    ],
)
def test_a_reward_needs_groups_and_no_balance_by_update(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(["distill.reward_weight=1", *overrides])


def test_the_reference_is_one_more_teacher_of_every_domain(tmp_path):
    cfg = compose(["distill.guard.reference_weight=0.25"])
    inputs = {}
    for name in ("start", *(f"grpo/{domain}" for domain in cfg.task.domains)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        inputs[name] = {"checkpoint": name}
    found = distill_stage.teacher_registry(context(cfg, tmp_path, inputs), tmp_path / "start")
    assert found.get("reference").weight == 0.25 and found.get("reference").checkpoint == tmp_path / "start"
    for domain in cfg.task.domains:
        assert found.names(domain) == f"{domain}+reference"
    plain = distill_stage.teacher_registry(context(compose(), tmp_path, inputs), tmp_path / "start")
    assert "reference" not in {record.name for record in plain}


def test_failures_that_were_seen_are_counted_for_the_report(tmp_path):
    ctx = context(compose(), tmp_path)
    log = MetricsLog(ctx.folder.metrics)
    log.scalars(1, {"guard_length": 0.0, "masked_bad_states": 2})
    log.scalars(2, {"guard_length": 1.0, "guard_late": 1.0, "masked_repeated": 3.0})
    log.finish()
    found = distill_stage.guard_health(ctx)
    assert found == {
        "guard_length": 1,
        "guard_repetition": 0,
        "guard_eos": 0,
        "guard_late": 1,
        "masked_repeated": 3,
        "masked_bad_states": 2,
    }
