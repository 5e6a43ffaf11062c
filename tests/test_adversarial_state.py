"""Methods that keep perturbations from batch to batch: FGSM-PGI, Free-AT and ATTA against loops over single samples."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from certtrain.attacks import KullbackLeibler, PriorGuided, SmoothedCrossEntropy, SquaredEuclidean, Transferred
from certtrain.bounds import L2Ball, LinfBall
from certtrain.config import structure
from certtrain.data import Digits
from certtrain.data.loader import Augment, Loader
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import Atta, Fgsm, FgsmPgi, FreeAt, Loss, Qub, Trades
from certtrain.losses.adversarial.qub import quadratic_upper_bound
from certtrain.models import SmallCnn
from certtrain.noise import Noise, key_of
from certtrain.recipe import Config
from certtrain.step import Augmentation, Batch, State, Step
from certtrain.training import Descend, Smoothed, Training
from certtrain.verifiers import Certify
from certtrain.workflows.train import train

BALLS = [LinfBall(0.1), L2Ball(0.6)]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)
SAMPLES = 12


def state_of(owner, batch_size=5, pad=0, shape=(1, 8, 8), samples=SAMPLES) -> State:
    """Allocated as the training loop does, but in float64."""
    specs = {name: replace(spec, dtype=torch.float64) for name, spec in owner.declare_state(shape, 10).items()}
    tensors = {n: spec.allocate(samples, batch_size, torch.device("cpu"), pad) for n, spec in specs.items()}
    return State(tensors, specs)


def step_of(ball, batch, state=None, epoch=0, number=0) -> Step:
    radius = torch.tensor(ball.epsilon, dtype=torch.float64)
    noise = Noise(key_of(9, number), torch.arange(len(batch)))
    return Step(ball.with_epsilon(radius), radius, radius, 0.5, noise, state or State(), epoch=epoch, epochs=9)


def smooth_model(classes=5) -> nn.Module:
    """No batch norm: what one sample gets does not depend on the others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, classes)).double()


def visits(epochs, samples=SAMPLES, size=5):
    """(epoch, number, index) of shuffled batches, the last of each epoch smaller."""
    number = 0
    for epoch in range(epochs):
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(size):
            yield epoch, number, index
            number += 1


def gradients(model, points, labels, loss=F.cross_entropy):
    points = points.clone().requires_grad_()
    return torch.autograd.grad(loss(model(points), labels), points)[0]


def into(ball, image, point):
    """By the definitions: shrunk to the ball, cut to [0, 1]."""
    change = point.clamp(0, 1) - image
    if isinstance(ball, LinfBall):
        return (image + change.clamp(-ball.epsilon, ball.epsilon)).clamp(0, 1)
    return (image + change * min(1, ball.epsilon / float(change.norm().clamp(min=1e-30)))).clamp(0, 1)


def along(ball, vector):
    return vector.sign() if isinstance(ball, LinfBall) else vector / vector.norm()


