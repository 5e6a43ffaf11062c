"""White-box l0 attacks beside sPGD: PGD0, SAIF and σ-zero, against enumeration and against plain twins."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.attacks import Attack, CrossEntropy, KullbackLeibler, Pgd0, Saif, SigmaZero, SwitchedMargin
from certtrain.attacks.sparse.saif import _Iterate
from certtrain.bounds import LinfBall, SparseBall
from certtrain.config import structure, unstructure
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step

SHAPE = (2, 4, 4)
ATTACKS = {
    "pgd0": Pgd0(steps=8, restarts=2),
    "saif": Saif(steps=12),
    "saif_line_search": Saif(steps=12, line_search=True),
    "sigma_zero": SigmaZero(steps=30),
}
BALLS = {
    "pixel": SparseBall(2), "feature": SparseBall(4, unit="feature"), "row": SparseBall(1, unit="row"),
    "column": SparseBall(1, unit="column"), "patch": SparseBall(1, unit="patch", side=2),
}  # fmt: skip
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
every_ball = pytest.mark.parametrize("ball", BALLS.values(), ids=BALLS)


def random_images(count, shape=SHAPE, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, *shape, generator=generator, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)


def make_model(dtype=torch.float64, classes=3):
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(80, classes)]
    return nn.Sequential(*layers).to(dtype).eval()


def make_wavy_model():
    """Whose gradient turns on the way."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    with torch.no_grad():
        model[1].weight.mul_(6)
    return model


def make_batch(model, count=9, *, wrong=2, dtype=torch.float64):
    """Every image right but the last few; those of a hundred that the model is surest of, as one pixel fools others."""
    pool = random_images(100, dtype=dtype)
    ahead = model(pool).detach().topk(2, 1).values.diff(dim=1)[:, 0]
    images = pool[ahead.argsort()[:count]]
    labels = model(images).argmax(1)
    labels[count - wrong :] = (labels[count - wrong :] + 1) % 3
    return Batch(images, labels, 40 + torch.arange(count))


def attacked(attack, model, batch, ball, key=3):
    return attack(model, batch, ball, Step.evaluation(ball, Noise(key, batch.index)))


def is_wrong(model, images, labels):
    logits = model(images)
    return ~(logits.gather(1, labels[:, None])[:, 0] > logits.scatter(1, labels[:, None], -torch.inf).amax(1))


