"""Sequences of 1 Mi tokens: memory is a mini-batch's however large the phase; the driver sees references."""

import json
import os
import subprocess
import sys

import million_tokens
import pytest

BYTES_A_TOKEN = 160
"""Of a mini-batch while it is packed, at its peak, counted array by array in `packing.pack` (GRPO's two
arrays beside the mask): ids 8 joined and 8 flat, masks and arrays 12 joined and 4 flat, places 49, the rows
made so far up to 44, up to 20 of the array in work, the file's page of the column that is read 4; the
allocator's slack on top."""


def drive(folder, num, num_batches):
    folder.mkdir()
    command = [sys.executable, million_tokens.__file__, "driver", str(folder), str(num), str(num_batches)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.timeout(400)
def test_memory_is_that_of_a_mini_batch_and_the_driver_sees_references_only(tmp_path):
    small, large = drive(tmp_path / "small", 4, 4), drive(tmp_path / "large", 12, 12)
    print(small, large, sep="\n")
    for found, num in ((small, 4), (large, 12)):
        assert found["loss_tokens"] == num * (million_tokens.NUM_TOKENS - million_tokens.PROMPT - 100)
        assert found["total"] == sum(int(million_tokens.tokens_of(i).sum()) for i in range(num))
        assert found["sent_bytes"] < 2000 * num and found["stored_bytes"] < 4000 * num
        assert found["driver_mib"] < 8
        assert found["train_mib"] < BYTES_A_TOKEN
    # Eight samples more are 104 MiB in files, and would be 1.2 GiB in tuples.
    assert large["train_mib"] < small["train_mib"] + 16
