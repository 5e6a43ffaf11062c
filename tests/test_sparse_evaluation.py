"""Evaluation over sparse sets: Sparse-AutoAttack on what is left, every success replayed, every image kept."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from walking import walk

import certtrain
from certtrain.attacks import Attack, AttackResult, CornerSearch, Pgd0, Saif, SigmaZero, SparsePgd, SparseRs, in_mode
from certtrain.bounds import L2Ball, LinfBall, PerturbationSet, SparseBall, size_name, sized
from certtrain.command_line import main
from certtrain.data import Split
from certtrain.errors import InputError
from certtrain.evaluation import (
    AdversaryQuestion,
    Checkpoint,
    Evaluate,
    Evaluation,
    Intervals,
    Outcome,
    Relaxations,
    RestartedPgd,
    Searching,
    adversary_of,
    change_of,
    rebuilt,
)
from certtrain.ledger import Ledger
from certtrain.noise import Noise
from certtrain.progress import console
from certtrain.recipe import load_config
from certtrain.run_folder import JsonLines, RunFolder
from certtrain.step import Batch, Step
from certtrain.workflows.compare import compare
from certtrain.workflows.run import load_model

ROOT = Path(__file__).parents[1]
CASCADE = "sparse-autoattack-8-30"
PARTS = ("spgd-u-8", "spgd-p-8", "sparse-rs-30")


def batch_of(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, torch.arange(len(labels)))


def asked(adversary, model: nn.Module, batch: Batch, ball: PerturbationSet, seed: int = 0) -> list[Outcome]:
    with in_mode(model, training=False):
        return adversary(model, batch, ball, Step.evaluation(ball, Noise(seed, batch.index)))


def named(name: str) -> Searching:
    found = adversary_of(name)
    assert isinstance(found, Searching)
    return found


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Batch]:
    """A network that nothing was done to, and 60 images that it has right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.Linear(24, 5)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), last)
        images = torch.rand(60, 2, 6, 6)
    with torch.no_grad():
        last.bias -= model(images).mean(0)  # no class is everybody's
        return model, batch_of(images, model(images).argmax(1))


# names


