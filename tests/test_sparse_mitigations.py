"""Methods against catastrophic overfitting over sparse sets: updates by hand, what they keep, what they refuse."""

import itertools
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from walking import walk

from certtrain.attacks import (
    AttackResult,
    Linearisation,
    Nuclear,
    SparseNuclear,
    SparsePgd,
    SparseTransferred,
    nuclear_norm,
)
from certtrain.bounds import L2Ball, LinfBall, SparseBall
from certtrain.comparison import read_study
from certtrain.config import structure
from certtrain.data import Digits
from certtrain.data.loader import Augment, Loader
from certtrain.errors import InputError
from certtrain.losses import (
    AdversarialTraining,
    Atta,
    FastBat,
    FgsmGa,
    FreeAt,
    Loss,
    Mer,
    NAaer,
    NuAt,
    Qub,
    Trades,
)
from certtrain.models import PreActResNet
from certtrain.noise import Noise, key_of
from certtrain.step import Augmentation, Batch, State, Step
from certtrain.training import Awp, Descend, Lap, Sgd, UpdateRule

ONE = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last")
SAMPLES, SHAPE = 12, (2, 6, 6)
STUDY = Path(__file__).parents[1] / "configs/studies/sparse_mitigations.yaml"

METHODS: dict[str, tuple[Loss, UpdateRule]] = {
    "sAT": (AdversarialTraining(attack=ONE), Descend()),
    "ATTA": (Atta(attack=SparseTransferred()), Descend()),
    "ATTA-TRADES": (Trades(attack=SparseTransferred(steps=2)), Descend()),
    "Free-AT": (FreeAt(replays=2, attack=ONE), Descend()),
    "Free-AT-QUB": (Qub(base=FreeAt(replays=2, attack=replace(ONE, variant="coin"))), Awp(start_epoch=0)),
    "GradAlign": (FgsmGa(attack=ONE, weight=0.2), Descend()),
    "GradAlign-clipped": (FgsmGa(attack=ONE, weight=0.2, detached=False, clipped=True), Descend()),
    "Fast-BAT": (FastBat(attack=ONE, step_size=2.0), Descend()),
    "N-AAER": (NAaer(attack=ONE), Descend()),
    "N-AAER-passed": (NAaer(attack=replace(ONE, steps=3, alpha=0.5), detached=False), Descend()),
    "N-LAP": (AdversarialTraining(attack=ONE), Lap(beta=0.05)),
    "N-LAP-MER": (Mer(base=Trades(attack=ONE)), Lap(beta=0.05, restore=True)),
    "NuAT": (NuAt(weight=3.0, attack=SparseNuclear()), Descend()),
}
BALLS = [SparseBall(4), SparseBall(7, unit="feature"), SparseBall(1, unit="row"), SparseBall(1, unit="patch", side=3)]
every_method = pytest.mark.parametrize("name", METHODS)
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.unit)


def make_model(classes=5, shape=SHAPE) -> nn.Module:
    """No batch norm: what one sample gets does not depend on the others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 9), nn.Tanh(), nn.Linear(9, classes)).double()


def make_batch(count=SAMPLES, shape=SHAPE) -> Batch:
    torch.manual_seed(1)
    images = torch.rand(count, *shape, dtype=torch.float64)
    images[images < 0.15], images[images > 0.85] = 0.0, 1.0
    return Batch(images, torch.arange(count) % 5, torch.arange(count))


def state_of(loss, batch_size, pad=0, shape=SHAPE) -> State:
    """Allocated as the training loop does, but in float64."""
    found = loss.declare_state(shape, 5)
    specs = {n: replace(s, dtype=torch.float64) if s.dtype == torch.float32 else s for n, s in found.items()}
    return State({n: s.allocate(SAMPLES, batch_size, torch.device("cpu"), pad) for n, s in specs.items()}, specs)


def step_of(ball, batch, state=None, epoch=0, number=0) -> Step:
    """As the training loop makes it: k is a 0-d tensor."""
    size = torch.tensor(float(ball.epsilon), dtype=torch.float64)
    noise = Noise(key_of(9, number), torch.arange(len(batch)))
    return Step(ball.with_epsilon(size), size, size, 0.5, noise, state or State(), epoch=epoch, epochs=9)


def visits(epochs, size=5):
    """(epoch, number, index) of shuffled batches, the last of each epoch smaller."""
    number = 0
    for epoch in range(epochs):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(size):
            yield epoch, number, index
            number += 1


def masked(m, k):
    """(…) bool: the k largest, ties to the first; from a stable sort."""
    chosen = torch.zeros(m.numel(), dtype=torch.bool)
    chosen[torch.sort(m.flatten(), descending=True, stable=True).indices[:k]] = True
    return chosen.reshape(m.shape)


def cut(p, x):
    return torch.minimum(torch.maximum(p, -x), 1 - x)


def moved(x, p, m, gradient):
    """sPGD's unprojected update of one image (C, H, W) and its logits (H, W) with alpha = beta = 1, by its formula."""
    sigmoid = torch.sigmoid(m)
    slope = (gradient * p).sum(0) * sigmoid * (1 - sigmoid)
    if float(slope.norm()) >= 2e-10:
        m = m + math.sqrt(m.numel()) * slope / (slope.norm() + 1e-10)
    return cut((p + gradient.sign()).clamp(-1, 1), x), m


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


