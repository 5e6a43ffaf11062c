"""Limits of a batch: seconds, and memory."""

import itertools
import time
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from certtrain.bounds import LinfBall
from certtrain.verifiers import Certify, Finding, Limits, Stage, run_cascade
from certtrain.verifiers.cascade import robustness
from certtrain.verifiers.limits import out_of_memory, within_memory


def test_branch_and_bound_gets_what_is_left():
    """Of an image's limit, and of the sweep's; the verdict says which of them it was."""
    torch.manual_seed(0)
    sizes = (24, 80, 80, 80, 3)
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    network = nn.Sequential(nn.Flatten(), *layers[:-1]).eval()
    images, labels = torch.rand(6, 1, 4, 6), torch.zeros(6, dtype=torch.int64)
    problem = robustness(network, images, labels, torch.arange(6), 3, LinfBall(0.3))
    with torch.no_grad():
        for layer in layers[:-1:2]:
            layer.weight.mul_(2)
        layers[-2].bias[0] = 7.0  # points of the box keep a margin of 6; CROWN proves -17 and less
    stages = Certify(stages=("crown", "bab"), timeout=1e6).build(0)
    for seconds, total, reason in ((0.3, 1e6, "timeout"), (1e6, 1.5, "total timeout")):
        started = time.perf_counter()
        verdicts = run_cascade(problem, stages, Limits(seconds, started + total))
        assert time.perf_counter() - started < 10
        late = [v for v in verdicts if v.status == "timeout"]
        assert late and {v.reason for v in late} <= {reason, "wall clock"}
        assert all(v.seconds < 5 and v.seconds == pytest.approx(sum(v.spent.values())) for v in verdicts)


@dataclass(frozen=True)
class Hungry(Stage):
    """Takes so many images at most, and so many images' worth of memory alone."""

    most: int
    error: BaseException
    name: str = field(default="hungry", kw_only=True)
    seen: list[int] = field(default_factory=list)

    def __call__(self, problem, known):
        if len(problem) > self.most or (0 in problem.index and self.most < 100):
            raise self.error
        self.seen.extend(problem.index.tolist())
        even = [int(i) % 2 == 0 for i in problem.index]
        return Finding(["verified" if ok else None for ok in even], known)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes."),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
def test_batches_are_halved_and_one_image_that_is_too_large_is_unknown(error):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval()
    labels = torch.zeros(13, dtype=torch.int64)
    problem = robustness(network, torch.rand(13, 1, 4, 4), labels, torch.arange(13), 4, LinfBall(0.1))
    hungry, last = Hungry(3, error), Hungry(1000, error, name="last")
    verdicts = run_cascade(problem, [hungry, last])
    assert sorted(hungry.seen) == list(range(1, 13)) and sorted(last.seen) == list(range(1, 13, 2))
    assert (verdicts[0].status, verdicts[0].stage, verdicts[0].reason) == ("unknown", "hungry", "out of memory")
    assert [v.status for v in verdicts[1:]] == ["unknown", "verified"] * 6
    assert [v.stage for v in verdicts[1:]] == ["last", "hungry"] * 6
    assert [v.index for v in verdicts] == list(range(13)) and all(v.seconds > 0 for v in verdicts)


def test_real_errors_are_known_and_others_pass():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value) and within_memory(lambda: torch.empty(10**15)) is None
    with pytest.raises(RuntimeError, match="shapes"):
        within_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
