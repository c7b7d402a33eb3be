"""Every GPU table: a process each, what is done already is skipped, all of it in one page at the end.

    python bench/run_gpu.py [--out FOLDER] [--only NAME …]       (make bench-gpu OUT=FOLDER)

Runs from a plain checkout with torch and triton. A table that takes more than 8 minutes or fails is named and
leaves the others alone; call again to run it alone. The page is `<folder>/<date>-<device>.md`, the default
folder bench/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMIT_S = 480
EITHER = ("opd_step", "opd_end_to_end")
"""Benches for both kinds of machine, which take the GPU where there is one."""


def run(file: Path, parts: Path) -> bool:
    """The output of one bench as `<parts>/<name>.md`, written whole or not at all; says how it went."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(file)]
    print(f"{file.stem} …", end=" ", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        print(f"over {LIMIT_S} s")
        return False
    took = time.monotonic() - began
    if done.returncode:
        print(f"failed after {took:.0f} s:\n{done.stderr[-2000:]}")
        return False
    text = f"## {file.stem}\n\n`python bench/{file.name}` ({took:.0f} s)\n\n{done.stdout.strip()}\n"
    draft = parts / f"{file.stem}.part"
    draft.write_text(text, encoding="utf-8")
    draft.rename(parts / f"{file.stem}.md")
    print(f"{took:.0f} s")
    return True


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--only", nargs="+", help="names of bench files, without _gpu.py")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/run_gpu.py needs a CUDA device; PyTorch finds none")
    device = torch.cuda.get_device_name().replace(" ", "-")
    page = given.out / f"{date.today()}-{device}.md"
    parts = given.out / f"{page.stem}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    files = sorted((ROOT / "bench").glob("*_gpu.py"))
    files = [f for f in files if f.name != Path(__file__).name]
    files += [ROOT / "bench" / f"{name}.py" for name in EITHER]
    if given.only:
        files = [f for f in files if f.stem.removesuffix("_gpu") in given.only]
    failed = [f.stem for f in files if not (parts / f"{f.stem}.md").exists() and not run(f, parts)]
    head = (
        f"# GPU tables, {date.today()}\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"commit {commit()}. Each table names the command that makes it.\n"
    )
    tables = [f.read_text(encoding="utf-8") for f in sorted(parts.glob("*.md"))]
    page.write_text("\n".join([head, *tables]), encoding="utf-8")
    print(page)
    if failed:
        sys.exit(f"without: {', '.join(failed)}")


if __name__ == "__main__":
    main()