class Spy(nn.Module):
    """Remembers every point that the network is asked about."""

    def __init__(self, model):
        super().__init__()
        self.model, self.points = model, []

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.model(x)


class TestSteps:
    @every_method
    @every_ball
    @walk("count", [1, 7])
    def test_every_point_lies_in_the_set_and_all_is_finite(self, name, ball, count):
        """Three updates, of which the first one may begin at the images: each moves the weights."""
        (loss, rule), batch = METHODS[name], make_batch(count)
        loss.check_ball(ball), rule.check_loss(loss)
        spy, state = Spy(make_model()), state_of(loss, 7, pad=1)
        optimizer = torch.optim.SGD(spy.parameters(), lr=0.1)
        for number in range(3):
            before = [weight.detach().clone() for weight in spy.parameters()]
            here = step_of(ball, batch, state, number, number)
            figures = rule(spy, optimizer, loss, [(batch, here)], None)
            assert all(math.isfinite(value) for value in figures.values())
            assert any(not torch.equal(old, new) for old, new in zip(before, spy.parameters(), strict=True))
        assert all(torch.isfinite(tensor).all() and tensor.any() for tensor in state.tensors.values())
        assert all(ball.contains(batch.images, points).all() for points in spy.points)
        assert all(int(ball.changed(batch.images, points).max()) <= ball.k for points in spy.points)
        assert any(not torch.equal(points, batch.images) for points in spy.points)

    @every_method
    @walk("k", [0, 36, 1000])
    def test_no_pixel_and_all_pixels(self, name, k):
        (loss, rule), batch = METHODS[name], make_batch(3)
        spy, state = Spy(make_model()), state_of(loss, 3)
        optimizer = torch.optim.SGD(spy.parameters(), lr=0.1)
        for number in range(2):
            step = step_of(SparseBall(k), batch, state, number, number)
            figures = rule(spy, optimizer, loss, [(batch, step)], None)
            assert all(math.isfinite(value) for value in figures.values())
        assert all(torch.equal(points, batch.images) for points in spy.points) == (k == 0)

    @every_method
    def test_one_k_for_each_image(self, name):
        (loss, _), batch = METHODS[name], make_batch(4)
        counts = torch.tensor([0, 1, 5, 36])
        step = replace(step_of(SparseBall(4), batch, state_of(loss, 4)), ball=SparseBall(counts))
        found = loss.attacked(make_model(), batch, step)
        passes = loss.passes(make_model(), batch, step, found, make_model()(batch.images))
        assert (step.ball.changed(batch.images, passes.images.detach()) <= counts).all()

    def test_flc_pooling_trains(self):
        torch.manual_seed(0)
        model = PreActResNet(width=2, downsampling="flc", activation="softplus").build((3, 32, 32), 10).train()
        batch = Batch(torch.rand(3, 3, 32, 32), torch.arange(3), torch.arange(3))
        loss, optimizer = AdversarialTraining(attack=ONE), Sgd(lr=0.05).build(model)
        figures = Descend()(model, optimizer, loss, [(batch, step_of(SparseBall(20), batch))], None)
        assert all(math.isfinite(value) for value in figures.values())
        assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


