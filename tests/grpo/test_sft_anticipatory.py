"""Supervised training under anticipatory routing: who chooses, the way back, kills in between."""

from dataclasses import replace

import numpy as np
import pytest
import small_trainer
import torch

from consilience.grpo.sft import SupervisedSettings, train_supervised
from consilience.grpo.supervised_batches import Example
from consilience.model.transformer import Transformer
from consilience.training.anticipatory_routing import AnticipatoryRouting, AnticipatorySettings
from consilience.training.checkpoint import CheckpointMeta, read_stage_tensors
from consilience.training.metrics import MetricsLog, read_metrics, surviving
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

CONFIG = replace(small_trainer.CONFIG, compress_ratios=(0, 0), n_routed_experts=6)
META = CheckpointMeta(stage="sft", seed=3, step=0, special_tokens={"<bos>": 0})
STEPS = 20
SPIKE = 10  # the update whose loss is blown up; rollback points at 0 3 6 9, so the way back leads to 6
QUIET = 7
WATCHING = AnticipatorySettings(
    mode="after_spike", delay=2, window=4, threshold=50.0, rollback_steps=3, quiet_steps=QUIET
)
ALWAYS = AnticipatorySettings(mode="always", delay=2)
TIMES = ("time", "anticipatory_s", "anticipatory_share")


def examples():
    rng = np.random.default_rng(0)
    return [Example(rng.integers(2, 40, n).tolist(), [1.0] * int(n)) for n in rng.integers(5, 30, 9)]


class Watched(TorchEngine):
    """Keeps what every update started from; blows the loss of update SPIKE up while routing is plain.

    seen[i] = (update, weights, optimiser state, token ids, routings) at the i-th forward_backward
    """

    def __init__(self, *args, spikes=(SPIKE,), cures=True, **options):
        super().__init__(*args, **options)
        self.seen, self.spikes, self.cures = [], spikes, cures

    def forward_backward(self, loss_fn, batch, denominators):
        weights = {n: t.clone() for n, t in self.model.state_dict().items()}
        state = {n: t.clone() for n, t in self.optimizer.state_tensors().items()}
        ids = np.concatenate([micro.token_ids for micro, _ in batch])
        routings = [routing for _, routing in batch]
        self.seen.append((self.num_steps, weights, state, ids, routings))
        report = super().forward_backward(loss_fn, batch, denominators)
        if self.num_steps in self.spikes and (routings[0] is None or not self.cures):
            report["nll"] *= 1e4
        return report


class Killed(Exception):
    """The power goes."""


class PowerCut:
    """A sink that ends the run right after its `at`-th row."""

    def __init__(self, sink, at):
        self.sink, self.at, self.num = sink, at, 0

    def scalars(self, step, values):
        self.num += 1
        self.sink.scalars(step, values)
        if self.num == self.at:
            raise Killed


def run(folder, settings, *, kill_at=None, every_s=1e9, micro_tokens=512, engine=None, save=None):
    """One attempt: resume where the folder stands, train to the end or to the kill."""
    (folder / "tokenizer-source.json").write_text("{}")
    torch.manual_seed(0)
    engine = engine or Watched(small_trainer.small_model(0, CONFIG), OptimizerSettings(lr=0.01))
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer-source.json", META, every_s=every_s
    )
    if save is not None:
        checkpoints.save = save(checkpoints)
    start, cursor = checkpoints.resume()
    anticipatory = AnticipatoryRouting(settings, STEPS, cursor.get("anticipatory"), checkpoints.tensors)
    log = MetricsLog(folder / "metrics.jsonl", resume_step=start)
    try:
        train_supervised(
            engine,
            [examples()],
            SupervisedSettings(
                STEPS, 90, row_tokens=64, micro_tokens=micro_tokens, warmup=2, balance_weight=0.01, seed=5
            ),
            checkpoints=checkpoints,
            log=log if kill_at is None else PowerCut(log, kill_at),
            clock=StageClock(earlier=cursor.get("clock")),
            progress=SilentProgress(),
            start=start,
            anticipatory=anticipatory,
        )
    finally:
        log.finish()
    return engine, anticipatory


def rows_of(folder):
    kept = surviving(read_metrics(folder / "metrics.jsonl"))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in kept]


