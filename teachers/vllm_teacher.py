"""A teacher scored by vLLM, in a process of its own (`vllm_scoring.py`), once it agrees with transformers.

vLLM hands out the states behind the last layer (its EAGLE-3 interface, `extract_hidden_states`); the final
norm is applied here, as transformers has it. Before a teacher is used, states of fixed sequences are held
against those of transformers' forward, through the head: a layer too early, another norm or arithmetic would
be a wrong loss that nobody sees. DeepSeek-V4 cannot be scored so: its class in vLLM has no such interface.

Shapes: S samples, n positions of one, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from consilience.conf.errors import AdmissionError, CheckpointError, ConfigError, EngineError
from consilience.conf.fields import nearest
from consilience.model.kernels.reverse_kl import reverse_kl
from consilience.teachers.causal_folder import folder_digest
from consilience.teachers.causal_teacher import CausalTeacher, load_causal_teacher
from consilience.teachers.heads import head_digest
from consilience.teachers.registry import TeacherRecord

ALLOWED = (
    "attention_backend", "block_size", "disable_custom_all_reduce", "distributed_executor_backend",
    "enable_expert_parallel", "enforce_eager", "gpu_memory_utilization", "kv_cache_memory_bytes",
    "max_num_batched_tokens", "model_impl", "moe_backend", "tensor_parallel_size",
)  # fmt: skip
"""Arguments of vLLM that say where and how fast a teacher is computed, and not what."""
PROBE_LENGTHS = (3, 12, 60, 140)
FLOOR_KL, TIMES_OWN = 1e-6, 4.0
"""Nats at any token of the probes between transformers' forward in fp32 and vLLM's: what the order of sums
makes in fp32; in 16 bits this often what transformers' own 16-bit forward is off by. Our own numbers."""
START_S, BATCH_S, END_S = 1800.0, 1800.0, 20.0


@dataclass(frozen=True)
class Reference:
    """What transformers' forward says of a teacher.

    probes   fixed sequences;  states  of them [n, D], computed in fp32
    most_kl  nats at a token by which vLLM may differ from them
    norm, head, num_layers, max_positions, digest  of the model, in its own type
    """

    probes: list[list[int]]
    states: list[Tensor]
    most_kl: float
    norm: nn.Module
    num_layers: int
    max_positions: int
    digest: str
    head: Tensor