NAMES = {
    "spgd-u-100": [("spgd-u", SparsePgd(steps=100, variant="unprojected"))],
    "spgd-p-7": [("spgd-p", SparsePgd(steps=7, variant="projected"))],
    "sparse-rs-200": [("sparse-rs", SparseRs(queries=200, p_init=0.8, objective="cross_entropy"))],
    "sparse-rs-large-200": [("sparse-rs", SparseRs(queries=200, p_init=0.3, objective="margin"))],
    "corner-search": [("corner-search", CornerSearch())],
    "saif-30": [("saif", Saif(steps=30))],
    "sigma-zero-30": [("sigma-zero", SigmaZero(steps=30))],
    "pgd0-30": [("pgd0", Pgd0(steps=30, restarts=1))],
    "pgd0-30-5": [("pgd0", Pgd0(steps=30, restarts=5))],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_an_attack(name):
    found = named(name)
    assert found.name == name and list(found.stages) == NAMES[name] and found.parts == ()


@pytest.mark.parametrize(
    ("name", "steps", "queries", "p_init", "objective"),
    [
        ("sparse-autoattack", 10000, 10000, 0.8, "cross_entropy"),
        ("sparse-autoattack-100-200", 100, 200, 0.8, "cross_entropy"),
        ("sparse-autoattack-large", 10000, 3000, 0.3, "margin"),
        ("sparse-autoattack-large-100-200", 100, 200, 0.3, "margin"),
    ],
)
def test_sparse_autoattack_is_the_published_cascade(name, steps, queries, p_init, objective):
    found = named(name)
    assert found.parts == ("spgd-u", "spgd-p", "sparse-rs")
    first, second, third = (attack for _, attack in found.stages)
    published = {"alpha": 0.25, "beta": 0.25, "patience": 3}
    assert first == SparsePgd(steps=steps, variant="unprojected", **published)
    assert second == SparsePgd(steps=steps, variant="projected", **published)
    assert third == SparseRs(queries=queries, p_init=p_init, objective=objective)


@walk(
    "name",
    [
        "spgd-x-10", "spgd-10", "spgd-u", "spgd-u-0", "SPGD-u-10", "sparse-rs", "sparse-rs-0", "sparse-rs-1.5", "saif",
        "sigma-zero-0", "pgd0", "pgd0-5-0", "corner-search-5", "sparse-autoattack-100", "sparse-autoattack-0-5",
        "sparse-autoattack-5-0", "sparse-autoattack-large-100", "crown-ibp", "spgd-u-10 ", "spgd-u-1000000",
    ],
)  # fmt: skip
def test_other_names_are_refused(name):
    assert adversary_of(name) is None
    with pytest.raises(InputError, match=r"attacks: found .*; accepted: .*crown; of a SparseBall .*sparse-rs-QUERIES"):
        Evaluate(attacks=(name,))


def test_sizes_are_k_or_epsilon():
    assert Evaluate(epsilons=(10, 20.0, 10)).sizes(SparseBall(3)) == (10, 20)
    assert all(type(size) is int for size in Evaluate(epsilons=(10.0,)).sizes(SparseBall(3)))
    assert Evaluate().sizes(SparseBall(3, unit="row")) == (3,)
    assert Evaluate(epsilons=(0.1, 1)).sizes(L2Ball(0.5)) == (0.1, 1.0) and Evaluate().sizes(LinfBall(0.5)) == (0.5,)
    with pytest.raises(InputError, match=r"evaluate.epsilons: found 2.5; accepted: a whole number of rows >= 0"):
        Evaluate(epsilons=(2.5,), attacks=()).check_ball(SparseBall(3, unit="row"))
    assert (size_name("SparseBall"), size_name("L2Ball")) == ("k", "epsilon")
    assert (sized("SparseBall", 20), sized("SparseBall", 1234567.0)) == ("k 20", "k 1234567")
    assert sized("LinfBall", 8 / 255, 4) == "epsilon 0.03137"


# what is refused


@pytest.mark.parametrize(
    ("name", "ball", "accepted"),
    [
        ("pgd-20", SparseBall(2), "sparse-autoattack"),
        ("autoattack", SparseBall(2), "LinfBall or L2Ball, or sparse-autoattack"),
        ("autoattack-cheap", SparseBall(2), "sparse-autoattack"),
        ("spgd-u-5", LinfBall(0.1), "a SparseBall"),
        ("sparse-autoattack", L2Ball(0.1), "a SparseBall"),
        ("corner-search", SparseBall(2, unit="row"), "pixels or features"),
    ],
)
def test_an_attack_refuses_sets_that_it_does_not_know(name, ball, accepted):
    with pytest.raises(InputError, match=rf"^{name}: found .*{accepted}") as error:
        Evaluate(attacks=(name,)).check_ball(ball)
    assert "\n" not in str(error.value) and "accepted: " in str(error.value)


def test_every_sparse_attack_knows_sparse_sets_and_no_others():
    for name in (*NAMES, CASCADE):
        Evaluate(attacks=(name,)).check_ball(SparseBall(2))
        assert named(name).refuses(None, None, LinfBall(0.1))
    assert not RestartedPgd("pgd", 3).refuses(None, None, L2Ball(0.1))
    for ball in (SparseBall(2), LinfBall(0.1), L2Ball(0.1)):
        assert not Relaxations().refuses(None, None, ball)


class Hard(nn.Module):
    """No gradient reaches the image."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x > 0.5).float().flatten(1).sum(1)
        return torch.stack([bright, 4.5 - bright], 1)


def test_a_network_without_gradients_is_refused_by_attacks_that_take_them_alone(tmp_path):
    images, ball = torch.rand(4, 1, 3, 3), SparseBall(9)
    for name in NAMES:
        refused = named(name).refuses(Hard(), images[:1], ball)
        assert bool(refused) == (not name.startswith(("sparse-rs", "corner"))), name
        assert not refused or "without gradients" in refused
    assert named(CASCADE).refuses(Hard(), images[:1], ball)
    batch = batch_of(images, Hard()(images).argmax(1))
    assert all(lost.lost_to == "sparse-rs" for lost in asked(named("sparse-rs-200"), Hard(), batch, ball))


# the cascade


def test_a_cascade_leaves_no_more_than_any_of_its_stages(small):
    """It loses exactly what some stage loses alone, and says which was the first."""
    model, batch = small
    for ball in (SparseBall(1), SparseBall(2), SparseBall(1, unit="row"), SparseBall(1, unit="patch", side=2)):
        alone = [asked(named(name), model, batch, ball) for name in PARTS]
        together = asked(named(CASCADE), model, batch, ball)
        for row, lost in enumerate(together):
            breakers = [found[row] for found in alone if found[row].lost_to]
            assert lost.lost_to == (breakers[0].lost_to if breakers else None)
            assert not breakers or lost.details["change"] == breakers[0].details["change"]
            assert not lost.unconfirmed
        assert 0 < sum(lost.lost_to is not None for lost in together)
    counts = {name: sum(lost.lost_to == name for lost in asked(named(CASCADE), model, batch, SparseBall(1)))
              for name in ("spgd-u", "spgd-p", "sparse-rs", None)}  # fmt: skip
    assert counts["spgd-u"] and counts["sparse-rs"] and counts[None]  # or this test shows little


@pytest.mark.parametrize("unit", ["pixel", "feature", "row", "column", "patch"])
@pytest.mark.parametrize("name", [CASCADE, "pgd0-5", "saif-5", "sigma-zero-20", "sparse-rs-large-20"])
def test_what_is_kept_rebuilds_a_counterexample_of_the_set(name, unit, small):
    model, batch = small
    ball = SparseBall(2, unit=unit, side=2 if unit == "patch" else 1)
    found = asked(named(name), model, batch, ball)
    broken = [row for row, lost in enumerate(found) if lost.lost_to]
    assert len(broken) > 3
    for row in broken:
        details = json.loads(json.dumps(dict(found[row].details)))
        point = rebuilt(ball, batch.images[row], details["change"])[None]
        image, label = batch.images[row][None], int(batch.labels[row])
        assert point.min() >= 0 and point.max() <= 1
        moved = (point != image)[0]
        if unit == "pixel":
            moved = moved.any(0).sum()
        elif unit == "feature":
            moved = moved.sum()
        elif unit == "patch":
            moved = moved.any(0).reshape(3, 2, 3, 2).any(3).any(1).sum()
        else:
            moved = moved.any(0).any(1 if unit == "row" else 0).sum()
        assert 1 <= int(moved) == details["changed"] <= 2
        logits = model(point)[0]
        assert not logits[label] > logits[torch.arange(5) != label].max()
        at = details.get("found_at", -1)  # what sigma-zero found with more units may do with k as well
        assert type(at) is int and (at >= 0 or name == "sigma-zero-20")


@pytest.mark.parametrize("ball", [SparseBall(1), SparseBall(1, unit="feature"), SparseBall(1, unit="column"),
                                  SparseBall(1, unit="patch", side=3)], ids=lambda ball: ball.unit)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_are_rebuilt_bit_for_bit(ball, dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 6, 9, generator=generator, dtype=dtype)
    for share in (0.0, 0.02, 0.5, 1.0):
        other = torch.rand(3, 6, 9, generator=generator, dtype=dtype)
        other.flatten()[:3] = torch.tensor([1 / 3, torch.finfo(dtype).tiny / 4, 1 - torch.finfo(dtype).eps / 2])
        point = torch.where(torch.rand(3, 6, 9, generator=generator) < share, other, image)
        kept, before = json.loads(json.dumps(change_of(ball, image, point))), image.clone()
        found = rebuilt(ball, image, kept)
        assert found.dtype == dtype and torch.equal(found, point) and torch.equal(image, before)
        assert len(kept) == int(ball.changed(image[None], point[None]))
    vector = torch.rand(7, generator=generator)
    assert torch.equal(rebuilt(SparseBall(1), vector, change_of(SparseBall(1), vector, vector.flip(0))), vector.flip(0))


@pytest.mark.parametrize("change", [[[54, [0.0] * 3]], [[-1, [0.0] * 3]], [[0, [0.0]]], [[0.0, [0.0] * 3]], [[0]]])
def test_changes_that_such_an_image_cannot_have_are_refused(change):
    with pytest.raises(InputError, match=r"change: found .*; accepted: \[unit, values\], a unit below 54 and 3 values"):
        rebuilt(SparseBall(1), torch.rand(3, 6, 9), change)


# replay


@dataclass(frozen=True)
class Planted:
    """Stands for an attack; returns what it is told and remembers whom it saw. Not one of ``Attack.members()``."""

    make: Callable[[Tensor], Tensor]
    trace: Mapping[str, int] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    balls: ClassVar = (SparseBall,)
    takes_gradients: ClassVar = False

    def check_ball(self, ball: PerturbationSet, where: str) -> None:
        pass

    def __call__(self, model: nn.Module, batch: Batch, ball: PerturbationSet, step: Step) -> AttackResult:
        assert torch.equal(step.noise.positions, batch.index)
        self.seen.extend(batch.index.tolist())
        trace = {name: torch.full_like(batch.labels, value) for name, value in self.trace.items()}
        return AttackResult(self.make(batch.images), trace)


class Dark(nn.Module):
    """Class 0 where less than three pixels of an image are bright; class 1 has the rest, and what is no number."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x > 0.5).float().flatten(1).sum(1)
        return torch.stack([3 - bright, bright * 0], 1)


def bright(pixels: int, value: float = 1.0) -> Callable[[Tensor], Tensor]:
    def make(images: Tensor) -> Tensor:
        points = images.clone()
        points.flatten(1)[:, :pixels] = value
        return points

    return make


def planted(*stages: Planted) -> Searching:
    return Searching("planted", tuple((f"stage {number}", stage) for number, stage in enumerate(stages)))  # type: ignore[arg-type]


DARK = batch_of(torch.full((3, 1, 2, 4), 0.25), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "trace", "expected"),
    [
        (bright(4), {"found_at": 0}, Outcome(None, ("stage 0",))),  # wrong, but four pixels of three
        (bright(4), {}, Outcome(None, ("stage 0",))),
        (bright(3, 1.5), {"found_at": 2}, Outcome(None, ("stage 0",))),  # outside the box
        (bright(3, torch.nan), {"found_at": 2}, Outcome(None, ("stage 0",))),
        (bright(2), {"found_at": 2}, Outcome(None, ("stage 0",))),  # in the set, and right
        (bright(2), {"found_at": -1}, Outcome()),
        (bright(2), {}, Outcome()),
        (bright(3), {"found_at": 7}, Outcome("stage 0", (), {"found_at": 7, "changed": 3})),
        (bright(3), {"found_at": -1}, Outcome("stage 0", (), {"changed": 3})),  # a counterexample, whatever it says
        (bright(3), {"queries": 9}, Outcome("stage 0", (), {"queries": 9, "changed": 3})),
        (bright(2), {"queries": 9}, Outcome(None, (), {"queries": 9})),
    ],
)
def test_only_counterexamples_of_the_set_count(make, trace, expected):
    for lost in asked(planted(Planted(make, trace)), Dark(), DARK, SparseBall(3)):
        change = lost.details.get("change")
        assert (
            Outcome(lost.lost_to, lost.unconfirmed, {k: v for k, v in lost.details.items() if k != "change"})
            == expected
        )
        assert change == ([[0, [1.0]], [1, [1.0]], [2, [1.0]]] if expected.lost_to else None)


