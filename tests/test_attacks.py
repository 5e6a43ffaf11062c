"""What the frame guarantees of every attack, whatever it proposes; then PGD."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from attack_cases import ATTACKS, quick
from torch import nn
from walking import pairs, walk

from certtrain.attacks import Attack, AttackResult, Pgd
from certtrain.bounds import L2Ball, LinfBall, NormBall, PerturbationSet, SparseBall
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step

BALLS = [cls(0.15) for cls in NormBall.members().values() if cls.__module__.startswith("certtrain.")]
BALLS += [SparseBall(4), SparseBall(7, unit="feature"), SparseBall(1, unit="row"), SparseBall(2, unit="patch", side=3)]
SIZES = {NormBall: (0.0, 1e-3, 8 / 255, 0.15, 2.0), SparseBall: (0, 1, 3, 30, 1000)}
MODES = ("eval", "train", "batch")

every_attack = pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)


def knows(kind, ball) -> bool:
    try:
        kind().check_ball(ball)
    except InputError:
        return False
    return True


PAIRS = [(kind, ball) for kind in ATTACKS for ball in BALLS if knows(kind, ball)]
every_pair = pytest.mark.parametrize(
    ("kind", "ball"), PAIRS, ids=lambda part: part.__name__ if isinstance(part, type) else name_of(part)
)
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: name_of(ball))
NORM_BALLS = [ball for ball in BALLS if isinstance(ball, NormBall)]
every_norm = pytest.mark.parametrize("ball", NORM_BALLS, ids=lambda ball: name_of(ball))


def name_of(ball: PerturbationSet) -> str:
    return f"{type(ball).__name__}-{ball.unit}" if isinstance(ball, SparseBall) else type(ball).__name__


def home_of(kind) -> PerturbationSet:
    """A set that the attack knows."""
    return LinfBall(0.1) if knows(kind, LinfBall(0.1)) else SparseBall(4)


def make_model(dtype=torch.float64) -> nn.Module:
    """A net with buffers, dropout, a frozen layer, a part in evaluation mode and gradients already there."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
        nn.Linear(144, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Tanh(), nn.Linear(12, 4),
    ).to(dtype)  # fmt: skip
    model.train()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[8].weight.grad = torch.ones_like(model[8].weight)
    for norm in (model[1], model[5]):
        norm.running_mean.uniform_(-0.1, 0.1), norm.running_var.uniform_(0.5, 2)
    return model


def make_batch(count=9, dtype=torch.float64) -> Batch:
    torch.manual_seed(1)
    images = torch.rand(count, 1, 6, 6, dtype=dtype)
    images[images < 0.1], images[images > 0.9] = 0.0, 1.0
    return Batch(images, torch.arange(count) % 4, 100 + torch.arange(count))


def attack_with(attack, ball, *, model=None, batch=None, key=5) -> torch.Tensor:
    model = make_model() if model is None else model
    batch = make_batch() if batch is None else batch
    return attack(model, batch, ball, Step.evaluation(ball, Noise(key, batch.index))).images


def snapshot(model, buffers=True):
    values = {name: value.clone() for name, value in model.named_parameters()}
    values |= {name: value.clone() for name, value in model.named_buffers()} if buffers else {}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return values, grads, flags, [module.training for module in model.modules()]


def assert_untouched(model, before, buffers=True):
    values, grads, flags, modes = snapshot(model, buffers)
    for name, value in before[0].items():
        assert torch.equal(values[name], value), name
    for name, grad in before[1].items():
        assert (grads[name] is None) == (grad is None) and (grad is None or torch.equal(grads[name], grad)), name
    assert flags == before[2] and modes == before[3]