class Spy(nn.Module):
    """Remembers every point at which the model was asked."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.points = []

    def forward(self, x):
        self.points.append(x.detach().clone())
        return self.model(x)


class TestWhatEachPromises:
    @every_attack
    @every_ball
    def test_results_lie_in_the_set_and_found_at_is_true(self, attack, ball):
        model, dtype = make_model(torch.float32), torch.float32
        batch = make_batch(model, dtype=dtype)
        result = attacked(attack, model, batch, ball)
        found_at, wrong = result.trace["found_at"], is_wrong(model, result.images, batch.labels)
        assert ball.contains(batch.images, result.images).all() and result.images.dtype == dtype
        assert found_at.dtype == torch.int64 and (found_at[:7] != 0).any() and (found_at[7:] == 0).all()
        assert torch.equal(result.images[7:], batch.images[7:])
        assert wrong[found_at >= 0].all()
        if not isinstance(attack, SigmaZero):
            assert torch.equal(found_at >= 0, wrong)

    @every_attack
    def test_one_k_for_each_image(self, attack):
        model = make_model()
        batch = make_batch(model)
        sizes = [0, 1, 2, 3, 5, 16, 1000, 0, 2]
        together = attacked(attack, model, batch, SparseBall(torch.tensor(sizes)))
        for number, k in enumerate(sizes):
            row = slice(number, number + 1)
            alone = attacked(attack, model, batch.part(row), SparseBall(k))
            torch.testing.assert_close(alone.images, together.images[row], rtol=0, atol=1e-12)
            assert alone.trace["found_at"] == together.trace["found_at"][row]
            assert SparseBall(k).contains(batch.images[row], together.images[row]).all()

    @every_attack
    def test_k_of_zero_changes_nothing(self, attack):
        model = make_model()
        batch = make_batch(model)
        result = attacked(attack, model, batch, SparseBall(0))
        assert torch.equal(result.images, batch.images)
        assert result.trace["found_at"].tolist() == [-1] * 7 + [0] * 2

    @every_attack
    def test_all_pixels_free_breaks_every_image(self, attack):
        model = make_model()
        batch = make_batch(model)
        for k in (16, 17, 10**9):
            assert is_wrong(model, attacked(attack, model, batch, SparseBall(k)).images, batch.labels).all()

    @every_attack
    def test_a_batch_of_clean_errors_is_left_at_once(self, attack):
        spy = Spy(make_model())
        batch = make_batch(spy.model, 4, wrong=4)
        result = attacked(attack, spy, batch, SparseBall(3))
        assert torch.equal(result.images, batch.images) and (result.trace["found_at"] == 0).all()
        assert len(spy.points) == 1

    @every_attack
    def test_deterministic_whatever_the_batch_and_the_generator(self, attack):
        model, ball = make_model(), SparseBall(2)
        batch = make_batch(model)
        before = torch.get_rng_state()
        whole = attacked(attack, model, batch, ball)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        again = attacked(attack, model, batch, ball)
        assert torch.equal(again.images, whole.images)
        for rows in (slice(0, 1), slice(1, 6), slice(6, 9)):
            part = attacked(attack, model, batch.part(rows), ball)
            torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-12)
            assert all(torch.equal(part.trace[name], whole.trace[name][rows]) for name in whole.trace)

    @every_attack
    def test_an_empty_batch(self, attack):
        model = make_model()
        assert attacked(attack, model, make_batch(model).part(slice(0, 0)), SparseBall(2)).images.shape == (0, *SHAPE)

    @every_attack
    def test_parameters_get_no_gradients(self, attack):
        model = make_model()
        attacked(attack, model, make_batch(model), SparseBall(2))
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    @every_attack
    @pytest.mark.parametrize("mode", ["eval", "train", "batch", "clean"])
    def test_batch_norm_over_the_batch_sees_all_of_it(self, attack, mode):
        spy = Spy(make_model())
        batch = make_batch(spy.model)
        attacked(replace(attack, attack_mode=mode), spy if mode != "clean" else spy.model, batch, SparseBall(2))
        sizes = {len(points) for points in spy.points}
        assert sizes == {9} if mode in ("train", "batch") else sizes != {9}

    @every_attack
    def test_other_sets_and_models_without_gradients_are_refused(self, attack):
        model = make_model()
        batch = make_batch(model)
        with pytest.raises(InputError, match="for a LinfBall"):
            attacked(attack, model, batch, LinfBall(0.1))

        class Closed(nn.Module):
            def forward(self, x):
                return model(x.detach()).detach()

        with pytest.raises(InputError, match="logits without gradients"):
            attacked(attack, Closed(), batch, SparseBall(2))

    @pytest.mark.parametrize("attack", [ATTACKS["pgd0"], ATTACKS["saif"], ATTACKS["saif_line_search"]])
    def test_the_objective_is_the_losss_unless_it_has_its_own(self, attack):
        model, ball = make_model(), SparseBall(2)
        batch = make_batch(model)
        own, served = SwitchedMargin(0.5), KullbackLeibler()
        assert attack.toward(served).objective == served
        assert replace(attack, objective=own).toward(served).objective == own
        assert torch.equal(
            attacked(attack, model, batch, ball).images,
            attacked(attack.toward(CrossEntropy()), model, batch, ball).images,
        )
        for objective in (own, served):
            result = attacked(attack.toward(objective), model, batch, ball)
            assert ball.contains(batch.images, result.images).all()
            assert torch.equal(result.trace["found_at"] >= 0, is_wrong(model, result.images, batch.labels))

    @pytest.mark.parametrize("attack", [ATTACKS["pgd0"], ATTACKS["saif"], ATTACKS["saif_line_search"]])
    def test_soft_labels_are_climbed_away_from(self, attack):
        """Those that say the opposite of the label send the attack the other way."""
        model, ball = make_model(classes=2), SparseBall(1)
        images = random_images(12)
        batch = Batch(images, model(images).argmax(1), torch.arange(12))
        other = replace(batch, targets=F.one_hot(1 - batch.labels, 2).double())
        lead = [F.cross_entropy(model(attacked(attack, model, b, ball).images), batch.labels) for b in (other, batch)]
        assert lead[0] < F.cross_entropy(model(images), batch.labels) < lead[1]

    @every_attack
    def test_it_is_a_section_of_a_recipe(self, attack):
        assert structure(Attack, unstructure(attack)) == attack


class Broken(nn.Module):
    """Logits that are NaN where the first number is above a bound, and gradients that are NaN in some places."""

    def __init__(self, model, places=(), above=math.inf):
        super().__init__()
        self.model, self.places, self.above = model, places, above

    def forward(self, x):
        logits = self.model(x)
        for place in self.places:  # sqrt has an infinite derivative at 0, and the difference one of 0
            here = x.flatten(1)[:, place]
            logits = logits + ((here - here) * 0).sqrt()[:, None]
        return torch.where(x.flatten(1)[:, :1] > self.above, torch.nan, logits)


class TestNotANumber:
    @every_attack
    def test_logits(self, attack):
        model, ball = Broken(make_model(), above=0.9), SparseBall(2)
        batch = make_batch(model.model)
        images = batch.images.clone()
        images[0, 0, 0, 0], images[1:, 0, 0, 0] = 0.95, 0.4
        batch = replace(batch, images=images, labels=model.model(images).argmax(1))
        result = attacked(attack, model, batch, ball)
        assert ball.contains(images, result.images).all() and result.images.isfinite().all()
        assert torch.equal(result.images[0], images[0]) and result.trace["found_at"][0] == 0
        assert is_wrong(model, result.images, batch.labels)[result.trace["found_at"] >= 0].all()

    @every_attack
    def test_gradients_everywhere(self, attack):
        model, ball = Broken(make_model(), range(32)), SparseBall(2)
        batch = make_batch(model.model)
        batch = replace(batch, images=batch.images * 0.8)
        result = attacked(attack, model, batch, ball)
        assert ball.contains(batch.images, result.images).all() and result.images.isfinite().all()

    @every_attack
    def test_gradients_in_one_pixel_leave_the_others(self, attack):
        """On a linear model with so large a budget the others suffice."""
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double()
        model = Broken(linear, (0, 16))
        images = random_images(8) * 0.8
        batch = Batch(images, linear(images).argmax(1), torch.arange(8))
        result = attacked(attack, model, batch, SparseBall(15))
        assert is_wrong(linear, result.images, batch.labels).all()


def linear_cases(channels, count=30, seed=0):
    """A linear model of two classes and 9 pixels, and right images; for each k the lowest lead of the label by
    enumeration of the pixels, each at its best corner: (10, B)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9 * channels, 2)).double()
    pool = random_images(900, (channels, 3, 3), seed=seed + 1)
    images = pool[model(pool).diff(dim=1)[:, 0].abs().argsort(descending=True)][:: 900 // count]
    labels = model(images).argmax(1)
    form = (model[1].weight[labels] - model[1].weight[1 - labels]).reshape(images.shape).detach()
    effect = (form * ((form < 0).double() - images)).sum(1).flatten(1)  # (B, 9)
    clean = (model(images).gather(1, labels[:, None]) - model(images).gather(1, 1 - labels[:, None]))[:, 0].detach()
    least = [
        clean + torch.stack([effect[:, list(chosen)].sum(1) for chosen in itertools.combinations(range(9), k)]).amin(0)
        for k in range(10)
    ]
    return model, Batch(images, labels, torch.arange(count)), torch.stack(least)


def lead_of(model, images, labels):
    logits = model(images)
    return (logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None]))[:, 0]


