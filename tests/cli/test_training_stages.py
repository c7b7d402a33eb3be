"""Training stages: what configuration becomes, and base and SFT run for real on a two-layer model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilience.cli import distill_stage, jobs, training_stage
from consilience.cli import supervised_stages as supervised
from consilience.cli.stage import StageContext
from consilience.conf.errors import ConfigError
from consilience.conf.load import from_plain
from consilience.grpo.supervised_batches import Example
from consilience.model.recompute import recompute_policy
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.tasks.corpus import Conversation
from consilience.tasks.fake_domain import FakeDomain
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.training.checkpoint import load_checkpoint, read_meta
from consilience.training.metrics import MetricsLog, read_metrics
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder
from tests.small_stage import MODEL, SHORT

torch.set_num_threads(1)


def config(**groups):
    plain = {
        "task": {"domains": {"code": {"kind": "code"}, "agent": {"kind": "agent"}}, "vocab_size": 300},
        "model": MODEL,
        "engine": {"threads": 1, "device": "cpu"},
        "log": {"wandb": "disabled"},
        "base": {**SHORT, "episodes": 2, "prompt_weight": 0.1},
        "sft": SHORT,
    }
    return from_plain({**plain, **groups})


def context(cfg, root: Path, name: str, domain=None, inputs=None):
    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    return StageContext(name, domain, cfg, folder, run, inputs or {}, SilentProgress())


def test_examples_weigh_what_the_model_would_sample_with_one_and_the_rest_as_told():
    tokenizer = byte_tokenizer()
    messages = ({"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"})
    (example,) = supervised.encode(tokenizer, [Conversation("x", "chat", messages, 1)], 0.25, "official")
    assert len(example.token_ids) == len(example.loss_weight)
    sampled = [t for t, w in zip(example.token_ids, example.loss_weight) if w == 1.0]
    assert tokenizer.decode(sampled[:-1]) == "2" and sampled[-1] == tokenizer.eos_id
    assert set(example.loss_weight) == {0.25, 1.0}
    (bare,) = supervised.encode(tokenizer, [Conversation("x", "chat", messages, 1)], 0.0, "official")
    assert set(bare.loss_weight) == {0.0, 1.0} and bare.token_ids == example.token_ids


def test_the_model_takes_the_tokenizers_vocabulary_and_never_less():
    tokenizer = byte_tokenizer()
    rows = tokenizer.padded_vocab_size(16)
    found = supervised.model_config(config(), tokenizer)
    assert (found.vocab_size, found.hidden_size, found.compress_ratios) == (rows, 16, (0, 4))
    assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert supervised.model_config(config(model={**MODEL, "vocab_size": 1000}), tokenizer).vocab_size == 1000
    assert supervised.model_config(config(model={**MODEL, "vocab_size": 100}), tokenizer).vocab_size == rows
    assert (found.num_nextn_predict_layers, found.mtp_compress_ratios) == (0, ())
    ahead = supervised.model_config(config(model={**MODEL, "num_nextn_predict_layers": 2}), tokenizer)
    assert (ahead.num_nextn_predict_layers, ahead.mtp_compress_ratios) == (2, (0, 0))


def test_optimizer_settings_are_the_configured_ones():
    cfg = config(optimizer={"betas": [0.8, 0.9], "muon_momentum": 0.7, "grad_clip": 3.0, "weight_decay": 0.0})
    found = training_stage.optimizer_settings(cfg.optimizer, 0.5)
    assert (found.lr, found.beta1, found.beta2, found.momentum) == (0.5, 0.8, 0.9, 0.7)
    assert (found.grad_clip, found.weight_decay, found.update_rms) == (3.0, 0.0, 0.18)


@pytest.mark.parametrize(
    ("num", "shares", "expected"),
    [
        (9, {}, {"a": 3, "b": 3, "c": 3}),
        (10, {}, {"a": 4, "b": 3, "c": 3}),
        (8, {"a": 2.0}, {"a": 4, "b": 2, "c": 2}),
        (5, {"b": 0.0}, {"a": 3, "c": 2}),
        (1, {"c": 5.0}, {"c": 1}),
        (7, {"a": 0.1, "b": 0.1, "c": 0.2}, {"a": 2, "b": 2, "c": 3}),
    ],
)
def test_prompts_are_split_by_share_and_none_is_lost(num, shares, expected):
    found = distill_stage.split_prompts(num, ["a", "b", "c"], shares)
    assert found == expected and sum(found.values()) == num


def small(num_train, base=30, sft=20):
    task = {"domains": {"fake": {"kind": "code"}}, "num_train": num_train}
    return config(task=task, base={**SHORT, "num_examples": base}, sft={**SHORT, "num_examples": sft})


def test_phases_draw_problems_that_base_and_sft_have_not_seen():
    domain = FakeDomain()
    seen = {p.id for p in domain.problems("train", 30)}
    phases = [{p.id for p in jobs.fresh_problems(small(100), domain, 8, step)} for step in range(8)]
    assert all(len(phase) == 8 and not phase & seen for phase in phases)
    assert len(set.union(*phases)) == 64


def test_phases_beyond_the_training_split_go_around_and_never_past_its_end():
    domain, cfg = FakeDomain(), small(50)
    allowed = {p.id for p in domain.problems("train", 50)}
    for step in range(40):
        assert {p.id for p in jobs.fresh_problems(cfg, domain, 7, step)} <= allowed
    few = jobs.fresh_problems(small(32), domain, 5, 0)  # 2 problems are unseen: from the beginning
    assert [p.id for p in few] == [p.id for p in domain.problems("train", 5)]


def test_distillation_asks_every_domain_and_stamps_each_prompt_with_its_owner(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    registry = TeacherRegistry(
        [TeacherRecord("one", tmp_path, ("x", "y")), TeacherRecord("two", tmp_path, ("z",), 2.0)]
    )
    domains = {name: FakeDomain(name, side=60) for name in "xyz"}
    cfg = config(distill={"prompts_per_step": 7, "samples_per_prompt": 2})
    phases = [distill_stage.distill_jobs(cfg, domains, registry, step) for step in range(2)]
    assert [len(jobs) for jobs in phases] == [14, 14]
    assert {(job.domain, job.teacher) for job in phases[0]} == {("x", "one"), ("y", "one"), ("z", "two")}
    assert len({job.uid for jobs in phases for job in jobs}) == 28
    assert all(job.reward == "" and not job.needs_sandbox for job in phases[0])
    first, second = ({(job.domain, str(job.messages)) for job in jobs} for jobs in phases)
    assert not first & second


def test_rows_are_long_enough_for_the_longest_example():
    groups = [[Example([1] * 70, [1.0] * 70)], [Example([1] * 5, [1.0] * 5)]]
    assert supervised._row_tokens(groups, 64) == 96 and supervised._row_tokens(groups, 128) == 128
    assert supervised._row_tokens([[]], 32) == 32


def test_curves_are_read_from_the_metrics_of_the_stage(tmp_path):
    ctx = context(config(), tmp_path, "sft/code", "code")
    log = MetricsLog(ctx.folder.metrics)
    log.scalars(1, {"nll": 2.0})
    log.scalars(2, {"nll": 1.0, "other": 5.0})
    log.finish()
    assert training_stage.curves_of(ctx, {"training loss": "nll", "rare": "other"}) == {
        "training loss": {"sft/code": [[1, 2], [2.0, 1.0]]},
        "rare": {"sft/code": [[1, 2], [None, 5.0]]},
    }


def test_specialists_are_the_teachers_unless_others_are_named(tmp_path):
    inputs = {}
    for name in ("grpo/code", "grpo/agent"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        inputs[name] = {"checkpoint": name}
    found = distill_stage.teacher_registry(context(config(), tmp_path, "distill", inputs=inputs))
    assert [(t.name, t.checkpoint, t.domains) for t in found] == [
        (d, tmp_path / "grpo" / d, (d,)) for d in ("code", "agent")
    ]
    named = {"all": {"domains": ["code", "agent"], "checkpoint": str(tmp_path / "grpo/code"), "weight": 0.5}}
    cfg = config(teachers={"registry": named})
    (only,) = distill_stage.teacher_registry(context(cfg, tmp_path, "distill", inputs=inputs))
    assert (only.name, only.domains, only.weight) == ("all", ("code", "agent"), 0.5)


def test_a_gpu_that_is_not_there_is_refused_with_what_to_set():
    assert training_stage.device_of(config()).type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"engine\.device=auto"):
            training_stage.device_of(config(engine={"device": "cuda"}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a base and a specialist of two steps each."""
    root, cfg = tmp_path_factory.mktemp("run"), config()
    base = supervised.run_base(context(cfg, root, "base"))
    sft = supervised.run_sft(context(cfg, root, "sft/agent", "agent", {"base": base}))
    return root, cfg, base, sft