def assert_inside(ball, images, found):
    """In the set, in its hull and in [0, 1]; for a box bit for bit."""
    assert found.shape == images.shape and found.dtype == images.dtype
    assert not found.requires_grad and torch.isfinite(found).all()
    assert (found >= 0).all() and (found <= 1).all()
    assert ball.hull(images).contains(found).all()
    assert ball.contains(images, found).all()
    if isinstance(ball, LinfBall):
        lower, upper = (images - ball.epsilon).clamp(min=0), (images + ball.epsilon).clamp(max=1)
        assert (lower <= found).all() and (found <= upper).all()


@dataclass(frozen=True)
class Rogue(Attack):
    """Proposes garbage, and handles the model badly."""

    value: float = 9.0

    def propose(self, model, batch, ball, step):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.train(not model.training)
        images = batch.images.clone().requires_grad_()
        images = images + model(images).sum()
        images = torch.where(torch.rand(images.shape) < 0.5, images * 0 + self.value, images)
        return AttackResult(images, {"loss": torch.ones(len(batch))})


@dataclass(frozen=True)
class Raising(Attack):
    def propose(self, model, batch, ball, step):
        model(batch.images)
        model.eval()
        raise ArithmeticError("no more")


@dataclass(frozen=True)
class Wide(Attack):
    """Declares twice the ball, and proposes its upper corner."""

    def allowed(self, ball):
        return ball.scaled(2.0)

    def propose(self, model, batch, ball, step):
        return AttackResult(batch.images + 2 * ball.epsilon)