class TestPrior:
    @every_ball
    @pytest.mark.parametrize("norm", ["batch", "sample"])
    def test_against_a_loop_over_samples(self, ball, norm):
        """Five epochs of shuffled batches, a fresh start in the first, third and fifth."""
        model, data = smooth_model(), make_batch(SAMPLES)
        attack = PriorGuided(norm=norm, reset=2, step_size=0.7, momentum=0.4)
        state = state_of(attack)
        prior, momentum = torch.zeros(SAMPLES, 1, 8, 8).double(), torch.zeros(SAMPLES, 1, 8, 8).double()
        for epoch, number, index in visits(5):
            batch = Batch(data.images[index], data.labels[index], index)
            step = step_of(ball, batch, state, epoch, number)
            found = attack(model, batch, ball, step)
            if epoch % 2 == 0:
                fresh = step.noise.normal((1, 8, 8), "start", torch.float64)
                momentum[index] = 0
                for row, sample in enumerate(index):
                    prior[sample] = ball.epsilon * along(ball, fresh[row])
            starts = torch.stack([into(ball, data.images[i], data.images[i] + prior[i]) for i in index])
            grads = gradients(model, starts, batch.labels)
            for row, sample in enumerate(index):
                image = data.images[sample]
                size = (grads if norm == "batch" else grads[row]).abs().sum()
                momentum[sample] = grads[row] / size + 0.4 * momentum[sample]
                moved = starts[row] + 0.7 * ball.epsilon * along(ball, grads[row])
                torch.testing.assert_close(found.images[row], into(ball, image, moved), rtol=0, atol=1e-9)
                nexts = starts[row] + 0.7 * ball.epsilon * along(ball, momentum[sample])
                prior[sample] = into(ball, image, nexts) - image
            torch.testing.assert_close(found.trace["start"], starts, rtol=0, atol=1e-9)
            torch.testing.assert_close(state.tensors["prior"], prior, rtol=0, atol=1e-9)
            torch.testing.assert_close(state.tensors["prior_momentum"], momentum, rtol=1e-9, atol=1e-12)

    @every_ball
    def test_a_fresh_start_is_a_corner_or_a_point_of_the_sphere(self, ball):
        batch = replace(make_batch(), images=torch.full((12, 1, 8, 8), 0.5).double())
        found = PriorGuided()(smooth_model(), batch, ball, step_of(ball, batch))
        change = found.trace["start"] - batch.images
        if isinstance(ball, LinfBall):
            torch.testing.assert_close(change.abs(), torch.full_like(change, ball.epsilon))
            assert 0.4 < (change > 0).double().mean() < 0.6
        else:
            torch.testing.assert_close(change.flatten(1).norm(dim=1), torch.full((12,), ball.epsilon).double())

    @every_ball
    def test_without_weight_and_with_nothing_stored_it_is_fgsm(self, ball):
        """Bit for bit: images, value and gradients."""
        batch, loss = make_batch(), FgsmPgi(weight=0.0, true_mass=1.0)
        step = step_of(ball, batch, state_of(loss), epoch=1)
        assert torch.equal(
            loss.attacked(make_model(), batch, step).images, Fgsm().attacked(make_model(), batch, step).images
        )
        step = step_of(ball, batch, state_of(loss), epoch=1)
        first, second = gradient(make_model(), loss, batch, step), gradient(make_model(), Fgsm(), batch, step)
        assert torch.equal(first[0].total, second[0].total) and torch.equal(first[1], second[1])

    def test_the_loss_against_its_formula(self):
        """Smoothed labels by torch; both logits of the penalty carry gradients."""
        model, batch, loss = smooth_model(), make_batch(), FgsmPgi()
        step = step_of(LinfBall(0.1), batch)
        found = loss.attacked(model, batch, step)
        terms, grad = gradient(model, loss, batch, step)
        model.zero_grad()
        logits, before = model(found.images), model(found.trace["start"])
        smoothed = F.cross_entropy(logits, batch.labels, label_smoothing=0.4 * 5 / 4)
        expected = smoothed + 10 * ((logits - before) ** 2).sum() / (12 * 5)
        expected.backward()
        assert terms.total.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in model.parameters()]))

    def test_the_attack_climbs_the_smoothed_loss(self):
        model, batch = smooth_model(), make_batch()
        with torch.no_grad():
            model[3].weight.mul_(30)  # sure enough for the two losses to differ in sign
        step = step_of(LinfBall(0.1), batch)
        for mass in (0.6, 1.0):
            found = FgsmPgi(true_mass=mass).attacked(model, batch, step)
            smoothing = (1 - mass) * 5 / 4

            def smoothed(logits, labels, smoothing=smoothing):
                return F.cross_entropy(logits, labels, label_smoothing=smoothing)

            sign = gradients(model, found.trace["start"], batch.labels, smoothed).sign()
            expected = (found.trace["start"] + 0.1 * sign).clamp(batch.images - 0.1, batch.images + 0.1).clamp(0, 1)
            torch.testing.assert_close(found.images, expected)

    @pytest.mark.parametrize("classes", [2, 5])
    @pytest.mark.parametrize("mass", [1.0, 0.6, 0.5])
    def test_smoothed_cross_entropy_against_torch(self, classes, mass):
        torch.manual_seed(0)
        logits, labels = 5 * torch.randn(30, classes).double(), torch.arange(30) % classes
        found = SmoothedCrossEntropy(mass)(logits, labels)
        smoothing = (1 - mass) * classes / (classes - 1)
        expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(found, expected)
        if mass == 1:
            assert torch.equal(found, expected)

    @pytest.mark.parametrize(("around", "moves"), [(lambda loss: loss, 2), (lambda loss: Qub(base=loss), 3)])
    def test_running_statistics_move_as_often_as_published(self, around, moves):
        model = make_model()
        around(FgsmPgi())(model, make_batch(), make_step())
        assert model[1].num_batches_tracked == moves

    def test_a_flat_loss_stores_nothing_strange(self):
        model, batch, loss = smooth_model(), make_batch(), FgsmPgi()
        nn.init.zeros_(model[3].weight)
        state = state_of(loss)
        step = step_of(LinfBall(0.1), batch, state)
        found = loss.attacked(model, batch, step)
        assert torch.equal(found.images, found.trace["start"])
        assert (state.tensors["prior_momentum"] == 0).all() and torch.isfinite(state.tensors["prior"]).all()
        with torch.no_grad():
            model[3].weight.fill_(torch.nan)
        loss.attacked(model, batch, step)
        assert all(torch.isfinite(tensor).all() for tensor in state.tensors.values())

    @pytest.mark.parametrize("norm", ["batch", "sample"])
    def test_where_the_gradient_is_zero_the_momentum_fades(self, norm):
        model, batch, attack = smooth_model(), make_batch(), PriorGuided(norm=norm)
        nn.init.zeros_(model[3].weight)
        state = state_of(attack)
        state.tensors["prior_momentum"].fill_(2.0)
        attack(model, batch, LinfBall(0.1), step_of(LinfBall(0.1), batch, state, epoch=1))
        torch.testing.assert_close(state.tensors["prior_momentum"], torch.full((12, 1, 8, 8), 0.6).double())

    def test_what_was_stored_in_a_larger_ball_is_brought_into_this_one(self):
        model, batch, attack = smooth_model(), make_batch(), PriorGuided()
        state = state_of(attack)
        attack(model, batch, LinfBall(0.3), step_of(LinfBall(0.3), batch, state))
        assert state.tensors["prior"].abs().max() > 0.2
        found = attack(model, batch, LinfBall(0.1), step_of(LinfBall(0.1), batch, state, epoch=1))
        assert LinfBall(0.1).contains(batch.images, found.trace["start"]).all()

    @pytest.mark.parametrize(
        ("field", "value"),
        [("step_size", 0.0), ("momentum", -0.1), ("reset", 0), ("norm", "x"), ("momentum", float("nan"))],
    )
    def test_refuses(self, field, value):
        with pytest.raises(InputError, match=f"^loss.attack.{field}: found .*accepted"):
            structure(Loss, {"type": "FgsmPgi", "attack": {field: value}}, "loss")

    @pytest.mark.parametrize("value", [0.0, 1.1])
    def test_refuses_a_mass_that_is_no_share(self, value):
        with pytest.raises(InputError, match=r"^loss.true_mass: found .*accepted"):
            structure(Loss, {"type": "FgsmPgi", "true_mass": value}, "loss")