@pytest.mark.parametrize("channels", [1, 3])
class TestLinearModelsByEnumeration:
    @pytest.mark.parametrize(
        ("attack", "slack"),
        [(Pgd0(steps=5, step_size=1e9, restarts=1), 1e-6), (Pgd0(steps=5, restarts=1), 0.02), (Saif(steps=5), 1e-12)],
        ids=["pgd0_far", "pgd0", "saif"],
    )
    def test_the_best_point_is_found(self, attack, slack, channels):
        """PGD0's projection of a finite step favours, a little, the pixels that it has."""
        model, batch, least = linear_cases(channels)
        standing = 0
        for k in (1, 2, 4):
            result = attacked(attack, model, batch, SparseBall(k))
            assert (result.trace["found_at"] < 0)[least[k] > 0].all()
            assert (result.trace["found_at"] >= 0)[least[k] < -slack].all()
            found, hard = lead_of(model, result.images, batch.labels), least[k] > 0
            torch.testing.assert_close(found[hard], least[k][hard], rtol=0, atol=slack)
            standing += int(hard.sum())
        assert standing >= 8

    def test_the_line_search_comes_close(self, channels):
        model, batch, least = linear_cases(channels)
        for k in (1, 2, 4):
            result = attacked(Saif(steps=200, line_search=True), model, batch, SparseBall(k))
            standing = least[k] > 0.05  # its perturbations go to their corners geometrically
            found = lead_of(model, result.images, batch.labels)
            assert (found[standing] - least[k][standing] < 0.05).all() and (result.trace["found_at"] < 0)[
                standing
            ].all()
            assert (result.trace["found_at"] >= 0)[least[k] < -0.05].all()

    def test_the_fewest_pixels_are_found(self, channels):
        model, batch, least = linear_cases(channels)
        fewest = (least > 0).sum(0)  # of k = 0, …, 9
        changed = attacked(SigmaZero(steps=200), model, batch, SparseBall(9)).trace["changed"]
        breakable = fewest < 10
        assert breakable.any() and len(fewest[breakable].unique()) > 2
        assert torch.equal(changed < 0, ~breakable)
        assert (changed >= fewest)[breakable].all() and (changed <= fewest + 1)[breakable].all()
        assert (changed == fewest)[breakable].double().mean() > 0.9