class TestTransferred:
    def test_against_a_loop_over_padded_frames(self):
        """Five epochs of shuffled, cropped and flipped batches; a fresh frame in the first, third and fifth."""
        data, model, ball = make_batch(), make_model(), SparseBall(4)
        loss = Atta(attack=SparseTransferred(reset=2))
        state = state_of(loss, 5, pad=1)
        frames = torch.zeros(SAMPLES, 2, 8, 8).double(), torch.zeros(SAMPLES, 8, 8).double()
        for epoch, number, index in visits(5):
            drawn = Augmentation((index + epoch) % 3, (2 * index + epoch) % 3, (index + epoch) % 2 == 0, 1)
            corners = list(zip(drawn.top.tolist(), drawn.left.tolist(), drawn.flip.tolist(), strict=True))

            def shown(whole, row, corners=corners):
                top, left, flip = corners[row]
                part = whole[..., top : top + 6, left : left + 6]
                return part.flip(-1) if flip else part

            padded = F.pad(data.images[index], (1, 1, 1, 1))
            images = torch.stack([shown(padded[row], row) for row in range(len(index))])
            batch = Batch(images, data.labels[index], index, drawn)
            step = step_of(ball, batch, state, epoch, number)
            found = loss.attacked(model, batch, step)
            if epoch % 2 == 0:
                frames[0][index] = 2 * step.noise.uniform((2, 8, 8), "magnitudes", torch.float64) - 1
                frames[1][index] = step.noise.normal((1, 8, 8), "logits", torch.float64)[:, 0]
            for row, sample in enumerate(index):
                x, p, m = images[row], cut(shown(frames[0][sample], row), images[row]), shown(frames[1][sample], row)
                start = torch.where(masked(m, 4), x + p, x).requires_grad_()
                value = F.cross_entropy(model(start[None]), batch.labels[row : row + 1])
                (gradient,) = torch.autograd.grad(value, start)
                p, m = moved(x, p, m, gradient)
                close(found.trace["start"][row], start.detach())
                close(found.images[row], torch.where(masked(m, 4), x + p, x))
                shown(frames[0][sample], row).copy_(p) if not corners[row][2] else None
                if corners[row][2]:  # a flip is a copy: written from the right
                    top, left, _ = corners[row]
                    frames[0][sample][:, top : top + 6, left : left + 6] = p.flip(-1)
                    frames[1][sample][top : top + 6, left : left + 6] = m.flip(-1)
                else:
                    shown(frames[1][sample], row).copy_(m)
            close(state.tensors["transferred_magnitudes"], frames[0])
            close(state.tensors["transferred_logits"][:, 0], frames[1])

    def test_where_nothing_is_kept_it_is_spgd(self):
        batch, model = make_batch(), make_model()
        step = step_of(SparseBall(4), batch, epoch=7)
        assert torch.equal(
            SparseTransferred()(model, batch, step.ball, step).images, ONE(model, batch, step.ball, step).images
        )

    @pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.unit)
    def test_the_next_visit_starts_where_this_one_ended(self, ball):
        """Of every kind of unit where the window stays; of features with one channel alone."""
        shape = (1, 6, 6) if ball.unit == "feature" else SHAPE
        batch, model, attack = make_batch(shape=shape), make_model(shape=shape), SparseTransferred()
        state = state_of(attack, SAMPLES, shape=shape)
        first = attack(model, batch, ball, step_of(ball, batch, state))
        second = attack(model, batch, ball, step_of(ball, batch, state, epoch=1, number=1))
        close(second.trace["start"], first.images)
        fresh = attack(model, batch, ball, step_of(ball, batch, state, epoch=10, number=2))
        assert not torch.allclose(fresh.trace["start"], second.images)

    def test_a_gradient_that_is_no_number_leaves_what_was_kept(self):
        batch, model, attack, ball = make_batch(), make_model(), SparseTransferred(), SparseBall(4)
        state = state_of(attack, SAMPLES)
        attack(model, batch, ball, step_of(ball, batch, state))
        kept = {name: tensor.clone() for name, tensor in state.tensors.items()}
        with torch.no_grad():
            model[3].weight.fill_(torch.nan)
        attack(model, batch, ball, step_of(ball, batch, state, epoch=1))
        assert all(torch.equal(tensor, kept[name]) for name, tensor in state.tensors.items())

    def test_an_empty_batch_keeps_nothing(self):
        batch, attack = make_batch().part(slice(0, 0)), SparseTransferred()
        state = state_of(attack, SAMPLES)
        assert len(attack(make_model(), batch, SparseBall(4), step_of(SparseBall(4), batch, state)).images) == 0
        assert not any(tensor.any() for tensor in state.tensors.values())


