"""The seam between processes: where the gradients and the figures of one step become one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from certtrain.attacks import Ascent
from certtrain.bounds import LinfBall
from certtrain.data import Digits
from certtrain.losses import CcIbp, FreeAt, Loss, NFgsm, PgdAt, Trades
from certtrain.models import SmallCnn
from certtrain.noise import Noise
from certtrain.run_folder import RunFolder
from certtrain.step import SINGLE_PROCESS, Batch, Exchange, State, Step
from certtrain.training import Awp, Descend, Lap, Linear, StopRequest, Training, UpdateRule, fit

BALL = LinfBall(epsilon=0.1)
SINGLE = NFgsm(attack=Ascent(steps=1, step_size=1.0))
SHORT = Ascent(attack_mode="eval", steps=2, step_size=0.25, start="uniform")
PGD_AT, TRADES = PgdAt(attack=replace(SHORT, attack_mode="train")), Trades(attack=replace(SHORT, start="normal"))
CASES: dict[str, tuple[UpdateRule, Loss]] = {
    "PGD-AT": (Descend(), PGD_AT), "TRADES": (Descend(), TRADES), "CC-IBP": (Descend(), CcIbp()),
    "Free-AT": (Descend(), FreeAt(replays=2)), "AWP": (Awp(gamma=0.05, start_epoch=0), TRADES),
    "LAP": (Lap(beta=0.05), SINGLE), "LAP, restored": (Lap(beta=0.05, restore=True), SINGLE),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


class Nulled(Exchange):
    """Takes away every gradient that passes, and counts them."""

    def __init__(self):
        self.passed = 0

    def samples(self, count: int) -> int:
        return count

    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.passed += 1
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        return dict(figures)


class Table:
    """Where threads meet that stand for processes; they add in the order of their ranks."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=300)  # processors may be busy
        self.entries: list[object] = [None] * count

    def meet(self, rank: int, entry):
        self.entries[rank] = entry
        self.barrier.wait()
        found = list(self.entries)
        self.barrier.wait()
        return found


class Thread(Exchange):
    def __init__(self, table: Table, rank: int):
        self.table, self.rank = table, rank

    def samples(self, count: int) -> int:
        return sum(self.table.meet(self.rank, count))

    def gradient(self, parameters: Sequence[nn.Parameter], figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gradients = [parameter.grad.clone() for parameter in parameters]
        found = self.table.meet(self.rank, (gradients, figures))
        for number, parameter in enumerate(parameters):
            parameter.grad.copy_(sum(theirs[number] for theirs, _ in found))
        return {name: sum(theirs[name] for _, theirs in found) for name in figures}


SEEDED = threading.Lock()
"""Threads share torch's generator: one at a time seeds it and draws weights."""


def model() -> nn.Module:
    with SEEDED:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).double()


def batch_of(rows: slice) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(14, 1, 4, 4, generator=generator, dtype=torch.float64)
    return Batch(images, torch.arange(14) % 4, torch.arange(14)).part(rows)


def step_of(loss: Loss, rows: slice, exchange: Exchange) -> Step:
    """The step of some rows of the global batch of 14: noise goes by the position there."""
    specs = loss.declare_state((1, 4, 4), 4)
    state = State({name: spec.allocate(14, 14, torch.device("cpu")) for name, spec in specs.items()}, specs)
    radius = torch.tensor(0.1, dtype=torch.float64)
    noise = Noise(7, torch.arange(14))
    return Step(BALL.with_epsilon(radius), radius, radius, 0.5, noise, state, epochs=2, exchange=exchange).part(rows)


def steps(case: str, rows: slice, exchange: Exchange, clip: float | None = 0.5, parts: int = 1):
    """The weights after two steps of SGD with momentum, and the figures of each."""
    update, loss = CASES[case]
    network, found = model().train(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    size = (rows.stop - rows.start) // parts
    cuts = [slice(first, first + size) for first in range(rows.start, rows.stop, size)]
    for number in range(2):
        pieces = []
        for cut in cuts:
            step = step_of(loss, cut, exchange)
            pieces.append((batch_of(cut), step.again(number)))
        found.append(update(network, optimizer, loss, pieces, clip))
    return [weight.detach() for weight in network.parameters()], found


@every_case
def test_no_gradient_goes_around_the_exchange(case):
    """Without those that it takes away, no weight moves."""
    exchange = Nulled()
    update, loss = CASES[case]
    network = model()
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    rows = slice(0, 14)
    figures = update(network, optimizer, loss, [(batch_of(rows), step_of(loss, rows, exchange))], None)
    assert exchange.passed == (1 if isinstance(update, Descend) else 2) and figures["gradient_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))


@every_case
@pytest.mark.parametrize("parts", [1, 2])
def test_unequal_shares_of_a_batch_make_the_whole_batch_step(case, parts):
    whole, figures = steps(case, slice(0, 14), SINGLE_PROCESS)
    table, results = Table(2), {}

    def work(rank: int, rows: slice) -> None:
        results[rank] = steps(case, rows, Thread(table, rank), parts=parts)

    threads = [
        threading.Thread(target=work, args=(0, slice(0, 8))),
        threading.Thread(target=work, args=(1, slice(8, 14))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for weights, seen in results.values():
        for found, wanted in zip(weights, whole, strict=True):
            assert float((found - wanted).abs().max()) <= 1e-12
        for found, wanted in zip(seen, figures, strict=True):
            assert found.keys() == wanted.keys() and wanted["gradient_norm"] > 0
            assert all(abs(found[name] - wanted[name]) <= 1e-12 * (1 + abs(wanted[name])) for name in wanted)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_a_training_hands_its_exchange_to_every_step(tmp_path):
    data = Digits().load()
    data = replace(data, train=replace(data.train, images=data.train.images[:80], labels=data.train.labels[:80]))
    network, exchange = SmallCnn(width=2, hidden=8).build(data.shape, data.classes), Nulled()
    settings = Training(epochs=2, batch_size=32, schedule=Linear(start=1, length=1), milestones=())
    with StopRequest() as stop:
        fit(network, data, loss=FreeAt(replays=2), ball=BALL, settings=settings, seed=0, folder=RunFolder(tmp_path),
            stop=stop, exchange=exchange, quiet=True)  # fmt: skip
    assert exchange.passed == 2 * 3 * 2
