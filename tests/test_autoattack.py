"""AutoAttack by its package: any number of classes, each success replayed, nothing of ours disturbed."""

import logging
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from walking import walk

from certtrain.attacks import in_mode
from certtrain.bounds import L2Ball, LinfBall
from certtrain.evaluation import AutoAttack, Outcome
from certtrain.evaluation.adversary import lead
from certtrain.evaluation.autoattack import replay
from certtrain.noise import Noise
from certtrain.step import Batch, Step

QUICK = AutoAttack("quick", steps=10, queries=20)
SHAPE = (1, 5, 5)
BALLS = {"linf": LinfBall(0.05), "l2": L2Ball(0.15)}


def batch_of(images: Tensor, labels: Tensor) -> Batch:
    return Batch(images, labels, torch.arange(len(labels)))


def step_of(batch: Batch, ball, seed: int = 0) -> Step:
    return Step.evaluation(ball, Noise(seed, batch.index))


def attacked(attack: AutoAttack, model: nn.Module, batch: Batch, ball) -> list[Outcome]:
    with in_mode(model, training=False):
        return attack(model, batch, ball, step_of(batch, ball))


class Linear(nn.Sequential):
    """Its robustness is known in closed form, away from the edges of [0, 1]."""

    def __init__(self, classes: int):
        super().__init__(nn.Flatten(), nn.Linear(25, classes))
        torch.manual_seed(classes)
        self[1].weight.data.normal_()
        self[1].bias.data = -self[1].weight.data.sum(1) / 2  # nothing is preferred at grey

    def images(self, count: int) -> Tensor:
        """(count, 1, 5, 5) in 0.1..0.9: grey, more or less of one class' weights, and noise."""
        generator = torch.Generator().manual_seed(1)
        weight = self[1].weight.detach()
        towards = (weight - weight.mean(0))[torch.arange(count) % len(weight)]
        size = 0.35 * torch.rand(count, 1, generator=generator) / towards.abs().amax(1, keepdim=True)
        noise = 0.05 * (2 * torch.rand(count, 25, generator=generator) - 1)
        return (0.5 + size * towards + noise).reshape(-1, *SHAPE)

    def slack(self, images: Tensor, labels: Tensor, ball) -> Tensor:
        """(B,) of the worst margin under attack, relative to what the ball can take from it."""
        weight, logits = self[1].weight, self(images)
        norm = 1 if isinstance(ball, LinfBall) else 2
        taken = ball.epsilon * (weight[labels][:, None] - weight[None]).norm(norm, dim=2)
        others = torch.arange(len(weight)) != labels[:, None]
        margins = logits.gather(1, labels[:, None]) - logits
        return torch.stack([(margins[row] / taken[row] - 1)[others[row]].min() for row in range(len(labels))])


@walk(
    "classes, kind",
    [(2, "linf"), (2, "l2"), (3, "linf"), (3, "l2"), (4, "l2"), (9, "linf"), (10, "l2"), (12, "linf")],
)
def test_linear_networks_are_broken_exactly_where_they_can_be(classes, kind):
    model, ball = Linear(classes), BALLS[kind]
    images = model.images(400)
    with torch.no_grad():
        labels = model(images).argmax(1)
        slack = model.slack(images, labels, ball)
    safe = (slack > 0.1).nonzero()[:3, 0]
    weak = ((slack < -0.2) & (slack > -0.8)).nonzero()[:5, 0]
    assert len(safe) == 3 and len(weak) == 5
    chosen = torch.cat([safe, weak])
    found = attacked(QUICK, model, batch_of(images[chosen], labels[chosen]), ball)
    assert [lost.lost_to is None for lost in found] == [True] * 3 + [False] * 5
    assert not any(lost.unconfirmed for lost in found)


@pytest.mark.parametrize("classes", [2, 3, 4, 9, 10, 100])
def test_the_plan_has_no_attack_that_so_few_classes_do_not_allow(classes):
    plan = AutoAttack().plan(classes)
    assert plan[0] == "apgd-ce" and plan[-1] == "square"
    assert ("apgd-t" in plan) == (classes > 3) and ("apgd-dlr" in plan) == (classes == 3)
    assert any(name.startswith("fab") for name in plan)
    assert not any(name.startswith("fab") for name in AutoAttack(fab=False).plan(classes))


