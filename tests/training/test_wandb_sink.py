"""wandb offline: a run file with history on disk, tables a person can open, no network, never in the way."""

import json
import sys

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from consilience.conf.errors import ConfigError
from consilience.training.metrics import RolloutRow
from consilience.training.wandb_sink import COLUMNS, WandbSink

BLOCK, HEADER = 32768, 7


def history(path):
    """Rows of an offline run file: LevelDB-framed protocol buffers after a 7-byte file header."""
    data = path.read_bytes()
    rows, at, partial = [], 7, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        partial += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # full or last
            record = wandb_internal_pb2.Record.FromString(partial)
            partial = b""
            if record.WhichOneof("record_type") == "history":
                item = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in item})
    return rows


ROW = RolloutRow("grpo/1/0/0", "12 + 3 =", "15", 1.0, {"correct": 1.0, "format": 0.5}, 0.25, "math", 0.125)


def outside_connections():
    """Peers outside this machine that this process and wandb's own service talk to."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    peers = [c.raddr.ip for p in processes for c in p.net_connections(kind="inet") if c.raddr]
    return [ip for ip in peers if not ip.startswith("127.") and ip != "::1"]


def test_an_offline_run_leaves_history_and_a_table_without_account_or_network(tmp_path, capfd):
    sink = WandbSink(tmp_path, name="grpo-math", config={"seed": 1})
    for step in range(1, 4):
        sink.scalars(step, {"loss": 1.0 / step, "kl": {"math": 0.5}, "note": "text", "bad": float("nan")})
        sink.rollouts(step, [ROW, ROW])
        assert outside_connections() == []
    assert sink.is_active
    sink.finish()
    sink.finish()
    assert sink.failure is None and not sink.is_active
    (run_file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    rows = {row["_step"]: row for row in history(run_file)}
    assert [rows[step]["loss"] for step in (1, 2, 3)] == pytest.approx([1, 1 / 2, 1 / 3])
    assert rows[2]["kl.math"] == 0.5 and "note" not in rows[2] and "bad" not in rows[2]
    tables = sorted(run_file.parent.glob("files/media/table/rollouts_*.table.json"))
    assert len(tables) == 3
    table = json.loads(tables[0].read_text())
    assert tuple(table["columns"]) == COLUMNS
    cells = dict(zip(table["columns"], table["data"][0]))
    assert cells["prompt"] == "12 + 3 =" and cells["teacher"] == "math" and cells["kl"] == 0.125
    assert json.loads(cells["reward_parts"]) == {"correct": 1.0, "format": 0.5}
    out, err = capfd.readouterr()
    assert out == "" and "wandb" not in err


def test_a_disabled_sink_does_nothing_and_makes_no_folder(tmp_path):
    sink = WandbSink(tmp_path / "run", mode="disabled")
    sink.scalars(1, {"loss": 1.0})
    sink.rollouts(1, [ROW])
    sink.finish()
    assert not sink.is_active and sink.failure is None and not (tmp_path / "run").exists()


def test_a_sink_that_cannot_write_says_so_once_and_lets_training_go_on(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    sink = WandbSink(blocked)
    sink.scalars(1, {"loss": 1.0})
    sink.rollouts(1, [ROW])
    sink.finish()
    assert sink.failure is not None and not sink.is_active
    assert sum("training goes on" in record.message for record in caplog.records) == 1


def test_an_unknown_mode_is_refused_with_the_ones_there_are(tmp_path):
    with pytest.raises(ConfigError, match="'on' is not one of offline, online, disabled"):
        WandbSink(tmp_path, mode="on")


def test_importing_the_module_does_not_import_wandb_itself():
    import consilience.training.wandb_sink as module

    assert "wandb" not in vars(module) and module.__name__ in sys.modules
