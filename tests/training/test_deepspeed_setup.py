"""Bringing DeepSpeed up: what is said where it is missing."""

import pytest

from consilience.conf.errors import EngineError
from consilience.training.deepspeed_setup import check_installed


def test_a_missing_deepspeed_is_said_with_the_way_to_install_it():
    with pytest.raises(EngineError, match=r"pip install 'deepspeed==0\.19\.8'"):
        check_installed(find=lambda name: None)


def test_deepspeed_is_found_where_it_is_installed():
    check_installed(find=lambda name: object())
