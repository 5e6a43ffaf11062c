"""SABR, TAPS, STAPS, and CROWN-IBP with its loss fused: their boxes, their points, their limits."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from loss_cases import gradient, make_batch, make_model, make_step
from networks import Residual
from torch import nn

from certtrain.attacks import Pgd
from certtrain.bounds import Interval, LinfBall, compute_bounds, compute_margins, forward, split
from certtrain.bounds.crown import best_forms, bound_forms, interval_bounds, interval_forms
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import CcDist, CcIbp, CrownIbp, Ibp, Sabr, Staps, Taps, taps
from certtrain.losses.certified import margin_loss, margin_rows, margins_of
from certtrain.losses.crown_ibp import fused_loss
from certtrain.losses.sabr import small_box
from certtrain.losses.taps import Classifier, connected
from certtrain.models import SmallCnn
from certtrain.recipe import Config
from certtrain.run_folder import RunFolder
from certtrain.training import Smoothed, Training
from certtrain.verifiers import Certify
from certtrain.workflows import train as pipeline
from certtrain.workflows.train import train

SHARES = (0.0, 0.1, 0.4, 0.6, 0.9, 1.0)


def a_hull() -> tuple[Interval, torch.Tensor]:
    """Pixels of every kind, at the ends of [0, 1] too, and candidates in and around the set."""
    torch.manual_seed(0)
    images = torch.cat([torch.rand(50), torch.zeros(5), torch.ones(5), torch.tensor([0.01, 0.99])])
    hull = LinfBall(0.1).hull(images)
    return hull, images + 0.25 * (2 * torch.rand_like(images) - 1)


@pytest.mark.parametrize("share", SHARES)
def test_the_small_box_lies_in_the_hull_and_has_its_share(share):
    hull, candidates = a_hull()
    box = small_box(hull, candidates, share)
    assert (box.lower >= hull.lower - 1e-7).all() and (box.upper <= hull.upper + 1e-7).all()
    torch.testing.assert_close(box.radius, share * hull.radius)


def test_the_small_box_is_nearest_to_the_point():
    hull, candidates = a_hull()
    fits = (candidates - hull.center).abs() <= 0.6 * hull.radius
    box = small_box(hull, candidates, 0.4)
    torch.testing.assert_close(box.center[fits], candidates[fits])
    inside = (candidates - hull.center).abs() <= hull.radius
    assert fits.any() and (inside & ~fits).any() and box.contains(candidates, 1e-7)[inside].all()


def test_the_small_box_of_the_whole_share_is_the_hull_bit_for_bit():
    hull, candidates = a_hull()
    box = small_box(hull, candidates, 1.0)
    assert torch.equal(box.center, hull.center) and torch.equal(box.radius, hull.radius)


@pytest.mark.parametrize("ramp", [0.5, 1.0])
def test_sabr_of_the_whole_set_is_ibp(ramp):
    model, batch, step = make_model(), make_batch(), make_step(ramp=ramp)
    expected, slopes = gradient(copy.deepcopy(model), Ibp(), batch, step)
    found, other = gradient(copy.deepcopy(model), Sabr(tau=1.0, bn_mode="clean"), batch, step)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(other, slopes)


def test_sabr_grows_with_tau_up_to_the_verified_loss():
    """Item 13 of the reference sheet: boxes around one point are nested."""
    model, batch = make_model(), make_batch()
    hull = LinfBall(0.05).hull(batch.images)
    images = hull.center + hull.radius * (2 * torch.rand_like(batch.images) - 1)
    statistics = forward(model, batch.images).statistics
    losses = [
        margin_loss(compute_margins(model, small_box(hull, images, share), batch.labels, statistics)[0])
        for share in SHARES
    ]
    for smaller, larger in pairwise(losses):
        assert (smaller <= larger + 1e-12).all()
    assert (losses[0] < losses[-1]).all()


def test_sabr_tells_what_it_attacked_and_bounded():
    model, batch = make_model(), make_batch()
    parts = Sabr()(model, batch, make_step()).parts
    assert (
        parts["verified_loss"] > parts["adversarial_loss"] and parts["attacked_accuracy"] >= parts["verified_accuracy"]
    )


def test_sabr_confines_the_box_to_the_ball_or_to_the_attacked_set():
    model, batch, step = make_model(batch_norm=False), make_batch(), make_step()

    class Corner(Pgd):
        def propose(self, model, batch, ball, step):
            result = super().propose(model, batch, ball, step)
            return type(result)(torch.ones_like(result.images))

    loss = {
        where: Sabr(attack=Corner(), attack_epsilon_factor=2.0, tau=0.5, confine=where)
        for where in ("ball", "attacked")
    }
    found = {where: kind(model, batch, step).parts["verified_loss"] for where, kind in loss.items()}
    hull, wide = (LinfBall(epsilon).hull(batch.images) for epsilon in (0.05, 0.1))
    corner = wide.upper
    for where, outer in (("ball", hull), ("attacked", wide)):
        box = small_box(outer, corner, 0.5)
        expected = margin_loss(compute_margins(model, box, batch.labels)[0]).mean()
        torch.testing.assert_close(found[where], expected)
    assert found["ball"] != found["attacked"]


def test_shrinking_by_hand():
    """Pre-activations [-1, 2], [1, 3], [-4, -1]: only the first may have either sign."""
    layer = nn.Linear(3, 3)
    last = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
        layer.bias.copy_(torch.tensor([0.5, 2.0, -2.5]))
        last.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.0, 10.0, 100.0]]))
    box = Interval(torch.zeros(1, 3), torch.tensor([[1.5, 1.0, 1.5]]))
    model = nn.Sequential(layer, nn.ReLU(), last).eval()
    labels = torch.tensor([0])
    for keep in (False, True):
        plain = compute_margins(model, box, labels, keep=keep)[0]
        shrunk, activity = compute_margins(model, box, labels, keep=keep, shrink=0.8)
        assert plain.item() == pytest.approx(-(2 + 30)) and shrunk.item() == pytest.approx(-(1.6 + 30))
    (kept,) = activity.preactivations.values()
    assert kept.upper.tolist() == [[2.0, 3.0, -1.0]]  # what regularisers see is not shrunk


class TestSplit:
    @pytest.mark.parametrize(("activations", "first"), [(0, 2), (1, 1)])
    def test_the_halves_are_the_network(self, activations, first):
        model, batch = make_model(), make_batch()
        halves = split(model, activations)
        whole = forward(copy.deepcopy(model), batch.images)
        one, two = halves.share(whole.statistics)
        assert len(one) == first and len(one) + len(two) == len(whole.statistics)
        features = forward(halves.extractor, batch.images, one).logits
        torch.testing.assert_close(forward(halves.classifier, features, two).logits, whole.logits)
        assert (features >= 0).all()  # right behind a ReLU

    @pytest.mark.parametrize("activations", [0, 1])
    def test_bounds_go_through_both(self, activations):
        model, batch = make_model(), make_batch()
        statistics = forward(model, batch.images).statistics
        halves = split(model, activations)
        one, two = halves.share(statistics)
        box = LinfBall(0.05).region(batch.images)
        features = compute_bounds(halves.extractor, box, one)
        expected = compute_bounds(model, box, statistics)
        found = compute_bounds(halves.classifier, features, two)
        torch.testing.assert_close((found.lower, found.upper), (expected.lower, expected.upper))
        margins = compute_margins(halves.classifier, features, batch.labels, two)[0]
        torch.testing.assert_close(margins, compute_margins(model, box, batch.labels, statistics)[0])

    def test_a_cut_that_is_none_is_refused(self):
        model = nn.Sequential(
            nn.Linear(4, 4), nn.ReLU(), Residual(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), nn.ReLU(),
            nn.Linear(4, 3),
        )  # fmt: skip
        with pytest.raises(InputError, match=r"leaves 1 activations; accepted: 0, 2$"):
            split(model, 1)
        with pytest.raises(InputError, match="leaves 7 activations"):
            split(model, 7)
        with pytest.raises(InputError, match="leaves 0 activations; accepted: a network with"):
            split(nn.Linear(4, 3), 0)
        assert len(split(model, 2).classifier.operations) > len(split(model, 0).classifier.operations)


def test_gradients_to_the_sides():
    lower = torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0, 0.0]], requires_grad=True)
    upper = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 1.0]], requires_grad=True)
    box = Interval((lower + upper) / 2, (upper - lower) / 2)
    points = torch.tensor([[[0.0, 1.0, 0.5, 0.25, 2.0, 0.9], [0.0, 0.0, 1.0, 0.5, 2.0, 0.1]]])
    found = connected(box, points, 0.5)
    assert torch.equal(found, points)
    found[:, 0].sum().backward()
    assert lower.grad is not None and upper.grad is not None
    torch.testing.assert_close(lower.grad, torch.tensor([[1.0, 0.0, 0.0, 0.5, 0.5, 0.0]]))
    torch.testing.assert_close(upper.grad, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.5, 0.8]]))


class TestTaps:
    @pytest.mark.parametrize("steps", [1, 3, 10])
    def test_a_linear_classifier_is_attacked_exactly(self, steps):
        """Its margins' minima lie in corners: the interval bound itself."""
        model, batch, step = make_model(), make_batch(), make_step()
        loss = Taps(classifier_activations=0, latent_steps=steps, latent_restarts=1)
        parts = loss(model, batch, step).parts
        torch.testing.assert_close(parts["estimated_loss"], parts["verified_loss"])

    def test_points_lie_in_the_box_and_more_restarts_find_less(self):
        model, batch, step = make_model(), make_batch(), make_step(epsilon=0.2)
        statistics = forward(model, batch.images).statistics
        halves = split(model, 1)
        one, two = halves.share(statistics)
        features = compute_bounds(halves.extractor, LinfBall(0.2).region(batch.images), one)
        classifier = Classifier(halves.classifier, batch.labels, two)
        margins = []
        for restarts in (1, 4):
            points = Taps(latent_restarts=restarts, latent_steps=4).worst(classifier, features, 4, step)
            assert (points >= features.lower.unsqueeze(1) - 1e-12).all()
            assert (points <= features.upper.unsqueeze(1) + 1e-12).all()
            margins.append(classifier(points))
        bounds = compute_margins(halves.classifier, features, batch.labels, two)[0]
        assert (margins[1] <= margins[0]).all() and (margins[1] >= bounds - 1e-12).all()
        random = features.center.unsqueeze(1) + features.radius.unsqueeze(1) * (
            2 * torch.rand(12, 4, *features.center.shape[1:]) - 1
        )
        assert (margins[1] < classifier(random)).float().mean() > 0.95

    def test_images_are_attacked_a_few_at_a_time_where_memory_is_short(self, monkeypatch):
        batch, step = make_batch(), make_step()
        whole, slopes = gradient(make_model(), Taps(latent_steps=3), batch, step)
        size = 4 * 64 * 8  # bytes of one image's points
        monkeypatch.setattr(taps, "MEMORY", 5 * size)
        found, other = gradient(make_model(), Taps(latent_steps=3), batch, step)
        torch.testing.assert_close((found.total, other), (whole.total, slopes), rtol=1e-12, atol=1e-12)

    def test_the_classifier_takes_each_class_margin_at_its_own_point(self):
        model, batch = make_model(batch_norm=False), make_batch(3)
        halves = split(model, 1)
        points = torch.rand(3, 4, *forward(halves.extractor, batch.images).logits.shape[1:], dtype=torch.float64)
        found = Classifier(halves.classifier, batch.labels[:3], {})(points)
        for sample in range(3):
            wrong = [label for label in range(5) if label != int(batch.labels[sample])]
            for place, label in enumerate(wrong):
                logits = forward(halves.classifier, points[sample, place : place + 1]).logits[0]
                torch.testing.assert_close(found[sample, place], logits[batch.labels[sample]] - logits[label])

    def test_plain_intervals_until_the_ramp_is_done(self):
        batch, step = make_batch(), make_step(epsilon=0.02, ramp=0.4)
        expected, slopes = gradient(make_model(), Ibp(), batch, step)
        found, other = gradient(make_model(), Taps(), batch, step)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(other, slopes)

    def test_the_product_and_its_scaled_gradient(self):
        """d(T · V) with T's gradient times w: linear in w, at w = 1 the product's own."""
        batch, step = make_batch(), make_step()
        results = {
            w: gradient(make_model(), Taps(gradient_scale=w, latent_steps=3), batch, step) for w in (1.0, 2.0, 4.0)
        }
        totals = [terms.total for terms, _ in results.values()]
        torch.testing.assert_close(totals[1], totals[0])
        parts = results[1.0][0].parts
        torch.testing.assert_close(totals[0], parts["estimated_loss"] * parts["verified_loss"])
        one, two, four = (slope for _, slope in results.values())
        torch.testing.assert_close(four - two, 2 * (two - one))
        assert (two - one).abs().max() > 1e-3

    def test_staps_with_the_whole_box_is_taps(self):
        for ramp in (0.5, 1.0):
            batch, step = make_batch(), make_step(ramp=ramp)
            expected, slopes = gradient(make_model(), Taps(latent_steps=2), batch, step)
            found, other = gradient(make_model(), Staps(latent_steps=2, tau=1.0), batch, step)
            torch.testing.assert_close(found.total, expected.total)
            torch.testing.assert_close(other, slopes)

    def test_staps_with_a_small_box_bounds_less(self):
        batch, step = make_batch(), make_step()
        small, whole = (Staps(tau=tau)(make_model(), batch, step).parts["verified_loss"] for tau in (0.1, 1.0))
        assert small < whole