class TestFree:
    def test_the_first_step_is_a_clean_one(self):
        model, batch = make_model(), make_batch()
        step = step_of(LinfBall(0.1), batch, state_of(FreeAt(), SAMPLES))
        terms, grad = gradient(model, FreeAt(replays=1), batch, step)
        model = make_model()
        expected = F.cross_entropy(model(batch.images), batch.labels)
        expected.backward()
        assert torch.equal(terms.total, expected.detach())
        assert torch.equal(grad, torch.cat([p.grad.flatten() for p in model.parameters()]))

    @every_ball
    @pytest.mark.parametrize("size", [1.0, 0.3])
    def test_against_a_loop(self, ball, size):
        """Two epochs of batches of 5, 5 and 2, three updates with each: weights and perturbation."""
        data, loss = make_batch(SAMPLES), FreeAt(replays=3, step_size=size)
        model, twin = smooth_model(), smooth_model()
        state, change = state_of(loss), torch.zeros(5, 1, 8, 8).double()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (model, twin)]
        for epoch, number, index in visits(2):
            batch = Batch(data.images[index], data.labels[index], index)
            for replay in range(loss.replays):
                step = step_of(ball, batch, state, epoch, number).again(replay)
                Descend()(model, optimizers[0], loss, [(batch, step)], clip=None)
                points = [into(ball, x, x + d) for x, d in zip(batch.images, change)]
                points = torch.stack(points).requires_grad_()
                optimizers[1].zero_grad()
                F.cross_entropy(twin(points), batch.labels).backward()
                optimizers[1].step()
                for row, image in enumerate(batch.images):
                    moved = points[row].detach() + size * ball.epsilon * along(ball, points.grad[row])
                    change[row] = into(ball, image, moved) - image
                torch.testing.assert_close(state.tensors["carried"], change, rtol=0, atol=1e-9)
        for parameter, expected in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(parameter, expected)

    def test_parts_of_a_batch_use_the_rows_of_their_positions(self):
        data, loss, model = make_batch(SAMPLES), FreeAt(), smooth_model()
        whole, parts = state_of(loss, SAMPLES), state_of(loss, SAMPLES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = step_of(LinfBall(0.1), data, parts)
        for _ in range(2):
            halves = [(data.part(rows), step.part(rows)) for rows in (slice(0, 7), slice(7, 14))]
            Descend()(model, optimizer, loss, halves, clip=None)
            Descend()(model, optimizer, loss, [(data, step_of(LinfBall(0.1), data, whole))], clip=None)
        assert torch.equal(whole.tensors["carried"], parts.tensors["carried"]) and whole.tensors["carried"].any()

    def test_under_qub_the_step_climbs_the_bound(self):
        model, batch, loss = smooth_model(), make_batch(), Qub(base=FreeAt())
        torch.manual_seed(3)
        before = 0.05 * (2 * torch.rand(12, 1, 8, 8).double() - 1)
        state = state_of(loss, SAMPLES)
        state.tensors["carried"].copy_(before)
        gradient(model, loss, batch, step_of(LinfBall(0.1), batch, state))
        points = (batch.images + before).clamp(0, 1)

        def bound(logits, labels):
            return quadratic_upper_bound(model(batch.images), logits, labels).mean()

        changes = []
        for climbed in (bound, F.cross_entropy):
            moved = points + 0.1 * gradients(model, points, batch.labels, climbed).sign()
            changes.append(into(LinfBall(0.1), batch.images, moved) - batch.images)
        torch.testing.assert_close(state.tensors["carried"], changes[0])
        assert not torch.equal(*changes) and loss.replays == 8

    def test_nothing_is_written_where_nothing_is_learned(self):
        model, batch, loss = smooth_model(), make_batch(), FreeAt()
        state = state_of(loss, SAMPLES)
        with torch.no_grad():
            loss(model, batch, step_of(LinfBall(0.1), batch, state))
        loss(model, batch, step_of(LinfBall(0.1), batch, state))
        assert (state.tensors["carried"] == 0).all()

    def test_one_step_of_the_optimiser_for_each_replay(self, tmp_path):
        config = Config(
            model=SmallCnn(width=2, hidden=8), loss=FreeAt(replays=3), certify=Certify(images=2, stages=("ibp",)),
            training=Training(epochs=2, batch_size=400, milestones=(1,), schedule=Smoothed(start=1, length=1)),
            export=Export(enabled=False),
        )  # fmt: skip
        steps = []
        hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
        try:
            train(config, tmp_path / "run", quiet=True)
        finally:
            hook.remove()
        assert len(steps) == 3 * 2 * -(-len(config.data.load().train) // 400)

    @pytest.mark.parametrize(("field", "value"), [("replays", 0), ("replays", 1.5), ("step_size", 0.0)])
    def test_refuses(self, field, value):
        with pytest.raises(InputError, match=f"^loss.{field}: found .*accepted"):
            structure(Loss, {"type": "FreeAt", field: value}, "loss")


def cropped(image, drawn, row):
    """The window of one padded image (C, H, W), by slices."""
    top, left = int(drawn.top[row]), int(drawn.left[row])
    window = image[:, top : top + 8, left : left + 8]
    return window.flip(2) if drawn.flip[row] else window


class TestTransferred:
    def augmented(self, index, images, epoch, pad=2):
        found, drawn = Augment(pad=pad, flip=True, padding="zero")(images[index], Noise(key_of(4, epoch), index))
        return Batch(found, index % 5, index, drawn)

    def test_the_window_is_what_the_augmentation_shows(self):
        torch.manual_seed(0)
        images = torch.rand(40, 3, 8, 8).double()
        batch = self.augmented(torch.arange(40), images, 0)
        padded = F.pad(images, [2] * 4)
        attack = Transferred(reset=5)
        state = state_of(attack, pad=2, shape=(3, 8, 8), samples=40)
        assert state.tensors["transferred"].shape == (40, 3, 12, 12)
        state.tensors["transferred"].copy_(padded)
        black = replace(batch, images=torch.zeros_like(batch.images))
        start = attack.begin(black, LinfBall(1.0), step_of(LinfBall(1.0), black, state, epoch=1))
        assert torch.equal(start, batch.images) and batch.augmentation.flip.any() and not batch.augmentation.flip.all()

    @every_ball
    def test_what_is_written_back_stands_where_it_was_read(self, ball):
        """Nothing moves (a flat loss): the row is as it was, bit for bit, and all around the window too."""
        batch = self.augmented(torch.arange(12), torch.full((12, 1, 8, 8), 0.5).double(), 0)
        batch = replace(batch, images=torch.full_like(batch.images, 0.5))
        attack, model = Transferred(), smooth_model()
        state = state_of(attack, pad=2)
        torch.manual_seed(1)
        before = torch.randint(-8, 9, (12, 1, 12, 12)).double() / 1024  # 0.5 + it - 0.5 is exact
        state.tensors["transferred"].copy_(before)
        nn.init.zeros_(model[3].weight)
        attack(model, batch, ball, step_of(ball, batch, state, epoch=1))
        assert torch.equal(state.tensors["transferred"], before)

    @every_ball
    def test_against_a_loop_over_samples(self, ball):
        """Four epochs of shuffled batches, each with its own crops and flips; a fresh start in the first and third."""
        model, images = smooth_model(), make_batch(SAMPLES).images
        attack = Transferred(steps=2, step_size=0.4, start_scale=0.02, reset=2)
        state, kept = state_of(attack, pad=2), torch.zeros(12, 1, 12, 12).double()
        for epoch, number, index in visits(4):
            batch = self.augmented(index, images, epoch)
            step = step_of(ball, batch, state, epoch, number)
            found = attack(model, batch, ball, step).images
            if epoch % 2 == 0:
                kept[index] = 0.02 * step.noise.normal((1, 12, 12), "start", torch.float64)
            drawn = batch.augmentation
            for row, sample in enumerate(index):
                image = batch.images[row]
                point = into(ball, image, image + cropped(kept[sample], drawn, row))
                for _ in range(2):
                    grad = gradients(model, point[None], batch.labels[row, None])[0]
                    point = into(ball, image, point + 0.4 * ball.epsilon * along(ball, grad))
                torch.testing.assert_close(found[row], point, rtol=0, atol=1e-9)
                change = (point - image).flip(2) if drawn.flip[row] else point - image
                top, left = int(drawn.top[row]), int(drawn.left[row])
                kept[sample, :, top : top + 8, left : left + 8] = change
            torch.testing.assert_close(state.tensors["transferred"], kept, rtol=0, atol=1e-9)

    def test_images_as_stored_are_the_middle_of_the_frame(self):
        batch, attack = make_batch(), Transferred(start_scale=0.0)
        outcomes = []
        for pad in (0, 2):
            state = state_of(attack, pad=pad)
            attack(smooth_model(), batch, LinfBall(0.1), step_of(LinfBall(0.1), batch, state))
            outcomes.append(state.tensors["transferred"])
        assert torch.equal(outcomes[1][..., 2:-2, 2:-2], outcomes[0]) and outcomes[0].abs().max() > 0.04
        outcomes[1][..., 2:-2, 2:-2] = 0
        assert (outcomes[1] == 0).all()

    def test_a_fresh_start_covers_the_whole_frame(self):
        batch, attack = self.augmented(torch.arange(12), make_batch().images, 0), Transferred(reset=10)
        state = state_of(attack, pad=2)
        for epoch in (9, 10):
            state.tensors["transferred"].fill_(0.05)
            attack(smooth_model(), batch, LinfBall(0.1), step_of(LinfBall(0.1), batch, state, epoch))
            outside = state.tensors["transferred"].abs()
            outside = torch.stack([
                row for sample, row in enumerate(outside[:, 0, 0])
                if batch.augmentation.top[sample] > 0
            ])  # fmt: skip
            assert len(outside) > 3 and bool((outside == 0.05).all()) == (epoch == 9)
            assert epoch == 9 or 1e-4 < outside.mean() < 3e-3

    def test_without_state_every_visit_is_a_first_one(self):
        batch, attack, model = make_batch(), Transferred(), smooth_model()
        step = step_of(LinfBall(0.1), batch, epoch=7)
        found = attack(model, batch, LinfBall(0.1), step)
        first = attack(model, batch, LinfBall(0.1), step_of(LinfBall(0.1), batch, state_of(attack)))
        assert torch.equal(found.images, first.images)
        start = batch.images + 1e-3 * step.noise.normal((1, 8, 8), "start", torch.float64)
        assert torch.equal(found.trace["start"], start.clamp(0, 1))

    def test_trades_keeps_the_attack_on_the_cross_entropy(self):
        batch, model = make_batch(), make_model()
        step = step_of(LinfBall(0.1), batch)
        expected = Atta().attacked(model, batch, step).images
        assert torch.equal(Trades(attack=Transferred()).attacked(model, batch, step).images, expected)
        climbed = Transferred(objective=None)
        divergence = Trades(attack=climbed).attacked(model, batch, step).images
        assert torch.equal(divergence, Transferred(objective=KullbackLeibler())(model, batch, step.ball, step).images)
        assert not torch.equal(divergence, expected)

    def test_the_default_is_atta_1(self):
        """One step of 0.015 in a radius of 0.031."""
        batch, spy = make_batch(), smooth_model()
        images = torch.full_like(batch.images, 0.5)
        attack = replace(Atta().attack, start_scale=0.0)
        ball = LinfBall(0.031)
        found = attack(spy, replace(batch, images=images), ball, step_of(ball, batch)).images
        torch.testing.assert_close((found - images).abs(), torch.full_like(images, 0.015))

    @every_ball
    def test_a_gradient_that_is_no_number_leaves_no_trace(self, ball):
        batch, model, attack = make_batch(), smooth_model(), Transferred(start_scale=0.0)
        with torch.no_grad():
            model[3].weight.fill_(torch.nan)
        state = state_of(attack)
        found = attack(model, batch, ball, step_of(ball, batch, state))
        assert torch.equal(found.images, batch.images) and (state.tensors["transferred"] == 0).all()

    @pytest.mark.parametrize(("field", "value"), [("start", "zero"), ("projected", False), ("reset", 0), ("steps", 0)])
    def test_refuses(self, field, value):
        with pytest.raises(InputError, match=f"^loss.attack.{field}: found .*accepted"):
            structure(Loss, {"type": "Atta", "attack": {field: value}}, "loss")


@every_ball
@pytest.mark.parametrize("divergence", [KullbackLeibler(), SquaredEuclidean()], ids=lambda found: type(found).__name__)
@pytest.mark.parametrize("attack", [PriorGuided(), Transferred(objective=None)], ids=lambda found: type(found).__name__)
def test_a_divergence_climbs_though_the_first_epoch_had_no_radius(attack, divergence, ball):
    """What is stored while epsilon is 0 is 0, where a divergence is flat: no later epoch would leave the images."""
    loss, model, batch = Trades(attack=attack, divergence=divergence), smooth_model(), make_batch()
    batch = replace(batch, augmentation=Augmentation(batch.index % 3, batch.index % 2, batch.index % 2 == 0, 1))
    state, carried = state_of(loss, 12, pad=1), None
    for epoch in range(4):
        step = step_of(ball.with_epsilon(0.0 if epoch == 0 else ball.epsilon), batch, state, epoch, epoch)
        found = loss.attacked(model, batch, step)
        moved = (found.images - batch.images).flatten(1).abs().amax(1)
        assert (moved == 0).all() if epoch == 0 else (moved > 1e-3).all()
        if epoch == 1:
            assert torch.equal(found.trace["start"], fresh_start(attack, batch, step))
        if epoch >= 2:  # what an epoch with a radius left is where the next one starts
            torch.testing.assert_close(found.trace["start"], carried, rtol=0, atol=1e-12)
        carried = found.images if isinstance(attack, Transferred) else batch.images + state.tensors["prior"]


def fresh_start(attack, batch, step):
    noise = step.noise.normal((1, 8, 8), "start", torch.float64)
    size = 1e-3 * noise if isinstance(attack, Transferred) else step.ball.epsilon * step.ball.direction(noise)
    return step.ball.project(batch.images, (batch.images + size).clamp(0, 1))


METHODS = [FgsmPgi(), FreeAt(), Atta()]
every_method = pytest.mark.parametrize("loss", METHODS, ids=lambda loss: type(loss).__name__)


@every_method
@every_ball
@pytest.mark.parametrize("around", [lambda loss: loss, lambda loss: Qub(base=loss)], ids=["alone", "qub"])
@pytest.mark.parametrize("count", [1, 7])
def test_any_ball_any_batch(loss, ball, around, count):
    """Three epochs of one batch: inside the set, finite, and other than without a memory."""
    model, batch, whole = smooth_model(), make_batch(count), around(loss)
    state = state_of(whole, 7, pad=1)
    specs = whole.declare_state((1, 8, 8), 10)
    assert specs == loss.declare_state((1, 8, 8), 10) and all(spec.dtype == torch.float32 for spec in specs.values())
    for epoch in range(3):
        step = step_of(ball, batch, state, epoch, epoch)
        images = whole.attacked(model, batch, replace(step, state=state_of(whole, 7, pad=1))).images
        remembered = whole.attacked(model, batch, step).images
        assert ball.contains(batch.images, remembered, 1e-12).all()
        assert ((remembered >= 0) & (remembered <= 1)).all()
        assert epoch == 0 or not torch.equal(images, remembered)
        terms, grad = gradient(model, whole, batch, step)
        assert torch.isfinite(terms.total) and torch.isfinite(grad).all() and grad.abs().sum() > 0
    assert all(torch.isfinite(t).all() and t.any() for t in state.tensors.values())


@pytest.mark.parametrize("loss", [FgsmPgi(), Atta()], ids=lambda loss: type(loss).__name__)
def test_what_a_sample_keeps_follows_its_number(loss):
    """The same visits under other numbers leave the same rows, at those numbers."""
    data, names = make_batch(SAMPLES), torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5))
    outcomes = []
    for numbers in (torch.arange(SAMPLES), names):
        state, model = state_of(loss, pad=1), smooth_model()
        for epoch, number, index in visits(3):
            rows = Augmentation(index % 3, (index + epoch) % 3, index % 2 == 0, 1)
            batch = Batch(data.images[index], data.labels[index], numbers[index], rows)
            loss.attacked(model, batch, step_of(LinfBall(0.1), batch, state, epoch, number))
        outcomes.append({name: tensor[numbers] for name, tensor in state.tensors.items()})
    for name, tensor in outcomes[0].items():
        assert torch.equal(tensor, outcomes[1][name]) and tensor.any()