def test_survivors_only_shrink_and_a_lie_keeps_nobody_away():
    first = Planted(lambda x: bright(4)(x), {"found_at": 0, "queries": 5})
    second = Planted(lambda x: torch.cat([bright(3)(x[:1]), x[1:]]), {"queries": 2})
    third = Planted(lambda x: torch.cat([x[:1], bright(3)(x[1:])]))
    fourth, fifth = Planted(bright(3)), Planted(bright(3))
    found = asked(planted(first, second, third, fourth, fifth), Dark(), DARK, SparseBall(3))
    assert (first.seen, second.seen, third.seen, fourth.seen, fifth.seen) == ([0, 1, 2], [0, 1, 2], [1, 2], [1], [])
    assert [lost.lost_to for lost in found] == ["stage 1", "stage 3", "stage 2"]
    assert all(lost.unconfirmed == ("stage 0",) and lost.details["queries"] == 7 for lost in found)


def test_of_no_images_and_at_k_0_nothing_is_lost(small):
    model, batch = small
    for name in (*NAMES, CASCADE):
        short = name.replace("100", "3").replace("200", "3").replace("30", "3")
        if name != CASCADE:
            assert [lost.lost_to for lost in asked(named(short), model, batch.part(slice(0, 6)), SparseBall(0))] == [
                None
            ] * 6
        assert asked(named(short), model, batch.part(slice(0, 0)), SparseBall(2)) == []
    assert asked(Relaxations(), model, batch.part(slice(0, 0)), SparseBall(2)) == []
    assert asked(Relaxations(), model, batch.part(slice(0, 6)), SparseBall(0)) == [Outcome()] * 6