class TestFree:
    def test_against_a_loop(self):
        """Two epochs of batches of 5, 5 and 2, three updates with each: weights, magnitudes and logits."""
        data, loss, ball = make_batch(), FreeAt(replays=3, attack=ONE), SparseBall(4)
        model, twin = make_model(), make_model()
        state, known = state_of(loss, 5), set()
        magnitudes, logits = torch.zeros(5, 2, 6, 6).double(), torch.zeros(5, 6, 6).double()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, twin)]
        for epoch, number, index in visits(2):
            batch = Batch(data.images[index], data.labels[index], index)
            for replay in range(loss.replays):
                step = step_of(ball, batch, state, epoch, number).again(replay)
                Descend()(model, optimizers[0], loss, [(batch, step)], clip=None)
                for row in range(len(batch)):
                    if row not in known:
                        known.add(row)
                        magnitudes[row] = (
                            2 * step.noise.uniform((2, 36), "magnitudes", torch.float64)[row].view(SHAPE) - 1
                        )
                        logits[row] = step.noise.normal((36,), "logits", torch.float64)[row].view(6, 6)
                    magnitudes[row] = cut(magnitudes[row], batch.images[row])
                points = [
                    torch.where(masked(m, 4), x + p, x)
                    for x, p, m in zip(batch.images, magnitudes, logits, strict=False)
                ]
                points = torch.stack(points).requires_grad_()
                optimizers[1].zero_grad()
                F.cross_entropy(twin(points), batch.labels).backward()
                optimizers[1].step()
                for row, image in enumerate(batch.images):
                    magnitudes[row], logits[row] = moved(image, magnitudes[row], logits[row], points.grad[row])
                close(state.tensors["carried"], magnitudes)
                close(state.tensors["carried_logits"], logits[:, None].expand(5, 2, 6, 6))
        for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected)

    @every_ball
    def test_parts_of_a_batch_use_the_rows_of_their_positions(self, ball):
        data, loss, model = make_batch(), FreeAt(attack=ONE), make_model()
        whole, parts = state_of(loss, SAMPLES), state_of(loss, SAMPLES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = step_of(ball, data, parts)
        for _ in range(3):
            halves = [(data.part(rows), step.part(rows)) for rows in (slice(0, 7), slice(7, 12))]
            Descend()(model, optimizer, loss, halves, clip=None)
            Descend()(model, optimizer, loss, [(data, step_of(ball, data, whole))], clip=None)
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(tensor, parts.tensors[name], rtol=1e-6, atol=1e-9)

    def test_the_coin_is_tossed_for_each_replay(self):
        """Projected updates leave the magnitudes of pixels that are not selected."""
        data, ball, kinds = make_batch(), SparseBall(4), set()
        for variant in ("projected", "unprojected", "coin"):
            loss, model = FreeAt(attack=replace(ONE, variant=variant)), make_model()
            state, optimizer = state_of(loss, SAMPLES), torch.optim.SGD(model.parameters(), lr=0.1)
            for replay in range(9):
                state.tensors["carried"].mul_(0.5)  # off the corners, where no step moves
                before = state.tensors["carried"].clone()
                Descend()(model, optimizer, loss, [(data, step_of(ball, data, state).again(replay))], None)
                changed = (state.tensors["carried"] != before).any(1).flatten(1).sum(1)
                if replay:  # the first one draws a start
                    kinds.add((variant, bool((changed <= 4).all())))
        assert kinds == {("projected", True), ("unprojected", False), ("coin", True), ("coin", False)}

    def test_without_a_memory_it_starts_as_spgd(self):
        batch, model, loss = make_batch(), make_model(), FreeAt(attack=ONE)
        step = step_of(SparseBall(4), batch)
        start = ONE(model, batch, step.ball, step).trace["start"]
        assert torch.equal(loss.attacked(model, batch, step).images, start)
        loss(model, batch, step).total.backward()

    def test_over_a_norms_ball_nothing_is_new(self):
        assert set(FreeAt().declare_state(SHAPE, 5)) == {"carried"}


class TestNuclear:
    def attacked(self, attack, batch, state=None, number=0):
        return attack(make_model(), batch, SparseBall(4), step_of(SparseBall(4), batch, state, number=number))

    def test_the_norm_joins_every_other_batch(self):
        batch = make_batch()
        state = state_of(NuAt(attack=SparseNuclear()), SAMPLES)
        for number in range(4):
            plain = self.attacked(ONE, batch, number=number)
            found = self.attacked(SparseNuclear(weight=50.0), batch, state, number)
            assert torch.equal(found.trace["start"], plain.trace["start"])
            assert torch.equal(found.trace["gradient"], plain.trace["gradient"]) == (number % 2 == 0)
            assert int(state.tensors["nuclear_iterations"]) == number + 1

    def test_its_gradient_is_that_of_the_sum(self):
        """The norm by torch, through the decomposition."""
        model, batch = make_model(), make_batch()
        found = self.attacked(SparseNuclear(weight=5.0), batch)
        start = found.trace["start"].clone().requires_grad_()
        change = model(start) - model(batch.images).detach()
        value = F.cross_entropy(model(start), batch.labels, reduction="sum") + 5 * torch.linalg.matrix_norm(
            change, "nuc"
        )
        torch.testing.assert_close(found.trace["gradient"], torch.autograd.grad(value, start)[0])
        for row in range(SAMPLES):
            step = step_of(SparseBall(4), batch)
            p = 2 * step.noise.uniform((2, 36), "magnitudes", torch.float64)[row].view(SHAPE) - 1
            m = step.noise.normal((36,), "logits", torch.float64)[row].view(6, 6)
            p, m = moved(batch.images[row], cut(p, batch.images[row]), m, found.trace["gradient"][row])
            close(found.images[row], torch.where(masked(m, 4), batch.images[row] + p, batch.images[row]))

    def test_without_weight_it_is_spgd(self):
        batch = make_batch()
        for weight in (None, 0.0):
            assert torch.equal(
                self.attacked(SparseNuclear(weight=weight), batch).images, self.attacked(ONE, batch).images
            )

    def test_the_loss_hands_its_weight_on(self):
        model, batch = make_model(), make_batch()
        step = step_of(SparseBall(4), batch)
        found = NuAt(weight=50.0, attack=SparseNuclear()).attacked(model, batch, step)
        assert torch.equal(found.images, SparseNuclear(weight=50.0)(model, batch, step.ball, step).images)
        terms = NuAt(weight=50.0, attack=SparseNuclear())(model, batch, step).total
        clean, attacked = model(batch.images), model(found.images)
        expected = F.cross_entropy(clean, batch.labels) + 50 / SAMPLES * nuclear_norm(attacked - clean)
        torch.testing.assert_close(terms, expected)


class TestAbnormal:
    @pytest.mark.parametrize("detached", [True, False])
    def test_the_start_is_spgds(self, detached):
        """All but the first image are put back, to where the loss is lower than at the start: the penalty's formula."""
        model, batch, loss = make_model(), make_batch(), NAaer(attack=ONE, detached=detached)
        step = step_of(SparseBall(4), batch)
        found = loss.attacked(model, batch, step)
        swapped = replace(found, images=torch.cat([found.images[:1], batch.images[1:]]))
        start = model(found.trace["start"])
        torch.testing.assert_close(found.trace["logits"], start.detach())
        before, after = (F.cross_entropy(z, batch.labels, reduction="none") for z in (start, model(swapped.images)))
        abnormal = before > after
        assert 0 < abnormal.sum() < SAMPLES
        far = (start - model(swapped.images)).square().sum(1)
        penalty = 1.5 * (before - after)[abnormal].mean()
        penalty = penalty + 0.15 * (far[abnormal].mean() - far[~abnormal].mean()).clamp(min=0)
        expected = after.mean() + abnormal.double().mean() * penalty
        torch.testing.assert_close(loss.given(model, batch, step, swapped).total, expected)


class TestLap:
    def test_by_hand(self):
        """theta + nu along the step at sPGD's random start; then a step with the images of theta."""
        model, twin, batch = make_model(), make_model(), make_batch()
        loss, step = AdversarialTraining(attack=ONE), step_of(SparseBall(4), batch)
        found = loss.attacked(twin, batch, step)
        Lap(beta=0.2)(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, [(batch, step)], None)
        F.cross_entropy(twin(found.trace["start"]), batch.labels).backward()
        first = twin[1].weight  # of two matrices the last has weight 0
        with torch.no_grad():
            first -= 0.2 * first.norm() * first.grad / first.grad.norm()
        twin.zero_grad()
        F.cross_entropy(twin(found.images), batch.labels).backward()
        for weight, expected in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(weight, expected - 0.1 * expected.grad)

    def test_refuses_an_attack_that_forgets_its_start(self):
        with pytest.raises(InputError, match=r"^training.update: found Lap for AdversarialTraining; .*keep: last"):
            Lap().check_loss(AdversarialTraining(attack=SparsePgd()))


class TestAlignment:
    def test_the_second_gradient_is_taken_in_the_set(self):
        model, batch = make_model(), make_batch()
        step, loss = step_of(SparseBall(4), batch), FgsmGa(attack=ONE, weight=0.7)
        total = loss(model, batch, step).total
        change = step.ball.sample(batch.images, step.noise, "alignment")
        assert (step.ball.changed(batch.images, batch.images + change) <= 4).all() and change.any()
        slopes = []
        for points in (batch.images, batch.images + change):
            points = points.clone().requires_grad_()
            value = F.cross_entropy(model(points), batch.labels, reduction="sum")
            slopes.append(torch.autograd.grad(value, points)[0].flatten(1))
        expected = F.cross_entropy(model(loss.attacked(model, batch, step).images), batch.labels)
        expected = expected + 0.7 * (1 - F.cosine_similarity(*slopes)).mean()
        torch.testing.assert_close(total, expected)


class Bilinear(nn.Module):
    """Logits (a (v b + w c) + 3 b, 0) of three pixels a, b, c."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]).double())

    def forward(self, x):
        a, b, c = x.flatten(1).T
        return torch.stack([a * (self.weight[0] * b + self.weight[1] * c) + 3 * b, 0 * a], 1)


class TestFastBat:
    SHAPE = (2, 2, 3)

    def question(self, size, k=2):
        """A net to which two pixels do not matter yet: there gradients are 0, and their derivatives are not."""
        model, batch = make_model(shape=self.SHAPE), make_batch(9, shape=self.SHAPE)
        with torch.no_grad():
            model[1].weight.mul_(2)
            model[1].weight[:, [0, 3, 6, 9]] = 0  # both channels of pixels 0 and 3
        loss, step = FastBat(attack=ONE, step_size=size, implicit=None), step_of(SparseBall(k), batch)
        return model, batch, loss, step, loss.attacked(model, batch, step)

    def reached(self, model, batch, size, found, k=2):
        """The nearest point of the set to z + size · gradient, by trying every pair of pixels; differentiable."""
        point = found.images.clone().requires_grad_()
        value = F.cross_entropy(model(point), batch.labels, reduction="sum")
        (slope,) = torch.autograd.grad(value, point, create_graph=True)
        target, best = point + size * slope, []
        for image, wanted in zip(batch.images, target, strict=True):
            tried = []
            for pair in itertools.combinations(range(6), k):
                chosen = torch.zeros(6, dtype=torch.bool)
                chosen[list(pair)] = True
                tried.append(torch.where(chosen.view(2, 3), wanted.clamp(0, 1), image))
            best.append(min(tried, key=lambda x, wanted=wanted: float((x - wanted).detach().square().sum())))
        return torch.stack(best), target

    @pytest.mark.parametrize("size", [0.02, 0.3, 2.0])
    def test_its_images_are_the_nearest_points(self, size):
        model, batch, loss, step, found = self.question(size)
        expected, _ = self.reached(model, batch, size, found)
        images = loss.passes(model, batch, step, found, None).images
        close(images.detach(), expected.detach())
        assert step.ball.contains(batch.images, images.detach()).all()

    @pytest.mark.parametrize("size", [0.02, 0.3, 2.0])
    def test_the_implicit_gradient_is_that_of_the_projection(self, size):
        model, batch, loss, step, found = self.question(size)
        loss.given(model, batch, step, found).total.backward()
        grads = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        reached, target = self.reached(model, batch, size, found)
        changed = reached != batch.images
        share = ((reached == target) & changed).sum().item() / changed.sum().item()
        assert 0.02 < share < 0.98 or size != 0.3
        F.cross_entropy(model(reached), batch.labels).backward()
        for grad, weight in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(grad, weight.grad, rtol=1e-9, atol=1e-12)

    def test_against_finite_differences(self):
        """Along random directions in the space of weights; z is a constant."""
        model, batch, loss, step, found = self.question(0.3)
        loss.given(model, batch, step, found).total.backward()
        for seed in range(5):
            generator, values = torch.Generator().manual_seed(seed), []
            along = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in model.parameters()]
            slope = sum(float((w.grad * d).sum()) for w, d in zip(model.parameters(), along, strict=True))
            for sign in (1, -2, 1):
                with torch.no_grad():
                    for weight, direction in zip(model.parameters(), along, strict=True):
                        weight.add_(direction, alpha=sign * 1e-6)
                values.append(loss.given(model, batch, step, found).total.item())
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_a_pixel_that_is_not_selected_has_no_derivative(self):
        """At the first one the gradient is 0, its derivative is not, and the loss where it ends depends on it."""
        model = Bilinear()
        batch = Batch(torch.tensor([[[[0.4, 0.5, 0.5]]]]).double(), torch.tensor([1]), torch.tensor([0]))
        loss, step = FastBat(attack=ONE, step_size=0.1, implicit=None), step_of(SparseBall(1), batch)
        found = AttackResult(batch.images)
        passes = loss.passes(model, batch, step, found, None)
        assert (passes.images != batch.images).flatten().tolist() == [False, True, False]
        loss.given(model, batch, step, found).total.backward()
        assert model.weight.grad is not None
        for number in range(2):
            values = []
            for change in (1e-6, -2e-6, 1e-6):
                with torch.no_grad():
                    model.weight[number] += change
                values.append(loss.given(model, batch, step, found).total.item())
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(model.weight.grad[number].item(), rel=1e-5)

    def test_without_the_implicit_part_it_is_another(self):
        model, batch, loss, step, found = self.question(0.3)
        grads = []
        for kind in (loss, replace(loss, implicit=0.0)):
            model.zero_grad()
            kind.given(model, batch, step, found).total.backward()
            grads.append(model[1].weight.grad.clone())
        assert (grads[0] - grads[1]).abs().max() > 1e-4


REFUSED = [
    ({"type": "Atta"}, SparseBall(4), r"^loss\.attack\.type: found Transferred for a SparseBall; .*SparseTransferred"),
    ({"type": "Atta", "attack": {"type": "SparseTransferred"}}, LinfBall(0.1), r"^loss\.attack\.type: .*Transferred"),
    ({"type": "FreeAt"}, SparseBall(4), r"^loss\.attack: found null for a SparseBall; accepted: \{type: SparsePgd"),
    ({"type": "FgsmGa"}, SparseBall(4), r"^loss\.attack\.type: found Ascent for a SparseBall; .*SparsePgd"),
    ({"type": "FgsmGa", "attack": {"type": "SparsePgd"}}, SparseBall(4), r"^loss\.weight: found null for SparseBall"),
    ({"type": "NAaer"}, SparseBall(4), r"^loss\.attack\.type: found Ascent for a SparseBall"),
    ({"type": "NuAt"}, SparseBall(4), r"^loss\.attack\.type: found Nuclear for a SparseBall; accepted: SparseNuclear$"),
    ({"type": "NuAt", "attack": {"type": "SparseNuclear"}}, LinfBall(0.1), r"found SparseNuclear .*accepted: Nuclear$"),
    ({"type": "FastBat"}, L2Ball(0.1), r"^loss\.type FastBat: found L2Ball .*accepted: LinfBall, SparseBall$"),
    ({"type": "FastBat"}, SparseBall(4), r"^loss\.attack\.type: found Linearisation for a SparseBall"),
    ({"type": "FastBat", "sign": True, "attack": {"type": "SparsePgd"}}, SparseBall(4), r"^loss\.sign: found true"),
]


@pytest.mark.parametrize(("written", "ball", "message"), REFUSED)
def test_sets_that_a_method_does_not_know(written, ball, message):
    with pytest.raises(InputError, match=message):
        structure(Loss, written, "loss").check_ball(ball)


def test_free_training_with_an_attack_knows_sparse_sets_alone():
    with pytest.raises(InputError, match=r"^loss\.attack: found SparsePgd for a LinfBall; accepted: null"):
        FreeAt(attack=ONE).check_ball(LinfBall(0.1))


def last(**fields) -> dict:
    return {"type": "SparsePgd", "steps": 1, "patience": None, "keep": "last", **fields}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"type": "FreeAt", "attack": last(steps=20)}, r"^loss\.attack\.steps: found 20; accepted: 1"),
        ({"type": "FreeAt", "attack": last(patience=3)}, r"^loss\.attack\.patience: found 3; accepted: null"),
        ({"type": "FreeAt", "attack": last(keep="best")}, r"^loss\.attack\.keep: found 'best'; accepted: last"),
        ({"type": "FreeAt", "attack": last(objective={"type": "CrossEntropy"})}, r"^loss\.attack\.objective: .*null"),
        ({"type": "FreeAt", "attack": {"type": "SparseTransferred"}}, r"^loss\.attack\.type: .*accepted: SparsePgd"),
        ({"type": "NAaer", "attack": {"type": "SparsePgd"}}, r"^loss\.attack\.type: .*SparsePgd with keep: last"),
        ({"type": "NAaer", "attack": {"type": "Pgd"}}, r"^loss\.attack\.type: found 'Pgd'; accepted: an Ascent"),
        ({"type": "NuAt", "attack": last()}, r"^loss\.attack\.type: .*accepted: Nuclear, SparseNuclear"),
        (
            {"type": "NuAt", "attack": {"type": "SparseNuclear", "keep": "best"}},
            r"^loss\.attack\.keep: .*accepted: last",
        ),
        ({"type": "NuAt", "attack": {"type": "SparseNuclear", "weight": -1}}, r"^loss\.attack\.weight: found -1"),
        ({"type": "Atta", "attack": {"type": "SparseTransferred", "keep": "best"}}, r"^loss\.attack\.keep: "),
        ({"type": "Atta", "attack": {"type": "SparseTransferred", "reset": 0}}, r"^loss\.attack\.reset: found 0"),
        ({"type": "Atta", "attack": {"type": "SparseTransferred", "steps": 0}}, r"^loss\.attack\.steps: found 0"),
    ],
)
def test_refuses(written, message):
    with pytest.raises(InputError, match=message):
        structure(Loss, written, "loss")


def test_the_attacks_of_norms_are_as_they_were():
    """Their fields, in their order: recorded recipes name them."""
    names = ["attack_mode", "steps", "step_size", "start", "start_scale", "projected", "objective", "record", "weight"]
    assert [field.name for field in fields(Nuclear)] == names and Nuclear().start == "corners"
    assert FastBat().attack == Linearisation(attack_mode="train") and NAaer().attack.start_scale == 2.0


@pytest.mark.parametrize("name", ["ATTA", "Free-AT", "NuAT"])
def test_interrupted_anywhere_it_goes_on_bit_for_bit(name):
    """Weights and augmented batches, from a copy of weights and state after any step."""
    loss, data = METHODS[name][0], Digits().load().train
    loader, shape = Loader(data, 500, Augment(pad=1, flip=True), seed=3), (1, 8, 8)
    specs = loss.declare_state(shape, 10)

    def run(first, model, tensors):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        yield {}, {}
        for number in range(first, 2 * len(loader)):
            epoch, position = divmod(number, len(loader))
            batch = next(loader.epoch(epoch, start=position))
            step = step_of(SparseBall(3), batch, State(tensors, specs), epoch, number)
            for replay in range(loss.replays):
                Descend()(model, optimizer, loss, [(batch, step.again(replay))], clip=None)
            yield {k: v.clone() for k, v in model.state_dict().items()}, {k: v.clone() for k, v in tensors.items()}

    def fresh():
        tensors = {name: spec.allocate(len(data), 500, torch.device("cpu"), 1) for name, spec in specs.items()}
        return make_model(10, shape).float(), tensors

    whole = list(run(0, *fresh()))[1:]
    for place in (1, len(loader)):
        model, _ = fresh()
        weights, tensors = whole[place - 1]
        model.load_state_dict(weights)
        *_, (end, kept) = run(place, model, {name: tensor.clone() for name, tensor in tensors.items()})
        assert all(torch.equal(value, whole[-1][0][name]) for name, value in end.items())
        assert all(torch.equal(value, whole[-1][1][name]) and value.any() for name, value in kept.items())


def test_the_study_has_the_rows_of_the_sources_first_table():
    rows = {row.label: row.config for row in read_study(STUDY).rows}
    assert list(rows) == [
        "sAT", "ATTA", "Free-AT", "GradAlign", "Fast-BAT", "FLC pooling", "N-AAER", "N-LAP", "NuAT",
        "sTRADES with 20 steps",
    ]  # fmt: skip
    for label, config in rows.items():
        training, attack = config.training, config.loss.attack  # type: ignore[attr-defined]
        config.loss.check_ball(config.perturbation), training.check_ball(config.perturbation)
        training.update.check_loss(config.loss)
        assert config.perturbation == SparseBall(20) and config.evaluate.attacks == ("sparse-autoattack",)
        many = label == "sTRADES with 20 steps"
        assert isinstance(attack, SparsePgd) and attack.steps == (20 if many else 1)
        assert (attack.alpha, attack.beta) == ((0.25, 0.25) if many else (1, 1))
        assert config.model.activation == "softplus" and training.epsilon(20, 0, 391) == 120
        replays = config.loss.replays
        assert training.epochs * replays in (96, 100)
        assert [m * 4 / training.epochs for m in training.milestones] == [1, 3]
