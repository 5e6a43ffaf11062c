"""sPGD against a plain-torch twin that attacks one image at a time, and against networks whose answers are scripted."""

import itertools
import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from certtrain import devices
from certtrain.attacks import CrossEntropy, KullbackLeibler, SparsePgd, SwitchedMargin, gradient_of
from certtrain.attacks.sparse import spgd
from certtrain.bounds import SparseBall
from certtrain.noise import Noise
from certtrain.step import Batch, Step

EXACT = {"rtol": 0, "atol": 1e-10}
KEY = 5
both_variants = pytest.mark.parametrize("variant", ["projected", "unprojected"])


class Net(nn.Module):
    """Smooth, and sure enough of itself that some images take a few steps and others withstand."""

    def __init__(self, channels=3, size=6):
        super().__init__()
        torch.manual_seed(channels)
        self.conv = nn.Conv2d(channels, 5, 3, padding=1).double()
        self.norm = nn.BatchNorm2d(5).double()
        self.dense = nn.Linear(5 * size * size, 4).double()
        self.calls = 0
        self.norm.running_mean = torch.empty(5, dtype=torch.float64).uniform_(-0.1, 0.1)
        with torch.no_grad():
            self.dense.weight.mul_(3)

    def forward(self, x):
        self.calls += 1
        return self.dense(torch.tanh(3 * self.norm(self.conv(x))).flatten(1))


def make_batch(net=None, channels=3, count=10, size=6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, channels, size, size, generator=generator, dtype=torch.float64)
    images[images < 0.1], images[images > 0.9] = 0.0, 1.0
    labels = torch.zeros(count, dtype=torch.int64)
    if net is not None:
        labels = net.eval()(images).argmax(1)
        labels[3] = (labels[3] + 1) % 4  # a clean error
    return Batch(images, labels, 100 + torch.arange(count))


def run(attack, net, batch, ball, key=KEY):
    return attack(net, batch, ball, Step.evaluation(ball, Noise(key, batch.index)))