class TestFrame:
    @every_pair
    @walk("dtype", [torch.float32, torch.float64], ids=str)
    def test_the_result_lies_in_the_ball(self, kind, ball, dtype):
        batch = make_batch(dtype=dtype)
        sizes = SIZES[NormBall if isinstance(ball, NormBall) else SparseBall]
        for epsilon in sizes if dtype is torch.float32 else sizes[2:3]:
            around = ball.with_epsilon(min(epsilon, ball.largest_radius) if isinstance(ball, NormBall) else epsilon)
            found = attack_with(quick(kind), around, model=make_model(dtype), batch=batch)
            assert_inside(around, batch.images, found)
            if epsilon == 0:
                assert torch.equal(found, batch.images)

    @every_attack
    @walk("mode", [*MODES, "clean"])
    def test_the_model_is_left_as_it_was(self, kind, mode):
        model = make_model()
        before = snapshot(model, buffers=mode != "train")
        attack_with(quick(kind, attack_mode=mode), home_of(kind), model=model)
        assert_untouched(model, before, buffers=mode != "train")

    @every_attack
    def test_train_mode_moves_the_running_statistics(self, kind):
        model = make_model()
        attack_with(quick(kind, attack_mode="train"), home_of(kind), model=model)
        assert model[5].num_batches_tracked > 0

    @pytest.mark.parametrize("mode", [*MODES, "clean"])
    def test_the_model_is_left_as_it_was_when_the_attack_raises(self, mode):
        model = make_model()
        before = snapshot(model, buffers=mode != "train")
        with pytest.raises(ArithmeticError):
            attack_with(Raising(attack_mode=mode), LinfBall(0.1), model=model)
        assert_untouched(model, before, buffers=mode != "train")

    @every_attack
    def test_the_model_sees_the_mode_that_was_asked_for(self, kind):
        for mode in MODES:
            seen = []
            model = make_model()
            hooks = [m.register_forward_hook(lambda module, *_: seen.append(module.training)) for m in model]  # noqa: B023
            attack_with(quick(kind, attack_mode=mode), home_of(kind), model=model)
            assert len(seen) >= len(hooks) and set(seen) == {mode != "eval"}

    @every_attack
    def test_an_empty_batch(self, kind):
        model = make_model()
        before = snapshot(model)
        found = attack_with(quick(kind), home_of(kind), model=model, batch=make_batch().part(slice(0, 0)))
        assert found.shape == (0, 1, 6, 6)
        assert_untouched(model, before)

    @every_attack
    def test_under_no_grad(self, kind):
        expected = attack_with(quick(kind), home_of(kind))
        with torch.no_grad():
            assert torch.equal(attack_with(quick(kind), home_of(kind)), expected)
            assert not torch.is_grad_enabled()

    @every_attack
    def test_images_that_take_gradients_yield_none(self, kind):
        batch = make_batch()
        watched = replace(batch, images=batch.images.clone().requires_grad_())
        found = attack_with(quick(kind), home_of(kind), batch=watched)
        assert not found.requires_grad and watched.images.grad is None
        assert torch.equal(found, attack_with(quick(kind), home_of(kind), batch=batch))
        assert not attack_with(quick(kind), home_of(kind), batch=watched.part(slice(0, 0))).requires_grad

    @every_pair
    def test_keyed_whatever_the_batch(self, kind, ball):
        attack, batch = quick(kind), make_batch()
        whole = attack_with(attack, ball)
        torch.rand(5)
        assert torch.equal(attack_with(attack, ball), whole)
        for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
            torch.testing.assert_close(attack_with(attack, ball, batch=batch.part(rows)), whole[rows])
        order = torch.tensor([3, 8, 0, 5, 1, 2, 4, 7, 6])
        shuffled = Batch(batch.images[order], batch.labels[order], batch.index[order])
        torch.testing.assert_close(attack_with(attack, ball, batch=shuffled), whole[order])

    @every_ball
    @walk("value", [9.0, -9.0, 1e30, float("inf"), float("-inf"), float("nan")], ids=str)
    def test_garbage_is_brought_back_into_the_ball(self, ball, value):
        batch, model = make_batch(), make_model()
        before = snapshot(model, buffers=False)
        found = attack_with(Rogue(value=value), ball, model=model, batch=batch)
        assert_inside(ball, batch.images, found)
        assert_untouched(model, before, buffers=False)

    @pytest.mark.parametrize("epsilon", [1e-3, 8 / 255, 0.5])
    @every_norm
    def test_no_rounding_leads_out_of_the_ball(self, ball, epsilon):
        """Many images: one in a hundred is enough."""
        batch = make_batch(300, dtype=torch.float32)
        found = attack_with(Rogue(), ball.with_epsilon(epsilon), model=make_model(torch.float32), batch=batch)
        assert_inside(ball.with_epsilon(epsilon), batch.images, found)

    def test_a_wider_set_counts_where_it_is_declared(self):
        batch, ball = make_batch(), LinfBall(0.1)
        found = attack_with(Wide(), ball, batch=batch)
        assert_inside(ball.scaled(2.0), batch.images, found)
        assert torch.equal(found, (batch.images + 0.2).clamp(max=1)) and not ball.contains(batch.images, found).any()

    def test_the_trace_is_what_the_attack_recorded(self):
        batch, ball = make_batch(), LinfBall(0.1)
        step = Step.evaluation(ball, Noise(0, batch.index))
        assert set(Rogue()(make_model(), batch, ball, step).trace) == {"loss"}
        assert not Pgd()(make_model(), batch, ball, step).trace


