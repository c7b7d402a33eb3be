"""Anticipatory routing: at step t features by θ_t, choice of experts by θ_{t-Δt} (report 4.2.3).

Specification 12.3. The batch of step t is fetched Δt steps early and run forward without gradient; what
the learned routers choose is kept and prescribed when its step comes. Weights of the chosen experts are
those of θ_t. Right after a switch the first Δt steps are chosen for at once, by weights 0 to Δt steps old.

After a loss spike the stage goes back to a rollback point and on with anticipatory routing, until a number
of steps in a row have shown no spike. The report gives neither Δt nor the detector nor these lengths; all
of them are ours.

R tokens of a step (flattened, padding included), K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.model.routing import Routing
from consilience.training.forward import hidden_at_loss
from consilience.training.packing import PackedRows
from consilience.training.spike_detector import SpikeDetector
from consilience.training.stage_clock import StageClock

OFF, AFTER_SPIKE, ALWAYS = "off", "after_spike", "always"
Choices = Mapping[int, Tensor]


@dataclass(frozen=True)
class AnticipatorySettings:
    """All in optimiser steps; the numbers are ours, the report has none.

    mode         off; after_spike (watch the loss, go back, switch on, switch off); always
    delay        Δt. 0 routes by the weights of now: the same training, at the full extra cost
    window, threshold   of the spike detector
    rollback_steps   steps between rollback points; the way back is one to two times as long
    quiet_steps  steps without a spike after which routing is plain again. At least the longest way
                 back, so that the step of a spike is always repeated with anticipatory routing
    """

    mode: str = OFF
    delay: int = 8
    window: int = 64
    threshold: float = 6.0
    rollback_steps: int = 50
    quiet_steps: int = 200


class AnticipatoryRouting:
    """Whether a step's routing is prescribed, by what, and what that has cost.

    num_steps   of the stage: nothing is looked up beyond its end
    cursor, tensors   `cursor()` and `tensors()` of the checkpoint that is resumed from
    """

    def __init__(
        self,
        settings: AnticipatorySettings,
        num_steps: int,
        cursor: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings, self.num_steps = settings, num_steps
        self.ledger: dict[str, Any] = {"rollbacks": [], "steps": 0, "extra_s": 0.0, "train_s": 0.0}
        self._restore(cursor or {}, tensors or {})
        self.ledger |= (cursor or {}).get("ledger", {})

    @property
    def points_every(self) -> int:
        """Updates between rollback points; 0 where nothing ever goes back."""
        return self.settings.rollback_steps if self.settings.mode == AFTER_SPIKE else 0

    def choices(self, step: int, look_up: Callable[[int], Choices], clock: StageClock) -> Choices | None:
        """What the learned routers have to choose at `step`, layer -> [R, K]; None while routing is plain.

        look_up(s) takes down the choices for the batch of step s with the weights of now. It is asked for
        each step up to `step` + Δt that it was not asked for yet: one a step, all at once after a switch.
        """
        if not self.is_on:
            return None
        with clock.phase("look_ahead") as span:
            for ahead in range(step, min(step + self.settings.delay, self.num_steps - 1) + 1):
                if ahead not in self._kept:
                    self._kept[ahead] = look_up(ahead)
        self._extra_s = span.seconds
        return self._kept.pop(step)

    def account(self, train_s: float) -> dict[str, float]:
        """Book the step's seconds of looking ahead beside those of training; what its metrics say."""
        if not self.is_on:
            return {}
        extra_s = self._extra_s
        self.ledger["steps"] += 1
        self.ledger["extra_s"] += extra_s
        self.ledger["train_s"] += train_s
        share = extra_s / (extra_s + train_s) if extra_s else 0.0
        return {"anticipatory": 1.0, "anticipatory_s": extra_s, "anticipatory_share": share}

    def must_go_back(self, loss: float) -> bool:
        """Take note of a step's loss. True after a spike under plain routing; then `go_back` must follow.

        A spike while routing is anticipatory only prolongs it: to repeat the steps would give the same.
        """
        if self.settings.mode != AFTER_SPIKE:
            return False
        is_spike = self._detector.is_spike(loss)
        if is_spike and not self.is_on:
            return True
        self._quiet = 0 if is_spike else self._quiet + 1
        if self.is_on and self._quiet >= self.settings.quiet_steps:
            self.is_on = False
            self._kept.clear()
        return False

    def go_back(
        self, spike: int, to: int, loss: float, cursor: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Switch on after the spike of step `spike`, all else as at the checkpoint of step `to`.

        The ledger alone is not taken back.
        """
        self._restore(cursor, tensors)
        self.is_on, self._quiet = True, 0
        self.ledger["rollbacks"].append({"spike": spike, "to": to, "loss": loss})

    def cursor(self) -> dict[str, Any]:
        """Everything but the choices kept, JSON-plain; {} when the mode is off."""
        if self.settings.mode == OFF:
            return {}
        return {
            "is_on": self.is_on,
            "quiet": self._quiet,
            "losses": list(self._detector.losses),
            "ledger": self.ledger,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The choices kept for steps to come: "step.layer" -> [R, K] int16."""
        return {f"{step}.{layer}": e for step, kept in self._kept.items() for layer, e in kept.items()}

    def report(self) -> dict[str, Any]:
        """{"anticipatory": …}, {} when the mode is off: rollbacks [{"spike", "to", "loss"}], the steps under
        it, their train_s, the extra_s of looking ahead, and overhead, extra_s over train_s."""
        if self.settings.mode == OFF:
            return {}
        extra_s, train_s = self.ledger["extra_s"], self.ledger["train_s"]
        return {"anticipatory": self.ledger | {"overhead": extra_s / train_s if train_s else 0.0}}

    def _restore(self, cursor: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.is_on: bool = cursor.get("is_on", self.settings.mode == ALWAYS)
        self._quiet: int = cursor.get("quiet", 0)
        self._detector = SpikeDetector(
            self.settings.window, self.settings.threshold, cursor.get("losses", ())
        )
        self._extra_s = 0.0
        self._kept: dict[int, Choices] = {}
        for name, experts in tensors.items():
            step, layer = map(int, name.split("."))
            self._kept[step] = {**self._kept.get(step, {}), layer: experts}


@torch.no_grad()
def look_up_choices(model: Any, micro_batches: Sequence[PackedRows]) -> Choices:
    """What the learned routers choose with the weights of now: layer -> [R, K] int16 on the CPU."""
    found: list[Routing] = []
    for micro in micro_batches:
        found.append(Routing())
        hidden_at_loss(model, micro, routing=found[-1], wants_mtp=True)
    return {layer: torch.cat([r.experts[layer] for r in found]) for layer in found[0].experts}


def routings(choices: Choices | None, micro_batches: Sequence[PackedRows]) -> list[Routing | None]:
    """The choices of a step as each of its micro-batches has to follow them, however the rows are cut."""
    if choices is None:
        return [None] * len(micro_batches)
    sizes = [micro.token_ids.size for micro in micro_batches]
    cut = {layer: experts.split(sizes) for layer, experts in choices.items()}
    return [Routing.fixed({layer: parts[i] for layer, parts in cut.items()}) for i in range(len(sizes))]