def test_ties_go_to_the_first_pixels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 9))
        model[1].bias.zero_()
    batch = Batch(torch.full((3, 1, 3, 3), 0.5).double(), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    for attack in (Saif(steps=5), Pgd0(steps=5, restarts=1), SigmaZero(steps=5)):
        result = attacked(attack, model, batch, SparseBall(4))
        assert SparseBall(4).contains(batch.images, result.images).all()
        assert torch.equal(result.images, attacked(attack, model, batch, SparseBall(4)).images)
        if not isinstance(attack, SigmaZero):  # which, by symmetry, changes all at once
            assert (result.images == 0).flatten(1).sum(1).tolist() == [4, 4, 4]


def points_of(attack, model, batch, ball, number, key=3):
    """What the network was shown of one image, alone, after the clean pass."""
    spy, row = Spy(model), batch.part(slice(number, number + 1))
    attacked(attack, spy, row, ball, key)
    return spy.points


def gradient_at(model, point, label):
    point = point.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(point), label), point)[0]


class TestPgd0:
    @every_ball
    def test_against_a_plain_twin_step_by_step(self, ball):
        model = make_model()
        batch = make_batch(model, 6, wrong=0)
        for number in range(len(batch)):
            row = slice(number, number + 1)
            clean, label = batch.images[row], batch.labels[row]
            spy = points_of(Pgd0(steps=6, step_size=3.0, restarts=2), model, batch, ball, number)[1:]
            for restart in (0, 1):
                change = ball.sample(clean, Noise(3, batch.index[row]), f"start/{restart}")
                x = (clean + change).clamp(0, 1)
                for _ in range(7):
                    torch.testing.assert_close(spy.pop(0), x, rtol=0, atol=1e-12)
                    if is_wrong(model, x, label):
                        break
                    gradient = gradient_at(model, x, label)
                    moved = x + 3.0 * gradient / gradient.abs().sum()
                    change, outside = ball.grouped(moved - clean)[0], ball.grouped(moved - moved.clamp(0, 1))[0]
                    scores = change.square().sum(0) - outside.square().sum(0)
                    kept = torch.zeros_like(scores)
                    kept[scores.argsort(descending=True)[: ball.k]] = 1
                    x = clean + ball.ungrouped((ball.grouped(moved.clamp(0, 1) - clean)[0] * kept)[None], SHAPE)
                else:
                    continue
                break
            assert not spy

    def test_more_restarts_are_never_worse_and_are_counted(self):
        model, ball = make_model(), SparseBall(1)
        batch = make_batch(model, 40, wrong=0)
        runs = [attacked(Pgd0(steps=4, step_size=2.0, restarts=count), model, batch, ball) for count in (1, 3, 8)]
        for fewer, more in itertools.pairwise(runs):
            early = fewer.trace["found_at"] >= 0
            assert torch.equal(more.images[early], fewer.images[early])
            assert torch.equal(more.trace["found_at"][early], fewer.trace["found_at"][early])
            loss = [F.cross_entropy(model(run.images), batch.labels, reduction="none") for run in (fewer, more)]
            assert (loss[1] >= loss[0] - 1e-12)[more.trace["found_at"] < 0].all()
        later = runs[2].trace["found_at"][runs[0].trace["found_at"] < 0]
        assert (later[later >= 0] >= 4).all() and (later >= 0).any()

    @pytest.mark.parametrize("size", [1e-300, 1e300], ids=["tiny", "huge"])
    def test_gradients_of_any_size(self, size):
        class Scaled(nn.Module):
            def forward(self, x):
                return size * model(x)

        model, _, _ = linear_cases(1)
        _, batch, least = linear_cases(1)
        result = attacked(Pgd0(steps=3, restarts=1, objective=SwitchedMargin(math.inf)), Scaled(), batch, SparseBall(2))
        assert torch.equal(result.trace["found_at"] < 0, least[2] > 0)


