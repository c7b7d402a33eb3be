"""The mark `ranks` for every test of a file that starts ranks, and what they found, as a table."""

import pytest

from tests.ranks_table import lines


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item.module, "on_ranks"):
            item.add_marker(pytest.mark.ranks)


def pytest_terminal_summary(terminalreporter, config):
    if "ranks" in (config.option.markexpr or ""):
        for line in ["", "several ranks against one process, largest relative difference", *lines()]:
            terminalreporter.write_line(line)
