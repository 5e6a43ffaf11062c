"""FGSM-CKPT and GradAlign against brute force, finite differences and their limits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from torch import nn

from certtrain.attacks import Ascent, Checkpoints, Pgd
from certtrain.bounds import L2Ball, LinfBall
from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.losses import Fgsm, FgsmCkpt, FgsmGa, FgsmRs, Loss, Qub
from certtrain.losses.adversarial.fgsm_ga import misalignment, published_weight
from certtrain.noise import Noise
from certtrain.step import Batch, Step

BALLS = [LinfBall(0.3), L2Ball(1.5)]
every_ball = pytest.mark.parametrize("ball", BALLS, ids=lambda ball: type(ball).__name__)


class Spy(nn.Module):
    """Remembers the images of every pass."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.model(x)


def step_of(ball, batch, **others) -> Step:
    radius = torch.tensor(ball.epsilon, dtype=torch.float64)
    return Step(ball.with_epsilon(radius), radius, radius, 0.5, Noise(3, torch.arange(len(batch))), **others)


def labelled(model, count=120) -> Batch:
    """Images of which the network has most, not all, right."""
    batch = make_batch(count)
    with torch.no_grad():
        for _ in range(50):
            model(batch.images)  # whose statistics then fit: predictions differ
        predicted = model.eval()(batch.images).argmax(1)
    model.train()
    return replace(batch, labels=torch.where(torch.arange(count) % 7 == 0, (predicted + 1) % 5, predicted))


class TestCheckpoints:
    @every_ball
    @pytest.mark.parametrize("reference", ["start", "clean"])
    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_against_a_search_sample_by_sample(self, ball, reference, count):
        model = make_model()
        batch = labelled(model)
        step = step_of(ball, batch)
        whole = Ascent(steps=1, step_size=1.25)(model, batch, ball, step)
        found = Checkpoints(checkpoints=count, reference=reference)(model, batch, ball, step)
        model.eval()

        def right(image, label):
            return bool(model(image[None]).argmax() == label)

        expected, shares = [], []
        for image, start, end, label in zip(batch.images, whole.trace["start"], whole.images, batch.labels):
            share = 0
            if right(start if reference == "start" else image, label):
                points = [image + k / count * (end - image) for k in range(1, count + 1)]
                share = next((k for k, point in enumerate(points, 1) if not right(point, label)), count)
            shares.append(share)
            expected.append(image + share / count * (end - image))
        assert found.trace["share"].tolist() == shares
        torch.testing.assert_close(found.images, torch.stack(expected), rtol=0, atol=1e-12)
        assert set(shares) == set(range(count + 1))

    def test_one_checkpoint_is_fgsm_rs_on_what_is_right_and_the_image_elsewhere(self):
        model = make_model()
        batch = labelled(model)
        step = step_of(LinfBall(0.3), batch)
        whole = Ascent(steps=1, step_size=1.25)(model, batch, step.ball, step)
        found = Checkpoints(checkpoints=1)(model, batch, step.ball, step).images
        right = whole.trace["correct"] > 0
        assert 0 < right.sum() < len(batch)
        assert torch.equal(found[right], whole.images[right]) and torch.equal(found[~right], batch.images[~right])

    def test_where_all_is_right_it_is_fgsm_rs_and_where_all_is_wrong_the_image(self):
        """A network that cannot be fooled, and its opposite."""
        batch = make_batch()
        step = make_step()
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
        nn.init.normal_(model[1].weight, std=1e-9)
        for right in (True, False):
            labels = torch.full_like(batch.labels, 2 if right else 1)
            with torch.no_grad():
                model[1].bias.copy_(torch.tensor([0.0, 0, 50, 0, 0]))
            found = FgsmCkpt().attacked(model, replace(batch, labels=labels), step)
            rs = FgsmRs().attacked(model, replace(batch, labels=labels), step)
            assert torch.equal(found.images, rs.images if right else batch.images)

    @pytest.mark.parametrize(("reference", "sizes"), [("start", [12, 36]), ("clean", [12, 12, 36])])
    def test_passes(self, reference, sizes):
        """The reference at the start costs none; the points on the way share one."""
        spy, batch = Spy(make_model()), make_batch()
        Checkpoints(checkpoints=4, reference=reference)(spy, batch, LinfBall(0.1), make_step())
        assert [len(images) for images in spy.seen] == sizes

    def test_unprojected_steps_are_cut_short_too(self):
        model = make_model()
        batch = labelled(model)
        ball = LinfBall(0.1)
        attack = Checkpoints(start_scale=2.0, step_size=1.0, projected=False)
        found = attack(model, batch, ball, step_of(ball, batch))
        assert (found.images >= 0).all() and (found.images <= 1).all()
        distance = (found.images - batch.images).abs().flatten(1).amax(1)
        assert distance.max() <= 0.3 + 1e-12 and (distance[found.trace["share"] == 3] > 0.1).any()

    @pytest.mark.parametrize(
        ("field", "value"), [("steps", 2), ("steps", 0), ("checkpoints", 0), ("reference", "x"), ("start", "x")]
    )
    def test_refuses(self, field, value):
        with pytest.raises(InputError, match=f"^loss.attack.{field}: found .*accepted"):
            structure(Loss, {"type": "FgsmCkpt", "attack": {field: value}}, "loss")

    def test_the_loss_is_the_cross_entropy_of_what_was_found(self):
        model, batch, step = make_model(), make_batch(), make_step()
        images = FgsmCkpt().attacked(model, batch, step).images
        terms, grad = gradient(model, FgsmCkpt(), batch, step)
        model.zero_grad()
        expected = F.cross_entropy(model(images), batch.labels)
        expected.backward()
        assert terms.total.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in model.parameters()]))