@pytest.mark.parametrize("kind", BALLS)
def test_with_ten_classes_it_is_the_packages_version_standard(kind):
    from pyautoattack import AutoAttack as Standard

    ball, model, device = BALLS[kind], Linear(10), torch.device("cpu")
    theirs = Standard(model, device=device, eps=ball.epsilon, norm={"linf": "Linf", "l2": "L2"}[kind], seed=7)
    ours = AutoAttack()
    assert list(ours.plan(10)) == theirs.attacks_to_run
    parts = {"apgd-ce": theirs.apgd, "apgd-t": theirs.apgd_targeted, "fab-t": theirs.fab, "square": theirs.square}
    for name, part in parts.items():
        mine, other = vars(ours.build(name, model, ball, 10, device, 7)), vars(part)
        differ = {key for key in mine | other if key not in mine or key not in other or mine[key] != other[key]}
        assert differ <= {"logger", "targeted"}, name  # the package sets `targeted` when it runs
    assert ours.build("fab-t", model, ball, 10, device, 7).targeted


def test_the_flags_are_those_of_the_packages_own_loop(monkeypatch):
    """Small settings on both sides: the same images are broken."""
    from pyautoattack import AutoAttack as Package

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 24), nn.ReLU(), nn.Linear(24, 10)).requires_grad_(False)
    images, ball = torch.rand(8, *SHAPE), LinfBall(0.08)
    labels = model(images).argmax(1)
    batch = batch_of(images, labels)
    seeds = set()
    build = AutoAttack.build

    def spy(self, name, model, ball, classes, device, seed):
        seeds.add(seed)
        return build(self, name, model, ball, classes, device, seed)

    monkeypatch.setattr(AutoAttack, "build", spy)
    found = attacked(QUICK, model, batch, ball)
    (seed,) = seeds
    theirs = Package(model, attacks=list(QUICK.plan(10)), version="custom", eps=ball.epsilon, seed=seed)
    for name, part in (("apgd-ce", "apgd"), ("apgd-t", "apgd_targeted"), ("fab-t", "fab"), ("square", "square")):
        setattr(theirs, part, build(QUICK, name, model, ball, 10, torch.device("cpu"), seed))
    points, _ = theirs.run_standard_evaluation(images, labels, batch_size=8)
    broken = model(points).argmax(1) != labels
    assert [lost.lost_to is not None for lost in found] == broken.tolist()
    assert 0 < broken.sum() < 8


class Normed(nn.Module):
    """Batch norm and dropout: in training mode each call changes the one and draws for the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(27, 10)
        )
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add(self.training)
        return self.layers(x)


def test_it_leaves_everything_as_it_was():
    model, ball = Normed().train(), LinfBall(0.05)
    model.layers[0].weight.requires_grad_(False)
    model.layers[5].eval()
    images = torch.rand(1, *SHAPE)  # a batch of one, which batch norm could not normalise in training mode
    with in_mode(model, training=False), torch.no_grad():
        batch = batch_of(images, model(images).argmax(1))
    model.modes.clear()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random, kept = torch.get_rng_state(), images.clone()

    def tracer(frame, event, argument):
        return None

    earlier = sys.gettrace()
    sys.settrace(tracer)
    try:
        attacked(QUICK, model, batch, ball)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(earlier)
    assert model.modes == {False}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(images, kept)


def test_the_same_call_finds_the_same_points():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 24), nn.ReLU(), nn.Linear(24, 4))
    images, ball = torch.rand(8, *SHAPE), LinfBall(0.06)
    batch = batch_of(images, model(images).argmax(1))
    first = attacked(QUICK, model, batch, ball)
    torch.rand(3)
    assert attacked(QUICK, model, batch, ball) == first


class Misleading(nn.Module):
    """Darker than 0.475 in the mean is wrong; the gradient says the opposite."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        score = 2 * mean.detach() - mean - 0.475
        return torch.stack([score, -score, score - 10, score - 10], 1)


def test_square_finds_what_gradients_hide():
    batch, ball = batch_of(torch.full((2, *SHAPE), 0.51), torch.zeros(2, dtype=torch.int64)), LinfBall(0.1)
    assert attacked(AutoAttack(steps=5, queries=500), Misleading(), batch, ball) == [Outcome("square")] * 2


def test_the_package_says_nothing_of_gradients_that_vanish(caplog, capsys):
    model, images = Linear(4), torch.rand(2, *SHAPE)
    model[1].weight.data.zero_()
    model[1].bias.data = torch.arange(4.0)
    batch = batch_of(images, torch.full((2,), 3))
    with caplog.at_level(logging.DEBUG):
        assert attacked(QUICK, model, batch, LinfBall(0.1)) == [Outcome()] * 2
    assert not caplog.records and capsys.readouterr() == ("", "")


@dataclass
class Liar:
    """An attack of the package's kind that returns what it is told."""

    points: Tensor

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.points[: len(images)].clone()


