"""`consilience generate` and what it shares with `chat`: open a checkpoint, sample, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from consilience.cli.prompt_family import prompt_family
from consilience.cli.talk import Talker
from consilience.conf.errors import ConfigError, RunError
from consilience.conf.schema import Config
from consilience.model.quantization import Quantization
from consilience.rollout.tokenizer import Tokenizer
from consilience.training.checkpoint import load_checkpoint
from consilience.training.run_folder import RunFolder
from consilience.training.step_folders import latest_checkpoint

if TYPE_CHECKING:
    from consilience.model.transformer import Transformer


def generate(cfg: Config) -> int:
    """Print `generate.num` answers to `generate.prompt`, or one each to that many test problems."""
    talker, folder = open_talker(cfg)
    print(f"checkpoint: {folder}")
    if cfg.generate.prompt is not None:
        asked = [[{"role": "user", "content": cfg.generate.prompt}]] * cfg.generate.num
    else:
        asked = _test_problems(cfg)
    for messages, answer in zip(asked, talker.answer(asked)):
        print(f"\n> {messages[-1]['content']}\n{answer.text}")
        if answer.finish != "stop":
            print(f"(stopped by {answer.finish} after {answer.num_tokens} tokens)")
    return 0


def open_talker(cfg: Config) -> tuple[Talker, Path]:
    """The policy `generate.*` names, on this process's own engine, and its folder.

    RunError if the run has no model yet; CheckpointError if the checkpoint is damaged. ConfigError if it is
    not V4's.
    """
    from consilience.model.dense import DenseModel
    from consilience.rollout.native_engine import NativeEngine

    folder = find_checkpoint(cfg)
    model, meta = load_checkpoint(folder)
    if isinstance(model, DenseModel):
        raise ConfigError(
            f"generate and chat sample on this project's own engine, which is V4's; {folder} holds a model "
            f"of type {model.config.row['model_type']}: give it to transformers or vLLM"
        )
    cast("Transformer", model).quantize(Quantization.from_name(cfg.engine.quantization))
    settings = cfg.generate
    rows = max(2, min(settings.num, 16))
    engine = NativeEngine(cast("Transformer", model), max_rows=rows, max_length=cfg.rollout.max_length)
    talker = Talker(
        engine,
        Tokenizer.load(folder),
        effort=settings.effort,
        family=prompt_family(cfg, folder, meta),
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=cfg.run.seed,
    )
    return talker, folder


def find_checkpoint(cfg: Config) -> Path:
    """`generate.checkpoint`, or the run's most finished model: student, the domain's specialist, base."""
    if cfg.generate.checkpoint is not None:
        return Path(cfg.generate.checkpoint)
    run = RunFolder(Path(cfg.run.folder) / cfg.run.name)
    domain = cfg.generate.domain or cfg.specialist.domain
    own = [f"{kind}-{domain}" for kind in ("grpo", "sft")] if domain else []
    for name in [*own, "base"] if cfg.specialist.domain else ["distill", *own, "base"]:
        found = latest_checkpoint(run.stage(name).checkpoints)
        if found is not None:
            return found
    raise RunError(
        f"run '{run.path}' has no checkpoint yet; train one (consilience run run.name={cfg.run.name}) "
        "or name one: generate.checkpoint=FOLDER"
    )


def _test_problems(cfg: Config) -> list[list[dict[str, object]]]:
    from consilience.tasks.registry import load_domain

    name = cfg.generate.domain or cfg.specialist.domain or next(iter(cfg.task.domains))
    domain = load_domain(cfg.task.domains[name].to_settings(name, cfg.task.seed))
    return [[dict(message) for message in p.messages] for p in domain.problems("test", cfg.generate.num)]
