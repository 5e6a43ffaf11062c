"""The page of supported operators is what the code says."""

from pathlib import Path

import operator_table
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"


@pytest.mark.filterwarnings("ignore")  # torch's, on functions that it deprecates
def test_the_page_is_the_codes():
    written, found = PAGE.read_text().splitlines(), operator_table.page().splitlines()
    missing = [line for line in found if line not in written]
    stale = [line for line in written if line not in found]
    assert written == found, f"python scripts/operator_table.py > docs/operators.md\nnew: {missing}\ngone: {stale}"


def test_it_reads_what_errors_accept():
    """Errors of rules, of what they call, of closures, and of operations that a tracing rule makes."""
    rules, functions = operator_table.RULES, operator_table.FUNCTIONS
    assert operator_table.accepted(rules["LeakyRelu"]) == ["alpha=…: a slope in [0, 1]"]
    assert "mode=…: nearest, linear" in operator_table.accepted(rules["Resize"])
    assert operator_table.accepted(rules["Elu"]) == ["alpha=…: a number > 0"]
    assert any("1024" in text for text in operator_table.accepted(functions["clamp"]))
    assert not operator_table.accepted(rules["Relu"])
