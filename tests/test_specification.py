"""Specifications in disjunctive normal form of the unsafe set: ties and NaN are unsafe."""

import math

import pytest
import torch

from certtrain.verifiers import Specification


class TestSpecification:
    def test_robust_rows_are_the_margins_in_increasing_order(self):
        specification = Specification.robust(torch.tensor([1, 0]), 3)
        logits = torch.tensor([[1.0, 10.0, 100.0]] * 2)
        assert specification.values(logits).tolist() == [[9.0, -90.0], [-9.0, -99.0]]
        assert specification.clauses.tolist() == [0, 1]

    def test_worst_is_brute_force_over_clauses_of_several_rows(self):
        """Unsafe: in some clause every row is <= 0."""
        torch.manual_seed(0)
        clauses = torch.tensor([2, 0, 1, 0, 2, 2])
        for _ in range(50):
            values = torch.randn(20, 6).round(decimals=1)  # zeros occur
            specification = Specification(torch.zeros(20, 6, 3), torch.zeros(20, 6), clauses)
            found = specification.worst(values)
            for row, value in zip(values, found, strict=True):
                unsafe = any(
                    all(v <= 0 for v, c in zip(row, clauses, strict=True) if c == clause) for clause in range(3)
                )
                assert (value > 0).item() is not unsafe
                expected = min(max(row[clauses == clause]) for clause in range(3))
                assert value == expected

    def test_offsets_and_subset(self):
        torch.manual_seed(0)
        rows, offsets, logits = torch.randn(4, 2, 3), torch.randn(4, 2), torch.randn(4, 3)
        specification = Specification(rows, offsets, torch.tensor([0, 0]), torch.tensor([3, 2, 1, 0]))
        expected = torch.einsum("brk,bk->br", rows, logits) + offsets
        torch.testing.assert_close(specification.values(logits), expected)
        part = specification.subset(torch.tensor([2, 0]))
        torch.testing.assert_close(part.values(logits[[2, 0]]), expected[[2, 0]])
        assert part.labels.tolist() == [1, 3]

    @pytest.mark.parametrize("rows", [[0.0], [math.nan], [-math.inf], [1.0, math.nan], [math.nan, 1.0], [1.0, 0.0]])
    def test_ties_and_nan_are_unsafe(self, rows):
        values = torch.tensor([rows])
        specification = Specification(torch.zeros(1, len(rows), 2), torch.zeros(1, len(rows)), torch.arange(len(rows)))
        assert not (specification.worst(values) > 0).item()
        clause = torch.zeros(len(rows), dtype=torch.int64)  # in one clause, one NaN row must not prove it either
        if all(not value > 0 for value in rows):
            one = Specification(specification.rows, specification.offsets, clause)
            assert not (one.worst(values) > 0).item()

    def test_a_clause_without_rows_holds_everywhere_and_so_is_unsafe(self):
        specification = Specification(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.tensor([1]))
        assert not (specification.worst(torch.tensor([[5.0]])) > 0).item()
