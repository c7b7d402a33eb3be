"""`consilience prove` where vLLM samples."""

import json
import sys

import pytest
from dense_run import prepare
from tiny_qwen import MAX_MISMATCH, SETTINGS

from consilience.cli.generate import open_talker
from consilience.cli.prove import prove
from consilience.cli.ray_session import close_session
from consilience.conf.errors import ConfigError
from consilience.conf.load import from_plain

pytestmark = pytest.mark.timeout(600)  # a start of Ray and of vLLM


def config(checkpoint, run):
    vllm = {"python": sys.executable, "max_mismatch": MAX_MISMATCH, "settings": SETTINGS}
    return from_plain(
        {
            "task": {"family": "official", "domains": {"code": {"kind": "code", "max_tokens": 32}}},
            "engine": {"device": "cpu", "threads": 1},
            "generate": {"checkpoint": str(checkpoint)},
            "cluster": {"object_store_bytes": 100 << 20},
            "rollout": {"engine": "vllm", "proof": "off", "num_workers": 1, "max_length": 200, "vllm": vllm},
            "run": {"folder": str(run), "name": "proof"},
        }
    )


def test_updates_of_a_dense_checkpoint_are_proven_on_demand(tmp_path, capsys):
    inputs = prepare(tmp_path / "inputs")
    given = config(inputs / "init", tmp_path / "run")
    try:
        assert prove(given) == 0
    finally:
        close_session()
    out = capsys.readouterr().out
    assert "1 workers of vLLM took the weights, others and these again" in out
    rows = [json.loads(x) for x in (tmp_path / "run/proof/vllm_updates.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [0, -1, 0]
    assert rows[0]["digest"] == rows[2]["digest"] != rows[1]["digest"]
    assert all(row["mean"] < MAX_MISMATCH for row in rows) and all(row["moved"] > 0.05 for row in rows[1:])
    with pytest.raises(ConfigError, match="of type qwen3: give it to"):
        open_talker(given)
