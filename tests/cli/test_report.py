"""report.json: built from gradings by hand, checked against its schema, drawn and printed."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from consilience.cli.report import Report, check, missing_parts, read_report, validate, write_report
from consilience.cli.report_assemble import _health, assemble, charts_of
from consilience.cli.report_build import (
    acting_checks,
    distill_checks,
    fall,
    measure,
    score_checks,
    stage_rows,
)
from consilience.cli.report_page import render_page, write_page
from consilience.cli.report_terminal import print_report
from consilience.conf.errors import RunError
from consilience.conf.schema import Config, DomainConfig, TaskConfig
from consilience.rollout.deadlines import STALLS, Stall, StallLog
from consilience.rollout.phase_health import HEALTH

DOMAINS = ("math", "code")
MODELS = ("base", "sft/math", "sft/code", "grpo/math", "grpo/code", "student")


def grades_of(model: str, domain: str, num: int = 40) -> dict[str, float]:
    """base 10 %, SFT 50 % and GRPO 90 % on its own domain, the student 85 % everywhere."""
    kind, _, own = model.partition("/")
    share = {"base": 0.1, "student": 0.85}.get(
        kind, {"sft": 0.5, "grpo": 0.9}.get(kind, 0) if own == domain else 0.1
    )
    return {f"p{i:03d}": float(i < round(share * num)) for i in range(num)}


@pytest.fixture
def run_folder(tmp_path):
    rows = [
        {"model": m, "domain": d, "temperature": t, "grades": grades_of(m, d)}
        for m in MODELS
        for d in DOMAINS
        for t in (1.0, 0.0)
    ]
    (tmp_path / "grades.json").write_text(json.dumps(rows))
    return tmp_path


def results() -> dict[str, dict]:
    rewards = {"GRPO: mean reward": {"grpo/math": [[0, 1, 2], [0.4, None, 0.9]]}}
    return {
        "base": {"train_tokens": 1000},
        "sft/math": {"train_tokens": 500},
        "sft/code": {"train_tokens": 500},
        "grpo/math": {"train_tokens": 400, "sampled_tokens": 600, "mismatch_max": 1e-6, "curves": rewards},
        "grpo/code": {
            "train_tokens": 400,
            "sampled_tokens": 600,
            "mismatch_max": 3e-6,
            "sandbox": {"bwrap_user": 512},
            "checks": [{"name": "clip share", "value": 0.01, "relation": ">", "bound": 0}],
        },
        "distill": {
            "kl": [{"teacher": t, "step": s, "mean": 1 / (s + 1)} for t in DOMAINS for s in range(8)],
            "self_kl": 2e-9,
            "head_loads": [{"distinct": 2, "loads": 2}],
        },
        "evaluate": {"sampled_tokens": 9000, "grades_file": "grades.json"},
    }


def build(folder) -> Report:
    cfg = Config(task=TaskConfig(domains={d: DomainConfig(kind=d) for d in DOMAINS}))
    walls = dict.fromkeys(results(), 10.0)
    return assemble(
        cfg,
        folder,
        results(),
        walls,
        elapsed_s=65.0,
        command="consilience run",
        commit="abc",
        machine={"cores": 2},
    )


def test_scores_gains_and_retention_by_hand(run_folder):
    report = build(run_folder)
    row = next(r for r in report.scores if (r.model, r.domain, r.temperature) == ("grpo/math", "math", 1.0))
    assert (row.n, row.correct, row.share) == (40, 36.0, 0.9)
    assert [(g.domain, g.delta) for g in report.gains] == [
        ("math", pytest.approx(0.4)),
        ("code", pytest.approx(0.4)),
    ]
    assert report.gains[0].ci95[0] > 0.2
    assert report.retention == {d: pytest.approx(30 / 32) for d in DOMAINS}
    assert report.mismatch_max == 3e-6
    assert report.sandbox["bwrap_user"] > 0
    assert report.is_ok, [r for r in report.checks if not r.ok]


def test_a_complete_report_survives_its_file_and_lacks_nothing(run_folder):
    report = build(run_folder)
    write_report(run_folder / "report.json", report)
    again = read_report(run_folder / "report.json")
    assert again.to_plain() == report.to_plain()
    assert missing_parts(again, DOMAINS, 40) == []
    assert list(json.loads((run_folder / "report.json").read_text())) == [
        "schema", "command", "commit", "seed", "machine", "stages", "scores", "gains", "retention", "kl",
        "self_kl", "head_loads", "mismatch_max", "sandbox", "checks", "elapsed_s", "health",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": []}, "stage base"),
        ({"scores": []}, "40 sampled answers of student on code"),
        ({"gains": []}, "gain of math"),
        ({"retention": {}}, "retention of code"),
        ({"kl": []}, "KL per teacher"),
        ({"self_kl": None}, "self_kl"),
        ({"sandbox": {}}, "sandbox"),
        ({"checks": []}, "checks"),
    ],
)
def test_what_a_run_did_not_leave_is_named(run_folder, change, said):
    assert said in missing_parts(replace(build(run_folder), **change), DOMAINS, 40)


def test_fewer_graded_problems_than_asked_for_are_noticed(run_folder):
    assert "41 sampled answers of base on math" in missing_parts(build(run_folder), DOMAINS, 41)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.pop("gains"), "'gains' is no list of rows"),
        (lambda p: p.update(extra=1), "'extra' is not part of the schema"),
        (lambda p: p.update(schema=9), "schema is 9"),
        (lambda p: p.update(seed="1"), "'seed' is str"),
        (lambda p: p["scores"][0].pop("ci95"), "scores[0]: 'ci95' is missing"),
        (lambda p: p["scores"][0].update(ci95=[1]), "scores[0]: 'ci95' is no pair"),
        (lambda p: p["checks"][0].update(ok="yes"), "checks[0]: 'ok' is str"),
        (lambda p: p["stages"][0].update(train_tokens=True), "'train_tokens' is bool"),
        (lambda p: p["kl"].append(3), "kl[16]: int instead of a row"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused_by_name(run_folder, damage, said):
    plain = json.loads(json.dumps(build(run_folder).to_plain()))
    assert validate(plain) == []
    damage(plain)
    assert any(said in problem for problem in validate(plain))
    with pytest.raises(RunError):
        Report.from_plain(plain)


def test_a_value_that_was_not_measured_is_null_and_its_check_fails(run_folder):
    report = replace(build(run_folder), self_kl=math.nan, checks=[check("x", math.nan, "<", 1.0)])
    plain = report.to_plain()
    assert plain["self_kl"] is None
    assert plain["checks"] == [{"name": "x", "value": None, "bound": "< 1", "ok": False}]
    assert not report.is_ok


def test_a_missing_or_torn_file_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match="finish the run first"):
        read_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(RunError, match="remove it and run again"):
        read_report(tmp_path / "report.json")


def test_gradings_that_cannot_be_read_say_which_stage_to_redo(run_folder):
    (run_folder / "grades.json").write_text("[{}]")
    with pytest.raises(RunError, match=r"run\.from=evaluate"):
        build(run_folder)


def test_a_specialist_that_is_good_everywhere_fails_its_check():
    everywhere = {(m, d, 1.0): grades_of("student", d) for m in MODELS if m != "base" for d in DOMAINS}
    everywhere |= {("base", d, 1.0): grades_of("base", d) for d in DOMAINS}
    rows = {r.name: r for r in score_checks(measure(everywhere, DOMAINS, num_resamples=200))}
    assert not rows["least retention of grpo/math over domains"].ok
    assert not rows["gain of math: lower bound"].ok


def test_a_failed_grading_leaves_the_problem_out_of_every_comparison():
    grades = {(m, "math", 1.0): grades_of(m, "math") for m in MODELS}
    grades["sft/math", "math", 1.0].pop("p000")
    (gained,) = measure(grades, ["math"], num_resamples=200).gains
    assert gained.delta == pytest.approx((35 - 19) / 39)


def test_checks_of_distillation():
    rising = [row(s) for s in range(8)]
    assert [r.ok for r in distill_checks(rising, 1e-5, [heads(2, 3)])] == [False, False, False]
    falling = [row(s, -1) for s in range(8)]
    assert [r.ok for r in distill_checks(falling, 1e-7, [heads(2, 2)])] == [True, True, True]
    assert [r.ok for r in distill_checks(falling[:1], None, [])] == [False, False, False]


def test_one_wild_episode_does_not_hide_that_the_kl_fell():
    assert fall([4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]) == pytest.approx(0.25)
    assert fall([0.02] * 4 + [0.001] * 8 + [0.0005, 0.2, 0.0005, 0.0005]) < 0.2
    assert fall([1.0, 1.1]) > 1 and fall([0.0, 0.0]) == pytest.approx(1.0)
    assert fall([1.0]) is None


def row(step: int, sign: int = 1):
    from consilience.cli.report import KlRow

    return KlRow("math", step, 1 + sign * step / 100)


def heads(distinct: int, loads: int):
    from consilience.cli.report import HeadLoadRow

    return HeadLoadRow(distinct, loads)


def test_a_part_that_never_acted_fails_its_check():
    assert [r.ok for r in acting_checks({"hca entries": 12, "clip share": 0.0})] == [True, False]


def test_shares_of_time_sum_to_one():
    rows = stage_rows([("base", 30.0, 3000, 0), ("evaluate", 10.0, 0, 500)])
    assert [(r.share, r.tokens_per_s) for r in rows] == [(0.75, 100.0), (0.25, 50.0)]
    assert stage_rows([("base", 0.0, 0, 0)])[0].tokens_per_s == 0.0


def test_the_total_time_is_what_elapsed_not_the_sum_of_stages_that_overlap(run_folder):
    report, out = build(run_folder), io.StringIO()
    assert sum(row.wall_s for row in report.stages) > 65.0
    assert "<b>1 min 05 s</b><span>elapsed" in render_page(report)
    print_report(report, out)
    assert "Where the time went: 1:05 in all" in out.getvalue()
    older = report.to_plain()
    del older["elapsed_s"]
    assert Report.from_plain(older) == replace(report, elapsed_s=None)


def test_the_page_is_one_well_formed_file_that_asks_for_no_other(run_folder):
    report = replace(build(run_folder), command='consilience run <&> "x"')
    write_page(run_folder / "report.html", report, charts_of(results()))
    page = (run_folder / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|src=", page)
    assert "consilience run &lt;&amp;&gt;" in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    for part in (
        "Held-out scores",
        "GRPO: mean reward",
        "mean KL to each teacher",
        "Where the time went",
        "clip share",
    ):
        assert part in page
    assert "nan" not in page.lower().replace("finance", "")


def test_an_empty_report_is_drawn_and_printed_too():
    report = Report("", "", 1, {}, [], [], [], {}, [], None, [], None, {}, [])
    assert "nothing was recorded" in render_page(report)
    print_report(report, io.StringIO())


def test_the_summary_names_what_fails_last(run_folder):
    out = io.StringIO()
    report = build(run_folder)
    print_report(replace(report, checks=[*report.checks, check("clip share", 0.0, ">", 0.0)]), out)
    lines = out.getvalue().strip().splitlines()
    assert lines[-1].strip() == "fails: clip share: 0, needs > 0"
    assert "90.0%" in out.getvalue()


def test_what_stalled_and_was_dropped_is_summed_over_the_stages_and_told(run_folder):
    assert build(run_folder).health == dict.fromkeys(HEALTH, 0.0)
    log = StallLog(run_folder / STALLS)
    log.add(Stall("publish", 9.0, 5.0, "rollout worker 0"))
    left = results()
    left["grpo/math"]["health"] = {"stalls": 1.0, "dropped_samples": 8.0, "resumed_tokens": 5.0}
    left["distill"]["health"] = {"dropped_samples": 4.0}
    report, out = replace(build(run_folder), health=_health(run_folder, left)), io.StringIO()
    assert report.health["dropped_samples"] == 12.0 and report.health["resumed_tokens"] == 5.0
    assert report.health["stalls"] == 1.0  # those of the file, which have those without a sample too
    print_report(report, out)
    assert "disturbances: stalls 1, dropped samples 12, resumed tokens 5; stalls.jsonl" in out.getvalue()
    assert "dropped samples" in render_page(report)
    older = report.to_plain()
    del older["health"]
    assert Report.from_plain(older).health == {}