def fresh(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def is_same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_looking_no_step_ahead_is_plain_training_bit_for_bit(tmp_path):
    plain, _ = run(fresh(tmp_path, "plain"), AnticipatorySettings(), engine=None)
    now, anticipatory = run(fresh(tmp_path, "now"), replace(ALWAYS, delay=0))
    assert is_same(plain.model.state_dict(), now.model.state_dict())
    rows = rows_of(tmp_path / "now")
    assert [row.pop("anticipatory") for row in rows] == [1.0] * STEPS
    expected = rows_of(tmp_path / "plain")
    expected[SPIKE]["nll"] /= 1e4  # the fault is injected under plain routing only, and off watches nothing
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected):
        assert row | {"nll": 0} == wanted | {"nll": 0} and row["nll"] == pytest.approx(wanted["nll"])
    assert anticipatory.ledger["steps"] == STEPS and anticipatory.ledger["extra_s"] > 0


def choices_of(weights, ids_by_micro):
    """Experts that a model of these weights chooses, the learned layer's gate overheard."""
    model = Transformer(CONFIG)
    model.load_state_dict(weights)
    seen = []
    model.layers[1].ffn.gate.register_forward_hook(lambda _g, _i, out: seen.append(out[1]))
    for micro in ids_by_micro:  # with gradients: without, few rows take a kernel that calls no gate
        rows = micro.to_torch("cpu")
        model.hidden(rows["token_ids"], rows["segment_ids"], rows["position_ids"])
    return seen


