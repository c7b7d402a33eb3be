"""Starting an engine: one that runs is left alone, one that is missing is started where we are root."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes import docker_engine
from consilience.sandboxes.docker_driver import ping_engine


def test_an_engine_is_started_answers_and_is_left_alone_after(monkeypatch):
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as folder:
        path = f"{folder}/docker.sock"
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        if os.geteuid() != 0 or docker_engine._find_daemon() is None:
            with pytest.raises(SandboxUnavailable):
                docker_engine.start_engine(path, Path(folder, "engine"), limit_s=1)
            return
        process = docker_engine.start_engine(path, Path(folder, "engine"))
        try:
            assert ping_engine(path) and docker_engine.ensure_engine() == "running"
        finally:
            process.terminate()
            process.wait(timeout=30)
        assert not ping_engine(path)


def test_an_engine_that_does_not_start_says_why(tmp_path, monkeypatch):
    daemon = tmp_path / "dockerd"
    daemon.write_text("#!/bin/sh\necho no such storage >&2\nexit 1\n")
    daemon.chmod(0o755)
    monkeypatch.setattr(docker_engine, "_find_daemon", lambda: str(daemon))
    with pytest.raises(SandboxUnavailable, match="no such storage"):
        docker_engine.start_engine(str(tmp_path / "s"), tmp_path / "engine")


def test_only_root_and_only_here_is_an_engine_started(tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(SandboxUnavailable, match="only a local engine"):
        docker_engine.ensure_engine()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SandboxUnavailable, match="only root"):
        docker_engine.ensure_engine()