class TestFusion:
    @staticmethod
    def parts(scale=1.0, epsilon=0.05):
        model, batch = make_model().eval(), make_batch()
        with torch.no_grad():
            model[-1].weight *= scale
        network = fold(model, batch.images.shape[1:])
        region = LinfBall(epsilon).region(batch.images)
        logits = model(batch.images)
        return model, batch, network, region, margin_rows(batch.labels, logits)

    @pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.1, 0.4])
    @pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
    def test_is_never_below_the_loss_of_a_point(self, scale, epsilon):
        model, batch, network, region, rows = self.parts(scale, epsilon)
        bound = fused_loss(network, region, rows)
        for seed in range(20):
            torch.manual_seed(seed)
            noise = 2 * torch.rand_like(batch.images) - 1
            noise = noise if seed % 2 else noise.sign()
            images = (batch.images + epsilon * noise).clamp(0, 1)
            loss = F.cross_entropy(model(images), batch.labels, reduction="none")
            assert (loss <= bound + 1e-9 * (1 + bound)).all()

    def test_of_a_point_is_its_cross_entropy(self):
        model, batch, network, region, rows = self.parts(epsilon=0.0)
        expected = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        torch.testing.assert_close(fused_loss(network, region, rows), expected)

    def test_is_not_below_what_a_chord_gives_for_two_classes(self):
        """With one margin: log(1 + chord(its CROWN-IBP bound)), by hand."""
        model, batch, network, region, rows = self.parts()
        rows = rows[:, :1]
        least = bound_forms(network, region, rows, interval_bounds(network, region)).squeeze(1)
        margins = compute_margins(model, region, batch.labels)[0][:, 0]
        low, high = interval_forms(network, region, rows).squeeze(1), -interval_forms(network, region, -rows).squeeze(1)
        torch.testing.assert_close(low, margins)
        chord = torch.exp(-low) + (torch.exp(-high) - torch.exp(-low)) / (high - low) * (least - low)
        torch.testing.assert_close(fused_loss(network, region, rows), torch.log1p(chord))

    def test_margins_that_overflow_exponentials(self):
        *_, network, region, rows = self.parts(scale=1e4, epsilon=0.3)
        network = fold(self.parts(scale=1e4)[0], region.images.shape[1:], dtype=torch.float32)
        found = fused_loss(network, region.to(torch.float32), rows.float())
        assert found.isfinite().all() and found.max() > 100

    def test_trains_and_tells_interval_accuracy(self):
        batch, step = make_batch(), make_step()
        terms, slope = gradient(make_model(), CrownIbp(beta=1.0, fusion=True), batch, step)
        assert slope.isfinite().all() and slope.abs().max() > 0
        ibp, _ = gradient(make_model(), Ibp(), batch, step)
        torch.testing.assert_close(terms.parts["verified_loss"], ibp.parts["verified_loss"])
        none, _ = gradient(make_model(), CrownIbp(beta=0.0, fusion=True), batch, step)
        torch.testing.assert_close(none.total, ibp.total)


