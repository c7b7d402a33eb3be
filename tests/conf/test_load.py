"""Composition: shipped options, the user's own, what is refused, and that nothing heavy is loaded."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from consilience.conf.errors import ConfigError
from consilience.conf.fields import fields_of
from consilience.conf.load import (
    compose,
    config_digest,
    describe,
    from_plain,
    load_resolved,
    to_plain,
    to_yaml,
)
from consilience.conf.overrides import CONF, group_options
from consilience.conf.rules import for_domain
from consilience.conf.schema import Config

ROOT = Path(__file__).parents[2]


def test_the_shipped_defaults_are_those_of_the_schema():
    composed = compose()
    assert list(composed.task.domains) == ["math", "code", "agent"]
    plain = dataclasses.replace(composed, task=dataclasses.replace(composed.task, domains={}))
    assert plain == Config()


def test_every_group_is_a_folder_and_every_folder_a_group():
    folders = {p.name for p in CONF.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(fields_of(Config))


DEFAULTS = (CONF / "config.yaml").read_text()
OTHERS = [
    f"{g}={o}"
    for g, options in group_options([CONF]).items()
    for o in options
    if f"- {g}: {o}\n" not in DEFAULTS
]


@pytest.mark.parametrize("choice", [choice for choice in OTHERS if choice != "task=file"])
def test_every_shipped_option_that_is_no_default_composes(choice):
    group, option = choice.split("=")
    needed = ["task=software"] if option == "swe" and group == "specialist" else []
    assert getattr(compose([*needed, choice]), group) != getattr(compose_default(), group), option


@functools.cache
def compose_default() -> Config:
    return compose()


def test_a_small_number_without_a_point_is_a_number():
    assert compose(["grpo.kl_beta=1e-6"]).grpo.kl_beta == 1e-6
    assert compose().optimizer.eps == 1e-20


def test_the_command_line_wins_over_a_profile_and_a_profile_over_the_groups():
    cfg = compose(["base.steps=7", "run=ci"])
    assert (cfg.base.steps, cfg.sft.steps, cfg.run.profile, cfg.run.margins) == (7, 6, "ci", False)


def test_recomputing_is_told_by_one_word_or_several():
    assert compose().engine.recompute == ("none",)
    assert compose(["engine.recompute=experts"]).engine.recompute == ("experts",)
    assert compose(["engine.recompute=[mhc,router]"]).engine.recompute == ("mhc", "router")


def test_truncated_sampling_needs_its_sets_recorded_and_no_drafts():
    cut = ["grpo.top_p=0.9", "grpo.top_k=50", "grpo.replay_kept_sets=true"]
    assert compose(cut).grpo.top_p == 0.9
    with pytest.raises(ConfigError, match=r"drafts are judged .* set rollout\.speculative=false"):
        compose([*cut, "rollout.speculative=true"])


def test_at_most_one_weight_corrects_the_sampler():
    both = ["grpo.token_truncate=2", "grpo.geometric_mask=[0.999,1.002]"]
    assert compose(both).grpo.geometric_mask == (0.999, 1.002)
    with pytest.raises(ConfigError, match="both weight by the same ratios; set one of them to null"):
        compose([*both, "grpo.token_mask=[0.5,5]"])


def test_a_number_may_name_a_run():
    assert compose(["run.name=2024"]).run.name == "2024"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.stepz=3", "did you mean 'grpo.steps'?"),
        ("modle.preset=tiny", "did you mean 'model.preset'?"),
        ("optimizer.lr=1", "did you mean 'base.lr'?"),
        ("grpo.steps.more=1", "is a value and has no parts"),
        ("grpo.steps=0", "at least 1 steps"),
        ("grpo.top_p=0.9", "set grpo.replay_kept_sets=true, or leave top_k, top_p and min_p at 0, 1 and 0"),
        ("grpo.replay_kept_sets=true", "but nothing is cut; set grpo.top_p below 1"),
        ("specialist.settings.math.grpo.min_p=0.1", "set specialist.settings.math.grpo.replay_kept_sets"),
        ("grpo.sequence_mask=[2,1]", "write [LOW,HIGH] with LOW below HIGH"),
        ("grpo.token_mask=[1]", "exactly 2 are needed"),
        ("grpo.steps=three", "a whole number is needed"),
        ("grpo.steps=1,2", "grpo.steps=1,2"),
        ("model=tinny", "did you mean 'tiny'?"),
        ("mdoel=tiny", "did you mean 'model'?"),
        ("specialist=maths", "unknown domain 'maths'; did you mean 'math'?"),
        ("grpo", "write KEY=VALUE"),
        ("grpo.steps=[1", "does not compose"),
        ("run.name=${oc.env:NO_SUCH_VARIABLE}", "does not compose"),
        ("task=file", "set task.domains.mine.path"),
        ("~task.domains", "at least one domain"),
        ("~grpo.stepz", "did you mean 'grpo.steps'?"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line_that_says_what_to_do(override, said):
    with pytest.raises(ConfigError) as refused:
        compose([override])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.context_ranks=2", "which does not divide engine.ranks=1; set it to a divisor"),
        ("sandbox.driver=dokcer", "did you mean 'docker'?"),
        ("sandbox.min_isolation=none", "sandbox.allow_insecure=true"),
        ("run.name=../up", "names a folder"),
        ("sft.init=no/such/folder", "no checkpoint lies there"),
        ("engine.recompute=expert", "did you mean 'experts'?"),
        ("engine.recompute=[none,experts]", "write none alone"),
        ("engine.recompute=[]", "write none alone"),
        ("rewards.path=no_such.py:score", "there is no file 'no_such.py'"),
        ("rewards.path=my_rewards", "FILE.py:FUNCTION"),
        ("cluster.spread=true", "cluster.placement is free; set it to apart or colocated"),
        ("cluster.port=29500", "cluster.placement is free; set it to apart or colocated"),
        ("cluster.worker_gpus=1.5", "a whole number of GPUs"),
        ("cluster.placement=together", "valid: apart, colocated, free"),
        ("task.domains.math.max_tokens=5000", "raise rollout.max_length"),
        ("grpo.mini_batches=17", "a step has 16 prompts"),
        ("evaluate.num_problems=513", "task.num_test offers 512"),
        ("sft.anticipatory.quiet_steps=99", "raise it to 100"),
        ("base.anticipatory.rollback_steps=101", "raise it to 202"),
        ("sft.anticipatory.mode=after_spikes", "did you mean 'after_spike'?"),
        ("specialist.settings.math.grpo.stepz=3", "did you mean 'steps'?"),
        ("specialist.settings.math.model.preset=pro", "only some groups vary by domain"),
        ("specialist.settings.maths.grpo.steps=3", "unknown domain 'maths'"),
        ("teachers.registry.t.domains=[math,chess]", "unknown domain 'chess'"),
        ("teachers.registry.t.weight=0", "above 0"),
        ("teachers.registry.t.domains=[math]", "domain 'agent' has no teacher"),
        ("teachers.engine=sglang", "valid: auto, vllm"),
        ("teachers.settings.block_size=32", "arguments of vLLM; set teachers.engine=vllm"),
    ],
)
def test_a_setting_that_does_not_go_with_another_is_refused(override, said):
    shipped = {"task": to_plain(compose_default().task)}
    plain = OmegaConf.merge(shipped, OmegaConf.from_dotlist([override]))
    with pytest.raises(ConfigError) as refused:
        from_plain(OmegaConf.to_container(plain, resolve=True))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.parallel=2"], "set run.parallel=1, or cluster.placement=free"),
        (["grpo.mode=async"], "set grpo.mode and distill.mode to sync"),
        (["engine=deepspeed"], "set engine.kind=torch, or cluster.placement=apart"),
        (["rollout.engine=vllm", "rollout.proof=off"], "set rollout.vllm.sleep=2"),
    ],
)
def test_roles_that_take_turns_go_without_what_needs_them_at_once(overrides, said):
    with pytest.raises(ConfigError) as refused:
        compose(["cluster.placement=colocated", *overrides])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_drafts_and_prefixes_on_disk_do_not_go_together():
    with pytest.raises(ConfigError, match="no state of the MTP block; set one of them to null or false"):
        compose(["rollout.speculative=true", "rollout.prefix_store.path=/tmp/x"])


def test_two_teachers_of_one_domain_are_refused():
    both = ["teachers.registry.a.domains=[math]", "teachers.registry.b.domains=[math,code,agent]"]
    with pytest.raises(ConfigError, match="domain 'math' has two teachers, 'a' and 'b'"):
        compose(both)


def test_a_users_own_file_becomes_a_domain_by_configuration_alone(tmp_path):
    problems, rewards = tmp_path / "p.jsonl", tmp_path / "r.py"
    problems.write_text("{}\n")
    rewards.write_text("def score(): ...\n")
    cfg = compose(
        [
            "task.domains.mine.kind=file",
            f"task.domains.mine.path={problems}",
            f"task.domains.mine.reward={rewards}:score",
        ]
    )
    assert list(cfg.task.domains) == ["math", "code", "agent", "mine"]
    assert compose(
        [f"task.domains.mine.{k}" for k in (f"path={problems}", f"reward={rewards}:score")]
        + ["specialist=mine"]
    )


def test_a_domain_can_be_taken_away():
    assert list(compose(["~task.domains.agent"]).task.domains) == ["math", "code"]


def test_options_of_the_users_own_folder_can_be_chosen(tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "long.yaml").write_text("steps: 1234\nlr: 1e-5\n")
    cfg = compose(["grpo=long"], tmp_path)
    assert (cfg.grpo.steps, cfg.grpo.lr) == (1234, 1e-5)


def test_a_wrong_key_in_the_users_own_folder_is_refused(tmp_path):
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "long.yaml").write_text("stepz: 1234\n")
    with pytest.raises(ConfigError, match=r"'grpo.stepz'; did you mean 'steps'\?"):
        compose(["grpo=long"], tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        compose([], tmp_path / "nowhere")


def test_the_resolved_file_reads_back_equal(tmp_path):
    cfg = compose(
        [
            "run=ci",
            "grpo.kl_beta=1e-7",
            "model.compress_ratios=[0,4,16,4]",
            "specialist=code",
            "run.from=base",
        ]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_resolved(tmp_path / "config.yaml") == cfg


def test_a_missing_or_broken_resolved_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no configuration at"):
        load_resolved(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_resolved(tmp_path / "config.yaml")


def test_a_specialists_own_settings_apply_to_it_alone():
    cfg = compose(["specialist.settings.math.grpo={steps: 9, lr: 1e-4}"])
    assert for_domain(cfg, "math").grpo == dataclasses.replace(cfg.grpo, steps=9, lr=1e-4)
    assert for_domain(cfg, "code").grpo == cfg.grpo
    assert for_domain(cfg, "math").specialist.domain == "math"


def test_the_digest_follows_the_named_groups_the_seed_and_nothing_that_only_changes_speed():
    def digest(*overrides):
        return config_digest(compose(list(overrides)), ["grpo", "rollout"])

    assert digest() == digest("rollout.num_workers=5", "sft.lr=1", "run.name=other")
    assert len({digest(), digest("grpo.lr=1"), digest("rollout.max_length=2000"), digest("run.seed=2")}) == 4


def test_every_setting_is_documented():
    for group in fields_of(Config):
        for key, _, _, meaning in describe(group):
            assert len(meaning) > 3, key
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        describe("grop")


def test_a_wrong_key_is_refused_before_anything_heavy_is_imported():
    program = (
        "import sys\n"
        "from consilience.cli.main import main\n"
        "code = main(['grpo', 'grpo.clip=0.3'])\n"
        "heavy = {'torch', 'ray', 'numpy', 'wandb', 'datasets', 'hydra'} & set(sys.modules)\n"
        "code += main(['grpo', 'grpo.steps=-1'])\n"
        "heavy |= {'torch', 'ray', 'numpy', 'wandb', 'datasets'} & set(sys.modules)\n"
        "print(code, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "4 []"
    assert done.stderr.count("\n") == 2