class Overheard(Watched):
    """Keeps the micro-batches, and what the learned gate gave in the forward that learns."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batches, self.used = [], []
        self.model.layers[1].ffn.gate.register_forward_hook(lambda _g, _i, out: self._overhear(out[1]))

    def forward_backward(self, loss_fn, batch, denominators):
        self.batches.append([micro for micro, _ in batch])
        self.used.append([])
        return super().forward_backward(loss_fn, batch, denominators)

    def _overhear(self, experts):
        if torch.is_grad_enabled():
            self.used[-1].append(experts)


def test_experts_are_those_that_the_weights_of_two_steps_before_choose(tmp_path):
    engine = Overheard(small_trainer.small_model(0, CONFIG), OptimizerSettings(lr=0.05), spikes=())
    run(fresh(tmp_path, "a"), ALWAYS, micro_tokens=64, engine=engine)
    weights = [seen[1] for seen in engine.seen]
    assert len(engine.batches) == STEPS and all(len(batch) > 1 for batch in engine.batches)
    num_moved = 0
    for step, (batch, used) in enumerate(zip(engine.batches, engine.used)):
        old = choices_of(weights[max(0, step - 2)], batch)
        now = choices_of(weights[step], batch)
        assert all(torch.equal(a, b) for a, b in zip(used, old, strict=True))
        num_moved += any(not torch.equal(a, b) for a, b in zip(old, now))
    assert num_moved > STEPS / 2  # the weights of now would have chosen otherwise


def test_how_rows_are_cut_into_micro_batches_does_not_matter_even_across_a_kill(tmp_path):
    with pytest.raises(Killed):
        run(fresh(tmp_path, "a"), ALWAYS, every_s=0.0, micro_tokens=64, kill_at=9)
    held = read_stage_tensors(tmp_path / "a" / "checkpoints" / "step-000008")
    resumed, _ = run(tmp_path / "a", ALWAYS)
    step, *_, routings = resumed.seen[0]
    assert step == 8 and len(routings) == 1 and sorted(held) == ["8.1", "9.1"]
    assert torch.equal(routings[0].experts[1], held["8.1"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The watched run with its one spike: engine, anticipatory routing, folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return *run(folder, WATCHING), folder


def test_a_spike_leads_back_to_weights_optimiser_and_data_as_they_were_then_quiet_switches_off(undisturbed):
    engine, anticipatory, folder = undisturbed
    updates = [seen[0] for seen in engine.seen]
    assert updates == [*range(SPIKE + 1), *range(6, STEPS)]
    first, again = engine.seen[6], engine.seen[SPIKE + 1]
    assert is_same(first[1], again[1]) and is_same(first[2], again[2])
    assert np.array_equal(first[3], again[3])
    assert first[4][0] is None and again[4][0].is_fixed
    is_routed = {i: seen[4][0] is not None for i, seen in enumerate(engine.seen)}
    on = range(SPIKE + 1, SPIKE + 1 + QUIET)  # updates 6 … 12, the spike's own among them
    assert [i for i, routed in is_routed.items() if routed] == list(on)
    told = read_metrics(folder / "metrics.jsonl")
    (marker,) = [row for row in told if "rolled_back_from" in row]
    assert (marker["step"], marker["rolled_back_from"]) == (6, SPIKE + 1) and marker["nll_of_spike"] > 1e4
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "anticipatory" in row] == list(range(7, 7 + QUIET))
    report = anticipatory.report()["anticipatory"]
    assert report["rollbacks"] == [{"spike": SPIKE, "to": 6, "loss": marker["nll_of_spike"]}]
    assert report["steps"] == QUIET and report["overhead"] == report["extra_s"] / report["train_s"] > 0
    assert all(0 < row["anticipatory_share"] < 1 for row in told if "anticipatory" in row)


def test_without_a_spike_watching_changes_no_bit(tmp_path):
    plain, watched = (
        Watched(small_trainer.small_model(0, CONFIG), OptimizerSettings(lr=0.01), spikes=()) for _ in range(2)
    )
    run(fresh(tmp_path, "plain"), AnticipatorySettings(), engine=plain)
    _, anticipatory = run(fresh(tmp_path, "watched"), WATCHING, engine=watched)
    assert is_same(plain.model.state_dict(), watched.model.state_dict())
    assert rows_of(tmp_path / "plain") == rows_of(tmp_path / "watched")
    assert anticipatory.ledger["rollbacks"] == [] and not anticipatory.is_on


def test_a_spike_that_stays_under_anticipatory_routing_prolongs_it_and_leads_back_once(tmp_path):
    engine = Watched(small_trainer.small_model(0, CONFIG), OptimizerSettings(lr=0.01), cures=False)
    _, anticipatory = run(fresh(tmp_path, "a"), WATCHING, engine=engine)
    assert [seen[0] for seen in engine.seen] == [*range(SPIKE + 1), *range(6, STEPS)]
    routed = [seen[0] for seen in engine.seen if seen[4][0] is not None]
    assert routed == list(range(6, SPIKE + QUIET + 1))
    assert len(anticipatory.ledger["rollbacks"]) == 1


def test_spikes_one_after_the_other_each_lead_back_and_the_stage_ends(tmp_path):
    late = (SPIKE, SPIKE + 4, SPIKE + 9)  # the second falls after the first one's quiet steps
    engine = Watched(small_trainer.small_model(0, CONFIG), OptimizerSettings(lr=0.01), spikes=late)
    _, anticipatory = run(fresh(tmp_path, "a"), WATCHING, engine=engine)
    assert [r["spike"] for r in anticipatory.ledger["rollbacks"]] == [SPIKE, SPIKE + 4, SPIKE + 9]
    assert [r["to"] for r in anticipatory.ledger["rollbacks"]] == [6, 9, 15]
    assert [row["step"] for row in rows_of(tmp_path / "a")] == list(range(1, STEPS + 1))


# Rows: 11 up to the spike, the marker, updates 6 …; anticipatory in rows 13 to 19. Saves at points or always.
@pytest.mark.parametrize(
    ("kill_at", "every_s"),
    [(5, 0.0), (8, 1e9), (11, 1e9), (12, 1e9), (13, 0.0), (15, 0.0), (19, 0.0)],
)
def test_a_run_killed_anywhere_ends_as_the_undisturbed_one_bit_for_bit(
    tmp_path, undisturbed, kill_at, every_s
):
    whole, expected, folder = undisturbed
    with pytest.raises(Killed):
        run(tmp_path, WATCHING, kill_at=kill_at, every_s=every_s)
    resumed, anticipatory = run(tmp_path, WATCHING, every_s=every_s)
    assert is_same(whole.model.state_dict(), resumed.model.state_dict())
    assert is_same(whole.optimizer.state_tensors(), resumed.optimizer.state_tensors())
    assert rows_of(tmp_path) == rows_of(folder)
    assert anticipatory.ledger["rollbacks"] == expected.ledger["rollbacks"]
    assert anticipatory.ledger["steps"] == expected.ledger["steps"]


@pytest.mark.parametrize("is_written", [False, True])
def test_a_kill_in_the_middle_of_the_way_back_repeats_it(tmp_path, undisturbed, is_written):
    """Later checkpoints are gone; the one gone back to does not know yet, or knows and told nobody."""

    def dying(checkpoints):
        save, done = checkpoints.save, []

        def once(step, *rest):
            if step in done:  # the second save of a step is the one on the way back
                if is_written:
                    save(step, *rest)
                raise Killed
            done.append(step)
            return save(step, *rest)

        return once

    whole, _, folder = undisturbed
    with pytest.raises(Killed):
        run(tmp_path, WATCHING, save=dying)
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-000006"]
    resumed, anticipatory = run(tmp_path, WATCHING)
    assert [seen[0] for seen in resumed.seen][:5] == [6, 7, 8, 9, 10]
    assert is_same(whole.model.state_dict(), resumed.model.state_dict())
    assert rows_of(tmp_path) == rows_of(folder)
    assert [r["spike"] for r in anticipatory.ledger["rollbacks"]] == [SPIKE]
