"""`consilience grpo` with a dense model and vLLM's workers: the command, its processes, what it leaves.

inputs/init   a Qwen3 of two layers with random weights as transformers saves it, and a tokenizer
<run>/dense/stages/grpo-mine/{rollouts,checkpoints,metrics.jsonl}, <run>/dense/vllm_updates.jsonl
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from real_run import REWARD
from session import ROOT
from tiny_qwen import MAX_MISMATCH, write_checkpoint

from consilience.rollout.fake_worker import byte_tokenizer

STEPS, PROMPTS, GROUP, TOKENS = 3, 4, 6, 80
MARK = "DENSE_RUN"
WAIT_S = 240.0
VLLM = "{dtype: float32, enforce_eager: true, kv_cache_memory_bytes: 33554432}"


def prepare(folder):
    """The inputs."""
    init = folder / "init"
    init.mkdir(parents=True)
    write_checkpoint(init)
    byte_tokenizer().save(init / "tokenizer.json")
    rows = [{"prompt": f"What is {i} times {i + 3}?", "answer": str(i * (i + 3))} for i in range(60)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(inputs, run):
    settings = {
        "task": "file",
        "task.family": "official",
        "task.domains.mine.path": inputs / "problems.jsonl",
        "task.domains.mine.reward": f"{inputs / 'reward.py'}:score",
        "task.domains.mine.effort": "chat",
        "task.domains.mine.max_tokens": TOKENS,
        "task.num_train": 30,
        "base.num_examples": 1,
        "sft.num_examples": 1,
        "grpo.init": inputs / "init",
        "grpo.steps": STEPS,
        "grpo.prompts_per_step": PROMPTS,
        "grpo.group_size": GROUP,
        "grpo.row_tokens": 256,
        "grpo.lr": 3e-3,
        "rollout.engine": "vllm",
        "rollout.proof": "off",
        "rollout.num_workers": 1,
        "rollout.max_batch": 16,
        "rollout.max_length": 200,
        "rollout.vllm.python": sys.executable,
        "rollout.vllm.max_mismatch": MAX_MISMATCH,
        "rollout.vllm.sleep": 2,
        "rollout.vllm.settings": VLLM,
        "engine.device": "cpu",
        "engine.threads": 1,
        "engine.checkpoint_s": 0,
        "cluster.object_store_bytes": 80 << 20,
        "log.wandb": "disabled",
        "log.progress": "off",
        "run.folder": run,
        "run.name": "dense",
        "run.seed": 7,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "consilience.cli.main", "grpo", *words]


class DenseRun:
    """The driver in a process of its own; it and all that it starts carry a mark in their environment."""

    def __init__(self, inputs, run):
        self.stage = run / "dense" / "stages" / "grpo-mine"
        self.updates = run / "dense" / "vllm_updates.jsonl"
        self.output = run.parent / "driver.txt"
        self.inputs, self.run = inputs, run
        self.mark = f"{MARK}={secrets.token_hex(8)}"

    def __enter__(self):
        self.temp = tempfile.TemporaryDirectory(
            prefix="dense-", dir="/tmp", ignore_cleanup_errors=True
        )  # short, for Ray's sockets
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {MARK: self.mark.partition("=")[2], "RAY_TMPDIR": self.temp.name}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self.output.open("ab") as output:
            self.driver = subprocess.Popen(
                command(self.inputs, self.run),
                env=environment,
                cwd=self.temp.name,
                stdout=output,
                stderr=output,
            )
        return self

    def __exit__(self, *exc):
        if self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while (left := self.members()) and time.monotonic() < deadline:
            for pid in left:
                self.end(pid)
            time.sleep(0.05)
        self.temp.cleanup()

    def members(self):
        """Process id -> command line of everything that is marked."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(path.name)] = line
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def workers(self):
        return [pid for pid, line in self.members().items() if line.startswith("ray::") and "Mailbox" in line]

    def end(self, pid):
        """`kill -9`, if it is still one of ours."""
        if pid in self.members():
            os.kill(pid, 9)

    def wait_for_log(self, phase, num_bytes):
        """Until so many bytes of a phase are logged. AssertionError if the driver ends before."""
        folder = self.stage / "rollouts" / "token_log" / f"{phase:06d}"
        deadline = time.monotonic() + WAIT_S
        while sum(path.stat().st_size for path in folder.glob("*.log")) < num_bytes:
            assert self.driver.poll() is None and time.monotonic() < deadline, self.output.read_text()[-4000:]
            time.sleep(0.005)

    def read_updates(self):
        """What vLLM's workers found of each update, in order."""
        return [json.loads(line) for line in self.updates.read_text().splitlines()]

    def finish(self):
        """The stage's result. AssertionError with the driver's output if it failed."""
        assert self.driver.wait(WAIT_S) == 0, self.output.read_text()[-4000:]
        return json.loads((self.stage / "done.json").read_text())["result"]
