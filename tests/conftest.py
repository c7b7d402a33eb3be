"""The mark `ranks` for every test of a file that starts ranks, and what they found, as a table."""

import pytest

from tests import ranks_table


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item.module, "on_ranks"):
            item.add_marker(pytest.mark.ranks)


def _named(value):
    return ", ".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else value


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """`row(what, engine)` is the test's row of the table; parameters stand in braces."""
    mark = item.get_closest_marker("row")
    if mark is None:
        return (yield)
    given = getattr(item, "callspec", None)
    named = {name: _named(value) for name, value in given.params.items()} if given else {}
    ranks_table.begin(*(text.format(**named) for text in mark.args))
    is_failed = True
    try:
        result = yield
        is_failed = False
        return result
    finally:
        ranks_table.end(is_failed=is_failed)


def pytest_terminal_summary(terminalreporter):
    found = ranks_table.lines()
    if found:
        title = "several ranks against one process: largest difference relative to the tensor's largest value"
        for line in ["", f"{title}; seconds on ranks", *found]:
            terminalreporter.write_line(line)
