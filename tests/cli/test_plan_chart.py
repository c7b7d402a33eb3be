"""The picture of `plan`: it is written, names every curve, and names do not cover each other."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from consilience.cli.main import main
from consilience.cli.plan_chart import draw
from consilience.model.config import FLASH, PRO


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_verb_writes_the_picture_it_is_asked_for(suffix, magic, tmp_path, capsys):
    path = tmp_path / f"costs.{suffix}"
    assert main(["plan", "model=flash", "context=1M", f"plot={path}"]) == 0
    assert path.read_bytes().startswith(magic)
    assert str(path) in capsys.readouterr().out.replace("\n", "")


def labels(path):
    """(text, height) of every curve's name; matplotlib keeps a text as a comment before its glyphs."""
    text = path.read_text()
    ElementTree.fromstring(text)
    return [
        (name.strip(), float(y))
        for name, y in re.findall(
            r"<!-- ([^>]*? [KMGT]?(?:FLOP|B)) -->\s*<g [^>]*translate\([\d.]+ ([\d.]+)\)", text
        )
        if "  " in name
    ]


def test_curves_are_named_with_their_value_at_the_marked_length(tmp_path):
    draw(tmp_path / "a.svg", {"V4-Pro": PRO, "V4-Flash": FLASH}, 10**6)
    assert {name for name, _ in labels(tmp_path / "a.svg")} == {
        "V3.2  1.15 TFLOP",
        "V4-Pro  310 GFLOP",
        "V4-Flash  117 GFLOP",
        "V3.2  48.1 GB",
        "V4-Pro  5.04 GB",
        "V4-Flash  3.52 GB",
    }


def test_names_of_curves_that_end_together_do_not_cover_each_other(tmp_path):
    twins = {f"twin {i}": replace(FLASH, n_routed_experts=256 + i) for i in range(3)}
    draw(tmp_path / "a.svg", {"V4-Pro": PRO, "V4-Flash": FLASH, **twins}, 65_536)
    found = labels(tmp_path / "a.svg")
    assert len(found) == 12
    for unit in ("FLOP", "B"):
        heights = sorted(y for name, y in found if name.endswith(unit))
        assert min(b - a for a, b in itertools.pairwise(heights)) > 9.5  # the size of the letters, points
