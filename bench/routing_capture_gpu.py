"""Recorded routing on one GPU: captured steps against eager ones, and against the trainer's free routing.

    python bench/routing_capture_gpu.py [--batch 8] [--prompt 512] [--tokens 64] [--top-p 0.9]

The model of train_step_gpu.py: 4 layers, 16 experts, bf16, random weights and prompts. Three arms sample the
same requests: eager, captured, captured with `top_p` below 1.

equal     tokens, log-probabilities and experts of the captured arm are those of the eager one, bit for bit
differs   share of (token, layer) pairs whose experts the trainer's packed forward would choose otherwise:
          what `grpo.replay_routing` is for
free, replayed  largest and mean |d| of the sampled tokens' log-probabilities, d = trainer less sampler, with
          the trainer routing freely and with the recorded experts; sets of the cut arm are replayed in both
ms        a decoding step, median
bytes     of routing a token, and of kept sets a token

Predicted: one copy of B·L·K bytes more a step, within the A/A spread of decode_gpu.py; replayed below free.
"""

from __future__ import annotations

import argparse
import time

import torch
from decode_gpu import our_model, prompts_of
from gpu_timing import Table, arguments, median_text


def sample(model, prompts, tokens: int, top_p: float, captures: bool):
    """Completed turns by uid, and milliseconds of each step but the first four and the last."""
    from consilience.rollout.engine import Request, SamplingParams
    from consilience.rollout.native_engine import NativeEngine

    batch, length = prompts.shape
    engine = NativeEngine(
        model, max_rows=batch, max_length=length + tokens + 2, captures=captures, records_routing=True
    )
    settings = [SamplingParams(1.0, tokens, (), i, top_p=top_p) for i in range(batch)]
    rows = enumerate(zip(prompts.tolist(), settings))
    engine.submit([Request(f"{i}", tuple(row), given) for i, (row, given) in rows])
    done, times = {}, []
    while engine.state().num_running + engine.state().num_waiting:
        began = time.perf_counter()
        done |= {c.uid: c for c in engine.step()}
        times.append(1e3 * (time.perf_counter() - began))
    return done, times[4:-1]


def records_of(prompts, done):
    from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
    from consilience.rollout.token_routing import stitched

    found = []
    for i, ids in enumerate(prompts.tolist()):
        turn = done[f"{i}"]
        n = len(turn.token_ids)
        found.append(
            RolloutRecord(
                turn.uid,
                "g",
                "bench",
                "chat",
                None,
                tuple(ids),
                turn.token_ids,
                turn.logprobs,
                (1,) * n,
                (0,) * n,
                FinishReason.LENGTH,
                Outcome(OutcomeKind.GRADED),
                1.0,
                routing=stitched(len(ids) + n, [(len(ids) + n - 1, turn.routing)]),
                kept=turn.kept,
            )
        )
    return found


@torch.no_grad()
def against_trainer(model, records, is_replayed: bool, is_cut: bool) -> tuple[torch.Tensor, float]:
    """d of every sampled token, and the share of (token, layer) pairs that would differ."""
    from consilience.grpo.mini_batch import MiniBatch
    from consilience.grpo.train import GrpoSettings
    from consilience.training.forward import hidden_at_loss

    settings = GrpoSettings(1, replay_routing=True, replay_kept_sets=is_cut)
    batch = MiniBatch.of(records, [1.0] * len(records), settings, model)
    routing = batch.routing_of(batch.packed)
    at = hidden_at_loss(model, batch.packed, routing=routing if is_replayed else None)
    d = batch.logprob(at, model.head.weight, batch.packed, 1.0) - at.arrays["old_logprob"]
    differing, compared = routing.num_differing()
    return d.double().cpu(), differing / max(compared, 1)


def gap(d: torch.Tensor) -> str:
    return f"{d.abs().max():.4f} ({d.abs().mean():.5f})"


def main(given: argparse.Namespace) -> None:
    model = our_model()
    prompts = prompts_of(model.config.vocab_size, given.batch, given.prompt)
    table = Table("arm", "equal", "differs", "free max (mean)", "replayed max (mean)", "ms", "bytes")
    eager = None
    for arm, top_p, captures in (
        ("eager", 1.0, False),
        ("captured", 1.0, True),
        ("top-p", given.top_p, True),
    ):
        done, times = sample(model, prompts, given.tokens, top_p, captures)
        records, is_cut = records_of(prompts, done), top_p < 1
        free, _ = against_trainer(model, records, False, is_cut)
        replayed, differs = against_trainer(model, records, True, is_cut)
        eager = eager or done
        kept = [r.kept for r in records if r.kept is not None]
        sets = sum(len(k.sizes) + len(k.ids) for k in kept) / max(sum(k.num_tokens for k in kept), 1)
        size = f"{records[0].routing.bytes_per_token}, {sets:.0f}"
        same = "" if is_cut else str(done == eager)
        table.add(arm, same, f"{differs:.4f}", gap(free), gap(replayed), median_text(times), size)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--top-p", type=float, default=0.9)
    main(parser.parse_args())
