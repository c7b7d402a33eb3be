import json
import math
import os

import numpy as np
import pytest
import torch

from consilience.rollout.vllm_proof import (
    Mismatch,
    changed,
    changed_enough,
    compare,
    kind_proof,
    kinds_of,
    note_update,
    tensor_digests,
)

NAMES = [
    "layers.0.attn.attn_sink",
    "layers.11.attn.attn_sink",
    "layers.3.ffn.experts.7.w1.weight",
    "norm.weight",
]


def rows(*values):
    return [np.array(v, dtype=float) for v in values]


def test_mismatch_by_hand():
    found = compare(4, rows([-1.0, -2.0], [-3.0]), rows([-1.5, -2.0], [-2.0]), rows([-1.5, -1.0], [-5.0]))
    assert (found.version, found.mean, found.largest) == (4, 0.5, 1.0)
    assert found.moved == pytest.approx((0 + 1 + 3) / 3)
    x, y = np.array([-1, -2, -3]), np.array([-1.5, -2, -2])
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(compare(0, rows([-1.0]), rows([-1.0]), None).moved)
    assert compare(0, rows([-1.0]), rows([-1.0]), None).correlation == 1.0


def test_kinds_are_names_without_layers_and_experts():
    assert kinds_of(NAMES) == {
        "layers.*.attn.attn_sink": NAMES[:2],
        "layers.*.ffn.experts.*.w1.weight": NAMES[2:3],
        "norm.weight": NAMES[3:],
    }


def test_only_the_named_tensors_change_and_none_stays_though_it_is_constant():
    weights = {
        "a": torch.randn(8, 8),
        "ones": torch.ones(4),
        "zeros": torch.zeros(4, dtype=torch.bfloat16),
        "table": torch.arange(6),
    }
    new = changed(weights, ["ones", "zeros", "table"])
    assert new["a"] is weights["a"] and torch.equal(new["table"], weights["table"])
    assert (new["ones"] != 1).all() and (new["zeros"] != 0).all() and new["zeros"].dtype == torch.bfloat16
    assert (changed(weights, ["a"])["a"] - weights["a"]).std() == pytest.approx(0.5, rel=0.4)
    digests, other = tensor_digests(weights), tensor_digests(new)
    assert [name for name in weights if digests[name] != other[name]] == ["ones", "zeros"]


def test_a_sampler_that_follows_is_told_from_one_that_stays_though_both_are_off_by_a_constant():
    before, after = rows([-1.0, -2.0]), rows([-1.4, -1.2])
    offset = rows([-1.3, -2.3])
    follows = kind_proof("k", (offset, rows([-1.7, -1.5])), (before, after))
    assert follows.expected == pytest.approx(0.6) and follows.followed == pytest.approx(1)
    assert not follows.is_stale
    stays = kind_proof("k", (offset, offset), (before, after))
    assert stays.followed == 0 and stays.is_stale
    assert kind_proof(
        "k", (before, after), (offset, offset)
    ).is_stale  # where nothing moves, nothing is proven


def test_rounding_larger_than_the_move_does_not_hide_whether_it_was_followed():
    noise = np.random.default_rng(0).normal(0, 0.3, (4, 1000))
    before, move = noise[0], noise[1] / 3
    reference = ([before], [before + move])
    follows = kind_proof("k", ([before + noise[2]], [before + move + noise[3]]), reference)
    stays = kind_proof("k", ([before + noise[2]], [before + noise[3]]), reference)
    assert abs(follows.followed - 1) < 0.4 and not follows.is_stale
    assert abs(stays.followed) < 0.4 and stays.is_stale


def test_a_change_grows_until_the_reference_moves():
    weights = {"w": torch.ones(4)}
    asked = []

    def reference(given, probes):
        asked.append(float((given["w"] - 1).abs().mean()))
        return rows([0.3 * asked[-1], -0.3 * asked[-1]])

    other, scores = changed_enough(weights, ["w"], reference, [[1, 2, 3]], rows([0.0, 0.0]))
    assert asked == sorted(asked) and asked[-1] == float((other["w"] - 1).abs().mean())
    assert np.abs(np.concatenate(scores)).mean() >= 0.5 > 0.3 * asked[-2]
    still = changed_enough(weights, ["w"], lambda given, probes: rows([0.0]), [[1, 2]], rows([0.0]))
    assert still[1][0].tolist() == [0.0]


def test_what_was_found_of_an_update_is_a_line_of_a_file_that_several_processes_write(tmp_path):
    path = tmp_path / "run" / "updates.jsonl"
    note_update(path, Mismatch(0, 1e-6, 2e-6, 0.5, float("nan")), "ab")
    note_update(path, Mismatch(1, 1e-6, 2e-6, 0.5, 0.25), "cd")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["version"], first["moved"], first["digest"], first["pid"]) == (0, None, "ab", os.getpid())
    assert (second["version"], second["mean"], second["moved"], second["digest"]) == (1, 1e-6, 0.25, "cd")
