"""`consilience grpo` on a model of two layers: the command, what it starts from, what it leaves.

inputs/init            checkpoint with random weights, tokenizer and all
inputs/problems.jsonl  prompts;  inputs/reward.py  a reward that random weights get now and then
<run>/chaos/stages/grpo-mine/{rollouts,checkpoints,metrics.jsonl}
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.frame_file import read_frames
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint
from consilience.training.metrics import read_metrics, surviving

TELLING = {"time", "stalls", "redispatches", "resumed_samples", "resumed_tokens", "log_faults"}
STEPS, PROMPTS, GROUP, TOKENS = 4, 3, 4, 60
STALL_S = 10.0  # the least that `rollout.stall_s` allows
CONFIG = replace(
    TINY,
    hidden_size=24,
    num_hidden_layers=2,
    compress_ratios=(0, 4),
    n_routed_experts=4,
    moe_intermediate_size=16,
)
REWARD = '''"""Half of all answers get a point, so that groups have a signal to learn from."""


def score(completion, *, prompt, metadata, sandbox):
    return float(sum(completion.text.encode("utf-8", "replace")) % 2)
'''


def prepare(folder: Path) -> Path:
    """The inputs that all runs share."""
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    size = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = replace(CONFIG, vocab_size=tokenizer.padded_vocab_size(16), **size)
    ids = dict(tokenizer.special_ids)
    meta = CheckpointMeta("sft", 0, 0, special_tokens=ids, domain="mine", family="official")
    model = initialize(Transformer(config), 0)
    save_checkpoint(folder / "init", model, folder / "tokenizer.json", meta)
    rows = [{"prompt": f"What is {i} times {i + 3}?", "answer": str(i * (i + 3))} for i in range(60)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


def command(inputs: Path, run: Path, address: str | None = None) -> list[str]:
    """The command line of a run in `run`, the same at every resume. `address`: of a cluster to join."""
    settings = {
        "task": "file",
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
        "grpo.row_tokens": 128,
        "grpo.lr": 3e-3,
        "rollout.max_length": 160,
        "rollout.stall_s": STALL_S,
        "rollout.most_redispatches": 1000,  # deaths before a word count, too
        "engine.device": "cpu",
        "engine.threads": 1,
        "engine.exact": "true",
        "engine.checkpoint_s": 0,
        "cluster.object_store_bytes": 80 << 20,
        "log.wandb": "disabled",
        "log.progress": "off",
        "run.folder": run,
        "run.name": "chaos",
        "run.seed": 7,
    }
    if address is not None:
        settings["cluster.address"] = address
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "consilience.cli.main", "grpo", *words]


def stage(run: Path) -> Path:
    return run / "chaos" / "stages" / "grpo-mine"


@dataclass(frozen=True)
class Facts:
    """What must not depend on who died.

    records    uid -> prompt, tokens, log-probabilities, weight versions, finish, reward
    trainings  uid -> times the surviving weights have seen it, from the ledger's bytes alone
    tensors    digest of weights and optimiser, by name, of the last checkpoint
    metrics    rows of metrics.jsonl that a resume has not undone, but for what tells of disturbances
    counted    tokens sampled and trained on, as the stage's result has them
    """

    records: dict[str, tuple[Any, ...]]
    trainings: dict[str, int]
    tensors: dict[str, str]
    metrics: list[str]
    counted: dict[str, int]


def _tells(name: str) -> bool:
    return name in TELLING or name.startswith("sandbox/")  # what the hosts went through


def facts(run: Path) -> Facts:
    folder = stage(run)
    done = json.loads((folder / "done.json").read_text())["result"]
    rows = surviving(read_metrics(folder / "metrics.jsonl"))
    return Facts(
        records={
            r.uid: (r.prompt_ids, r.token_ids, r.logprobs, r.weight_version, r.finish, r.reward)
            for r in RolloutStore(folder / "rollouts").read()
        },
        trainings=trainings(folder / "rollouts" / "ledger.log"),
        tensors=_tensors(run / "chaos" / done["checkpoint"]),
        metrics=[json.dumps({k: v for k, v in row.items() if not _tells(k)}) for row in rows],
        counted={name: done[name] for name in ("train_tokens", "sampled_tokens")},
    )


def trainings(ledger: Path) -> dict[str, int]:
    events: list[tuple[int, str]] = []
    for payload in read_frames(ledger).payloads:
        row = json.loads(payload)
        if row["event"] == "trained":
            events += [(row["step"], uid) for uid in row["uids"]]
        elif row["event"] == "resumed":
            events = [event for event in events if event[0] < row["step"]]
    return dict(Counter(uid for _, uid in events))


def resumptions(run: Path) -> tuple[int, int]:
    """(records that went on from a log, those of them that know of a damaged one)."""
    metadata = [record.metadata for record in RolloutStore(stage(run) / "rollouts").read()]
    return sum("resumed_at" in m for m in metadata), sum("log_fault" in m for m in metadata)


def leftovers(run: Path) -> list[str]:
    """Files that a finished stage should not have."""
    rollouts = stage(run) / "rollouts"
    wanted = {"ledger.log", "publications.log", *(f"{step:06d}.jsonl" for step in range(STEPS))}
    return [str(p) for p in rollouts.rglob("*") if p.is_file() and p.name not in wanted]


def _tensors(checkpoint: Path) -> dict[str, str]:
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if path.name == "random.safetensors":  # generators that this stage neither seeds nor draws from
            continue
        for name, tensor in load_file(path).items():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[f"{path.relative_to(checkpoint)}:{name}"] = hashlib.sha256(data).hexdigest()
    return found