def saif_twin(model, clean, label, ball, steps, noise):
    """The points that the network sees: the average form, of one image, by argsort."""
    center = ball.grouped(clean)[0]
    p = (2 * noise.uniform(center.shape, "magnitudes", center.dtype)[0] - 1).clamp(-center, 1 - center)
    scores = noise.uniform(center.shape[1:], "mask", center.dtype)[0]
    s = torch.zeros_like(scores)
    s[scores.argsort(descending=True)[: ball.k]] = 1
    for t in range(steps + 1):
        mask = torch.zeros_like(s)
        mask[s.argsort(descending=True, stable=True)[: ball.k]] = 1
        mask *= s > 0
        x = ball.ungrouped((center + mask * p)[None], clean.shape[1:])
        yield x
        if is_wrong(model, x, label):
            return
        gradient = ball.grouped(gradient_at(model, x, label))[0]
        effect = (gradient * p).sum(0)
        z = torch.zeros_like(s)
        for unit in effect.argsort(descending=True)[: ball.k]:
            z[unit] = float(effect[unit] > 0)
        mu = 1 / math.sqrt(t + 1)
        p = (p + mu * (gradient.sign() - p)).clamp(-center, 1 - center)
        s = s + mu * (z - s)


class TestSaif:
    @every_ball
    def test_against_a_plain_twin_step_by_step(self, ball):
        model = make_model()
        batch = make_batch(model, 6, wrong=0)
        for number in range(len(batch)):
            row = slice(number, number + 1)
            seen = points_of(Saif(steps=9), model, batch, ball, number)[1:]
            twin = list(saif_twin(model, batch.images[row], batch.labels[row], ball, 9, Noise(3, batch.index[row])))
            assert len(seen) == len(twin)
            for ours, theirs in zip(seen, twin):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    def test_the_mask_still_moves_after_four_steps(self):
        """Where the hard mask is put back into s it cannot: 1 - mu > mu from there on."""
        model, ball = make_wavy_model(), SparseBall(1)
        batch = make_batch(model, 20, wrong=0)
        moved = 0
        for number in range(len(batch)):
            seen = points_of(Saif(steps=30), model, batch, ball, number)[6:]
            masks = [(points != batch.images[number]).any(1) for points in seen]
            moved += any(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
        assert moved > 3

    def test_the_line_search_never_falls_and_only_its_last_point_counts(self, monkeypatch):
        model, ball, rises, original = make_wavy_model(), SparseBall(1), [], _Iterate.searched

        def watched(at, goal, share, values, look):
            after = original(at, goal, share, values, look)
            rises.append(look(after) - values)
            assert (after.halvings >= at.halvings).all()
            halved.append(int((after.halvings - at.halvings).sum()))
            return after

        halved = []
        monkeypatch.setattr(_Iterate, "searched", watched)
        batch, most = make_batch(model, 12, wrong=0), 0
        for number in range(len(batch)):
            row = slice(number, number + 1)
            spy = Spy(model)
            result = attacked(Saif(steps=10, line_search=True), spy, batch.part(row), ball)
            counts = [int(ball.changed(batch.images[row], points)) for points in spy.points]
            most = max(most, *counts)
            assert counts[-1] <= 1 and ball.contains(batch.images[row], result.images).all()
            assert result.trace["found_at"] in (-1, 10)
            assert torch.equal(result.images, spy.points[-1]) or torch.equal(result.images, batch.images[row])
        assert (torch.cat(rises) >= -1e-12).all() and torch.cat(rises).max() > 0.01
        assert most > 1 and sum(halved) > 2

    def test_units_that_promise_nothing_are_left_alone(self):
        """Two pixels count; all others stay, though their random perturbations do not."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double()
        with torch.no_grad():
            model[1].weight.zero_()
            model[1].weight[0, [5, 9]] = 1.0
            model[1].bias.copy_(torch.tensor([9.0, 0.0]))
        batch = Batch(random_images(5), torch.zeros(5, dtype=torch.int64), torch.arange(5))
        result = attacked(Saif(steps=6), model, batch, SparseBall(6))
        changed = (result.images != batch.images).any(1).flatten(1)
        assert not changed[:, [place for place in range(16) if place not in (5, 9)]].any()
        assert (result.images.flatten(1)[:, [5, 9]] == 0).all()

    def test_a_line_search_that_finds_nothing_stays(self):
        """The objective falls in every direction from where the gradient says that it rises."""

        class Against(nn.Module):
            def forward(self, x):
                size = x.flatten(1).sum(1) / 10
                return torch.stack([size.detach() * 2 - size, torch.zeros_like(size)], 1)

        batch = Batch(random_images(3), torch.zeros(3, dtype=torch.int64), torch.arange(3))
        spy = Spy(Against())
        result = attacked(Saif(steps=3, line_search=True), spy, batch, SparseBall(2))
        assert SparseBall(2).contains(batch.images, result.images).all()
        assert len(spy.points) < 3 + 3 * 45 and torch.equal(spy.points[-1], spy.points[1])


def sigma_zero_twin(model, clean, label, ball, attack):
    """The points that the network sees: of one image, by torch's own Adam, schedule and gradients."""
    center = ball.grouped(clean)
    change = torch.zeros_like(center, requires_grad=True)
    adam = torch.optim.Adam([change], lr=attack.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, attack.steps, eta_min=attack.lr / 10)
    tau = attack.threshold
    for number in range(attack.steps + 1):
        x = ball.ungrouped(center + change, clean.shape[1:])
        yield x.detach()
        if number == attack.steps:
            return
        logits = model(x)
        others = logits.scatter(1, label[:, None], -torch.inf).amax(1)
        lead = logits[0, label] - others
        size = change.square().sum(1)
        loss = lead.clamp(min=0).sum() + (size / (size + attack.sigma)).mean()
        adam.zero_grad()
        loss.backward()
        change.grad /= change.grad.abs().max().clamp(min=1e-12)
        rate = adam.param_groups[0]["lr"]
        adam.step()
        schedule.step()
        tau += attack.threshold_rate * rate * (1 if lead <= 0 else -1)
        tau = min(max(tau, 0.0), 1.0)
        with torch.no_grad():
            change.copy_((center + change).clamp(0, 1) - center)
            change *= (change.abs().amax(1, keepdim=True) >= tau).double()


class TestSigmaZero:
    @every_ball
    def test_against_a_plain_twin_step_by_step(self, ball):
        model = make_model()
        batch, attack = make_batch(model, 6, wrong=0), SigmaZero(steps=25, threshold_rate=0.05)
        for number in range(len(batch)):
            row = slice(number, number + 1)
            seen = points_of(attack, model, batch, ball, number)
            twin = list(sigma_zero_twin(model, batch.images[row], batch.labels[row], ball, attack))
            assert len(seen) == len(twin) or ball.changed(batch.images[row], seen[-1]) == 1
            for ours, theirs in zip(seen, twin):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)

    def test_its_answer_is_the_sparsest_of_what_it_saw(self):
        model, ball = make_model(), SparseBall(3)
        batch = make_batch(model, 10, wrong=0)
        whole = attacked(SigmaZero(steps=40), model, batch, ball)
        for number in range(len(batch)):
            row = slice(number, number + 1)
            seen = torch.cat(points_of(SigmaZero(steps=40), model, batch, ball, number))
            counts = ball.changed(batch.images[row].expand_as(seen), seen)
            wrong = is_wrong(model, seen, batch.labels[row].expand(len(seen)))
            least = int(counts[wrong].min()) if wrong.any() else -1
            within = (wrong & (counts <= 3)).nonzero()
            assert whole.trace["changed"][row] == least
            assert whole.trace["found_at"][row] == (int(within[0]) if len(within) else -1)
            if 0 < least <= 3:
                first = seen[(wrong & (counts == least)).nonzero()[0]]
                torch.testing.assert_close(whole.images[row], first, rtol=0, atol=1e-12)

    def test_k_takes_no_part_in_the_search(self):
        model = make_model()
        batch = make_batch(model, 20)
        runs = {k: attacked(SigmaZero(steps=40), model, batch, SparseBall(k)) for k in (0, 1, 2, 16)}
        changed = runs[16].trace["changed"]
        assert (changed[18:] == 0).all() and (changed[:18] != 0).all() and (changed > 2).any()
        for k, run in runs.items():
            assert torch.equal(run.trace["changed"], changed)
            assert torch.equal(run.trace["found_at"] >= 0, (changed >= 0) & (changed <= k))
            assert SparseBall(k).contains(batch.images, run.images).all()

    def test_the_threshold_moves(self):
        """Down where the image is still right, up where it is fooled, and never out of [0, 1]."""
        model = make_model()
        batch, thresholds = make_batch(model, 8, wrong=0), []

        class Watched(SigmaZero):
            def moved(self, at, gradient, wrong, number):
                after = super().moved(at, gradient, wrong, number)
                thresholds.append((at.tau, after.tau, wrong))
                return after

        attacked(Watched(steps=60, threshold_rate=0.04), model, batch, SparseBall(2))
        down = sum(int((after < before)[~wrong].sum()) for before, after, wrong in thresholds)
        up = sum(int((after > before)[wrong].sum()) for before, after, wrong in thresholds)
        assert down > 50 and up > 50
        before, after, wrong = thresholds[0]
        assert not wrong.any() and (before == 0.3).all()
        torch.testing.assert_close(after, torch.full_like(after, 0.26))
        everything = torch.cat([after for _, after, _ in thresholds])
        assert everything.min() >= 0 and everything.max() <= 1
        still = attacked(SigmaZero(steps=60, threshold_rate=0.0), model, batch, SparseBall(2))
        assert not torch.equal(still.images, attacked(SigmaZero(steps=60), model, batch, SparseBall(2)).images)

    def test_units_return_to_the_image_as_a_whole(self):
        """A pixel's channels are kept or dropped together: there is nothing to gain from some of them."""
        model = make_model()
        batch, partly = make_batch(model, 10, wrong=0), 0
        for number in range(len(batch)):
            for points in points_of(SigmaZero(steps=20, threshold=0.5), model, batch, SparseBall(2), number):
                change = (points - batch.images[number]).abs()[0].flatten(1)
                partly += int(((change > 0).all(0) & (change.amin(0) < 0.1) & (change.amax(0) > 0.5)).sum())
                assert ((change.amax(0) == 0) | (change.amax(0) > 0.2)).all()
        assert partly > 0

    def test_more_steps_need_fewer_pixels(self):
        model = make_model()
        batch = make_batch(model, 40, wrong=0)
        counts = [
            attacked(SigmaZero(steps=steps), model, batch, SparseBall(2)).trace["changed"] for steps in (10, 50, 250)
        ]
        means = [torch.where(count < 0, 17, count).double().mean() for count in counts]
        assert means[0] > means[1] > means[2]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (Pgd0, "steps", 0), (Pgd0, "step_size", 0.0), (Pgd0, "step_size", float("nan")), (Pgd0, "restarts", 0),
        (Saif, "steps", -1), (SigmaZero, "steps", 0), (SigmaZero, "lr", 0.0), (SigmaZero, "lr", float("inf")),
        (SigmaZero, "sigma", -1.0), (SigmaZero, "sigma", float("nan")), (SigmaZero, "threshold", 1.5),
        (SigmaZero, "threshold", float("nan")), (SigmaZero, "threshold_rate", -0.1),
    ],
)  # fmt: skip
def test_bad_fields_are_named(make, field, value):
    with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
        make(**{field: value})
