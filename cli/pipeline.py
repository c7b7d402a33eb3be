"""The verbs that work on a run folder: the whole graph, a part of it, or its report."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.cli.graph import Graph
from consilience.cli.progress_display import open_progress
from consilience.cli.report import Report, missing_parts, read_report, write_report
from consilience.cli.report_assemble import assemble, charts_of
from consilience.cli.report_page import write_page
from consilience.cli.report_terminal import print_report
from consilience.cli.side_by_side import SharedWorkers
from consilience.cli.stage import Stage
from consilience.cli.stages import STAGE_FUNCTIONS, StageFunctions, build_graph, chosen
from consilience.conf.errors import RunError
from consilience.conf.load import to_yaml
from consilience.conf.schema import Config
from consilience.training.run_folder import open_run


def run(cfg: Config, functions: StageFunctions = STAGE_FUNCTIONS) -> int:
    """The whole graph, then the report. 1 if a check misses its bound and `run.margins` asks for it."""
    graph = execute(cfg, chosen(cfg, "run", build_graph(cfg, functions)))
    if cfg.evaluate.checkpoint:
        return 0
    written = write_results(cfg, graph)
    print_report(written)
    folder = run_folder(cfg)
    print(f"\nreport: {folder / 'report.html'}  (numbers: {folder / 'report.json'})")
    return 0 if written.is_ok or not cfg.run.margins else 1


def sft(cfg: Config) -> int:
    return _part(cfg, "sft")


def grpo(cfg: Config) -> int:
    return _part(cfg, "grpo")


def distill(cfg: Config) -> int:
    return _part(cfg, "distill")


def evaluate(cfg: Config) -> int:
    return _part(cfg, "evaluate")


def report(cfg: Config) -> int:
    """Print a finished run's report; RunError if it lacks a part that such a run leaves."""
    path = run_folder(cfg) / "report.json"
    found = read_report(path)
    missing = missing_parts(found, list(cfg.task.domains), cfg.evaluate.num_problems)
    if missing:
        raise RunError(f"'{path}' is incomplete, it lacks: {'; '.join(missing[:5])}; finish the run first")
    print_report(found)
    return 0 if found.is_ok or not cfg.run.margins else 1


def run_folder(cfg: Config) -> Path:
    return Path(cfg.run.folder) / cfg.run.name


def execute(cfg: Config, stages: list[Stage]) -> Graph:
    """Run these stages in the run folder of `cfg`, holding its lock. The finished graph."""
    folder = run_folder(cfg)
    if folder.exists() and not cfg.run.resume:
        raise RunError(
            f"run folder '{folder}' exists and run.resume is false; choose another run.name or remove it"
        )
    from consilience.cli.engines import backend_of
    from consilience.training.manifest import environment_manifest  # both import torch

    if cfg.cluster.placement != "free":
        _place_roles(cfg, samples=any(stage.needs_workers for stage in stages))
    else:
        backend_of(cfg)  # refuses what the machine cannot do, before anything is started
    manifest = environment_manifest(command=command(), seed=cfg.run.seed)
    # A changed setting is not refused: the graph redoes just the stages that depend on it.
    opened = open_run(
        folder.parent, folder.name, config_yaml=to_yaml(cfg), manifest=manifest, accept_changed_config=True
    )
    with opened as run, contextlib.closing(open_progress(cfg.log.progress)) as progress:
        graph = Graph(run, stages, progress)
        graph.run(redo_from=cfg.run.from_, slots=cfg.run.parallel, open_workers=_share_cluster)
    return graph


def _place_roles(cfg: Config, samples: bool) -> None:
    from consilience.cli.ray_session import placement_of  # imports torch and ray

    placement_of(cfg, samples=samples)  # refuses what the cluster cannot hold, before any model is built


def _share_cluster(cfgs: Sequence[Config], slots: int) -> SharedWorkers:
    from consilience.cli.ray_session import share_cluster  # imports torch and ray

    return share_cluster(cfgs, slots)


def write_results(cfg: Config, graph: Graph) -> Report:
    """report.json and report.html of a graph that ran to its end."""
    folder = run_folder(cfg)
    first = graph.run_folder.manifest() or {}
    latest = (first.get("resumes") or [first])[-1]
    assembled = assemble(
        cfg,
        folder,
        graph.results,
        {name: state.wall_s for name, state in graph.states().items()},
        elapsed_s=graph.elapsed_s(),
        command=shlex.join(first.get("command") or command()),
        commit=(latest.get("git") or {}).get("commit") or "",
        machine=machine_facts(latest),
    )
    write_report(folder / "report.json", assembled)
    write_page(folder / "report.html", assembled, charts_of(graph.results))
    return assembled


def command() -> list[str]:
    return ["consilience", *sys.argv[1:]]


def machine_facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The report's `machine`: what the manifest says of hardware and of the versions that matter most."""
    packages, python = manifest.get("packages") or {}, manifest.get("python") or {}
    versions = {name: packages.get(name) for name in ("torch", "ray")}
    return {**(manifest.get("machine") or {}), "python": python.get("version"), **versions}


def _part(cfg: Config, kind: str) -> int:
    graph = execute(cfg, chosen(cfg, kind, build_graph(cfg)))
    for name in (stage.name for stage in graph.stages):
        checkpoint = graph.results[name].get("checkpoint")
        print(f"{name}: {checkpoint or graph.stage_folder(name).path}")
    return 0
