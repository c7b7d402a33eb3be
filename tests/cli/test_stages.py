"""The pipeline's graph from a configuration, and the verbs over it with plain stage functions."""

import pickle
from collections.abc import Sequence

import pytest
from omegaconf import OmegaConf

from consilience.cli.stages import build_graph, chosen, targets_of
from consilience.conf.errors import ConfigError
from consilience.conf.load import from_plain
from consilience.conf.schema import Config

DOMAINS = {name: {"kind": name} for name in ("math", "code", "agent")}


def compose(overrides: Sequence[str] = ()) -> Config:
    """The checked configuration of these overrides, without Hydra's composition: quicker."""
    plain = OmegaConf.merge({"task": {"domains": DOMAINS}}, OmegaConf.from_dotlist(list(overrides)))
    return from_plain(OmegaConf.to_container(plain))  # type: ignore[arg-type]


FUNCTIONS = {kind: (lambda context: {}) for kind in ("base", "sft", "grpo", "distill", "evaluate")}


def names(cfg: Config) -> list[str]:
    return [stage.name for stage in build_graph(cfg, FUNCTIONS)]


def needs(cfg: Config) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.needs for stage in build_graph(cfg, FUNCTIONS)}


def test_the_graph_is_base_sft_grpo_distillation_evaluation():
    assert names(compose()) == [
        "base", "sft/math", "sft/code", "sft/agent", "grpo/math", "grpo/code", "grpo/agent",
        "distill", "evaluate",
    ]  # fmt: skip
    found = needs(compose())
    assert found["sft/code"] == ("base",)
    samples = {stage.name for stage in build_graph(compose(), FUNCTIONS) if stage.needs_workers}
    assert samples == {"grpo/math", "grpo/code", "grpo/agent", "distill", "evaluate"}
    assert found["grpo/code"] == ("sft/code",)
    assert found["distill"] == ("base", "grpo/math", "grpo/code", "grpo/agent")
    assert len(found["evaluate"]) == 8


def test_a_verb_is_about_one_specialist_or_all_of_them():
    assert targets_of(compose(["specialist.domain=math"]), "grpo") == ["grpo/math"]
    assert targets_of(compose(), "sft") == ["sft/math", "sft/code", "sft/agent"]
    cfg = compose(["specialist.domain=math"])
    assert [s.name for s in chosen(cfg, "grpo", build_graph(cfg, FUNCTIONS))] == [
        "base",
        "sft/math",
        "grpo/math",
    ]


def test_a_checkpoint_to_start_from_takes_the_place_of_the_stage_before(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    cfg = compose([f"grpo.init={tmp_path}", "specialist.domain=math"])
    assert [s.name for s in chosen(cfg, "grpo", build_graph(cfg, FUNCTIONS))] == ["grpo/math"]
    cfg = compose([f"evaluate.checkpoint={tmp_path}"])
    assert [s.name for s in chosen(cfg, "evaluate", build_graph(cfg, FUNCTIONS))] == ["evaluate"]


def test_teachers_from_elsewhere_need_no_specialist_stages(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    key = "teachers.registry"
    one = [f"{key}.all.domains=[math,code]", f"{key}.all.checkpoint={tmp_path}"]
    cfg = compose([*one, f"{key}.agent.domains=[agent]"])
    assert needs(cfg)["distill"] == ("base", "grpo/agent")


def test_settings_change_the_stages_that_depend_on_them_and_no_others():
    def settings(*overrides: str) -> dict[str, str]:
        return {s.name: s.settings for s in build_graph(compose(list(overrides)), FUNCTIONS)}

    plain = settings()
    changed = {n for n, s in settings("grpo.lr=0.5").items() if s != plain[n]}
    assert changed == {"grpo/math", "grpo/code", "grpo/agent"}
    one = {n for n, s in settings("specialist.settings.code.sft.steps=9").items() if s != plain[n]}
    assert one == {"sft/code"}
    assert settings("rollout.num_workers=7", "log.table_rows=9", "run.name=b") == plain


def test_redoing_from_a_stage_the_verb_does_not_have_is_refused():
    cfg = compose(["run.from=distil"])
    with pytest.raises(ConfigError, match="did you mean 'distill'"):
        chosen(cfg, "run", build_graph(cfg, FUNCTIONS))


def test_the_file_of_a_users_reward_is_part_of_what_grpo_depends_on(tmp_path):
    rewards = tmp_path / "r.py"
    rewards.write_text("def score(): ...\n")
    stages = {s.name: s.files for s in build_graph(compose([f"rewards.path={rewards}:score"]), FUNCTIONS)}
    assert stages["grpo/math"] == (str(rewards),)
    assert stages["sft/math"] == ()


def test_stages_travel_to_another_process_and_how_many_do_changes_no_fingerprint():
    one, three = (build_graph(compose([f"run.parallel={n}"])) for n in (1, 3))
    assert [stage.settings for stage in one] == [stage.settings for stage in three]
    for stage in three:
        received = pickle.loads(pickle.dumps(stage))
        assert (received.name, received.cfg, received.run.args) == (stage.name, stage.cfg, stage.run.args)  # type: ignore[attr-defined]
