"""What bf16 costs: our model and transformers', each against our model in fp64 with the same (bf16) weights.

    python bench/bf16_parity.py [--tokens 400] [--json FILE]

Ours follows DeepSeek's own precision, transformers' rounds in more places (specification 3, 5, 7, 9, 11.4):

    place                     ours                                   transformers
    mHC coefficients          fp32                                   fp32
    mHC mixing                fp32 from bf16 streams, one cast       post, comb cast to bf16, product in bf16
    compressors               fp32 up to the pooled value            bf16 projections, softmax weights, sum
    RoPE tables               fp32                                   bf16 cos and sin
    query head norm           fp32, one cast                         factor cast to bf16, product in bf16
    router                    fp32 logits, scores, weights           bf16
    between w1, w3 and w2     fp32, one cast                         bf16
    routing weight            before w2, fp32                        after w2
    sum over experts          fp32, shared expert too, one cast      bf16
    prediction head           fp32 logits                            bf16 logits

The first table is one block at a time: every block of all three gets the same input, the fp64 model's streams
rounded to bf16, so an error is that block's own. Relative errors are norms, averaged over the layers. The
second lets errors accumulate. A changed choice of expert or entry is an error far above rounding, so all of
it is done twice: choosing freely, and with nothing to choose (hash routing, every entry attended).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "model"))

PLACES = {
    "hc_attn layer input": "layer input of attention",
    "hc_attn comb": "mHC comb",
    "attn.q_norm": "query latent, normed",
    "query heads": "query heads, normed",
    "attn.kv_norm": "window KV, normed",
    "entries": "compressed entries",
    "index keys": "index keys",
    "index queries": "index queries",
    "attn": "attention output",
    "router scores": "router scores",
    "router weights": "router weights",
    "ffn.experts": "routed experts' sum",
    "ffn": "MoE output",
    "streams": "streams after the block",
}
Found = dict[str, Tensor]


def three_models(config) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Ours in fp64, ours in bf16, transformers' in bf16, all with the second one's weights."""
    from transformers import DeepseekV4ForCausalLM
    from transformers_oracle import hf_twin

    from consilience.model.initialize import initialize
    from consilience.model.transformer import Transformer

    narrow = Transformer(config, torch.bfloat16)
    narrow.load_state_dict(initialize(Transformer(config), seed=0).state_dict())
    rounded = Transformer(config)
    rounded.load_state_dict(narrow.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        hf_twin(rounded).save_pretrained(folder)
        # By from_pretrained, which keeps in fp32 what transformers wants there.
        theirs = DeepseekV4ForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
    return rounded.double(), narrow, theirs.eval()


@contextmanager
def given_inputs(layers: nn.ModuleList, inputs: list[Tensor]) -> Iterator[None]:
    """Within: every block gets the given streams [B, T, N, D] in place of its own."""

    def replace_streams(number: int) -> Callable:
        def hook(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            own, given = args[0], inputs[number]
            if own.ndim == 3:  # ours: rows and tokens flattened, tokens padded
                padding = own.shape[0] // given.shape[0] - given.shape[1]
                given = nn.functional.pad(given, (0, 0, 0, 0, 0, padding)).flatten(0, 1)
            return (given.to(own.dtype), *args[1:]), kwargs

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(replace_streams(number), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, over what both have (our indexer skips queries with k entries or fewer)."""
    wide, exact = found.double(), exact.double()
    is_there = ~(wide.isnan() | exact.isnan())
    return float((wide - exact)[is_there].norm() / exact[is_there].norm())


def by_place(config, exact: Found, found: Found) -> dict[str, float]:
    """Mean over layers of each place's relative error; router weights only where experts agree."""
    errors = {}
    for place in PLACES:
        values = []
        for layer in range(config.num_hidden_layers):
            name = f"{layer}.{place}"
            if name not in exact or name not in found:
                continue
            mine, other = found[name], exact[name]
            if place == "router weights":
                same = (found[f"{layer}.router experts"] == exact[f"{layer}.router experts"]).all(-1)
                mine, other = mine[same], other[same]
            values.append(relative(mine, other))
        if values:
            errors[place] = sum(values) / len(values)
    return errors


def measure(config, num_tokens: int) -> dict:
    """All errors of ours and transformers' bf16 models against fp64."""
    from intermediates import run_ours, run_theirs

    wide, narrow, theirs = three_models(config)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, num_tokens), generator=generator)
    exact = run_ours(wide, tokens)
    free = {"ours": run_ours(narrow, tokens), "transformers": run_theirs(theirs, tokens)}
    before = [exact["embedding streams"], *(exact[f"{i}.streams"] for i in range(config.num_hidden_layers))]
    inputs = [streams.bfloat16() for streams in before[:-1]]
    with (
        given_inputs(wide.layers, inputs),
        given_inputs(narrow.layers, inputs),
        given_inputs(theirs.model.layers, inputs),
    ):
        alone_exact = run_ours(wide, tokens)
        alone = {
            "ours": run_ours(narrow, tokens),
            "transformers": run_theirs(theirs, tokens),
        }
    result: dict = {}
    for who, found in free.items():
        logits, right = found["logits"].double(), exact["logits"]
        result[who] = {
            "alone": by_place(config, alone_exact, alone[who]),
            "accumulated": [
                relative(found[f"{i}.streams"], exact[f"{i}.streams"])
                for i in range(config.num_hidden_layers)
            ],
            "same experts": same_experts(config, exact, found),
            "logits": relative(logits, right),
            "argmax": float((logits.argmax(-1) == right.argmax(-1)).double().mean()),
            "kl": float(
                nn.functional.kl_div(
                    logits.log_softmax(-1).flatten(0, 1),
                    right.log_softmax(-1).flatten(0, 1),
                    log_target=True,
                    reduction="batchmean",
                )
            ),
        }
    return result


def same_experts(config, exact: Found, found: Found) -> float:
    """Share of tokens and learned layers whose set of experts is fp64's."""
    learned = range(config.num_hash_layers, config.num_hidden_layers)
    same = [(found[f"{i}.router experts"] == exact[f"{i}.router experts"]).all(-1) for i in learned]
    return float(torch.stack(same).double().mean()) if same else 1.0


def show(title: str, config, result: dict) -> None:
    ours, theirs = result["ours"], result["transformers"]
    print(f"\n{title}\n{'one block alone':28s} {'ours':>9s} {'transformers':>13s} {'ratio':>6s}")
    for place, label in PLACES.items():
        if place in ours["alone"] and place in theirs["alone"]:
            a, b = ours["alone"][place], theirs["alone"][place]
            ratio = f"{b / a:6.2f}" if a > 0 else "     -"
            print(f"{label:28s} {a:9.1e} {b:13.1e} {ratio}")
    print(f"{'accumulated':28s}")
    for i, ratio in enumerate(config.compress_ratios):
        a, b = ours["accumulated"][i], theirs["accumulated"][i]
        print(f"{f'streams after layer {i} ({ratio})':28s} {a:9.1e} {b:13.1e} {b / a:6.2f}")
    for key in ("logits", "kl", "same experts", "argmax"):
        a, b = ours[key], theirs[key]
        shown = (
            (f"{a:9.1%}", f"{b:13.1%}") if key in ("same experts", "argmax") else (f"{a:9.1e}", f"{b:13.1e}")
        )
        print(f"{key:28s} {shown[0]} {shown[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    from consilience.model.config import MINI

    free = replace(MINI, num_hash_layers=1, compress_ratios=(0, 4, 128, 4, 128, 4))
    fixed = replace(free, num_hash_layers=free.num_hidden_layers, index_topk=options.tokens)
    results = {"choosing freely": measure(free, options.tokens)}
    results["nothing to choose"] = measure(fixed, options.tokens)
    for title, result in results.items():
        show(f"{title}: hidden {free.hidden_size}, {options.tokens} tokens x 2 rows", free, result)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
