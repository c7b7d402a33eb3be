"""From the version in a token to the bytes that sampled it, whoever died in between."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import EngineError, RunError
from consilience.rollout.publication_log import PublicationLog, read_publications, trace
from consilience.rollout.publishing import Publication, TensorRecord, announce, verify

ROOT = Path(__file__).parents[2]


def weights(seed, num=4):
    g = torch.Generator().manual_seed(seed)
    found = {f"layers.{i}.w": torch.randn(5, 3, generator=g).to(torch.bfloat16) for i in range(num)}
    return found | {"head": torch.randn(2, generator=g), "table": torch.arange(3), "empty": torch.zeros(0, 4)}


def test_the_bytes_of_a_publication_worked_by_hand(tmp_path):
    digest = "ab" * 32
    publication = Publication(3, "cd" * 32, {"w": TensorRecord("float32", (2,), digest)}, "fp4", 7.5)
    log = PublicationLog(tmp_path / "log")
    log.record(publication)
    data = (tmp_path / "log").read_bytes()
    assert b"L" in data and b'{"w":["float32",[2]]}' in data
    assert data.endswith(bytes.fromhex(digest)) and data.count(bytes.fromhex(digest)) == 1
    assert b'"version":3' in data and b'"quantization":"fp4"' in data and b'"time_s":7.5' in data
    assert read_publications(tmp_path / "log") == [publication]


def test_a_version_leads_to_the_digest_of_every_tensor_and_costs_32_bytes_for_each(tmp_path):
    log = PublicationLog(tmp_path / "log")
    sizes = []
    for version in range(3):
        log.record(announce(weights(version, 200), version, "fp4_fp8"))
        sizes.append((tmp_path / "log").stat().st_size)
    for version in range(3):
        found = log.trace(version)
        assert found.quantization == "fp4_fp8"
        verify(weights(version, 200), found)
    # the head's JSON and the frame's own bytes beside them; names are written once
    assert sizes[2] - sizes[1] <= 32 * 203 + 400 < sizes[0]
    log.close()
    assert PublicationLog(tmp_path / "log").publications == log.publications


def test_a_version_published_again_is_told_apart_by_time(tmp_path):
    log = PublicationLog(tmp_path / "log")
    tensors = {"w": TensorRecord("float32", (2,), "00" * 32)}
    for time_s, digest in ((10.0, "aa" * 32), (20.0, "bb" * 32)):
        log.record(Publication(5, digest, tensors, "off", time_s))
    assert log.trace(5).digest == "bb" * 32 and log.trace(5, 19.0).digest == "aa" * 32
    with pytest.raises(RunError, match="no publication of version 6"):
        log.trace(6)
    with pytest.raises(RunError, match=r"before 9\.000"):
        trace(read_publications(tmp_path / "log"), 5, 9.0)


CHILD = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_publication_log import weights
from consilience.rollout.publication_log import PublicationLog
from consilience.rollout.publishing import announce
log = PublicationLog(Path(sys.argv[1]))
for version in range(100000):
    log.record(announce(weights(version), version))
    print(version, flush=True)
"""


def test_what_was_recorded_before_a_driver_was_killed_is_there(tmp_path):
    path = tmp_path / "log"
    command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        said += child.stdout.readlines()
    last = int(said[-1])
    found = read_publications(path)
    assert len(found) >= last + 1 >= 20
    for version in (0, last):
        verify(weights(version), found[version])
    log = PublicationLog(path)
    log.record(announce(weights(7), 7))
    assert len(read_publications(path)) == len(found) + 1


def test_damage_is_an_error_and_not_another_digest(tmp_path):
    path = tmp_path / "log"
    log = PublicationLog(path)
    for version in range(3):
        log.record(announce(weights(version), version))
    log.close()
    data = bytearray(path.read_bytes())
    middle = data.index(b'"version":1')
    data[middle + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match="damaged behind frame 2"):
        read_publications(path)
    with pytest.raises(EngineError, match="damaged"):
        PublicationLog(path)
    with pytest.raises(RunError, match="cannot read"):
        read_publications(tmp_path / "none")