def test_an_attack_with_the_clean_statistics():
    """As one of the evaluation network whose running statistics are this batch's, biased; nothing is left behind."""
    model, batch, step = make_model(), make_batch(), make_step()
    before = copy.deepcopy(model.state_dict())
    attack = Pgd(steps=3, step_size=0.5, attack_mode="clean")
    found = attack(model, batch, LinfBall(0.05), step).images
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    twin = copy.deepcopy(model)
    norms = [layer for layer in twin if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm, statistics in zip(norms, forward(model, batch.images).statistics.values(), strict=True):
        norm.running_mean.copy_(statistics.mean.detach())
        norm.running_var.copy_(statistics.variance.detach())
    expected = Pgd(steps=3, step_size=0.5, attack_mode="eval")(twin, batch, LinfBall(0.05), step).images
    torch.testing.assert_close(found, expected)
    assert not torch.equal(
        found, Pgd(steps=3, step_size=0.5, attack_mode="eval")(model, batch, LinfBall(0.05), step).images
    )


class TestBestLayer:
    """Each form's minimum over the intervals of every layer on its way back: the input's and the last one's too."""

    @pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.4])
    def test_is_never_below_crown_ibp_nor_ibp_and_never_above_a_point(self, epsilon):
        model, batch, network, region, rows = TestFusion.parts(epsilon=epsilon)
        best = best_forms(network, region, rows)
        linear = bound_forms(network, region, rows, interval_bounds(network, region))
        assert (best >= linear - 1e-12).all() and (best >= interval_forms(network, region, rows) - 1e-12).all()
        for seed in range(20):
            torch.manual_seed(seed)
            images = (batch.images + epsilon * (2 * torch.rand_like(batch.images) - 1).sign()).clamp(0, 1)
            assert (best <= margins_of(model(images), batch.labels) + 1e-9).all()

    def test_a_layer_in_between_may_be_the_best(self):
        torch.manual_seed(1)
        linear = [nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)]
        model = nn.Sequential(nn.Flatten(), *(part for layer in linear for part in (layer, nn.ReLU())))[:-1].double()
        images, labels = torch.rand(8, 1, 1, 3).double(), torch.arange(8) % 3
        network, region = fold(model.eval(), torch.Size((1, 1, 3))), LinfBall(0.5).region(images)
        rows = margin_rows(labels, model(images))
        ends = bound_forms(network, region, rows, interval_bounds(network, region))
        ends = torch.maximum(ends, interval_forms(network, region, rows))
        assert (best_forms(network, region, rows) > ends + 1e-3).any()

    def test_residual_networks(self):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), Residual(block), nn.ReLU(), nn.Linear(6, 3))
        network = fold(model.double().eval(), torch.Size((1, 2, 2)))
        images, labels = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.arange(5) % 3
        region, rows = LinfBall(0.2).region(images), margin_rows(labels, model(images))
        best = best_forms(network, region, rows)
        assert (best >= bound_forms(network, region, rows, interval_bounds(network, region)) - 1e-12).all()
        for seed in range(20):
            torch.manual_seed(seed)
            found = model((images + 0.2 * (2 * torch.rand_like(images) - 1)).clamp(0, 1))
            assert (best <= margins_of(found, labels) + 1e-9).all()

    @pytest.mark.parametrize("fusion", [False, True])
    def test_trains(self, fusion):
        batch, step = make_batch(), make_step(epsilon=0.2)
        plain, slope = gradient(make_model(), CrownIbp(beta=1.0, fusion=fusion), batch, step)
        best, other = gradient(make_model(), CrownIbp(beta=1.0, fusion=fusion, best_layer=True), batch, step)
        assert best.total <= plain.total + 1e-9 and other.isfinite().all() and not torch.equal(slope, other)