def smooth_model(classes=5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, classes)
    ).double()  # fmt: skip


class TestGradAlign:
    @every_ball
    def test_without_weight_it_is_fgsm(self, ball):
        """Bit for bit: value, gradients and running statistics."""
        batch, step = make_batch(), step_of(ball, make_batch())
        plain, aligned = make_model(), make_model()
        first, second = gradient(plain, Fgsm(), batch, step), gradient(aligned, FgsmGa(weight=0.0), batch, step)
        assert torch.equal(first[0].total, second[0].total) and torch.equal(first[1], second[1])
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), aligned.buffers()))

    @pytest.mark.parametrize("detached", [True, False])
    def test_gradients_against_finite_differences(self, detached):
        """Of CE(x') + w · mean(1 - cos), x' a constant, and g1 too where it is detached."""
        model, batch = smooth_model(), make_batch()
        step = step_of(LinfBall(0.3), batch)
        loss = FgsmGa(weight=1.7, detached=detached)
        images = loss.attacked(model, batch, step).images
        changed = batch.images + 0.3 * (2 * step.noise.uniform((1, 8, 8), "alignment", torch.float64) - 1)

        def of_input(points):
            points = points.clone().requires_grad_()
            return torch.autograd.grad(F.cross_entropy(model(points), batch.labels), points)[0].flatten(1)

        constant = of_input(batch.images)

        def value():
            first = constant if detached else of_input(batch.images)
            cosine = F.cosine_similarity(first, of_input(changed), dim=1, eps=0)
            return (F.cross_entropy(model(images), batch.labels) + 1.7 * (1 - cosine).mean()).item()

        terms, grad = gradient(model, loss, batch, step)
        assert terms.total.item() == pytest.approx(value(), rel=1e-12)
        torch.manual_seed(2)
        for _ in range(5):
            directions = [torch.randn_like(p) for p in model.parameters()]
            values = []
            for size in (1e-5, -2e-5):
                with torch.no_grad():
                    for parameter, direction in zip(model.parameters(), directions):
                        parameter.add_(size * direction)
                values.append(value())
            with torch.no_grad():
                for parameter, direction in zip(model.parameters(), directions):
                    parameter.add_(1e-5 * direction)
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float(grad @ torch.cat([d.flatten() for d in directions])), rel=1e-5)

    @pytest.mark.parametrize(
        ("loss", "count"),
        [
            (FgsmGa(weight=1.0), 3),
            (FgsmGa(weight=1.0, detached=False), 4),
            (FgsmGa(weight=1.0, attack=Ascent(attack_mode="eval", steps=1, start="zero")), 4),
            (FgsmGa(weight=1.0, attack=Ascent(attack_mode="train", steps=1, start="uniform")), 4),
            (FgsmGa(weight=1.0, attack=Pgd(attack_mode="train", random_start=False)), 4),
            (FgsmGa(weight=0.0), 2),
        ],
    )
    def test_passes(self, loss, count):
        """The attack's own gradient is used where it is the one that is wanted."""
        spy = Spy(make_model())
        loss(spy, make_batch(), make_step())
        assert len(spy.seen) == count

    def test_the_attacks_gradient_is_the_recomputed_one(self):
        batch, step = make_batch(), make_step()
        shared = gradient(make_model(), FgsmGa(weight=1.0), batch, step)
        attack = Checkpoints(attack_mode="train", start="zero", step_size=1.0, checkpoints=1)
        model = make_model()
        loss = FgsmGa(weight=1.0, attack=attack)
        found = FgsmGa().attacked(make_model(), batch, step)
        model.zero_grad()
        terms = loss.given(model, batch, step, replace(found, trace={}))
        terms.total.backward()
        assert terms.total.item() == pytest.approx(shared[0].total.item(), rel=1e-12)
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), shared[1])

    def test_two_logits_of_a_linear_model_are_aligned_and_three_are_not(self):
        batch, step = make_batch(), step_of(LinfBall(0.3), make_batch())
        for classes in (2, 3):
            torch.manual_seed(classes)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
            nn.init.normal_(model[1].weight)
            these = replace(batch, labels=batch.labels % classes)
            penalty = FgsmGa(weight=1.0)(model, these, step).parts["misalignment"]
            assert abs(penalty) < 1e-12 if classes == 2 else penalty > 1e-3

    @pytest.mark.parametrize("detached", [True, False])
    @pytest.mark.parametrize("dead", [3, 12])
    def test_samples_without_a_gradient_have_no_part(self, dead, detached):
        """Behind a ReLU that they do not open. The others' mean is unchanged; where none is left, it is 0."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 5)).double()
        nn.init.uniform_(model[1].weight, 0.1, 1)
        nn.init.constant_(model[1].bias, -2.0)
        batch = make_batch()
        batch.images[:dead] = 0
        step = step_of(LinfBall(0.01), batch)
        loss = FgsmGa(weight=1.0, detached=detached)
        terms, grad = gradient(model, loss, batch, step)
        assert torch.isfinite(grad).all() and torch.isfinite(terms.total)
        alive = slice(dead, None)
        if dead < 12:
            rest = loss(model, batch.part(alive), step.part(alive)).parts["misalignment"]
            assert terms.parts["misalignment"].item() == pytest.approx(rest.item(), rel=1e-9) and rest > 0
        else:
            assert terms.parts["misalignment"] == 0

    def test_samples_that_are_certain_have_no_part(self):
        """The softmax of logits 1000 apart has no gradient at all."""
        model, batch = smooth_model(), make_batch()
        with torch.no_grad():
            model[4].weight.mul_(1e5)
            labels = model(batch.images).argmax(1)
        loss = FgsmGa(weight=1.0)
        _, grad = gradient(model, loss, replace(batch, labels=labels), make_step())
        assert torch.isfinite(grad).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (4, 3, 5), (0, 2)])
    def test_misalignment_against_torch(self, shape, dtype):
        torch.manual_seed(0)
        first, second = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype).requires_grad_()
        found = misalignment(first, second)
        cosine = F.cosine_similarity(first.flatten(1), second.flatten(1), dim=1) if len(first) else first.new_ones(0)
        assert found.item() == pytest.approx((1 - cosine).mean().item() if len(first) else 0.0, abs=1e-6)
        small = 1e-30 if dtype == torch.float32 else 1e-200
        found = misalignment(first * small, second * small)
        (grad,) = torch.autograd.grad(found, second)
        assert found == 0 and (grad == 0).all()

    def test_the_published_weight(self):
        printed = {1: 0.027, 2: 0.036, 3: 0.047, 4: 0.063, 8: 0.200, 12: 0.632, 16: 2.0}
        for steps, weight in printed.items():
            assert published_weight(steps / 255) == pytest.approx(weight, abs=5.1e-4)
            epsilon = torch.tensor(steps / 255)
            assert float(published_weight(epsilon)) == pytest.approx(published_weight(steps / 255), rel=1e-6)

    def test_the_weight_follows_epsilon_unless_it_is_given(self):
        batch = make_batch()
        model = make_model(batch_norm=False)
        for epsilon in (4 / 255, 16 / 255):
            step = step_of(LinfBall(epsilon), batch)
            one, published = (FgsmGa(weight=w)(model, batch, step).parts["misalignment"] for w in (1.0, None))
            exact = torch.exp(torch.tensor(epsilon * 255 / 8).double() * torch.log(torch.tensor(10.0).double())) * 0.02
            assert published.item() == pytest.approx((one * exact).item(), rel=1e-9) and one > 0

    @pytest.mark.parametrize("clipped", [True, False])
    @every_ball
    def test_the_second_point(self, ball, clipped):
        """In the ball around the image; valid only where that is asked for."""
        batch, spy = make_batch(), Spy(make_model())
        step = step_of(ball, batch)
        FgsmGa(weight=1.0, clipped=clipped)(spy, batch, step)
        point = spy.seen[-1]
        change = (point - batch.images).flatten(1)
        size = change.abs().amax(1) if isinstance(ball, LinfBall) else change.norm(dim=1)
        assert (size <= ball.epsilon * (1 + 1e-9)).all() and (size > 0.5 * ball.epsilon).any()
        assert bool(((point >= 0) & (point <= 1)).all()) == clipped

    def test_qub_keeps_the_penalty(self):
        batch, step, model = make_batch(), make_step(), make_model(batch_norm=False)
        found = FgsmGa(weight=2.0).attacked(model, batch, step)
        with_it, without = (Qub(base=FgsmGa(weight=w)).given(model, batch, step, found) for w in (2.0, 0.0))
        penalty = with_it.parts["misalignment"]
        assert (with_it.total - without.total).item() == pytest.approx(penalty.item()) and penalty > 0

    def test_refuses(self):
        for bad in (-1.0, float("nan"), "many"):
            with pytest.raises(InputError, match=r"^loss.weight: found .*accepted"):
                structure(Loss, {"type": "FgsmGa", "weight": bad}, "loss")
        with pytest.raises(InputError, match=r"^loss.weight: found null for L2Ball; accepted: a number"):
            Qub(base=FgsmGa()).check_ball(L2Ball(0.5))
        FgsmGa().check_ball(LinfBall(0.1)), FgsmGa(weight=0.2).check_ball(L2Ball(0.5))


@every_ball
@pytest.mark.parametrize("loss", [FgsmCkpt(), FgsmGa(weight=0.3)], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("around", [lambda loss: loss, lambda loss: Qub(base=loss)], ids=["alone", "qub"])
@pytest.mark.parametrize("count", [1, 7])
def test_any_ball_any_batch(loss, ball, around, count):
    model = make_model(batch_norm=False)
    batch = make_batch(count)
    step = step_of(ball, batch)
    terms, grad = gradient(model, around(loss), batch, step)
    assert torch.isfinite(terms.total) and torch.isfinite(grad).all() and grad.abs().sum() > 0
    images = loss.attacked(model, batch, step).images
    assert ball.contains(batch.images, images, 1e-12).all() and ((images >= 0) & (images <= 1)).all()
    again, repeated = gradient(model, around(loss), batch, step)
    assert torch.equal(again.total, terms.total) and torch.equal(repeated, grad)
