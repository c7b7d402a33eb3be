"""Held-out measurement: one sample at T = 1 and a greedy answer to every test problem, for every model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from consilience.cli.jobs import rollout_jobs
from consilience.cli.prompt_family import prompt_family
from consilience.cli.ray_session import domains_of, rollout_pool
from consilience.cli.stage import StageContext
from consilience.conf.errors import RunError
from consilience.conf.schema import Config
from consilience.model.checkpoint import to_official
from consilience.model.config import ModelConfig
from consilience.model.forward_trace import Trace
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.records import RolloutRecord
from consilience.tasks.domain import Domain
from consilience.training.checkpoint import load_checkpoint
from consilience.training.durable_files import write_text_atomically
from consilience.training.forward import hidden_at_loss
from consilience.training.packing import pack, row_length
from consilience.training.stage_clock import StageClock

GRADES = "grades.json"


def run_evaluate(context: StageContext) -> Mapping[str, Any]:
    """Grade every model on every domain. Models already graded by an interrupted run are kept."""
    cfg = context.cfg
    models = models_of(context)
    domains = domains_of(cfg)
    folder = context.folder.create().path
    done = _read(folder)
    clock = StageClock()
    greedy = min(cfg.evaluate.greedy_problems, cfg.evaluate.num_problems)
    temperatures = {cfg.evaluate.temperature: cfg.evaluate.num_problems}
    if greedy:
        temperatures.setdefault(0.0, greedy)
    context.progress.start(context.name, len(models) * len(domains) * len(temperatures), "test")
    acting: dict[str, float] = {}
    isolation: dict[str, int] = {}
    last = list(models)[-1]  # its rollouts show what V4's parts did, so it is graded in any case
    for name, checkpoint in models.items():
        if name in done and name != last:
            context.progress.advance(len(domains) * len(temperatures))
            continue
        model, meta = load_checkpoint(checkpoint)
        family = prompt_family(cfg, checkpoint, meta, domains.values())
        config: ModelConfig = model.config  # type: ignore[assignment]
        pool = rollout_pool(cfg, config, checkpoint / "tokenizer.json", domains, family)
        pool.publish(to_official(model), meta.digest, 0)  # type: ignore[arg-type]
        jobs = {t: _jobs(cfg, domains, name, t, num) for t, num in temperatures.items()}
        records = {r.uid: r for r in pool.generate(short_first(list(jobs.values())))}
        clock.add_tokens("sampled", sum(r.num_sampled for r in records.values()))
        rows = []
        for temperature, asked in jobs.items():
            own = [records[job.uid] for job in asked]
            graded = _grade_rows(name, temperature, own, domains)
            rows += [row | {"family": family} for row in graded]
            context.progress.advance(
                len(domains), model=name, **{row["domain"]: _mean(row["grades"]) for row in graded}
            )
            if temperature == cfg.evaluate.temperature and name == last:
                acting = parts_that_acted(model, own)
        for record in records.values():
            isolation[record.isolation] = isolation.get(record.isolation, 0) + 1
        done[name] = rows
        write_text_atomically(folder / GRADES, json.dumps([row for each in done.values() for row in each]))
    context.progress.finish()
    return {
        "grades_file": str((folder / GRADES).relative_to(context.run.path)),
        "sampled_tokens": clock.state()["tokens"].get("sampled", 0),
        "checks": [{"name": n, "value": v, "relation": ">", "bound": 0.0} for n, v in acting.items()],
        "sandbox": isolation,
        "families": {model: rows[0].get("family") for model, rows in done.items() if rows},
        "scores": {
            f"{row['model']} {row['domain']} T={row['temperature']:g}": _mean(row["grades"])
            for each in done.values()
            for row in each
        },
    }


def models_of(context: StageContext) -> dict[str, Path]:
    """Model name -> checkpoint folder: `evaluate.checkpoint`, or every model of the run."""
    cfg = context.cfg
    if cfg.evaluate.checkpoint:
        return {"checkpoint": Path(cfg.evaluate.checkpoint)}
    named = {
        ("student" if stage == "distill" else stage): context.run.path / result["checkpoint"]
        for stage, result in context.inputs.items()
        if "checkpoint" in result
    }
    if not named:
        raise RunError("the run has no model to evaluate; train one first or name evaluate.checkpoint=FOLDER")
    return named


def _jobs(
    cfg: Config, domains: Mapping[str, Domain], model: str, temperature: float, num: int
) -> list[RolloutJob]:
    jobs = []
    for name, domain in domains.items():
        jobs += rollout_jobs(
            domain,
            domain.problems("test", num),
            prefix=f"evaluate/{model}/{temperature:g}/{name}",
            samples=1,
            temperature=temperature,
            run_seed=cfg.run.seed,
        )
    return jobs


def short_first(groups: Sequence[Sequence[RolloutJob]]) -> list[RolloutJob]:
    """All jobs, domains of short answers first: episodes that wait for a box would keep rows from them."""
    return sorted((job for group in groups for job in group), key=lambda job: job.max_tokens)


def _grade_rows(
    model: str, temperature: float, records: list[RolloutRecord], domains: Mapping[str, Domain]
) -> list[dict[str, Any]]:
    """Per domain, problem id -> correct (0 to 1); a grading that failed is absent."""
    rows = []
    for name in domains:
        grades = {
            str(r.metadata["problem"]): float(r.reward_parts.get("correct", r.reward))
            for r in records
            if r.domain == name and r.reward is not None
        }
        rows.append({"model": model, "domain": name, "temperature": temperature, "grades": grades})
    return rows


@torch.no_grad()
def parts_that_acted(model: Any, records: list[RolloutRecord], num: int = 24) -> dict[str, float]:
    """Counters of one traced forward over the longest episodes: what V4's parts did on real rollouts."""
    longest = sorted(records, key=lambda r: -len(r.prompt_ids) - len(r.token_ids))[:num]
    trace = Trace()
    ids = [(*r.prompt_ids, *r.token_ids) for r in longest]
    hidden_at_loss(model, pack(ids, quantum=32, max_row_tokens=row_length(max(map(len, ids)))), trace)
    loads = [load for layer, load in trace.expert_load.items() if trace.is_hash[layer]]
    return {
        "HCA entries attended": float(trace.hca_attended),
        "CSA entries dropped by the indexer's top-k": float(trace.csa_dropped),
        "distance between mHC streams": trace.stream_spread,
        "least load of a hash-routed expert": float(min(int(load.min()) for load in loads)) if loads else 0.0,
        "longest episode minus 255 tokens": float(len(ids[0]) - 255),
    }


def _read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    path = folder / GRADES
    done: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        for row in json.loads(path.read_text("utf-8")):
            done.setdefault(row["model"], []).append(row)
    return done


def _mean(grades: Mapping[str, float]) -> float:
    return sum(grades.values()) / len(grades) if grades else float("nan")