def members(unit, side, channels, height, width) -> Tensor:
    """(M, N): where the M numbers of each of N units are in a flat image."""

    def at(c, h, w):
        return (c * height + h) * width + w

    every = list(itertools.product(range(channels), range(height), range(width)))
    name = {
        "pixel": lambda c, h, w: (h, w), "feature": lambda c, h, w: (c, h, w), "row": lambda c, h, w: h,
        "column": lambda c, h, w: w, "patch": lambda c, h, w: (h // side, w // side),
    }[unit]  # fmt: skip
    found = defaultdict(list)
    for place in sorted(every, key=lambda p: (name(*p), p)):
        found[name(*place)].append(at(*place))
    return torch.tensor(list(found.values())).T


def first(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(scores)
    mask[torch.sort(scores, descending=True, stable=True).indices[:k]] = 1
    return mask


def cross_entropy(logits, label, clean):
    return torch.logsumexp(logits, 0) - logits[label]


def margin(logits, label, clean):
    others = torch.cat([logits[:label], logits[label + 1 :]]).max()
    return others - logits[label] if logits[label] - others < 0.5 else cross_entropy(logits, label, clean)


def soft_cross_entropy(logits, target, clean):
    return -(target * torch.log_softmax(logits, 0)).sum()


def divergence(logits, label, clean):
    p, q = torch.softmax(clean, 0), torch.softmax(logits, 0)
    return (p * (p.log() - q.log())).sum()


def twin(
    net, x, y, k, places, noise, *, steps, alpha, beta, projected, patience, keep, loss=cross_entropy, target=None
):
    """One image: (result, when it was found, what each step led to, the points it was asked at)."""
    net, units, flat = net.eval(), places.shape[1], x.flatten()
    k, aim, draw = min(max(int(k), 0), units), y if target is None else target, torch.float64
    center, wrong = flat[places], lambda z: bool(z.argmax() != y)
    clean = net(x[None])[0].detach()
    p = 2 * noise.uniform(places.shape, "magnitudes", draw)[0] - 1
    p = torch.min(torch.max(p, -center), 1 - center)
    m = noise.normal((units,), "logits", draw)[0]
    mask, still, log, asked = first(m, k), 0, [], []
    best, value, found = x, float(loss(clean, aim, clean)), 0 if wrong(clean) else -1
    for number in range(steps + 1):
        if keep == "best" and found >= 0:
            break
        point = flat.clone()
        point[places] = torch.where(mask.bool(), center + p * mask, center)
        point = point.reshape(x.shape).requires_grad_()
        asked.append(point.detach())
        logits = net(point[None])[0]
        here = loss(logits, aim, clean)
        if found < 0 and (wrong(logits) or here >= value):
            best, value, found = point.detach(), float(here.detach()), number if wrong(logits) else -1
        if number == steps:
            break
        (gradient,) = torch.autograd.grad(here, point)
        gradient = gradient.flatten()[places]
        surrogate_p, surrogate_m = p.clone().requires_grad_(), m.clone().requires_grad_()
        for_p, for_m = torch.autograd.grad(surrogate_p * surrogate_m.sigmoid(), (surrogate_p, surrogate_m), gradient)
        if projected:
            for_p = gradient * mask
        length = for_m.norm()
        if length >= 2e-10:
            m = m + beta * units**0.5 * for_m / (length + 1e-10)
        p = (p + alpha * for_p.sign()).clamp(-1, 1)
        p = torch.min(torch.max(p, -center), 1 - center)
        new = first(m, k)
        still, mask = still + 1 if torch.equal(new, mask) else 0, new
        drawn = still == patience
        if drawn:
            m, still = noise.normal((units,), f"logits/{number}", draw)[0], 0
            mask = first(m, k)
        log.append({"p": p, "m": m, "mask": mask, "still": still, "drawn": drawn})
    asked_last = flat.clone()
    asked_last[places] = torch.where(mask.bool(), center + p, center)
    return best if keep == "best" else asked_last.reshape(x.shape), found, log, asked


@pytest.fixture
def walked(monkeypatch):
    """What each step led to: by the image's number and the step's."""
    log, moved = {}, SparsePgd.moved

    def recorded(self, walk, gradient, projected, number):
        new = moved(self, walk, gradient, projected, number)
        for place, row in enumerate(new.rows.tolist()):
            state = {name: getattr(new, name)[place].clone() for name in ("p", "m", "mask", "points", "still")}
            log[row, number] = state
        return new

    monkeypatch.setattr(SparsePgd, "moved", recorded)
    return log


def compare(attack, ball, walked, *, channels=3, loss=cross_entropy, targets=None, projected=None):
    """The attack against the twin: every step of every image, and what comes out. Returns the twin's records."""
    net = Net(channels)
    batch = replace(make_batch(net, channels), targets=targets)
    result = run(attack, net, batch, ball)
    places = members(ball.unit, ball.side, channels, 6, 6)
    projected = attack.variant == "projected" if projected is None else projected
    budgets = ball.k.tolist() if isinstance(ball.k, Tensor) else [ball.k] * len(batch)
    records = []
    for i in range(len(batch)):
        record = twin(
            net, batch.images[i], batch.labels[i], budgets[i], places, Noise(KEY, batch.index[i : i + 1]),
            steps=attack.steps, alpha=attack.alpha, beta=attack.beta, projected=projected, patience=attack.patience,
            keep=attack.keep, loss=loss, target=None if targets is None else targets[i],
        )  # fmt: skip
        expected, found, log, _ = record
        for number, state in enumerate(log):
            ours = walked[i, number]
            where = f"image {i}, step {number}"
            assert torch.equal(ours["mask"].double(), state["mask"]), where
            assert int(ours["still"]) == (0 if attack.patience is None else state["still"]), where
            torch.testing.assert_close(ours["p"], state["p"], **EXACT)
            torch.testing.assert_close(ours["m"], state["m"], rtol=1e-9, atol=1e-9)
            center = batch.images[i].flatten()[places]
            points = torch.where(state["mask"].bool(), center + state["p"], center)
            torch.testing.assert_close(ours["points"], points, **EXACT)
        torch.testing.assert_close(result.images[i], expected, **EXACT)
        if attack.keep == "best":
            assert int(result.trace["found_at"][i]) == found
        records.append(record)
    return result, records


class TestTwin:
    @both_variants
    @pytest.mark.parametrize("channels", [1, 3])
    def test_the_best_of_several_steps(self, variant, channels, walked):
        attack = SparsePgd(steps=9, variant=variant)
        _, records = compare(attack, SparseBall(2), walked, channels=channels)
        found = [record[1] for record in records]
        assert 0 in found and -1 in found and max(found) > 1  # all three ends were seen

    @both_variants
    @pytest.mark.parametrize(("patience", "beta"), [(1, 0.05), (2, 0.02), (3, 0.1)])
    def test_logits_are_drawn_anew(self, variant, patience, beta, walked):
        attack = SparsePgd(steps=11, beta=beta, variant=variant, patience=patience)
        _, records = compare(attack, SparseBall(1), walked)
        drawn = [state["drawn"] for _, _, log, _ in records for state in log]
        assert 5 < sum(drawn) < len(drawn)

    @both_variants
    @pytest.mark.parametrize(
        "options",
        [{"steps": 1, "alpha": 1.0, "beta": 1.0, "patience": None}, {"steps": 7, "beta": 0.05, "patience": 2}],
    )
    def test_the_last_point(self, variant, options, walked):
        attack = SparsePgd(keep="last", variant=variant, **options)
        result, records = compare(attack, SparseBall(3), walked)
        assert len(walked) == attack.steps * 10  # clean errors walk too
        net, batch = Net(), make_batch(Net())
        start = torch.stack([asked[0] for *_, asked in records])
        torch.testing.assert_close(result.trace["start"], start, **EXACT)
        points = start.requires_grad_()
        logits = net.eval()(points)
        torch.testing.assert_close(result.trace["logits"], logits.detach(), **EXACT)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        torch.testing.assert_close(result.trace["gradient"], torch.autograd.grad(loss, points)[0], **EXACT)
        assert not any(value.requires_grad for value in result.trace.values())

    @both_variants
    def test_a_budget_for_each_image(self, variant, walked):
        ball = SparseBall(torch.tensor([0, 1, 2, 5, 36, 99, 3, 0, 1, 8]))
        result, _ = compare(SparsePgd(steps=6, beta=0.05, variant=variant), ball, walked)
        images = make_batch(Net()).images
        assert torch.equal(result.images[[0, 7]], images[[0, 7]])
        assert (ball.changed(images, result.images) <= ball.k).all()

    @both_variants
    @pytest.mark.parametrize(
        "ball",
        [SparseBall(6, "feature"), SparseBall(1, "row"), SparseBall(2, "column"), SparseBall(1, "patch", 2)],
        ids=lambda ball: ball.unit,
    )
    def test_units(self, variant, ball, walked):
        compare(SparsePgd(steps=5, beta=0.1, variant=variant, patience=2), ball, walked)

    @pytest.mark.parametrize(("objective", "loss"), [(SwitchedMargin(), margin), (KullbackLeibler(), divergence)])
    def test_objectives(self, objective, loss, walked):
        compare(SparsePgd(steps=6, objective=objective), SparseBall(2), walked, loss=loss)

    def test_toward_another_objective(self, walked):
        own = SparsePgd(steps=6, keep="last", objective=CrossEntropy())
        assert own.toward(KullbackLeibler()) is own
        result, records = compare(
            SparsePgd(steps=6, keep="last").toward(KullbackLeibler()), SparseBall(2), walked, loss=divergence
        )
        net, images = Net().eval(), make_batch(Net()).images
        start = torch.stack([asked[0] for *_, asked in records])
        reached, before = (
            torch.stack([divergence(a, None, b) for a, b in zip(net(x), net(images))]) for x in (result.images, start)
        )
        assert (reached > before).sum() >= 8

    def test_soft_labels_are_climbed_where_they_are_set(self, walked):
        batch = make_batch(Net())
        hard = F.one_hot(batch.labels, 4).double()
        soft = (0.6 * hard + 0.4 * hard.roll(1, 1) * torch.linspace(0, 1, 10)[:, None]).double()
        soft /= soft.sum(1, keepdim=True)
        attack, ball = SparsePgd(steps=5), SparseBall(2)
        found, _ = compare(attack, ball, walked, loss=soft_cross_entropy, targets=soft)
        plain, one_hot = (run(attack, Net(), replace(batch, targets=t), ball).images for t in (None, hard))
        assert torch.allclose(plain, one_hot, **EXACT) and not torch.allclose(found.images, plain)

    def test_a_coin_is_tossed_for_each_step(self, walked):
        net, batch, ball, seen = Net(), make_batch(Net()), SparseBall(2), set()
        for key in range(12):
            sides = [
                run(SparsePgd(steps=3, variant=v), net, batch, ball, key).images for v in ("projected", "unprojected")
            ]
            tossed = run(SparsePgd(steps=3, variant="coin"), net, batch, ball, key).images
            fallen = [torch.equal(tossed, side) for side in sides]
            assert fallen.count(True) == 1
            part = run(SparsePgd(steps=3, variant="coin"), net, batch.part(slice(4, 6)), ball, key).images
            assert torch.allclose(part, tossed[4:6], **EXACT)  # one toss, whatever the images
            seen.add(tuple(fallen))
        assert len(seen) == 2

    @pytest.mark.parametrize("ball", [SparseBall(1), SparseBall(torch.arange(10) % 4)], ids=["one", "each its own"])
    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_a_gpu_takes_the_same_way(self, keep, ball, monkeypatch, walked):
        """There nobody asks which images are left, or stuck, until a stretch is over."""
        monkeypatch.setattr(devices, "reading_waits", lambda values: True)
        monkeypatch.setattr(spgd, "STRETCH", 4)
        _, records = compare(SparsePgd(steps=11, beta=0.05, patience=2, keep=keep), ball, walked)
        assert any(state["drawn"] for _, _, log, _ in records for state in log)


class Scripted(nn.Module):
    """Two classes; the label 0 leads by ``leads[call]`` (B,), whatever the images are. Their gradient is given."""

    def __init__(self, leads: Tensor, gradient=None):
        super().__init__()
        self.leads, self.gradient, self.asked = leads, gradient, []

    def forward(self, x):
        lead = self.leads[len(self.asked)]
        self.asked.append(x.detach().clone())
        slope = torch.zeros_like(x) if self.gradient is None else self.gradient
        own = lead + ((x - x.detach()) * slope).flatten(1).sum(1)
        return torch.stack([own, torch.zeros_like(own)], 1)


class TestBest:
    @pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
    @pytest.mark.parametrize("seed", range(6))
    def test_the_first_success_or_the_latest_of_the_greatest(self, seed, gpu, monkeypatch):
        monkeypatch.setattr(devices, "reading_waits", lambda values: gpu)
        generator = torch.Generator().manual_seed(seed)
        leads = torch.randint(-1 if seed % 2 else 1, 6, (8, 40), generator=generator).double()  # of which many tie
        if seed > 3:
            leads[torch.rand(leads.shape, generator=generator) < 0.1] = torch.nan
        model, batch = Scripted(leads, torch.ones(40, 1, 4, 4)), make_batch(channels=1, count=40, size=4)
        attack = SparsePgd(steps=6, beta=0.05, patience=1, attack_mode="batch")  # whose batch stays whole
        result = run(attack, model, batch, SparseBall(2))
        points = [batch.images, *model.asked[1:]]
        for row, column in enumerate(leads.T.tolist()):
            broken = [call for call, lead in enumerate(column) if not lead > 0]
            least = min(column)
            chosen = broken[0] if broken else max(call for call, lead in enumerate(column) if lead == least)
            assert torch.equal(result.images[row], points[chosen][row])
            assert int(result.trace["found_at"][row]) == (max(chosen - 1, 0) if broken else -1)

    def test_more_steps_go_on_from_where_fewer_stopped(self):
        net, batch, ball = Net(), make_batch(Net()), SparseBall(2)
        results = [run(SparsePgd(steps=steps), net, batch, ball) for steps in range(1, 13)]
        with torch.no_grad():
            losses = [F.cross_entropy(net.eval()(r.images), batch.labels, reduction="none") for r in results]
            clean = F.cross_entropy(net(batch.images), batch.labels, reduction="none")
        assert (losses[0] >= clean - 1e-12).all()
        for (less, before), (more, after) in itertools.pairwise(zip(results, losses)):
            done = less.trace["found_at"] >= 0
            assert torch.equal(more.images[done], less.images[done])  # a success is never replaced
            assert torch.equal(more.trace["found_at"][done], less.trace["found_at"][done])
            assert (after[~done & (more.trace["found_at"] < 0)] >= before[~done & (more.trace["found_at"] < 0)]).all()
        assert 1 < int((results[-1].trace["found_at"] > 1).sum())

    @both_variants
    def test_success_is_what_a_fresh_pass_finds(self, variant):
        net, batch = Net(), make_batch(Net(), count=60)
        for k in (0, 1, 2, 36, 37):
            result = run(SparsePgd(steps=6, variant=variant), net, batch, SparseBall(k))
            right = net.eval()(result.images).argmax(1) == batch.labels
            assert torch.equal(right, result.trace["found_at"] < 0)
            assert torch.equal(result.images[3], batch.images[3]) and result.trace["found_at"][3] == 0
            changed = ((result.images - batch.images) != 0).any(1).flatten(1).sum(1)
            assert (changed <= k).all() and (result.images >= 0).all() and (result.images <= 1).all()
            if not k:
                assert torch.equal(result.images, batch.images) and right.sum() == 59

    @pytest.mark.parametrize("mode", [True, False])
    def test_errors_alone_are_returned_as_they_are(self, mode):
        net, batch = Net(), make_batch(Net())
        batch = replace(batch, labels=(net.eval()(batch.images).argmax(1) + 1) % 4)
        net.train(mode).calls = 0
        result = run(SparsePgd(steps=5), net, batch, SparseBall(4))
        assert torch.equal(result.images, batch.images) and result.images.dtype == torch.float64
        assert result.trace["found_at"].tolist() == [0] * 10
        assert net.calls == 1 and net.training is mode and net.norm.training is mode

    def test_only_images_that_are_left_are_asked_about(self):
        net, batch = Net(), make_batch(Net())
        sizes = []
        net.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
        found = run(SparsePgd(steps=9), net, batch, SparseBall(2)).trace["found_at"]
        left = [int(((found < 0) | (found >= number)).sum()) for number in range(1, 10)]
        start = len(batch) - 1  # without the clean error
        assert sizes == [len(batch), start, *(size for size in left if size)]


class TestPatience:
    @pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "as on a gpu"])
    @pytest.mark.parametrize("patience", [1, 2, 3, 5])
    def test_logits_are_drawn_after_so_many_unchanged_masks_in_a_row(self, patience, gpu, monkeypatch):
        """Of one pixel: a push of 9 makes another the greatest. Rows: never pushed, pushed at 2, at 1 and 4, always."""
        monkeypatch.setattr(devices, "reading_waits", lambda values: gpu)
        pushes = [set(), {2}, {1, 4}, set(range(12))]
        images = torch.full((4, 1, 1, 5), 0.5, dtype=torch.float64)
        batch, ball = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4)), SparseBall(1)
        attack = SparsePgd(alpha=1e-9, beta=9 / 5**0.5, patience=patience)
        walk = attack.begin(batch, ball, Step.evaluation(ball, Noise(0, batch.index)))
        still = [0] * 4
        for number in range(12):
            gradient = torch.zeros(4, 1, 5, dtype=torch.float64)
            for row in range(4):
                if number in pushes[row]:
                    m, p = walk.m[row], walk.p[row, 0]
                    weakest = int(torch.where(m < 3, m, torch.inf).argmin()) if (m < 3).any() else int(m.argmin())
                    gradient[row, 0, weakest] = p[weakest].sign()
                    gradient[row, 0, int(m.argmax())] = -100 * p[int(m.argmax())].sign()  # a saturated one has to fall
            new = attack.moved(walk, gradient, True, number)
            for row in range(4):
                bare = spgd.kernels.spgd_step(
                    gradient, walk.p, walk.m, walk.center, walk.mask, 1, alpha=1e-9, beta=attack.beta, projected=True
                )
                still[row] = still[row] + 1 if torch.equal(bare[2][row], walk.mask[row]) else 0
                if still[row] == patience:
                    still[row] = 0
                    fresh = Noise(0, batch.index).normal((5,), f"logits/{number}", torch.float64)[row]
                    assert torch.equal(new.m[row], fresh)
                    assert int(new.mask[row].argmax()) == int(fresh.argmax()) and new.mask[row].sum() == 1
                else:
                    assert torch.equal(new.m[row], bare[1][row]) and torch.equal(new.mask[row], bare[2][row])
                changed = new.points[row] != images[row].reshape(1, 5)
                assert torch.equal(changed[0], new.mask[row].bool()) and torch.equal(new.p[row], bare[0][row])
            assert new.still.tolist() == still
            walk = new

    def test_none_is_never(self, walked):
        model, batch = Scripted(torch.ones(22, 3)), make_batch(channels=1, count=3)
        run(SparsePgd(steps=20, patience=None, attack_mode="batch"), model, batch, SparseBall(2))
        logits = torch.stack([walked[0, number]["m"] for number in range(20)])
        assert (logits == logits[0]).all()  # without a gradient nothing moves them

    def test_neighbours_draw_the_same_whoever_is_stuck(self):
        """Numbers belong to the image and the step, not to how many images are drawn for."""
        net, batch, ball = Net(), make_batch(Net()), SparseBall(1)
        attack = SparsePgd(steps=10, beta=0.02, patience=2)
        whole = run(attack, net, batch, ball).images
        for order in ([7, 2, 9], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]):
            part = Batch(batch.images[order], batch.labels[order], batch.index[order])
            torch.testing.assert_close(run(attack, net, part, ball).images, whole[order], **EXACT)