class TestDistillation:
    @staticmethod
    def teacher(folder) -> nn.Module:
        torch.manual_seed(3)
        teacher = make_model()
        for parameter in teacher.parameters():
            nn.init.normal_(parameter, std=0.3)
        safetensors.torch.save_file(teacher.state_dict(), folder / "model.safetensors")
        return teacher.eval()

    @pytest.mark.parametrize("bn_mode", ["adv", "clean"])
    @pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
    def test_is_cc_ibp_plus_the_distance_by_hand(self, alpha, bn_mode, tmp_path):
        teacher, batch, step = self.teacher(tmp_path), make_batch(), make_step()
        attack = Pgd(steps=2, step_size=0.5)
        plain = CcIbp(alpha=alpha, attack=attack, bn_mode=bn_mode)(make_model(), batch, step)
        found = CcDist(alpha=alpha, attack=attack, bn_mode=bn_mode, teacher=tmp_path, weight=2.0)(
            make_model(), batch, step
        )
        model = make_model()
        clean = forward(model, batch.images)
        images = attack(model, batch, step.ball, step).images
        adversarial = forward(model, images, clean.statistics if bn_mode == "clean" else None)
        head, features = model[-1], nn.Sequential(*list(model)[:-1])
        box = compute_bounds(features, step.ball.region(batch.images), adversarial.statistics)
        own = forward(features, images, adversarial.statistics).logits
        target = nn.Sequential(*list(teacher)[:-1])(batch.images)
        distances = [
            (((1 - alpha) * own + alpha * end - target) ** 2).sum(1) / head.in_features
            for end in (box.lower, box.upper)
        ]
        expected = torch.maximum(*distances).mean()
        torch.testing.assert_close(found.parts["distance"], expected.detach())
        torch.testing.assert_close(found.total, plain.total + 2 * expected)

    def test_a_student_that_is_its_teacher_is_at_no_distance_from_it(self, tmp_path):
        model = make_model()
        safetensors.torch.save_file(model.state_dict(), tmp_path / "twin.safetensors")
        point = dataclasses.replace(make_step(), ball=LinfBall(0.0))
        loss = CcDist(teacher=tmp_path / "twin.safetensors")
        assert loss(model.eval(), make_batch(), point).parts["distance"] < 1e-20
        assert loss(make_model().eval(), make_batch(), make_step()).parts["distance"] > 0

    def test_teachers_that_cannot_teach(self, tmp_path):
        model = make_model()
        (tmp_path / "short.safetensors").write_bytes(b"short")
        safetensors.torch.save_file(make_model(batch_norm=False).state_dict(), tmp_path / "other.safetensors")
        for teacher, named in ((None, "found none"), (tmp_path / "no", "no.*cannot be read"),
                               (tmp_path / "short.safetensors", "short.*cannot be read"),
                               (tmp_path / "other.safetensors", "other.*accepted: weights")):  # fmt: skip
            with pytest.raises(InputError, match=f"^loss.teacher: .*{named}"):
                CcDist(teacher=teacher).check_model(model)