class Spy(nn.Module):
    """Remembers every point at which the model was asked."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.points: list[torch.Tensor] = []

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.model(x)


def objective(name, logits, labels):
    if name == "cross_entropy":
        return F.cross_entropy(logits, labels, reduction="none")
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def gradient_sign(model, points, labels):
    points = points.clone().requires_grad_()
    loss = F.cross_entropy(model.eval()(points), labels, reduction="sum")
    return torch.autograd.grad(loss, points)[0].sign()


class TestPgd:
    @pytest.mark.parametrize("step_size", [2.0, 10.0])
    @pytest.mark.parametrize("random_start", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_one_large_step_lands_on_the_face_that_the_gradient_points_to(self, step_size, random_start, dtype):
        batch, ball, spy = make_batch(dtype=dtype), LinfBall(0.1), Spy(make_model(dtype))
        attack = Pgd(steps=1, step_size=step_size, random_start=random_start)
        found = attack_with(attack, ball, model=spy, batch=batch)
        assert len(spy.points) == 1
        sign = gradient_sign(spy.model, spy.points[0], batch.labels)
        assert (sign != 0).all()
        lower, upper = (batch.images - 0.1).clamp(min=0), (batch.images + 0.1).clamp(max=1)
        assert torch.equal(found, torch.where(sign > 0, upper, lower))

    def test_where_the_gradient_is_zero_the_start_stays(self):
        batch, ball = make_batch(), LinfBall(0.1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
        nn.init.zeros_(model[1].weight)
        assert torch.equal(attack_with(Pgd(random_start=False), ball, model=model, batch=batch), batch.images)

    def test_the_start_is_uniform_in_the_clipped_box(self):
        batch, ball, spy = make_batch(), LinfBall(0.3), Spy(make_model())
        for key in range(200):
            attack_with(Pgd(), ball, model=spy, batch=batch, key=key)
        starts = torch.stack(spy.points)
        hull = ball.hull(batch.images)
        assert all(ball.contains(batch.images, start).all() for start in spy.points)
        share = (starts - hull.lower) / (2 * hull.radius)
        count = share.numel()
        assert float(share.mean()) == pytest.approx(1 / 2, abs=5 * 0.29 / count**0.5)
        assert float(share.square().mean()) == pytest.approx(1 / 3, abs=5 * 0.3 / count**0.5)

    def test_steps_are_relative_to_the_clipped_half_width_pixel_by_pixel(self):
        batch, ball, spy = make_batch(), LinfBall(0.1), Spy(make_model())
        attack_with(Pgd(steps=2, step_size=0.25, random_start=False), ball, model=spy, batch=batch)
        moved = (spy.points[1] - spy.points[0]).abs()
        inside = (batch.images > 0.1) & (batch.images < 0.9)
        torch.testing.assert_close(moved[inside], torch.full_like(moved[inside], 0.025))
        at_edge = (batch.images == 0) | (batch.images == 1)
        assert at_edge.any()
        sign = gradient_sign(spy.model, spy.points[0], batch.labels)
        inward = at_edge & (sign == torch.where(batch.images == 0, 1, -1))
        torch.testing.assert_close(moved[inward], torch.full_like(moved[inward], 0.0125))
        assert (moved[at_edge & ~inward] == 0).all()

    def test_steps_shrink_at_the_milestones(self):
        batch, ball, spy = make_batch(), LinfBall(0.1), Spy(make_model())
        attack = Pgd(steps=5, step_size=0.1, milestones=(1, 3, 3), decay=0.5, random_start=False)
        attack_with(attack, ball, model=spy, batch=batch)
        inside = (batch.images > 0.1) & (batch.images < 0.9)
        moved = [float((b - a).abs()[inside].max()) for a, b in pairwise(spy.points)]
        assert moved == pytest.approx([0.01, 0.005, 0.005, 0.00125, 0.00125])

    @walk(
        "ball, mode, name, budget",
        pairs(NORM_BALLS, MODES, ["cross_entropy", "margin"], [(7, 1, 0.4), (1, 3, 10.0), (4, 2, 2.0)]),
    )
    def test_several_steps_return_the_best_point_visited(self, ball, mode, name, budget):
        (steps, restarts, size), model = budget, make_model()
        model[6] = nn.Identity()  # dropout would give every visit another objective
        batch, spy = make_batch(), Spy(model)
        attack = Pgd(steps=steps, restarts=restarts, step_size=size, objective=name, attack_mode=mode)
        found = attack_with(attack, ball, model=spy, batch=batch)
        assert len(spy.points) == restarts * (steps + 1)
        model.train(mode != "eval")
        with torch.no_grad():
            visited = torch.stack([objective(name, model(point), batch.labels) for point in spy.points])
        choice = visited.argmax(0)
        rows = torch.arange(len(batch))
        torch.testing.assert_close(found, torch.stack(spy.points)[choice, rows])

    @every_norm
    def test_the_margin_objective_never_drops_a_success(self, ball):
        batch, spy = make_batch(40), Spy(make_model().eval())
        spy.eval()
        around = ball.scaled(3.0)
        found = attack_with(Pgd(steps=6, step_size=1.5, objective="margin"), around, model=spy, batch=batch)
        with torch.no_grad():
            fooled = torch.stack([spy.model(p).argmax(1) != batch.labels for p in spy.points]).any(0)
            assert 0 < fooled.sum() and torch.equal(spy.model(found).argmax(1) != batch.labels, fooled)

    @pytest.mark.parametrize("name", ["cross_entropy", "margin"])
    def test_more_restarts_and_more_steps_never_weaken(self, name):
        batch, model, ball = make_batch(30), make_model().eval(), LinfBall(0.1)
        values = []
        for restarts in (1, 2, 5):
            attack = Pgd(steps=3, step_size=0.7, restarts=restarts, objective=name)
            with torch.no_grad():
                values.append(objective(name, model(attack_with(attack, ball, batch=batch, model=model)), batch.labels))
        assert (values[1] >= values[0]).all() and (values[2] >= values[1]).all()
        assert (values[2] > values[0]).any()

    def test_diversified_starts(self):
        """Of a linear model each is the corner that a random direction of the logits points to, an image's own."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double().eval()
        batch, ball = make_batch(50), LinfBall(0.1)
        hull = ball.hull(batch.images)
        found = attack_with(Pgd(step_size=1e-9, diversified=2), ball, model=model, batch=batch)
        assert torch.allclose((found - hull.center).abs(), hull.radius, atol=1e-8)
        assert len({tuple(row) for row in (found > hull.center).flatten(1).tolist()}) > 40

    def test_diversified_starts_stay_in_the_ball(self):
        torch.manual_seed(0)
        model = make_model().eval()
        ball, batch = LinfBall(0.15), make_batch(40)
        plain, spread = (
            attack_with(Pgd(steps=3, step_size=0.3, restarts=2, diversified=n, objective="margin"), ball, model=model,
                        batch=batch) for n in (0, 2)
        )  # fmt: skip
        assert ball.contains(batch.images, spread).all() and not torch.equal(plain, spread)

    def test_the_image_itself_wins_where_nothing_is_better(self):
        """A kink: every step from the image makes the loss smaller."""
        batch = make_batch()
        batch = replace(batch, images=torch.full_like(batch.images, 0.5), labels=torch.zeros_like(batch.labels))

        class Kink(nn.Module):
            def forward(self, x):
                own = (x - 0.5 + 1e-9).abs().flatten(1).sum(1)
                return torch.stack([own, -own], 1)

        model = Kink()
        found = attack_with(Pgd(steps=3, step_size=0.5, random_start=False), LinfBall(0.1), model=model, batch=batch)
        assert torch.equal(found, batch.images)

    def test_the_l2_ball_is_used_to_its_edge(self):
        batch, model = make_batch(), make_model().eval()
        ball = L2Ball(0.5)
        found = attack_with(Pgd(steps=10, step_size=0.5), ball, batch=batch, model=model)
        length = (found - batch.images).flatten(1).norm(dim=1)
        assert (length <= 0.5 * (1 + 1e-9)).all() and (length > 0.4).all()
        clean = objective("cross_entropy", model(batch.images), batch.labels)
        assert (objective("cross_entropy", model(found), batch.labels) > clean).all()

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("steps", 0),
            ("steps", -1),
            ("step_size", 0.0),
            ("step_size", float("nan")),
            ("restarts", 0),
            ("milestones", (0,)),
            ("decay", 0.0),
            ("decay", 1.5),
        ],
    )
    def test_refuses(self, field, value):
        with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
            Pgd(**{field: value})
