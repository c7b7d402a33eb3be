"""The verbs on a run folder, with plain functions in the place of the stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from consilience.cli import pipeline
from consilience.cli.generate import find_checkpoint
from consilience.cli.stages import build_graph, chosen
from consilience.conf.errors import EngineError, RunError
from consilience.conf.load import from_plain, load_resolved
from consilience.conf.schema import Config

MODELS = ("base", "sft/math", "sft/code", "grpo/math", "grpo/code", "student")


def config(folder: Path, engine: dict | None = None, **run) -> Config:
    return from_plain(
        {
            "engine": engine or {},
            "task": {"domains": {"math": {"kind": "math"}, "code": {"kind": "code"}}},
            "evaluate": {"num_problems": 40, "num_resamples": 200},
            "log": {"progress": "off"},
            "run": {"folder": str(folder), "name": "r", **run},
        }
    )


def train(context) -> dict:
    (context.folder.checkpoints / "step-00000001").mkdir(exist_ok=True)
    sandbox = {"bwrap_user": 4}
    return {"train_tokens": 10, "sampled_tokens": 10, "mismatch_max": 1e-6, "sandbox": sandbox}


def distil(context) -> dict:
    rows = [{"teacher": t, "step": s, "mean": 1.0 - s / 10} for t in ("math", "code") for s in range(8)]
    return {**train(context), "kl": rows, "self_kl": 0.0, "head_loads": [{"distinct": 2, "loads": 2}]}


def evaluate(context) -> dict:
    def share(model: str, domain: str) -> float:
        kind, _, own = model.partition("/")
        return {"base": 0.1, "student": 0.9}.get(
            kind, {"sft": 0.5, "grpo": 0.9}.get(kind, 0) if own == domain else 0.1
        )

    rows = [
        {
            "model": m,
            "domain": d,
            "temperature": 1.0,
            "grades": {f"{i:02d}": float(i < 40 * share(m, d)) for i in range(40)},
        }
        for m in MODELS
        for d in ("math", "code")
    ]
    path = context.folder.path / "grades.json"
    path.write_text(json.dumps(rows))
    return {"grades_file": str(path.relative_to(context.run.path))}


FUNCTIONS = {"base": train, "sft": train, "grpo": train, "distill": distil, "evaluate": evaluate}


def test_a_run_leaves_what_the_contract_lists_and_its_report_is_complete(tmp_path, capsys):
    cfg = config(tmp_path)
    assert pipeline.run(cfg, FUNCTIONS) == 0
    folder = tmp_path / "r"
    for name in ("config.yaml", "manifest.json", "graph.json", "report.json", "report.html"):
        assert (folder / name).is_file(), name
    assert (folder / "stages/grpo-math/done.json").is_file()
    assert load_resolved(folder / "config.yaml") == cfg
    assert pipeline.report(cfg) == 0
    assert "checks hold" in capsys.readouterr().out
    found = json.loads((folder / "report.json").read_text())
    assert found["machine"]["cores"] >= 1
    assert found["retention"] == {"math": 1.0, "code": 1.0}


def test_a_check_that_fails_fails_the_run_unless_only_structure_is_asked_for(tmp_path):
    def copies_itself(context) -> dict:
        return {**distil(context), "self_kl": 1.0}

    functions = {**FUNCTIONS, "distill": copies_itself}
    assert pipeline.run(config(tmp_path), functions) == 1
    assert pipeline.run(config(tmp_path, margins=False), functions) == 0


def test_an_incomplete_report_is_refused_with_what_it_lacks(tmp_path):
    def forgets(context) -> dict:
        return {k: v for k, v in distil(context).items() if k != "self_kl"}

    cfg = config(tmp_path, margins=False)
    pipeline.run(cfg, {**FUNCTIONS, "distill": forgets})
    with pytest.raises(RunError, match="lacks: self_kl"):
        pipeline.report(cfg)


def test_a_run_that_must_be_new_refuses_a_folder_that_exists(tmp_path):
    pipeline.run(config(tmp_path), FUNCTIONS)
    with pytest.raises(RunError, match=r"choose another run\.name"):
        pipeline.run(config(tmp_path, resume=False), FUNCTIONS)


def test_a_folder_in_use_is_refused(tmp_path):
    cfg = config(tmp_path)

    def runs_again(context) -> dict:
        pipeline.run(cfg, FUNCTIONS)
        return {}

    with pytest.raises(RunError, match="is in use by process"):
        pipeline.run(cfg, {**FUNCTIONS, "base": runs_again})


def must_not_run(context) -> dict:
    raise AssertionError(context.name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_missing_deepspeed_is_one_error_before_anything_is_made(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # to imports, it is not installed
    cfg = config(tmp_path, {"kind": "deepspeed", "ranks": ranks, "device": "cpu"})
    with pytest.raises(EngineError) as found:
        pipeline.run(cfg, dict.fromkeys(FUNCTIONS, must_not_run))
    assert str(found.value) == (
        "engine.kind=deepspeed needs DeepSpeed, which is not installed; pip install 'deepspeed==0.19.8', "
        "or use engine.kind=torch"
    )
    assert not list(tmp_path.iterdir())


def test_a_run_folder_may_be_moved_and_still_stands(tmp_path):
    pipeline.run(config(tmp_path), FUNCTIONS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").rename(tmp_path / "elsewhere" / "r")
    assert pipeline.run(config(tmp_path / "elsewhere"), dict.fromkeys(FUNCTIONS, must_not_run)) == 0


def test_the_most_finished_model_is_the_one_to_talk_to(tmp_path):
    cfg = config(tmp_path)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        find_checkpoint(cfg)
    pipeline.execute(cfg, chosen(cfg, "sft", build_graph(cfg, FUNCTIONS)))
    assert find_checkpoint(cfg).parts[-3:-1] == ("base", "checkpoints")
    pipeline.run(cfg, FUNCTIONS)
    assert find_checkpoint(cfg).parts[-3] == "distill"
