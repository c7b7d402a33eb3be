"""Lengths as people write them."""

import pytest

from consilience.conf.errors import ConfigError
from consilience.conf.token_count import token_count


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("4096", 4096),
        ("64K", 64_000),
        ("64k", 64_000),
        ("64Ki", 65_536),
        ("1M", 1_000_000),
        ("1Mi", 1_048_576),
        ("1.5M", 1_500_000),
        ("1,000,000", 1_000_000),
        ("2^20", 1_048_576),
        ("2**20", 1_048_576),
        ("1000000.0", 1_000_000),  # what Hydra makes of 1e6
        ("2^40", 1 << 40),
    ],
)
def test_k_and_m_are_powers_of_ten_and_ki_and_mi_powers_of_two(text, tokens):
    assert token_count(text, "plan.context") == tokens


@pytest.mark.parametrize(
    "text", ["0", "abc", "", "-5", "1.5", "1G", "K", "2^", "2^41", "9^99", "1 M tokens", "2^20K"]
)
def test_anything_else_is_refused_with_examples_of_what_is_allowed(text):
    with pytest.raises(ConfigError, match=r"^plan.context is '.*', but .* 64K \(64,000\)"):
        token_count(text, "plan.context")