def test_base_and_sft_leave_checkpoints_that_name_their_parent(trained):
    root, _, base, sft = trained
    # Two agent episodes in one example fill more than a whole micro-batch: no reason to stop.
    for result, name in ((base, "base"), (sft, "sft/agent")):
        meta = read_meta(root / result["checkpoint"])
        assert (meta.stage, meta.step, meta.digest) == (name, 2, result["digest"])
        assert result["train_tokens"] >= 2 * 250 and result["time"]["wall_s"] > 0
        (curve,) = result["curves"]["training loss"].values()
        assert curve[0] == [1, 2] and all(v > 0 for v in curve[1])
    assert read_meta(root / sft["checkpoint"]).parent == base["digest"] != sft["digest"]
    assert read_meta(root / base["checkpoint"]).parent is None
    model, _ = load_checkpoint(root / sft["checkpoint"])
    assert model.config.num_hidden_layers == 2  # type: ignore[union-attr]


def test_a_stage_recomputes_what_it_is_told_and_ends_at_the_same_weights(trained, tmp_path):
    root, _, base, _ = trained
    cfg = config(engine={"threads": 1, "device": "cpu", "recompute": ["experts", "mhc"]})
    assert supervised.run_base(context(cfg, tmp_path, "base"))["digest"] == base["digest"]
    model, _ = load_checkpoint(root / base["checkpoint"])
    start = training_stage.Start(model, root / base["checkpoint"], None, "official")
    with training_stage.open_stage(context(cfg, tmp_path, "other"), start, 1e-3):
        assert {block.recompute for block in model.layers} == {recompute_policy(["experts", "mhc"])}  # type: ignore[union-attr]


