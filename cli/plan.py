"""`consilience plan model=flash context=1M`: what a model costs before anyone builds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config
from consilience.conf.token_count import token_count
from consilience.model.config import CSA_RATIO, FLASH, PRESETS, PRO, SLIDING, ModelConfig
from consilience.model.cost import (
    EQUIVALENT,
    allocated_bytes,
    equivalent_flops,
    forward_work,
    report_state_bytes,
    serving_format,
    state_bytes,
    training_flops,
)
from consilience.model.cost_ranks import EngineLayout, rank_bytes
from consilience.model.cost_v32 import v32_state_bytes, v32_work
from consilience.model.weights import (
    LAYOUTS,
    PARTS,
    Weight,
    main_weights,
    mtp_weights,
    num_active_parameters,
    num_parameters,
    released_layout,
    training_bytes,
    weight_bytes,
)

REPORT_CONTEXT = 10**6
PRECISION = {"low": "FP8", "high": "BF16", "core": "BF16", "index": "FP4"}
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def plan(cfg: Config) -> int:
    """Print the tables, draw the picture if one is asked for; 0."""
    name, config = planned_model(cfg)
    asked = cfg.plan.context
    tokens = config.max_position_embeddings if asked is None else token_count(asked, "plan.context")
    console = Console(highlight=False)
    console.print(Text(f"\n{_headline(name, config)}", "bold"))
    console.print(_context(config, asked, tokens), end="\n\n")
    for table in (
        _parameters(config),
        _memory(config),
        _flops(config, tokens),
        _state(config, tokens),
        _comparison(name, config, tokens),
    ):
        console.print(table)
    if cfg.engine.ranks > 1:
        console.print(_ranks(cfg), _rank(config, cfg), sep="\n")
    if cfg.plan.plot is not None:
        from consilience.cli.plan_chart import draw

        draw(Path(cfg.plan.plot), compared_models(name, config), tokens)
        console.print(f"picture: {cfg.plan.plot}")
    return 0


def planned_model(cfg: Config) -> tuple[str, ModelConfig]:
    """Its name and sizes, from `plan.checkpoint` or group model. ConfigError if they do not fit together."""
    if cfg.plan.checkpoint is None:
        preset, changed = cfg.model.preset, cfg.model.overrides()
        return preset + " (changed)" * bool(changed), replace(PRESETS[preset], **changed)
    path = Path(cfg.plan.checkpoint) / "config.json"
    try:
        row = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is no JSON file: {error}; give a checkpoint's own config.json"
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(f"'{path}' holds no table of fields; give a checkpoint's own config.json")
    return Path(cfg.plan.checkpoint).resolve().name, ModelConfig.from_json_dict(row)


def compared_models(name: str, config: ModelConfig) -> dict[str, ModelConfig]:
    """Name -> model of the comparison: the released two, and the planned one where it is another."""
    released = {"V4-Pro": PRO, "V4-Flash": FLASH}
    return released if config in released.values() else {**released, name: config}


def _headline(name: str, config: ModelConfig) -> str:
    ratios = config.compress_ratios
    kinds = {"sliding": ratios.count(SLIDING), "CSA": ratios.count(CSA_RATIO)}
    kinds["HCA"] = len(ratios) - sum(kinds.values())
    layers = ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)
    return f"{name}: {len(ratios)} layers ({layers}), width {config.hidden_size:,}"


def _context(config: ModelConfig, asked: str | None, tokens: int) -> str:
    longest = config.max_position_embeddings
    text = "the model's longest" if asked is None else asked
    beyond = f" (beyond the model's longest stream, {longest:,})" if tokens > longest else ""
    return f"context: {text} = {tokens:,} tokens{beyond}"


def _parameters(config: ModelConfig) -> Table:
    weights, mtp = main_weights(config), mtp_weights(config)
    total, released = num_parameters(weights), released_layout(config)
    unit, prefix = _unit(weight_bytes(weights, released))
    table = _table("Parameters", "part", "parameters", "share", "a token uses", f"released, {prefix}B")

    def add(part: str, own: list[Weight], *, is_share: bool = False, is_used: bool = True) -> None:
        count = num_parameters(own)
        used = f"{num_active_parameters(own):,}" if is_used else ""
        size = f"{weight_bytes(own, released) / unit:,.3f}"
        table.add_row(part, f"{count:,}", _share(count, total) if is_share else "", used, size)

    for part in PARTS:
        add(part, [w for w in weights if w.part == part], is_share=True)
    table.add_section()
    add("all", weights)
    if mtp:
        add("MTP", mtp, is_used=False)
        add("with MTP", [*weights, *mtp], is_used=False)
    return table


def _memory(config: ModelConfig) -> Table:
    main, mtp = main_weights(config), mtp_weights(config)
    groups = {"model": main, "with MTP": [*main, *mtp]} if mtp else {"model": main}
    unit, prefix = _unit(weight_bytes(main, released_layout(config)))
    table = _table(f"Memory of weights and of training, {prefix}B", "what", *groups)
    for layout in LAYOUTS:
        sizes = (weight_bytes(weights, layout) for weights in groups.values())
        table.add_row(f"weights, {layout}", *(f"{size / unit:,.3f}" for size in sizes))
    table.add_section()
    states = [training_bytes(weights) for weights in groups.values()]
    for part in states[0]:
        table.add_row(f"training, {part}", *(f"{state[part] / unit:,.3f}" for state in states))
    table.add_row("training, all", *(f"{sum(state.values()) / unit:,.3f}" for state in states))
    return table


def _ranks(cfg: Config) -> str:
    engine = cfg.engine
    kind = f"deepspeed, ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind
    return f"SFT in fp32 on {engine.ranks} ranks of {kind}, micro-batches of {_micro_tokens(cfg):,} tokens"


def _micro_tokens(cfg: Config) -> int:
    return cfg.sft.row_tokens * cfg.engine.micro_batch_rows


def _rank(config: ModelConfig, cfg: Config) -> Table:
    """What a rank of `engine.ranks` holds while it trains."""
    engine = cfg.engine
    layout = EngineLayout(
        engine.kind,
        engine.ranks,
        context_ranks=engine.context_ranks,
        zero_stage=engine.zero_stage,
        is_state_divided=engine.shard_state,
        is_offloaded=engine.offload,
        recompute="block" if "block" in engine.recompute else "none",
        micro_batch=_micro_tokens(cfg),
    )
    found = rank_bytes(config, layout)
    unit, prefix = _unit(found["weights"])
    table = _table("Memory of a rank", "what", f"{prefix}B")
    for name, size in found.items():
        if size:
            table.add_row(name, f"{size / unit:,.3f}")
    table.add_section()
    table.add_row("all", f"{sum(found.values()) / unit:,.3f}")
    return table


def _flops(config: ModelConfig, tokens: int) -> Table:
    work, mean = forward_work(config, tokens), forward_work(config, tokens, is_mean=True)
    total = equivalent_flops(work)
    unit, prefix = _unit(total)
    title = f"{prefix}FLOPs a token; as FP8: weighted by the speed of each precision"
    table = _table(title, f"token {tokens:,}", "precision", "FLOPs", "weight", "as FP8", "share")
    for row in work:
        equivalent = row.flops * EQUIVALENT[row.kind]
        values = (f"{row.flops / unit:,.3f}", f"{EQUIVALENT[row.kind]:g}", f"{equivalent / unit:,.3f}")
        table.add_row(row.part, PRECISION[row.kind], *values, _share(equivalent, total))
    table.add_section()

    def add(name: str, flops: float, equivalent: str = "") -> None:
        table.add_row(name, "", f"{flops / unit:,.3f}", "", equivalent, "")

    add("all", sum(row.flops for row in work), f"{total / unit:,.3f}")
    table.add_section()
    add("mean of a sample this long", sum(row.flops for row in mean))
    add("… with backward (training)", training_flops(config, tokens))
    return table


def _state(config: ModelConfig, tokens: int) -> Table:
    table = _table(
        f"Decode state of one sequence of {tokens:,} tokens", "part", "B a token", "bytes", "share"
    )
    parts = state_bytes(config, tokens, serving_format(config))
    total = report_state_bytes(parts)
    tails = parts.pop("compressor tails")
    for part, size in parts.items():
        table.add_row(part, f"{size / tokens:,.1f}", f"{size:,}", _share(size, total))
    table.add_section()
    table.add_row("all, as the report counts", f"{total / tokens:,.1f}", f"{total:,}", "")
    table.add_row("compressor tails, fp32", f"{tails / tokens:,.1f}", f"{tails:,}", "")
    table.add_section()
    for name, element in (("bf16", 2), ("fp32", 4)):
        size = allocated_bytes(config, 1, tokens, element)
        table.add_row(f"as allocated here, {name}", f"{size / tokens:,.1f}", f"{size:,}", "")
    return table


def _comparison(name: str, config: ModelConfig, tokens: int) -> Table:
    flops, state = equivalent_flops(v32_work(tokens)), v32_state_bytes(tokens)
    units = _unit(flops), _unit(state)
    columns = [c for (_, p), what in zip(units, ("FLOPs", "B")) for c in (p + what, "of V3.2", "lower by")]
    title = f"Beside V3.2 at {tokens:,} tokens: FLOPs of a token as FP8, decode state"
    table = _table(title, "model", *columns)

    def add(model: str, own_flops: float, own_state: float) -> None:
        cells = []
        for own, other, (unit, _) in zip((own_flops, own_state), (flops, state), units):
            cells += [f"{own / unit:,.4f}", f"{own / other:.1%}", f"{other / own:,.2f}×"]
        table.add_row(model, *cells)

    add("V3.2", flops, state)
    for other, sizes in compared_models(name, config).items():
        parts = state_bytes(sizes, tokens, serving_format(sizes))
        add(other, equivalent_flops(forward_work(sizes, tokens)), report_state_bytes(parts))
    if tokens == REPORT_CONTEXT:
        table.add_section()
        table.add_row("report: Pro", "", "27%", "3.7×", "", "10%", "9.5×")
        table.add_row("report: Flash", "", "10%", "9.8×", "", "7%", "13.7×")
    return table


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}"


def _unit(largest: float) -> tuple[float, str]:
    return next(unit for unit in PREFIXES if largest >= unit[0] or unit[0] == 1.0)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
