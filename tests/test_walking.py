"""One test id for a table: every row is tried, and each failing row is named."""

from itertools import combinations, product

import pytest
from walking import pairs, walk


@walk("number", [1, 2, 3])
@walk(("word", "length"), [("a", 1), ("bcd", 3)], ids=["short", "long"])
def test_it_walks_beside_fixtures(number, tmp_path, word, length):
    (tmp_path / f"{number}{word}").touch()
    assert number < 4 and len(word) == length


class TestMethods:
    @walk("number", range(2))
    def test_it_walks(self, number):
        assert isinstance(self, TestMethods) and number < 2


def test_every_failing_row_is_named():
    seen = []

    @walk("number", range(5))
    def check(number):
        seen.append(number)
        if number == 4:
            pytest.skip("no such thing")
        assert number % 2 == 0, "odd"

    with pytest.raises(ExceptionGroup, match=r"2 of 5 rows failed\nrow: number=1\nrow: number=3") as caught:
        check()
    assert seen == [0, 1, 2, 3, 4] and all("odd" in str(error) for error in caught.value.exceptions)


def test_skipped_where_all_rows_are():
    @walk("number", range(2))
    def check(number):
        pytest.skip("never")

    with pytest.raises(pytest.skip.Exception, match="never"):
        check()


def test_wrong_tables_are_refused():
    with pytest.raises(AssertionError, match="no row"):
        walk("number", [])
    with pytest.raises(AssertionError, match="takes no"):
        walk("word", "a")(lambda number: None)


def test_all_pairs_meet_in_few_rows():
    axes = "abcd", range(3), [True, False], (0.5, 1.5, 2.5)
    rows = pairs(*axes)
    assert set(rows) <= set(product(*axes)) and len(rows) <= 16 < 72 and rows == pairs(*axes)
    for (i, first), (j, second) in combinations(enumerate(axes), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(first, second))