@pytest.mark.parametrize("loss", [FgsmPgi(), Atta(), FreeAt(replays=2)], ids=lambda loss: type(loss).__name__)
def test_interrupted_anywhere_it_goes_on_bit_for_bit(loss):
    """Weights, buffers and augmented batches, from a copy of the weights and the state taken after any step."""
    data = Digits().load().train
    loader = Loader(data, 500, Augment(pad=1, flip=True), seed=3)
    specs = loss.declare_state((1, 8, 8), 10)

    def run(first, model, tensors):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        yield {}, {}
        for number in range(first, 2 * len(loader)):
            epoch, position = divmod(number, len(loader))
            batch = next(loader.epoch(epoch, start=position))
            step = step_of(LinfBall(0.1), batch, State(tensors, specs), epoch, number)
            for replay in range(loss.replays):
                Descend()(model, optimizer, loss, [(batch, step.again(replay))], clip=None)
            yield {k: v.clone() for k, v in model.state_dict().items()}, {k: v.clone() for k, v in tensors.items()}

    def fresh():
        tensors = {name: spec.allocate(len(data), 500, torch.device("cpu"), 1) for name, spec in specs.items()}
        return smooth_model(10).float(), tensors

    whole = list(run(0, *fresh()))[1:]
    for cut in (1, len(loader), len(loader) + 1):
        model, _ = fresh()
        weights, tensors = whole[cut - 1]
        model.load_state_dict(weights)
        *_, (last, kept) = run(cut, model, {name: tensor.clone() for name, tensor in tensors.items()})
        assert all(torch.equal(value, whole[-1][0][name]) for name, value in last.items())
        assert all(torch.equal(value, whole[-1][1][name]) and value.any() for name, value in kept.items())
