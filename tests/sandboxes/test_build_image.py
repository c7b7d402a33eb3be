"""The image builder: what it copies, and clear refusals."""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes import build_image
from consilience.sandboxes.docker_driver import find_engine


def test_the_copied_root_holds_an_interpreter_its_libraries_and_no_caches(tmp_path):
    archive = tmp_path / "root.tar"
    build_image._copy_host(tmp_path, archive)
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    version = os.path.basename(os.path.realpath("/usr/bin/python3"))
    assert len(names) == len(set(names))
    assert {
        "usr/bin/python3",
        f"usr/bin/{version}",
        f"usr/lib/{version}/json",
        "workspace",
        "etc/passwd",
    } <= set(names)
    assert any("libc.so" in name for name in names) and any("ld-linux" in name for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith(("home", "root/"))]


def test_linked_libraries_are_absolute_files():
    libraries = build_image._linked("/usr/bin/env")
    assert libraries and all(Path(path).is_file() for path in libraries)
    assert build_image._linked("/etc/hostname") == []


def test_without_an_engine_or_with_its_image_there_is_nothing_to_build(capsys):
    engine = find_engine()
    if isinstance(engine, str):
        with pytest.raises(SandboxUnavailable, match="cannot build"):
            build_image.build()
        assert build_image.main([]) == 1 and "cannot build" in capsys.readouterr().err
    else:
        assert build_image.build() == "kept"
        assert build_image.main([]) == 0 and "kept" in capsys.readouterr().out


def test_a_command_that_fails_is_named_with_its_words():
    with pytest.raises(SandboxUnavailable, match=r"ended with 3: why"):
        build_image._run(sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)")


def test_the_mirror_is_that_of_the_suite_in_either_form_of_source():
    line = "# deb http://old x main\ndeb [signed-by=/k] http://a/debian bookworm main\n"
    stanzas = "Types: deb\nURIs: https://node\nSuites: nodistro\n\nTypes: deb\nURIs: http://b/debian\n"
    stanzas += "Suites: bookworm bookworm-updates\n"
    assert build_image.mirror_of(line, "bookworm") == "http://a/debian"
    assert build_image.mirror_of(stanzas, "bookworm") == "http://b/debian"
    assert build_image.mirror_of(stanzas, "trixie") == "http://deb.debian.org/debian"


def test_a_command_that_hangs_is_ended_and_named(monkeypatch):
    monkeypatch.setattr(build_image, "COMMAND_LIMIT_S", 0.2)
    with pytest.raises(SandboxUnavailable, match=r"sleep took over 0\.2 s"):
        build_image._run("sleep", "600")