def test_a_run_goes_on_with_the_same_teacher_alone(tmp_path, monkeypatch):
    def teach(seed):
        torch.manual_seed(seed)
        model = SmallCnn(width=2, hidden=4).build((1, 8, 8), 10)
        safetensors.torch.save_file(model.state_dict(), tmp_path / "teacher.safetensors")

    def stop(*_):
        raise KeyboardInterrupt

    teach(0)
    training = Training(epochs=2, batch_size=400, milestones=(), schedule=Smoothed(1, 1), checkpoint_seconds=0.0)
    loss = CcDist(teacher=tmp_path / "teacher.safetensors")
    recipe = Config(model=SmallCnn(width=2, hidden=4), loss=loss, training=training,
                    certify=Certify(images=3, stages=("ibp",)), export=Export(enabled=False))  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "save_weights", stop)
        train(recipe, tmp_path / "run", quiet=True)
    assert len(RunFolder.open(tmp_path / "run")[1]["loss_files"]["teacher"]) == 64
    teach(1)
    with pytest.raises(InputError, match="checkpoint of another recipe"):
        pipeline.resume(tmp_path / "run", quiet=True)
    teach(0)
    assert pipeline.resume(tmp_path / "run", quiet=True).final()


def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(tmp_path):
    for loss, named in ((Taps(classifier_activations=9), "leaves 9"), (CcDist(), "teacher")):
        with pytest.raises(InputError, match=named):
            train(Config(loss=loss), tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()