class VllmTeacher:
    """`Teacher` over a vLLM process, which ends with it.

    python       interpreter that has vLLM
    max_length   most tokens of a sample
    settings     further arguments of vLLM, of `ALLOWED`
    """

    def __init__(
        self,
        record: TeacherRecord,
        reference: Reference,
        *,
        python: str = sys.executable,
        max_length: int,
        max_rows: int = 64,
        settings: Mapping[str, Any] | None = None,
        start_s: float = START_S,
        batch_s: float = BATCH_S,
    ) -> None:
        check_settings(settings or {})
        self.name, self.digest = record.name, reference.digest
        self.head_digest = head_digest(reference.head)
        self._reference, self._batch_s = reference, batch_s
        self._max_length = min(
            max_length, reference.max_positions - 1
        )  # vLLM has to sample a token to be done
        self._states = Path(tempfile.mkdtemp(prefix="teacher-states-"))
        arguments = {
            "folder": str(record.checkpoint),
            "states": str(self._states),
            "layer": reference.num_layers,
            "dtype": str(reference.head.dtype).removeprefix("torch."),
            "max_length": self._max_length + 1,
            "max_rows": max_rows,
            "settings": dict(settings or {}),
        }
        with open(self._states / "log.txt", "wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "consilience.teachers.vllm_scoring", json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        self._end = weakref.finalize(self, _end, self._process, self._states)
        self._read = b""
        self._answer(start_s)

    def score(self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """[S][T_s], [S][n_s] -> S tensors [n_s, D].

        EngineError: a sample longer than `max_length`, or a process that died or said nothing in time.
        """
        longest = max((len(ids) for ids in token_ids), default=0)
        if longest > self._max_length:
            raise EngineError(
                f"teacher '{self.name}': a sample has {longest} tokens, vLLM takes {self._max_length}, "
                f"by rollout.max_length and its {self._reference.max_positions} positions; sample less"
            )
        if not token_ids:
            return []
        asked = self._states / "asked.json"  # a pipe would hold a long sample up while nobody reads
        asked.write_text(json.dumps([list(ids) for ids in token_ids]))
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a dead process is reported where its answer is missing
            self._process.stdin.write(f"{asked}\n".encode())
            self._process.stdin.flush()
        files = self._answer(self._batch_s)["files"]
        return [self._take(Path(file), own) for file, own in zip(files, positions, strict=True)]

    def head(self) -> Tensor:
        """Prediction head [V, D]."""
        return self._reference.head

    def close(self) -> None:
        """End the process now; otherwise it ends when the teacher is forgotten."""
        self._end()

    def check(self) -> float:
        """The largest KL of the probes to transformers' forward; AdmissionError where that is too much."""
        reference = self._reference
        found = torch.cat(self.score(reference.probes, [range(len(ids)) for ids in reference.probes]))
        expected = torch.cat(reference.states)
        if found.shape != expected.shape:
            raise AdmissionError(
                f"teacher '{self.name}': vLLM's states are {list(found.shape)}, transformers' "
                f"{list(expected.shape)}; take teachers.engine=auto"
            )
        worst = largest_kl(expected, found, reference.head)
        if not worst <= reference.most_kl:
            gap = float((found.float() - expected).norm() / expected.norm())
            raise AdmissionError(
                f"teacher '{self.name}': vLLM's states are not transformers': at a token of the probes the "
                f"distributions differ by {worst:.3g} nats, at most {reference.most_kl:.3g} is allowed, the "
                f"states by {gap:.3g} of their norm; take teachers.engine=auto"
            )
        return worst

    @torch.no_grad()
    def _take(self, file: Path, positions: Sequence[int]) -> Tensor:
        """The states of a file behind the final norm [n, D]; the file goes."""
        states = load_file(file)["hidden_states"][:, 0]
        file.unlink()
        chosen = states[torch.tensor(list(positions), dtype=torch.long)]
        return self._reference.norm(chosen).to(self._reference.head.dtype)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        """The next line of the process. EngineError if it reports an error, ends, or says nothing in time."""
        assert self._process.stdout is not None
        deadline, source = time.monotonic() + limit_s, self._process.stdout.fileno()
        while b"\n" not in self._read:
            is_ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(source, 1 << 16) if is_ready else b""  # no limit: select had one
            if not piece:
                what = "ended" if is_ready else f"has said nothing for {limit_s:.0f} s"
                self._process.kill()  # it is not asked again, nor waited for
                raise EngineError(f"teacher '{self.name}': its vLLM {what}: {self._last_words()}")
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"teacher '{self.name}': vLLM cannot score it: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        text = (self._states / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1][:300] if text else "it printed nothing"


class VllmLoader:
    """Loads teachers for the scheduler, each verified; what transformers says of one is computed once."""

    def __init__(self, **how: Any) -> None:
        check_settings(how.get("settings") or {})
        self._how = how
        self._references: dict[str, Reference] = {}  # by the digest of the weights

    def __call__(self, record: TeacherRecord) -> VllmTeacher:
        """EngineError if vLLM cannot serve it, AdmissionError if it computes something else."""
        digest = folder_digest(record.checkpoint)
        if digest not in self._references:
            self._references[digest] = read_reference(record, self._how["max_length"])
        teacher = VllmTeacher(record, self._references[digest], **self._how)
        try:
            teacher.check()
        except BaseException:
            teacher.close()
            raise
        return teacher


def read_reference(record: TeacherRecord, max_length: int) -> Reference:
    """The model is loaded by transformers, scored on the probes, in its type and in fp32, and released."""
    teacher = load_causal_teacher(record)
    generator = torch.Generator().manual_seed(5)
    head = teacher.head().clone()
    config = teacher.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or max_length + 1
    lengths = sorted({min(length, max_length, positions - 1) for length in PROBE_LENGTHS})
    probes = [torch.randint(len(head), (n,), generator=generator).tolist() for n in lengths]
    score = lambda: [teacher.score([ids], [range(len(ids))])[0] for ids in probes]
    norm, own = copy.deepcopy(final_norm(teacher)), torch.cat(score())
    teacher.model.float()
    states = score()
    return Reference(
        probes,
        states,
        max(FLOOR_KL, TIMES_OWN * largest_kl(torch.cat(states), own, head)),
        norm,
        config.num_hidden_layers,
        positions,
        teacher.digest,
        head,
    )


def largest_kl(expected: Tensor, found: Tensor, head: Tensor) -> float:
    """The largest KL of a token between two sets of states [n, D]; nan if one is no number."""
    wide = head.float()
    with torch.no_grad():
        kl = reverse_kl(expected.float(), wide, found.float(), wide, torch.ones(len(found))).kl.abs()
    return float(kl.max()) if bool(torch.isfinite(kl).all()) else float("nan")


@torch.no_grad()
def final_norm(teacher: CausalTeacher) -> nn.Module:
    """The module of the model whose output its head is given. CheckpointError if none is."""
    found: list[tuple[nn.Module, Tensor]] = []

    def see(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            found.append((module, output))

    base = teacher.model.base_model
    leaves = [module for module in base.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(see) for module in leaves]
    last = teacher.score([[1, 2, 3]], [range(3)])[0]
    for hook in hooks:
        hook.remove()
    module, output = found[-1]
    if output.shape[-1] != last.shape[-1] or not torch.equal(
        output.reshape(-1, last.shape[-1]).to(last.dtype), last
    ):
        raise CheckpointError(
            f"teacher '{teacher.name}': {type(base).__name__} does not end in a norm, which vLLM's states "
            "need behind them; take teachers.engine=auto"
        )
    return module


def check_settings(settings: Mapping[str, Any]) -> None:
    """ConfigError on an argument of vLLM that is not of `ALLOWED`."""
    for name in settings:
        if name not in ALLOWED:
            raise ConfigError(
                f"teachers.settings.{name} is no argument of vLLM that a teacher may have; "
                f"{nearest(name, ALLOWED)}"
            )


def _environment() -> dict[str, str]:
    """This process's, and where another interpreter finds the same code if it is not installed there."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root)] if (root / "consilience.py").is_file() else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _end(process: subprocess.Popen[bytes], states: Path) -> None:
    """The process, and whatever it started, gone; its files too."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    if process.stdout is not None:
        process.stdout.close()
    shutil.rmtree(states, ignore_errors=True)
