"""The manifest says what ran where; what is not known is None, never an error."""

import json
import subprocess

import torch

from consilience.training.manifest import PACKAGES, environment_manifest


def test_the_manifest_has_every_fact_and_is_plain_json():
    manifest = environment_manifest(command=["consilience", "run"], seed=4, digests={"config": "ab"})
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["command"] == ["consilience", "run"] and manifest["seed"] == 4
    assert manifest["digests"] == {"config": "ab"}
    assert set(manifest["packages"]) == set(PACKAGES) and manifest["packages"]["torch"]
    assert manifest["machine"]["cores"] >= 1 and manifest["machine"]["memory_bytes"] > 1 << 28
    assert manifest["torch"]["num_threads"] == torch.get_num_threads()


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_a_checkout_is_described_by_commit_and_dirty_flag(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-m", "one")
    clean = environment_manifest(command=[], seed=0, root=tmp_path)["git"]
    assert len(clean["commit"]) == 40 and clean["is_dirty"] is False
    (tmp_path / "a").write_text("2")
    assert environment_manifest(command=[], seed=0, root=tmp_path)["git"]["is_dirty"] is True


def test_outside_a_checkout_the_commit_is_unknown(tmp_path):
    assert environment_manifest(command=[], seed=0, root=tmp_path)["git"] == {
        "commit": None,
        "is_dirty": None,
    }
