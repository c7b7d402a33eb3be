"""Values of torch and numpy become JSON-plain, whatever they are nested in."""

import math

import numpy as np
import torch

from consilience.training.plain_json import plain


def test_scalars_arrays_and_tables_become_plain():
    assert plain({"a": torch.tensor(1.5), 2: (np.int64(3), None, True)}) == {"a": 1.5, "2": [3, None, True]}
    assert plain(np.array([[1.0, math.nan]])) == [[1.0, None]]


def test_what_is_not_finite_becomes_none_and_what_is_no_number_becomes_text():
    assert plain([math.inf, -math.inf, torch.tensor(math.nan)]) == [None, None, None]
    assert plain({"p": complex(1, 2)}) == {"p": "(1+2j)"}
