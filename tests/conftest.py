"""Fixtures that several test files share."""

import pytest

from certtrain.data import Dataset, Digits


@pytest.fixture(scope="session")
def digits_dataset() -> Dataset:
    return Digits().load()
