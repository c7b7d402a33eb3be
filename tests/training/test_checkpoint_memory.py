"""A checkpoint of ours is read into its model tensor by tensor: measured in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]

CHILD = """
import json, sys
from pathlib import Path
import torch
from peak_memory import peak, start
torch.set_num_threads(1)
from consilience.training.checkpoint import load_checkpoint

found = {}
for name, folder in zip(("warm", "large"), sys.argv[1:]):  # the first time brings in libraries
    before = start()
    model, meta = load_checkpoint(Path(folder))
    held = sum(t.nbytes for t in model.state_dict().values())
    found[name] = {"beside": peak() - before - held, "held": held, "digest": meta.digest}
print(json.dumps(found))
"""


def test_nothing_but_the_model_is_in_memory_however_large_shard_and_tensor(tmp_path):
    """One shard of 133 MB with tensors of 50 MB; the digest is checked on the way."""
    config = replace(TINY, hidden_size=128, vocab_size=98_304, num_hidden_layers=2, compress_ratios=(0, 4))
    model = initialize(Transformer(config), 0)
    meta = save_checkpoint(tmp_path / "large", model, None, CheckpointMeta("base", 0, 0))
    small = initialize(Transformer(replace(config, vocab_size=64)), 0)
    save_checkpoint(tmp_path / "small", small, None, CheckpointMeta("base", 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    large = json.loads(done.stdout)["large"]
    assert large["digest"] == meta.digest and large["held"] > 100e6
    assert large["beside"] < 4e6, large  # 0.1 MB seen; one tensor would be 50
    assert len(list((tmp_path / "large").glob("*.safetensors"))) == 1