def lied_to(monkeypatch, ball, model, images, claims) -> list[Outcome]:
    """AutoAttack whose first attack returns ``claims`` and whose others return the images."""
    build = {"apgd-ce": Liar(claims)}

    def pretend(self, name, model, ball, classes, device, seed):
        return build.get(name, Liar(images))

    monkeypatch.setattr(AutoAttack, "build", pretend)
    with torch.no_grad():
        return attacked(QUICK, model, batch_of(images, model(images).argmax(1)), ball)


@pytest.mark.parametrize("kind", BALLS)
@pytest.mark.parametrize("claim", ["outside", "nan", "not an image", "infinite"])
def test_a_success_that_does_not_hold_is_reported_and_does_not_count(kind, claim, monkeypatch):
    model, ball = Linear(4), BALLS[kind]
    with torch.no_grad():
        images = model.images(400)
        labels = model(images).argmax(1)
        safe = model.slack(images, labels, ball) > 0.1  # no point of the ball is wrong
        images, label = images[safe][:1], labels[safe][:1]
    points = {
        "outside": 1 - images, "nan": torch.full_like(images, torch.nan),
        "not an image": images - 500 * model[1].weight.detach()[label].reshape(images.shape),
        "infinite": torch.full_like(images, torch.inf),
    }[claim]  # fmt: skip
    with torch.no_grad():
        assert not (lead(model(points), label) > 0).any()
    assert lied_to(monkeypatch, ball, model, images, points) == [Outcome(None, ("apgd-ce",))]


def test_what_counts_is_the_point_of_the_ball():
    model, ball = Linear(2), LinfBall(0.05)
    model[1].weight.data = torch.stack([torch.ones(25), -torch.ones(25)])
    labels = torch.zeros(1, dtype=torch.int64)
    # margin 2 * sum(x) + bias; the ball takes 2 * 25 * 0.05 = 2.5 of it
    model[1].bias.data = torch.tensor([-25.0 + 2.4, 0.0])  # margin 2.4 at 0.5: broken by the ball's corner
    images = torch.full((1, *SHAPE), 0.5)

    def verdict(found: Tensor) -> list[bool]:
        return [bool(flag) for flag in replay(model, batch_of(images, labels), ball, found)]

    for beyond in (5e-7, 1e-4, 0.3, 2.0):  # wrong there, and at the corner that stands for it
        assert verdict(images - 0.05 - beyond) == [True, True]
    assert verdict(images - 0.04) == [False, False]
    model[1].bias.data = torch.tensor([-25.0 + 2.5 + 1e-5, 0.0])  # held by the corner, lost 5e-7 beyond it
    assert verdict(images - 0.05 - 5e-7) == [True, False]
    half = images - 0.05
    half[..., 0] = torch.nan
    assert verdict(half) == [True, False]


def test_a_point_that_is_wrong_only_inside_the_ball_counts():
    """Right far away and wrong nearby: what was projected is what is asked."""

    class Ring(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            far = (x.flatten(1).mean(1) - 0.5).abs()
            right = (far < 0.02) | (far > 0.2)
            return torch.stack([right.float(), 1 - right.float()], 1)

    batch = batch_of(torch.full((1, *SHAPE), 0.5), torch.zeros(1, dtype=torch.int64))
    claimed, broken = replay(Ring(), batch, LinfBall(0.05), torch.zeros(1, *SHAPE))
    assert (bool(claimed), bool(broken)) == (False, True)


def test_a_lie_does_not_keep_later_attacks_away(monkeypatch):
    model, ball = Linear(4), LinfBall(0.05)
    images = model.images(200)
    with torch.no_grad():
        labels = model(images).argmax(1)
        weak = (model.slack(images, labels, ball) < -0.3).nonzero()[:2, 0]
    build = AutoAttack.build

    def pretend(self, name, *rest):
        return Liar(torch.ones(2, *SHAPE) * torch.nan) if name == "apgd-ce" else build(self, name, *rest)

    monkeypatch.setattr(AutoAttack, "build", pretend)
    found = attacked(QUICK, model, batch_of(images[weak], labels[weak]), ball)
    assert all(lost.lost_to in ("apgd-t", "fab-t", "square") and lost.unconfirmed == ("apgd-ce",) for lost in found)


def test_small_images_are_refused_in_l2():
    images, attack = torch.rand(1, 3, 4, 9), AutoAttack()
    assert "4×9" in attack.refuses(None, images, L2Ball(0.1)) and not attack.refuses(None, images, LinfBall(0.1))
    assert not attack.refuses(None, torch.rand(1, 3, 5, 5), L2Ball(0.1))


def test_at_epsilon_0_right_images_stay_right():
    model, images = Linear(4), torch.rand(3, *SHAPE)
    assert attacked(AutoAttack(), model, batch_of(images, model(images).argmax(1)), LinfBall(0.0)) == [Outcome()] * 3