# bounds


def linear(classes: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network, and 80 images that it has right."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(2 * 12, classes).requires_grad_(False)
        model, toward = nn.Sequential(nn.Flatten(), layer), layer.weight - layer.weight.mean(0)
        layer.bias.copy_(-toward.sum(1) / 2)  # nothing is preferred at grey
        signs = toward.sign()[torch.arange(80) % classes].reshape(80, 2, 1, 12)
        images = 0.5 + signs * torch.rand(80, 1, 1, 1) * (0.2 + 0.3 * torch.rand(80, 2, 1, 12))
    return model, images, model(images).argmax(1)


def least_margins(model: nn.Module, images: Tensor, labels: Tensor, k: int) -> Tensor:
    """(B,) of the label's lead: over every choice of k pixels, every corner of them."""
    margins = torch.full((len(images),), torch.inf)
    for places in itertools.combinations(range(12), k):
        for corner in itertools.product((0.0, 1.0), repeat=2 * k):
            points = images.clone()
            points[:, :, 0, list(places)] = torch.tensor(corner).reshape(2, k)
            logits = model(points)
            own = logits.gather(1, labels[:, None])[:, 0]
            margins = torch.minimum(margins, own - logits.scatter(1, labels[:, None], -torch.inf).amax(1))
    return margins


@pytest.mark.parametrize("k", [1, 2])
def test_linear_networks_are_broken_and_proved_exactly_where_they_can_be(k):
    model, images, labels = linear()
    least, ball = least_margins(model, images, labels, k), SparseBall(k)
    clear = least.abs() > 1e-5
    batch = batch_of(images[clear], labels[clear])
    breakable = (least[clear] < 0).tolist()
    assert 5 < sum(breakable) < len(breakable) - 5
    assert [lost.lost_to is not None for lost in asked(Relaxations(), model, batch, ball)] == breakable
    assert [lost.lost_to is not None for lost in asked(named("corner-search"), model, batch, ball)] == breakable
    found = [lost.lost_to is not None for lost in asked(named("sparse-autoattack-60-300"), model, batch, ball)]
    assert found == breakable


def test_relaxations_certify_where_intervals_know_nothing_and_never_less(small):
    _, batch = small
    with torch.no_grad():
        first = nn.Conv2d(2, 4, 3)
        first.weight.mul_(0.2)
        narrow = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        batch = batch_of(batch.images, narrow(batch.images).argmax(1))
    proved = {}
    for k in (1, 9):
        for adversary in (Intervals(), Relaxations()):
            lost = asked(adversary, narrow, batch, SparseBall(k))
            proved[adversary.name, k] = {row for row, found in enumerate(lost) if found.lost_to is None}
        assert proved["ibp", k] <= proved["crown", k]
    assert proved["crown", 1] > proved["ibp", 1]
    broken = {
        row for row, lost in enumerate(asked(named("corner-search"), narrow, batch, SparseBall(1))) if lost.lost_to
    }
    assert not proved["crown", 1] & broken


# files


def question(
    model: nn.Module, batch: Batch, name: str = CASCADE, size: int = 8, k: int = 1, wrong=()
) -> AdversaryQuestion:
    labels = batch.labels.clone()
    labels[list(wrong)] = (labels[list(wrong)] + 1) % 5
    split = Split(batch.images, labels, 1)
    basis, versions = {"weights": "a", "data": "b"}, {"torch": "1"}
    return AdversaryQuestion(model, split, SparseBall(k), named(name), 0, size, basis, versions)


def without_times(lines) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_neither_batch_size_nor_order_changes_a_line(small, tmp_path):
    model, batch = small
    found = []
    for size in (7, 64):
        asked_so, file = question(model, batch, size=size, wrong=(3, 20)), JsonLines(tmp_path / f"{size}.jsonl")
        lines = Ledger(file).ask(asked_so, range(50), quiet=True)
        found.append(without_times(lines))
    assert found[0] == found[1]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    (shuffled,) = question(model, batch, wrong=(3, 20)).answer(order)
    assert without_times(sorted(shuffled, key=lambda line: line["index"])) == [
        {**line, "settings": shuffled[0]["settings"]} for line in found[0]
    ]
    assert {line["lost_to"] for line in found[0]} >= {"clean", "spgd-u", "sparse-rs", None}


def test_a_killed_evaluation_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    model, batch = small
    whole, file = JsonLines(tmp_path / "whole.jsonl"), JsonLines(tmp_path / "file.jsonl")
    Ledger(whole).ask(question(model, batch), range(40), quiet=True)
    call, calls = Searching.__call__, []

    def killed(self, *rest):
        calls.append(rest[1].index.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *rest)

    monkeypatch.setattr(Searching, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        Ledger(file).ask(question(model, batch), range(40), quiet=True)
    assert len(list(file)) == 1 + 16
    Ledger(file).ask(question(model, batch), range(40), quiet=True)
    assert calls[3][0] == 16 and without_times(file) == without_times(whole)


@pytest.mark.parametrize("spoil", [{"changed": "2"}, {"change": 3}, {"queries": 1.5}, {"found_at": None}])
def test_a_file_that_was_tampered_with_is_refused(spoil, small, tmp_path):
    model, batch = small
    file = JsonLines(tmp_path / "file.jsonl")
    Ledger(file).ask(question(model, batch), range(8), quiet=True)
    lines = list(file)
    file.rewrite([*lines[:3], {**lines[3], **spoil}, *lines[4:]])
    with pytest.raises(InputError, match=rf"file\.jsonl, line 4: found {next(iter(spoil))} .*; accepted: "):
        Ledger(file).ask(question(model, batch), range(8), quiet=True)


def test_lines_without_details_are_read(small, tmp_path, monkeypatch):
    model, batch = small
    file = JsonLines(tmp_path / "file.jsonl")
    Ledger(file).ask(question(model, batch), range(8), quiet=True)
    extra = ("queries", "found_at", "changed", "change")
    bare = [{key: value for key, value in line.items() if key not in extra} for line in file]
    assert bare != list(file)
    file.rewrite(bare)
    monkeypatch.setattr(Searching, "__call__", None)
    assert Ledger(file).ask(question(model, batch), range(8), quiet=True) == bare[1:]


# a run


TINY = {"model.type": "Mlp", "model.hidden": "[16]", "training.epochs": "6", "training.schedule.length": "1",
        "perturbation": "{type: SparseBall, k: 2}", "certify.enabled": "false", "export.enabled": "false",
        "loss": "{type: PgdAt, attack: {type: SparsePgd, steps: 1}}", "threads": "1"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    config = load_config(ROOT / "configs" / "smoke.yaml", TINY)
    return certtrain.train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).path


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunFolder:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path("run"))


def test_a_run_gets_one_table_and_keeps_every_image(run):
    attacks = (CASCADE, *PARTS, "corner-search", "crown")
    found = certtrain.evaluate("run", attacks=attacks, epsilons=(1, 2), images=40, quiet=True)
    assert found == json.loads(run.evaluation.read_text()) and found["perturbation"] == "SparseBall"
    rows = {(row["attack"], row["epsilon"]): row for row in found["rows"]}
    assert [key for key in rows][:3] == [("clean", 0.0), ("ibp", 1), ("crown", 1)] and len(rows) == 1 + 2 * 7
    model, config = load_model("run")
    test = config.data.load().test
    for k in (1, 2):
        ball = SparseBall(k)
        lines = {name: [line for line in run.evaluated("last", name, k) if "index" in line]
                 for name in ("ibp", *attacks)}  # fmt: skip
        robust = {name: {line["index"] for line in some if line["robust"]} for name, some in lines.items()}
        assert robust[CASCADE] == robust[PARTS[0]] & robust[PARTS[1]] & robust[PARTS[2]]
        assert robust["ibp"] <= robust["crown"] <= robust[CASCADE] & robust["corner-search"]
        row = rows[CASCADE, k]
        assert list(row["stages"]) == ["spgd-u", "spgd-p", "sparse-rs"]
        shares = [rows["clean", 0.0]["accuracy"], *row["stages"].values()]
        assert shares == sorted(shares, reverse=True) and shares[-1] == row["accuracy"]
        lost = [row["lost_to"].get(name, 0) / 40 for name in row["stages"]]
        assert [a - b for a, b in itertools.pairwise(shares)] == pytest.approx(lost)
        broken = [line for line in lines[CASCADE] if line["lost_to"] not in (None, "clean")]
        assert row["changed"]["mean"] == pytest.approx(sum(line["changed"] for line in broken) / len(broken))
        assert row["changed"]["max"] == max(line["changed"] for line in broken) <= k
        searched = [line["queries"] for line in lines["sparse-rs-30"] if "queries" in line]
        assert len(searched) == rows["clean", 0.0]["correct"] and max(searched) == 31
        assert rows["sparse-rs-30", k]["queries"] == pytest.approx(sum(searched) / len(searched))
        assert "stages" not in rows["spgd-u-8", k] and "queries" not in rows["spgd-u-8", k]
        for line in broken:
            image = test.pixels(torch.tensor([line["index"]]))
            point = rebuilt(ball, image[0], line["change"])[None]
            assert bool(ball.contains(image, point)) and int((point != image).sum()) == line["changed"] <= k
            logits = model(point)[0]
            others = logits[torch.arange(10) != line["label"]]
            assert not logits[line["label"]] > others.max()
    settings = rows[CASCADE, 2]["settings"]
    assert settings["seed"] == 0 and settings["stages"]["sparse-rs"]["queries"] == 30
    again = certtrain.evaluate("run", attacks=[CASCADE], epsilons=[2.0], images=40, quiet=True)
    assert len(again["rows"]) == len(found["rows"])


def test_a_certificate_that_an_attack_refutes_is_never_silent(run, monkeypatch):
    monkeypatch.setattr(Relaxations, "__call__", lambda self, model, batch, ball, step: [Outcome()] * len(batch))
    with pytest.raises(RuntimeError, match=r"last, spgd-u-8, k 5: CROWN certifies the test images \[\d+[\d, ]*\]"):
        certtrain.evaluate("run", attacks=["spgd-u-8", "crown"], epsilons=[5], images=20, quiet=True)
    assert not run.evaluation.exists()


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


class Sorted(nn.Module):
    """No bound rule knows it."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1).sort(1).values)


@pytest.mark.parametrize(
    ("model", "attack", "found"), [(Sorted(), "crown", "no bound rule"), (Hard(), CASCADE, "without gradients")]
)
def test_what_a_network_does_not_allow_is_refused_before_anything_is_written(model, attack, found, run):
    split, before = Split(torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64), 1), everything_in(run.path)
    settings = Evaluate(attacks=(attack,))
    evaluation = Evaluation(run, split, SparseBall(1), settings, 0, "data", {})
    with pytest.raises(InputError, match=f"{attack}: .*{found}"):
        evaluation.run([Checkpoint("last", model, run.weights_sha256())], range(6), quiet=True)
    assert everything_in(run.path) == before
    with pytest.raises(InputError, match=f"{attack}: .*{found}"):
        settings.check_ball(SparseBall(1), torch.rand(1, 1, 2, 2), model.train())
    assert model.training


WORDS = {
    "attack of norms": (["--attacks", "pgd-20"], ["pgd-20: found a SparseBall", "sparse-autoattack"]),
    "the recipe's default": ([], ["pgd-20: found a SparseBall"]),
    "AutoAttack": (["--attacks", "autoattack"], ["autoattack: found a SparseBall", "sparse-autoattack"]),
    "no queries": (["--attacks", "sparse-rs-0"], ["'sparse-rs-0'", "sparse-rs-QUERIES"]),
    "half a name": (["--attacks", "sparse-autoattack-100"], ["'sparse-autoattack-100'", "-STEPS-QUERIES"]),
    "k not whole": (["--attacks", "crown", "--epsilons", "2.5"], ["evaluate.epsilons: found 2.5", "whole number"]),
    "k as a radius": (["--attacks", "crown", "--epsilons", "8/255"], ["evaluate.epsilons", "whole number of pixels"]),
    "k negative": (["--attacks", "crown", "--epsilons", "-1"], ["evaluate.epsilons", "-1"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_bad_input_is_one_line(name, run, capsys):
    words, mentions = WORDS[name]
    before = everything_in(run.path)
    assert main(["evaluate", "run", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "accepted" in said
    assert all(mention in said for mention in mentions)
    assert everything_in(run.path) == before


def test_the_command_says_k_stages_and_pixels(run, capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 200)  # which it has read from its terminal, if any, long ago
    words = ["evaluate", "run", "--attacks", f"{CASCADE},spgd-u-8", "--epsilons", "3,1000", "--images", "20"]
    assert main(words) == 0
    said = capsys.readouterr().out
    row = json.loads(run.evaluation.read_text())["rows"][2]
    assert row["attack"] == CASCADE and row["epsilon"] == 3
    (line,) = [line for line in said.splitlines() if CASCADE in line and " 3 │" in line]
    way = ", ".join(f"{100 * share:.2f} % after {name}" for name, share in row["stages"].items())
    assert f"last, {CASCADE}, k 3: {way}\n" in said
    assert f"{row['changed']['mean']:.1f}" in line and " k " in said and "epsilon" not in said
    assert said.count("k: found 1000, of images with 64 pixels: it means all of them") == 1
    assert f"{CASCADE}, k 3: " in said and " after sparse-rs)" in said
    assert {path.name for path in (run.path / "evaluation").iterdir()} >= {
        f"last-{CASCADE}-3.jsonl",
        "last-ibp-3.jsonl",
    }


def test_a_k_above_the_number_of_pixels_is_said_once_of_each(tmp_path, capsys):
    more = {"perturbation": "{type: SparseBall, k: 70}", "training.epochs": "1", "evaluate.enabled": "true",
            "evaluate.attacks": "[]", "evaluate.epsilons": "[70, 64, 80]", "evaluate.images": "4"}  # fmt: skip
    certtrain.train(load_config(ROOT / "configs" / "smoke.yaml", TINY | more), tmp_path / "run")
    said = capsys.readouterr().out
    assert [said.count(f"k: found {k}, of images with 64 pixels") for k in (70, 64, 80)] == [1, 0, 1]
    certtrain.evaluate(tmp_path / "run")
    said = capsys.readouterr().out
    assert [said.count(f"k: found {k}, of images with 64 pixels") for k in (70, 64, 80)] == [1, 0, 1]
    certtrain.evaluate(tmp_path / "run", quiet=True)
    assert not capsys.readouterr().out


# a study


def test_a_study_shows_sparse_rows(tmp_path):
    recipe = {name: value for name, value in load_recipe().items() if name != "name"}
    study = {
        "name": "sparse", "base": recipe, "seeds": [0], "robustness": CASCADE,
        "evaluate": {"attacks": [CASCADE, "crown"], "epsilons": [1, 2], "images": 20},
        "rows": [{"name": "sAT"}, {"name": "clean k", "sweep": {"perturbation.k": [1]}}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    found = compare(tmp_path / "study.yaml", out=tmp_path / "out", quiet=True)
    table = found.table.read_text()
    heading = table.splitlines()[0]
    for k in (1, 2):
        assert f"| {CASCADE}, k {k} |" in heading and f"| certified by CROWN, k {k} |" in heading
    assert heading.index("certified by CROWN, k 1") > heading.index(f"{CASCADE}, k 2")
    row = next(line for line in table.splitlines() if line.startswith("| sAT |")).split(" | ")
    evaluation = json.loads((tmp_path / "out" / "sat-seed0" / "evaluation.json").read_text())
    (accuracy,) = [row["accuracy"] for row in evaluation["rows"] if (row["attack"], row["epsilon"]) == (CASCADE, 2)]
    assert f"{100 * accuracy:.2f}" in row
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"figure.png", "figure-epsilon.png", "table.csv"}
    assert set(itertools.chain(*(seeds.values() for seeds in found.stages().values()))) == {"evaluated"}


def load_recipe() -> dict:
    return {
        "name": "tiny", "threads": 1, "data": {"type": "Digits"}, "model": {"type": "Mlp", "hidden": [16]},
        "perturbation": {"type": "SparseBall", "k": 2}, "certify": {"enabled": False}, "export": {"enabled": False},
        "loss": {"type": "PgdAt", "attack": {"type": "SparsePgd", "steps": 1}},
        "training": {"epochs": 2, "milestones": [], "schedule": {"type": "Linear", "start": 1, "length": 0},
                     "epsilon_multiplier": 1.0},
    }  # fmt: skip


def test_planted_attacks_are_none_of_ours():
    assert "Planted" not in Attack.members()
