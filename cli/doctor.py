"""`consilience doctor`: what this machine has, and what each stage will therefore use.

Every finding that stands in the way comes with its fix. Exit code 0 if a run can start, 1 if not.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilience.conf.errors import ConsilienceError
from consilience.conf.schema import Config
from consilience.sandboxes.protocol import Isolation, SandboxSpec

GIB = 1 << 30
STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `state` is ok, note (a run works, with less) or missing (a run cannot start)."""

    what: str
    found: str
    state: str = "ok"
    fix: str = ""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What a kind of stage will use."""

    stage: str
    engine: str
    device: str
    sampler: str
    sandbox: str


def doctor(cfg: Config) -> int:
    """Print both tables; the exit code."""
    findings = inspect(cfg)
    console = Console()
    console.print(_findings_table(findings))
    console.print(_plan_table(plan_stages(cfg, device_of(cfg), sandbox_of(cfg).found)))
    missing = [f for f in findings if f.state == "missing"]
    for finding in (f for f in findings if f.fix):
        console.print(Text(f"{finding.what}: {finding.fix}", STYLES[finding.state]))
    console.print("This machine can run it." if not missing else f"{len(missing)} thing(s) stand in the way.")
    return 1 if missing else 0


def inspect(cfg: Config) -> list[Finding]:
    """Every finding, in the order a reader cares about."""
    facts: list[Callable[[], Finding]] = [
        _python,
        _processor,
        _memory,
        lambda: _disk(Path(cfg.run.folder)),
        lambda: _torch(cfg),
        lambda: _package("ray", "ray[default]"),
        lambda: _cluster(cfg),
        lambda: _package("wandb", "wandb"),
        lambda: _wandb(cfg),
        _compiler,
        *[(lambda offer=offer: offer) for offer in _offers(cfg)],
        lambda: sandbox_of(cfg),
    ]
    return [fact() for fact in facts]


def device_of(cfg: Config) -> str:
    """The device the trainer will use: "cpu" or the GPU's name."""
    import torch

    if cfg.engine.device != "cpu" and torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    return "cpu" if cfg.engine.device != "cuda" else "none"


def sandbox_of(cfg: Config) -> Finding:
    """The sandbox a run will choose here, or why there is none strong enough."""
    from consilience.sandboxes.probe import available, choose

    wanted = Isolation[cfg.sandbox.min_isolation.upper()]
    spec = SandboxSpec(
        driver=cfg.sandbox.driver,
        min_isolation=wanted,
        image=cfg.sandbox.image,
        runtime=cfg.sandbox.runtime,
        allow_insecure=cfg.sandbox.allow_insecure,
    )
    try:
        choose(spec)
    except ConsilienceError as error:
        return Finding("sandbox", "none strong enough", "missing", str(error))
    named = [o for o in available(image=cfg.sandbox.image) if cfg.sandbox.driver in ("auto", o.driver)]
    return Finding("sandbox", str(next(o for o in named if o.is_available and o.level >= wanted)))


def plan_stages(cfg: Config, device: str, sandbox: str) -> list[StagePlan]:
    """What each kind of stage uses on this machine."""
    trainer = f"{cfg.engine.kind}, {cfg.optimizer.kind}"
    workers = f"native, {cfg.rollout.num_workers} Ray actors × {cfg.rollout.threads_per_worker} thread(s)"
    return [
        StagePlan("base, sft", trainer, device, "–", "–"),
        StagePlan("grpo", trainer, device, workers, sandbox),
        StagePlan("distill", trainer, device, workers, sandbox),
        StagePlan("evaluate", "–", "cpu", workers, sandbox),
    ]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("python", found)
    return Finding("python", found, "missing", "install Python 3.11 or 3.12, then make clean setup")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0]
    found = f"{cores} core(s), load {load:.1f}"
    if cores < 2:
        return Finding("processor", found, "note", "one core doubles the demo's ten minutes")
    if load > cores:
        return Finding("processor", found, "note", "other programs use the cores; times will be longer")
    return Finding("processor", found)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < 3 * GIB:
        return Finding("memory", found, "note", "the demo's processes want about 3 GiB; close other programs")
    return Finding("memory", found)


def _disk(folder: Path) -> Finding:
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / GIB:.1f} GiB free in {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", found, "missing", f"'{existing}' cannot be written; choose run.folder=FOLDER")
    if free < GIB:
        return Finding(
            "disk", found, "missing", "a run wants about 1 GiB; free some space or choose run.folder=FOLDER"
        )
    return Finding("disk", found)


def _torch(cfg: Config) -> Finding:
    found = _version("torch")
    if found is None:
        return Finding("torch", "not installed", "missing", "make setup")
    device = device_of(cfg)
    if device == "none":
        return Finding(
            "torch", f"{found}, no GPU", "missing", "engine.device=cuda needs a GPU; take engine.device=auto"
        )
    return Finding("torch", f"{found}, {device}")


def _package(name: str, requirement: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding(name, "not installed", "missing", f"make setup (or pip install '{requirement}')")
    return Finding(name, found)


def _cluster(cfg: Config) -> Finding:
    address = (
        cfg.cluster.address if cfg.cluster.address not in (None, "auto") else os.environ.get("RAY_ADDRESS")
    )
    if address:
        return Finding("ray cluster", f"joins {address}")
    if cfg.cluster.dashboard and not _is_port_free(cfg.cluster.dashboard_port):
        port = cfg.cluster.dashboard_port
        return Finding(
            "ray cluster", f"port {port} in use", "missing", "choose another cluster.dashboard_port"
        )
    return Finding("ray cluster", "starts its own on this machine")


def _wandb(cfg: Config) -> Finding:
    if (
        cfg.log.wandb == "online"
        and not os.environ.get("WANDB_API_KEY")
        and not (Path.home() / ".netrc").exists()
    ):
        return Finding("wandb account", "none", "missing", "wandb login, or log=offline")
    return Finding("wandb account", "not needed" if cfg.log.wandb != "online" else "present")


def _compiler() -> Finding:
    """Whether the CPU kernels of model/kernels/ can be compiled here (and now are)."""
    from consilience.model.kernels.compiled import library

    found = library("hyper_connections")
    if isinstance(found, str):
        fix = "a third slower without; apt install build-essential, or xcode-select --install"
        return Finding("C kernels", found, "note", fix)
    return Finding("C kernels", "compiled for this processor")


def _offers(cfg: Config) -> Sequence[Finding]:
    """Every isolation level this machine could give; the ones it cannot are notes, not faults."""
    from consilience.sandboxes.probe import available

    return [
        Finding(
            f"  {offer.level.label} ({offer.driver})",
            f"{offer.runtime}, memory by {offer.memory_cap}" if offer.is_available else f"no: {offer.reason}",
            "ok" if offer.is_available else "note",
        )
        for offer in available(image=cfg.sandbox.image)
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_port_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(title="This machine", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("what", "found", ""):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.found, Text(finding.state, STYLES[finding.state]))
    return table


def _plan_table(plans: Sequence[StagePlan]) -> Table:
    table = Table(
        title="What each stage will use", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in ("stage", "trainer", "device", "sampler", "sandbox"):
        table.add_column(name, overflow="fold")
    for plan in plans:
        table.add_row(plan.stage, plan.engine, plan.device, plan.sampler, plan.sandbox)
    return table
