"""Speculative decoding beside plain decoding: acceptance, tokens a round, tokens a second.

    PYTHONPATH=. python bench/speculative.py [steps] [preset]

A model with one MTP block learns the demo's worked solutions in mathematics and code for a few hundred steps
(1,024 tokens each, MTP weight 0.3, then 0.1), then answers test problems. Both come from reasoning_gym; where
that is not installed, the base's exercises in copying take their place, and the first line says so. The two
arms take turns, a warm-up first; medians of three rounds, decoding alone (without prefill). One CPU thread,
or the GPU if there is one.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from consilience.grpo.sft import SupervisedSettings, supervised_step
from consilience.grpo.supervised_batches import Example
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.encoding import encode_messages
from consilience.rollout.engine import EngineState, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prompts import conversation_ids, prompt_ids
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.corpus import Conversation, base_texts
from consilience.tasks.recall import recall_texts
from consilience.tasks.registry import load_domain
from consilience.training.packing import pack
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOMAINS = (  # as conf/task/three.yaml has them
    {"kind": "math", "seed": 1},
    {"kind": "code", "seed": 1, "parameters": {"min_terms": 5, "max_terms": 5}},
)
ROWS, TEMPERATURES, ROUNDS, MAX_TOKENS = (1, 8, 64), (1.0, 0.0), 3, 48


def main(steps: int, preset: str) -> None:
    torch.set_num_threads(1)
    texts, asked = solutions_and_problems()
    print(f"torch {torch.__version__} on {DEVICE}; {', '.join(sorted({c.domain for c in texts}))}")
    tokenizer = Tokenizer.train([encode_messages(c.messages, c.effort) for c in texts[:2000]], 672)
    config = replace(
        PRESETS[preset],
        vocab_size=tokenizer.padded_vocab_size(16),
        num_nextn_predict_layers=1,
        mtp_compress_ratios=(0,),
    )
    model = initialize(Transformer(config), 1).to(DEVICE)
    examples = []
    for text in texts:
        ids, mask = conversation_ids(tokenizer, text.messages, text.effort)
        examples.append(Example(ids, [max(float(m), 0.1) for m in mask]))
    train(model, examples, steps)
    prompts = [prompt_ids(tokenizer, messages, effort) for messages, effort in asked]
    model.requires_grad_(False)
    print(f"{'rows':>4} {'T':>3}   plain tok/s   speculative   ratio   accepted   tokens a round")
    for rows in ROWS:
        for temperature in TEMPERATURES:
            compare(model, prompts, rows, temperature, tokenizer.eos_id)


def solutions_and_problems() -> tuple[list[Conversation], Sequence[tuple[Sequence[Any], str]]]:
    """Worked solutions to learn from, and held-out messages with their effort."""
    if importlib.util.find_spec("reasoning_gym") is None:
        held = recall_texts(2 * max(ROWS), seed=2)
        return recall_texts(4000, seed=1), [(c.messages[: c.num_prompt], c.effort) for c in held]
    domains = [load_domain(settings) for settings in DOMAINS]
    problems = [(p.messages, d.effort) for d in domains for p in d.problems("test", max(ROWS))]
    return base_texts(domains, 4000, seed=1), problems


def train(model: Transformer, examples: list[Example], steps: int) -> None:
    engine = TorchEngine(model, OptimizerSettings(lr=1.2e-2))
    settings = SupervisedSettings(steps, 1024, warmup=10, decay_steps=steps // 3)
    stream, began, report = random.Random(1), time.perf_counter(), {}
    for step in range(steps):
        chosen, held = [], 0
        while held < settings.tokens_per_step:
            chosen.append(stream.choice(examples))
            held += len(chosen[-1].token_ids)
        packed = pack([e.token_ids for e in chosen], [e.loss_weight for e in chosen], quantum=32)
        report = supervised_step(engine, packed, settings, step)
    took = time.perf_counter() - began
    print(f"{steps} steps in {took:.0f} s: nll {report['nll']:.3f}, MTP loss {report['mtp_loss']:.3f}")


def compare(
    model: Transformer, prompts: list[tuple[int, ...]], rows: int, temperature: float, eos: int
) -> None:
    speeds: dict[bool, list[float]] = {False: [], True: []}
    last: dict[bool, EngineState] = {}
    for number in range(ROUNDS + 1):
        for is_speculative, found in speeds.items():
            state = sample(model, prompts, rows, temperature, eos, is_speculative, number)
            # Every stream's first token comes with its prefill.
            found.append((state.sampled_tokens - requests_of(rows)) / state.decode_s)
            last[is_speculative] = state
    plain, ahead = (statistics.median(found[1:]) for found in speeds.values())
    state = last[True]
    rate = state.accepted_tokens / state.drafted_tokens
    a_round = (state.sampled_tokens - requests_of(rows)) / state.drafted_tokens
    print(
        f"{rows:4d} {temperature:3.0f} {plain:13,.0f} {ahead:13,.0f} {ahead / plain:7.2f} "
        f"{rate:10.2f} {a_round:10.2f}"
    )


def requests_of(rows: int) -> int:
    return max(rows, 4)


def sample(
    model: Transformer,
    prompts: list[tuple[int, ...]],
    rows: int,
    temperature: float,
    eos: int,
    is_speculative: bool,
    number: int,
) -> EngineState:
    """Answers to `requests_of(rows)` problems, `rows` at once."""
    engine = NativeEngine(model, max_rows=rows, max_length=512, speculative=is_speculative)
    count = requests_of(rows)
    engine.submit(
        [
            Request(f"{i}", ids, SamplingParams(temperature, MAX_TOKENS, (eos,), seed=1000 * number + i))
            for i, ids in enumerate(random.Random(number).sample(prompts, count))
        ]
    )
    while engine.state().num_running + engine.state().num_waiting:
        engine.step()
    return engine.state()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300, sys.argv[2] if len(sys.argv) > 2 else "tiny")
