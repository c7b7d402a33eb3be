"""A stage's parts on any number of ranks, and what it leaves, for tests that compare numbers of ranks."""

import math

import numpy as np
import torch

from consilience.model.checkpoint import to_official
from consilience.model.expert_parallel import each_expert
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.engine import is_cut, official_weights
from consilience.training.expert_engine import ExpertEngine
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine
from tests.ranks_table import note

META = CheckpointMeta(stage="stage", seed=3, step=0, special_tokens={"<bos>": 0})
# With the default eps of 1e-20 a gradient that is rounding alone would become a whole step of AdamW.
# Every step makes the next one's gradients differ by what its rounding moved: the rate keeps that below 1e-5.
SETTINGS = OptimizerSettings(lr=1e-3, weight_decay=0.0, kind="adamw", eps=1e-4, bias_speed=0.1)
OF_CLOCKS = ("anticipatory_s", "anticipatory_share")


class Keeper(TorchEngine):
    """Keeps the summed gradients of every step."""

    def __init__(self, model, ranks, settings=SETTINGS, exact=False):
        super().__init__(model, settings, ranks=ranks, exact=exact)
        self.kept = []

    def step(self, lr_scale=1.0, expert_load=None):
        self.kept.append({name: grad.numpy().copy() for name, grad in self.gradients().items()})
        return super().step(lr_scale, expert_load)


class DividedKeeper(ExpertEngine):
    """Keeps the summed gradients of every step, those of experts gathered."""

    def __init__(self, model, settings, **given):
        super().__init__(model, settings, **given)
        self.kept, take_step = [], self.step

        def step(lr_scale=1.0, expert_load=None):
            self.kept.append({name: self._whole(name, grad) for name, grad in self.gradients().items()})
            return take_step(lr_scale, expert_load)

        self.step = step

    def _whole(self, name, grad):
        shard = self.split.get(name)
        return (grad if shard is None else torch.stack(list(each_expert(grad, shard)))).numpy().copy()


def engine_of(kind, model, ranks, settings, exact):
    if kind == "fsdp":
        from consilience.training.fsdp_engine import FsdpEngine

        return FsdpEngine(model, settings, ranks=ranks, exact=exact)
    if kind == "zero3":
        from consilience.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, settings, ranks=ranks, zero_stage=3)
    if kind.startswith("experts"):
        size = int(kind.removeprefix("experts"))
        return DividedKeeper(model, settings, ranks=ranks, expert_ranks=size, exact=exact)
    return Keeper(model, ranks, settings, exact)


class StageParts:
    """Engine, checkpoints, log and clock of a stage in `folder`, which all ranks see.

    saves: after every step, which takes a cut model longer than the step
    """

    def __init__(self, model, ranks, folder, settings=SETTINGS, kind="torch", exact=False, saves=True):
        torch.set_num_threads(1)
        if ranks.is_first:
            folder.mkdir(exist_ok=True)
            (folder / "tokenizer.json").write_text("{}")
        ranks.barrier()
        self.engine, self.log = engine_of(kind, model, ranks, settings, exact), MemorySink()
        given = (folder / "checkpoints", self.engine, folder / "tokenizer.json", META)
        self.checkpoints = StageCheckpoints(*given, every_s=0.0 if saves else math.inf)
        self.start, self.cursor = self.checkpoints.resume()
        ranks.barrier()
        self.clock, self.progress = StageClock(), SilentProgress()

    def named(self):
        return {name: getattr(self, name) for name in ("checkpoints", "log", "clock", "progress")}

    def _weights(self):
        return official_weights(self.engine) or {} if is_cut(self.engine) else to_official(self.engine.model)

    def left(self):
        """Gradients by step, weights and router biases at the end, and what was logged."""
        rows = [{k: v for k, v in row.items() if k not in OF_CLOCKS} for row in self.log.rows]
        weights = {name: value.numpy().copy() for name, value in self._weights().items()}
        held = self.engine.model.named_parameters() if isinstance(self.engine, ExpertEngine) else ()
        own = {name: value.detach().numpy().copy() for name, value in held}
        left = {"gradients": getattr(self.engine, "kept", []), "weights": weights, "rows": rows}
        return left | ({"own": own} if own else {})


GAPS = ("mismatch_max", "sampler_gap_max")


def assert_same(found, expected, tolerance=1e-5, least=1e-6):
    """Tensors within `tolerance` of their largest value, numbers within that of theirs; fp32 sums differ so.

    least  values are compared with this at least. Of gradients it is a tenth of the step's largest: mixing
           weights of the first layer's streams, which enter it as copies, have rounding for a gradient.
           A mean of differences of log-probs, as |log ratio| is, has the error of the log-probs, 1e-6; the
           largest of them (GAPS) is held to 1e-5 of a log-prob, which is 1 and more.
    """
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        if "rows" in expected:  # what a stage left
            note(found, expected)
        if all(isinstance(value, np.ndarray) for value in expected.values()):
            least = max(0.1 * max((np.abs(v).max() for v in expected.values()), default=0.0), least)
        for name in expected:
            try:
                assert_same(found[name], expected[name], tolerance, 1e-5 if name in GAPS else least)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for number, (one, other) in enumerate(zip(found, expected)):
            try:
                assert_same(one, other, tolerance, least)
            except AssertionError as error:
                raise AssertionError(f"[{number}]: {error}") from None
    elif isinstance(expected, np.ndarray):
        off = np.abs(found - expected).max(initial=0)
        assert off <= tolerance * np.abs(expected).max(initial=least), off
    elif isinstance(expected, float):
        both_nan = math.isnan(found) and math.isnan(expected)
        assert both_nan or abs(found - expected) <= max(tolerance * abs(expected), least), (found, expected)
    else:
        assert found == expected


def assert_ranks_agree(left):
    """All ranks end with the same bits; returns the first's."""
    for other in left[1:]:
        for name, value in left[0]["weights"].items():
            assert np.array_equal(value, other["weights"][name]), name
        assert repr(other["rows"]) == repr(left[0]["rows"])
    return left[0]


def assert_cut_same(left, expected):
    """What ranks with a part of the model each left is what one process did; the first has gathered it."""
    for other in left[1:]:
        assert not other["weights"] and repr(other["rows"]) == repr(left[0]["rows"])
    assert_same(
        {name: value for name, value in left[0].items() if name != "gradients"},
        {name: value for name, value in expected.items() if name != "gradients"},
    )


def assert_divided_same(left, expected, expert_ranks):
    """What ranks with a part of the experts each left is what one process did; all have the same bits."""
    for rank, other in enumerate(left):
        assert bool(other["weights"]) == (rank == 0) and repr(other["rows"]) == repr(left[0]["rows"])
        for name, value in other["own"].items():
            first = rank % expert_ranks if ".experts." in name else 0
            assert np.array_equal(value, left[first]["own"][name]), name
    assert_same({name: value for name, value in left[0].items() if name != "own"}, expected)
