"""Fixtures that several test files share."""

import os

# one thread for each pytest worker: two workers of two threads on two cores made the suite eight times as slow
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from certtrain.data import Dataset, Digits


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "networks with a planted counterexample, and as many robust ones, that the verifier is tried on (default 25)"
    parser.addoption("--planted", type=int, default=25, metavar="N", help=help)


@pytest.fixture(scope="session")
def planted(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--planted")


@pytest.fixture(scope="session")
def digits_dataset() -> Dataset:
    return Digits().load()
