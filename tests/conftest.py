"""Fixtures that several test files share."""

import os

# one thread for each pytest worker: two workers of two threads on two cores made the suite eight times as slow
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from certtrain.data import Dataset, Digits


@pytest.fixture(scope="session")
def digits_dataset() -> Dataset:
    return Digits().load()