def test_a_finished_stage_that_runs_again_keeps_its_weights_and_counts(trained):
    """The run was cut between the last checkpoint and done.json."""
    root, cfg, base, _ = trained
    again = supervised.run_base(context(cfg, root, "base"))
    assert (again["digest"], again["train_tokens"]) == (base["digest"], base["train_tokens"])
    assert again["curves"] == base["curves"]
    assert len(read_metrics(root / "stages/base/metrics.jsonl")) == 2


def test_a_stage_takes_its_share_of_the_threads_before_the_configured_number(trained, tmp_path):
    _, cfg, _, _ = trained
    given = replace(context(cfg, tmp_path, "base"), threads=2)
    try:
        supervised.run_base(given)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_same_settings_train_the_same_model_and_another_seed_another(trained, tmp_path):
    _, cfg, base, _ = trained
    assert supervised.run_base(context(cfg, tmp_path / "a", "base"))["digest"] == base["digest"]
    other = replace(cfg, run=replace(cfg.run, seed=9))
    assert supervised.run_base(context(other, tmp_path / "b", "base"))["digest"] != base["digest"]


def test_anticipatory_routing_is_a_setting_whose_cost_the_result_states(trained, tmp_path):
    _, cfg, base, _ = trained
    assert "anticipatory" not in base
    ahead = replace(cfg.base.anticipatory, mode="always", delay=0)
    other = replace(cfg, base=replace(cfg.base, anticipatory=ahead))
    result = supervised.run_base(context(other, tmp_path, "base"))
    assert result["digest"] == base["digest"]  # the weights of now choose what they would have chosen
    cost = result["anticipatory"]
    assert cost["steps"] == 2 and cost["rollbacks"] == [] and cost["overhead"] > 0
    assert result["time"]["phases"]["look_ahead"] == pytest.approx(cost["extra_s"])
