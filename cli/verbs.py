"""The verbs of `consilience`: what each is for and which function runs it.

A function is imported when its verb is called, so `consilience help` and a wrong key cost nothing.
It takes the checked Config and returns the exit code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

VERBS: Mapping[str, str] = MappingProxyType(
    {
        "run": "consilience.cli.pipeline:run",
        "sft": "consilience.cli.pipeline:sft",
        "grpo": "consilience.cli.pipeline:grpo",
        "distill": "consilience.cli.pipeline:distill",
        "evaluate": "consilience.cli.pipeline:evaluate",
        "generate": "consilience.cli.generate:generate",
        "chat": "consilience.cli.chat:chat",
        "prove": "consilience.cli.prove:prove",
        "report": "consilience.cli.pipeline:report",
        "plan": "consilience.cli.plan:plan",
        "convert": "consilience.cli.convert:convert",
        "doctor": "consilience.cli.doctor:doctor",
    }
)

PURPOSE: Mapping[str, str] = MappingProxyType(
    {
        "run": "base, SFT and GRPO of every specialist, distillation, evaluation; skips what is finished",
        "sft": "a specialist by supervised fine-tuning (specialist=math; none: all)",
        "grpo": "a specialist by reinforcement learning, with the stages it needs",
        "distill": "the student from its teachers, with the stages it needs",
        "evaluate": "held-out scores of every model of the run, or of evaluate.checkpoint=FOLDER",
        "generate": "answers of a checkpoint, printed",
        "chat": "talk to a checkpoint",
        "prove": "rollout workers compute with a checkpoint's weights to the last bit (generate.checkpoint=)",
        "report": "check and print the report of a finished run",
        "plan": "parameters, FLOPs and bytes of a model, beside V3.2 (model=flash context=1M plot=FILE.png)",
        "convert": "weights from one layout to another (source=DIR target=DIR layout=official experts=fp4)",
        "doctor": "what this machine has, and which engine, sandbox and device each stage will use",
        "help": "this text, or the settings of one group: consilience help grpo",
    }
)
