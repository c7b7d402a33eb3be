"""How many matrices a weight stacks in its rows, by its name and the shapes beside it."""

import pytest

from consilience.conf.errors import EngineError
from consilience.training.logical_matrices import row_blocks

WO_A, WQ_B = "layers.0.attn.wo_a.weight", "layers.0.attn.wq_b.weight"


def test_output_groups_are_read_off_the_shapes_or_given():
    assert row_blocks(WO_A, {WO_A: (12, 4), WQ_B: (8, 3)}, None) == (6, 6)
    assert row_blocks(WO_A, {WO_A: (12, 4)}, 3) == (4, 4, 4)
    with pytest.raises(EngineError, match="pass o_groups"):
        row_blocks(WO_A, {WO_A: (12, 4)}, None)
    with pytest.raises(EngineError, match="do not fall into 5 equal blocks"):
        row_blocks(WO_A, {WO_A: (12, 4)}, 5)


def test_the_rows_of_a_hyper_connection_are_pre_post_and_comb():
    assert row_blocks("layers.0.hc_attn_fn", {"layers.0.hc_attn_fn": (24, 8)}, None) == (4, 4, 16)
    with pytest.raises(EngineError, match="23 rows; N streams need"):
        row_blocks("layers.0.hc_ffn.fn", {"layers.0.hc_ffn.fn": (23, 8)}, None)


def test_overlapping_windows_have_two_halves_and_a_stack_of_experts_is_one_matrix_each():
    norm, wkv = (f"layers.1.attn.compressor.{name}.weight" for name in ("norm", "wkv"))
    assert row_blocks(wkv, {wkv: (8, 4), norm: (4,)}, None) == (4, 4)
    assert row_blocks(wkv, {wkv: (4, 4), norm: (4,)}, None) == (4,)
    assert row_blocks("layers.0.ffn.experts.w2", {"layers.0.ffn.experts.w2": (5, 8, 3)}, None) == (8,)
