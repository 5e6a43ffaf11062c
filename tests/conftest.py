"""Fixtures that several test files share."""

import os
import shutil
from pathlib import Path

# one thread for each pytest worker: two workers of two threads on two cores made the suite eight times as slow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or a second thread spins while another process has its core

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported: its kernels are interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from certtrain.data import Dataset, Digits
from certtrain.recipe import load_config
from certtrain.workflows.train import train


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "networks with a planted counterexample, and as many robust ones, that the verifier is tried on (default 25)"
    parser.addoption("--planted", type=int, default=25, metavar="N", help=help)


@pytest.fixture(scope="session")
def planted(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--planted")


@pytest.fixture(scope="session")
def digits_dataset() -> Dataset:
    return Digits().load()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the smallest recipe, to be read alone."""
    recipe = Path(__file__).parents[1] / "configs" / "smoke.yaml"
    return train(load_config(recipe), tmp_path_factory.mktemp("smoke") / "run", quiet=True).path


@pytest.fixture
def run(smoke: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(smoke, tmp_path / "run")
    return tmp_path / "run"