class TestNumbers:
    @both_variants
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_a_gradient_that_is_not_finite(self, keep, value, variant, walked: dict):
        batch, ball = make_batch(channels=2, count=4, size=3), SparseBall(2)
        gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        attack = SparsePgd(steps=4, patience=None, keep=keep, variant=variant, attack_mode="batch")
        clean = run(attack, Scripted(torch.ones(6, 4).double(), gradient.clone()), batch, ball).images
        expected = walked.copy()
        gradient[1] = value
        found = run(attack, Scripted(torch.ones(6, 4).double(), gradient), batch, ball).images
        assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])  # neighbours do not notice
        assert torch.isfinite(found).all() and ball.contains(batch.images, found).all()
        logits = torch.stack([walked[1, number]["m"] for number in range(4)])
        assert (logits == logits[0]).all() and (expected[1, 0]["m"] != logits[0]).any()
        if value != value:
            p = torch.stack([walked[1, number]["p"] for number in range(4)])
            assert (p == p[0]).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_a_whole_step_of_all_pixels_ends_in_corners(self, dtype):
        net, batch, ball = Net().to(dtype), make_batch(Net(), count=50), SparseBall(5)
        batch = replace(batch, images=batch.images.to(dtype))
        attack = SparsePgd(steps=1, alpha=1.0, beta=1.0, patience=None, keep="last", variant="unprojected")
        found = run(attack, net, batch, ball).images
        changed = (found != batch.images).any(1)
        ends = torch.minimum(found, 1 - found).amax(1)[changed]
        assert found.dtype == dtype and 200 < changed.sum() <= 250 and ends.max() <= 2**-24

    @pytest.mark.parametrize(
        "shape", [(1, 3, 1, 1), (2, 1, 1, 1), (3, 1, 7, 7), (1, 2, 3, 341), (2, 3, 64, 65)], ids=str
    )
    def test_shapes(self, shape):
        generator = torch.Generator().manual_seed(0)
        images, pixels = torch.rand(shape, generator=generator), shape[2] * shape[3]
        gradient = torch.randn(shape, generator=generator)
        batch = Batch(images, torch.zeros(shape[0], dtype=torch.int64), torch.arange(shape[0]))
        for k in (0, 1, pixels, pixels + 1, 1 << 40):
            attack = SparsePgd(steps=2, keep="last")
            found = run(attack, Scripted(torch.ones(4, shape[0]), gradient), batch, SparseBall(k)).images
            changed = (found != images).any(1).flatten(1).sum(1)
            assert (changed <= min(k, pixels)).all() and found.shape == shape
            assert k == 0 or (changed >= 0.9 * min(k, pixels)).all()

    @both_variants
    def test_vectors(self, variant):
        batch = Batch(torch.rand(3, 7), torch.zeros(3, dtype=torch.int64), torch.arange(3))
        model = Scripted(torch.ones(9, 3), torch.ones(3, 7))
        found = run(SparsePgd(steps=4, variant=variant), model, batch, SparseBall(2)).images
        assert (((found != batch.images).sum(1)) <= 2).all() and found.shape == (3, 7)

    def test_layouts_carry_no_meaning(self):
        net, batch, ball = Net(), make_batch(Net()), SparseBall(2)
        expected = run(SparsePgd(steps=5), net, batch, ball).images
        wide = torch.empty(10, 3, 6, 12, dtype=torch.float64)
        wide[..., ::2] = batch.images
        for images in (batch.images.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
            found = run(SparsePgd(steps=5), net, replace(batch, images=images), ball).images
            torch.testing.assert_close(found, expected, **EXACT)

    def test_the_images_stay_and_nothing_is_drawn_from_global_generators(self):
        net, batch = Net(), make_batch(Net())
        states = (
            torch.random.get_rng_state(),
            np.random.get_state(legacy=False)["state"]["key"].copy(),
            random.getstate(),
        )
        images = batch.images.clone()
        run(SparsePgd(steps=6, beta=0.02, patience=1, variant="coin"), net, batch, SparseBall(2))
        assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[2]
        assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[1]) and torch.equal(
            batch.images, images
        )

    def test_the_same_bits_on_one_thread_and_on_two(self):
        shape, threads, found = (32, 3, 38, 38), torch.get_num_threads(), []
        generator = torch.Generator().manual_seed(0)
        batch = Batch(torch.rand(shape, generator=generator), torch.zeros(32, dtype=torch.int64), torch.arange(32))
        gradient = torch.randn(shape, generator=generator)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                attack = SparsePgd(steps=2, patience=1)
                found.append(run(attack, Scripted(torch.ones(4, 32), gradient), batch, SparseBall(9)).images)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)


LOOKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Operations that make the host wait for a GPU (``LOOKS``, and boolean indices, which are ``nonzero`` in disguise),
    with how often the network had been called; and what convolutions and products computed gradients of."""

    def __init__(self, net):
        super().__init__()
        self.net, self.looks, self.masks, self.shapes = net, [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        indexed = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in LOOKS or any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in indexed):
            self.looks.append(self.net.calls)
        if name == "convolution_backward":
            self.masks.append(tuple(args[-1]))
        if name in ("mm", "addmm"):
            self.shapes.append(tuple(found.shape))
        return found


class TestCost:
    def watched(self, attack, net, batch, ball):
        step = Step.evaluation(ball, Noise(KEY, batch.index))
        net.calls = 0
        with Watch(net) as watch:
            attack(net, batch, ball, step)
        return watch

    @pytest.mark.parametrize("ball", [SparseBall(1), SparseBall(torch.arange(10) % 3)], ids=["one", "each its own"])
    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_no_wait_inside_a_stretch(self, keep, ball, monkeypatch):
        net, batch = Net(), make_batch(Net())
        monkeypatch.setattr(devices, "reading_waits", lambda values: True)
        attack = SparsePgd(steps=25, beta=0.01, patience=2, keep=keep)
        watch = self.watched(attack, net, batch, ball)
        looked = {number * spgd.STRETCH + 1 for number in range(3)} if keep == "best" else set()
        assert set(watch.looks) == looked  # after that many calls; the first is of the clean images
        assert net.calls == 25 + (2 if keep == "best" else 0)

    def test_the_watch_sees_what_a_cpu_may_do(self):
        net, batch = Net(), make_batch(Net())
        watch = self.watched(SparsePgd(steps=25, beta=0.01, patience=2), net, batch, SparseBall(1))
        assert set(watch.looks) == set(range(28))  # at the pixels, then after each call

    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_no_gradients_of_weights(self, keep):
        net, batch = Net().train(), make_batch(Net())
        watch = self.watched(SparsePgd(steps=4, keep=keep), net, batch, SparseBall(1))
        assert watch.masks == [(True, False, False)] * 4
        assert (4, 180) not in watch.shapes and any(width == 180 for _, width in watch.shapes)
        assert all(p.grad is None and p.requires_grad for p in net.parameters())

        with Watch(net) as watch:  # which a backward pass would have
            F.cross_entropy(net(batch.images), batch.labels).backward()
        assert watch.masks == [(False, True, True)] and (4, 180) in watch.shapes

    @pytest.mark.parametrize(("keep", "calls"), [("best", 5 + 2), ("last", 5)])
    def test_one_gradient_for_each_step(self, keep, calls):
        """Beside them the best of all asks about the images, and about the last point."""
        net, batch = Net(), make_batch(Net())
        watch = self.watched(SparsePgd(steps=5, keep=keep), net, batch, SparseBall(1))
        assert net.calls == calls and len(watch.masks) == 5


def test_a_gradient_of_many_is_each_ones_own():
    net, batch = Net().eval(), make_batch(Net())
    logits, gradient = gradient_of(net, batch.images, lambda z: F.cross_entropy(z, batch.labels, reduction="none"))
    for i in range(3):
        x = batch.images[i].clone().requires_grad_()
        (own,) = torch.autograd.grad(F.cross_entropy(net(x[None]), batch.labels[i : i + 1]), x)
        torch.testing.assert_close(gradient[i], own, **EXACT)
    assert not logits.requires_grad
