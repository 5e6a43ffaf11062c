"""Sparse-RS and CornerSearch: seen by a network that remembers what it was asked, and against enumeration."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from certtrain.attacks import Attack, AttackResult, CornerSearch, SparsePgd, SparseRs
from certtrain.attacks.sparse import corner_search
from certtrain.bounds import LinfBall, SparseBall
from certtrain.errors import FieldError, InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step

SHAPES = [(3, 4, 6), (1, 6, 4)]
RS, CORNERS = SparseRs(queries=40), CornerSearch(per_size=25, best=8)
UNITS = [
    SparseBall(3), SparseBall(4, unit="feature"), SparseBall(2, unit="row"), SparseBall(1, unit="column"),
    SparseBall(2, unit="patch", side=2),
]  # fmt: skip
PAIRS = [(RS, ball) for ball in UNITS] + [(CORNERS, ball) for ball in UNITS[:2]]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_attack = pytest.mark.parametrize("attack", [RS, CORNERS], ids=lambda attack: type(attack).__name__)
every_pair = pytest.mark.parametrize(
    ("attack", "ball"), PAIRS, ids=lambda part: part.unit if isinstance(part, SparseBall) else type(part).__name__
)
every_objective = pytest.mark.parametrize("objective", ["cross_entropy", "margin"])


class Spy(nn.Module):
    """Remembers every point and answer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.points: list[torch.Tensor] = []
        self.answers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x):
        assert not torch.is_grad_enabled() and not x.requires_grad
        logits = self.model(x)
        self.points.append(x.clone())
        self.answers.append((logits, logits.clone()))
        return logits

    def asked(self, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each image the points that are closest to it, in their order, and their logits."""
        points, logits = torch.cat(self.points), torch.cat([answer for answer, _ in self.answers])
        distance = torch.stack([(points != image).flatten(1).sum(1) for image in images])
        owner = distance.argmin(0)
        return [(points[owner == number], logits[owner == number]) for number in range(len(images))]


def make_model(shape=SHAPES[0], classes=4, bias=0.0, seed=0):
    """A smooth net in float64; with a ``bias`` for class 0."""
    torch.manual_seed(seed)
    hidden, last = nn.Linear(math.prod(shape), 12), nn.Linear(12, classes)
    last.bias.data[0] += bias
    return nn.Sequential(nn.Flatten(), hidden, nn.Tanh(), last).double().eval()


def make_batch(count=6, shape=SHAPES[0], seed=1, model=None) -> Batch:
    """Images inside (0.1, 0.9), so that every corner is a change; right for the model, if given."""
    torch.manual_seed(seed)
    images = 0.1 + 0.8 * torch.rand(count, *shape, dtype=torch.float64)
    labels = torch.zeros(count, dtype=torch.int64) if model is None else model(images).argmax(1)
    return Batch(images, labels, 50 + torch.arange(count))


def attacked(attack: Attack, model, batch, ball, key=3) -> AttackResult:
    return attack(model, batch, ball, Step.evaluation(ball, Noise(key, batch.index)))


def leads(logits, labels):
    """Without a mask: of the sorted logits of the others."""
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return [row[label] - max(z for j, z in enumerate(row) if j != label) for row, label in rows]


def losses(objective, logits, labels):
    return torch.tensor(leads(logits, labels)) if objective == "margin" else -F.cross_entropy(
        logits, labels, reduction="none"
    )  # fmt: skip


class TestBoth:
    @every_pair
    @every_shape
    def test_every_query_is_in_the_set_and_changes_go_to_corners(self, attack, ball, shape):
        batch, spy = make_batch(shape=shape), Spy(make_model(shape, bias=10.0))
        found = attacked(attack, spy, batch, ball)
        for image, (points, _) in zip(batch.images, spy.asked(batch.images), strict=True):
            around = image.expand_as(points)
            changed = ball.changed(around, points)
            assert changed[0] == 0 and changed.max() <= ball.k
            assert attack is CORNERS or (changed[1:] == ball.k).all()
            moved = points != around
            assert ((points[moved] == 0) | (points[moved] == 1)).all()
            whole = ball.grouped(moved.double())
            assert torch.equal(whole.amax(1), whole.amin(1))  # all numbers of a unit
        assert ball.contains(batch.images, found.images).all()

    @every_pair
    @every_shape
    def test_queries_are_those_that_were_asked_and_end_with_the_first_success(self, attack, ball, shape, monkeypatch):
        monkeypatch.setattr(corner_search, "CHUNK", 7)
        model = make_model(shape, seed=2)
        batch, spy = make_batch(12, shape, model=model), Spy(model)
        wrong = batch.labels.clone()
        wrong[:2] = (wrong[:2] + 1) % 4
        batch = replace(batch, labels=wrong)
        found = attacked(attack, spy, batch, ball)
        late = 1 if attack is RS else 7
        for number, (points, logits) in enumerate(spy.asked(batch.images)):
            at, label = int(found.trace["found_at"][number]), batch.labels[number].expand(len(points))
            fooled = [lead <= 0 for lead in leads(logits, label)]
            assert len(points) == found.trace["queries"][number]
            assert at == (fooled.index(True) if any(fooled) else -1)
            if at >= 0:
                assert torch.equal(found.images[number], points[at]) and len(points) - at <= late
            else:
                assert len(points) == (41 if attack is RS else points_of(attack, ball, shape, 4))
        assert (found.trace["found_at"][:2] == 0).all() and (found.trace["queries"][:2] == 1).all()
        assert found.trace["queries"].dtype == found.trace["found_at"].dtype == torch.int64
        if isinstance(attack, SparseRs):
            assert len({int(at) for at in found.trace["found_at"]}) > 2

    @every_pair
    def test_what_is_never_fooled_comes_back_at_its_best(self, attack, ball):
        model, objective = make_model(bias=10.0), "cross_entropy" if attack is RS else "margin"
        batch, spy = make_batch(), Spy(model)
        found = attacked(attack, spy, batch, ball)
        assert (found.trace["found_at"] == -1).all()
        final = losses(objective, model(found.images).detach(), batch.labels)
        for number, (_, logits) in enumerate(spy.asked(batch.images)):
            tried = losses(objective, logits, batch.labels[number].expand(len(logits)))
            assert final[number] == pytest.approx(float(tried.min()), rel=1e-9)

    @every_pair
    def test_keyed_whatever_the_batch(self, attack, ball):
        model = make_model(seed=2)
        batch = make_batch(7, model=model)
        state = torch.get_rng_state()
        whole = attacked(attack, model, batch, ball)
        assert torch.equal(torch.get_rng_state(), state)
        other = attacked(attack, model, batch, ball, key=4)
        assert not torch.equal(whole.images, other.images) or attack is CORNERS
        for rows in ([6, 2, 0, 5, 1, 3, 4], [3], [4, 1]):
            index = torch.tensor(rows)
            part = attacked(
                attack, model, Batch(batch.images[index], batch.labels[index], batch.index[index]), ball
            )  # fmt: skip
            assert torch.equal(part.images, whole.images[index])
            for name in ("queries", "found_at"):
                assert torch.equal(part.trace[name], whole.trace[name][index])

    @every_attack
    def test_each_image_its_own_k(self, attack):
        model = make_model(bias=10.0)
        batch, k = make_batch(), torch.tensor([0, 1, 2, 5, 0, 7])
        spy = Spy(model)
        found = attacked(attack, spy, batch, SparseBall(k))
        for number in range(len(batch)):
            alone = attacked(attack, model, batch.part(slice(number, number + 1)), SparseBall(int(k[number])))
            assert torch.equal(alone.images[0], found.images[number])
            assert int(alone.trace["queries"][0]) == int(found.trace["queries"][number])
        for number, (points, _) in enumerate(spy.asked(batch.images)):
            most = SparseBall().changed(batch.images[number].expand_as(points), points).max()
            assert k[number] - int(attack is CORNERS) <= most <= k[number]
        assert (found.trace["queries"][k == 0] == 1).all() and (found.trace["queries"][k > 0] > 20).all()
        assert torch.equal(found.images[k == 0], batch.images[k == 0])

    @every_attack
    @pytest.mark.parametrize("mode", ["batch", "train"])
    def test_batch_statistics_see_one_point_of_each_image(self, attack, mode):
        model = make_model(seed=2)
        batch = make_batch(5, model=model)
        model = nn.Sequential(model[0], nn.BatchNorm1d(72).double(), *model[1:])
        spy, k = Spy(model), torch.tensor([1, 0, 2, 1, 2])
        batch = replace(batch, labels=model(batch.images).argmax(1))
        model.eval()
        attack = replace(attack, attack_mode=mode)
        found = attacked(attack, spy, batch, SparseBall(k))
        assert {len(points) for points in spy.points} == {5}
        assert len(spy.points) == found.trace["queries"].max() and found.trace["queries"].min() > 1
        stacked = torch.stack(spy.points)
        for number in range(5):
            around = batch.images[number].expand_as(stacked[:, number])
            assert SparseBall().changed(around, stacked[:, number]).max() <= k[number]
            at = int(found.trace["found_at"][number])
            assert at < 0 or torch.equal(found.images[number], stacked[at, number])

    @every_attack
    def test_k_of_zero_and_clean_errors_ask_once(self, attack):
        model = make_model()
        batch = make_batch(model=model)
        for ball, labels, at in (
            (SparseBall(0), batch.labels, -1), (SparseBall(3), (batch.labels + 1) % 4, 0),
        ):  # fmt: skip
            spy = Spy(model)
            found = attacked(attack, spy, replace(batch, labels=labels), ball)
            assert torch.equal(found.images, batch.images) and len(spy.points) == 1
            assert (found.trace["queries"] == 1).all() and (found.trace["found_at"] == at).all()

    @every_attack
    def test_an_empty_batch(self, attack):
        spy = Spy(make_model())
        found = attacked(attack, spy, make_batch().part(slice(0, 0)), SparseBall(3))
        assert found.images.shape == (0, 3, 4, 6) and not spy.points

    @every_attack
    def test_a_model_without_gradients_will_do(self, attack):
        inner = make_model(seed=2)

        class Detached(nn.Module):
            def forward(self, x):
                return inner(x.detach()).detach()

        batch, ball = make_batch(model=inner), SparseBall(3)
        found = attacked(attack, Detached(), batch, ball)
        assert torch.equal(found.images, attacked(attack, inner, batch, ball).images)
        assert not found.images.requires_grad and not torch.equal(found.images, batch.images)
        with pytest.raises(InputError, match="SparseRs, CornerSearch"):
            attacked(SparsePgd(), Detached(), batch, ball)

    @every_attack
    def test_the_models_answers_are_left_alone(self, attack):
        spy = Spy(make_model(seed=2))
        attacked(attack, spy, make_batch(model=spy.model), SparseBall(2))
        assert all(torch.equal(given, kept) for given, kept in spy.answers)

    @every_attack
    @pytest.mark.parametrize("value", [math.nan, 0.0], ids=["nan", "tie"])
    def test_nan_and_ties_are_successes(self, attack, value):
        """A network that is right at the image alone."""
        batch = make_batch(4)

        class Brittle(nn.Module):
            def forward(self, x):
                same = (x.unsqueeze(1) == batch.images).flatten(2).all(2).any(1)
                return torch.where(same[:, None], torch.tensor([1.0, 0.0]), torch.full((1, 2), value))

        found = attacked(attack, Brittle(), batch, SparseBall(3))
        assert (found.trace["found_at"] == 1).all()
        assert (SparseBall().changed(batch.images, found.images) > 0).all()

    @every_attack
    @pytest.mark.parametrize("shape", [(5,), (2, 3, 2, 2)], ids=str)
    def test_other_than_images(self, attack, shape):
        model = make_model(shape, seed=2)
        batch, ball = make_batch(shape=shape, model=model), SparseBall(2)
        assert ball.contains(batch.images, attacked(attack, model, batch, ball).images).all()

    @every_attack
    def test_float32(self, attack):
        model = make_model(seed=2).float()
        batch = make_batch()
        batch = replace(batch, images=batch.images.float(), labels=model(batch.images.float()).argmax(1))
        found = attacked(attack, model, batch, SparseBall(3))
        assert found.images.dtype == torch.float32 and (found.trace["found_at"] >= 0).any()

    @pytest.mark.parametrize(
        ("kind", "field", "value"),
        [
            (SparseRs, "queries", 0), (SparseRs, "queries", -1), (SparseRs, "p_init", 0.0), (SparseRs, "p_init", 1.1),
            (SparseRs, "p_init", math.nan), (SparseRs, "restarts", 0), (CornerSearch, "per_size", 0),
            (CornerSearch, "best", 0),
        ],
    )  # fmt: skip
    def test_refuses(self, kind, field, value):
        with pytest.raises(FieldError, match=f"^{field}: found .*accepted"):
            kind(**{field: value})

    @every_attack
    def test_refuses_balls_of_norms(self, attack):
        with pytest.raises(InputError, match=r"^attack.type: found .* for a LinfBall; accepted: .*Pgd"):
            attacked(attack, make_model(), make_batch(), LinfBall(0.1))


def points_of(attack, ball, shape, classes):
    members = shape[0] if ball.unit == "pixel" else 1
    return 1 + 2**members * ball.units(shape) + (ball.k - 1) * classes * attack.per_size


class TestSparseRs:
    def test_schedule(self):
        """Sheet: of 10000 queries, each divisor up to the last number of its stretch."""
        attack = SparseRs(p_init=0.8)
        stretches = {2: (1, 50), 4: (51, 200), 5: (201, 500), 6: (501, 1000), 8: (1001, 2000), 10: (2001, 4000),
                     12: (4001, 6000), 15: (6001, 8000), 20: (8001, 9999)}  # fmt: skip
        for divisor, ends in stretches.items():
            assert [attack.share(number) for number in ends] == [0.8 / divisor] * 2
        short, long = replace(attack, queries=100, p_init=0.3), replace(attack, queries=20000)
        assert [short.share(n) for n in (1, 2, 3, 5, 6, 99)] == [0.3 / d for d in (4, 4, 5, 5, 6, 20)]
        assert [long.share(n) for n in (1, 2, 101, 102, 19999)] == [0.8, 0.4, 0.4, 0.2, 0.04]

    @every_objective
    @pytest.mark.parametrize("k", [1, 5, 13])
    def test_moves_and_what_is_kept_of_them(self, objective, k):
        """The walk, replayed: of k units so many are replaced, from the last point at which the loss dropped."""
        model, queries = make_model(bias=10.0), 150
        batch, ball = make_batch(1), SparseBall(k)
        spy = Spy(model)
        attacked(SparseRs(queries=queries, objective=objective), spy, batch, ball)
        points, logits = spy.asked(batch.images)[0]
        values = losses(objective, logits, batch.labels.expand(len(points)))
        used = (points != batch.images).any(1).flatten(1)
        assert not used[0].any() and (used[1:].sum(1) == k).all()
        current, accepted, sizes = 1, 0, []
        for number in range(1, queries):
            query, scaled = number + 1, number * 10000 // queries
            divisor = 2 + sum(weight for last, weight in zip(
                (50, 200, 500, 1000, 2000, 4000, 6000, 8000), (2, 1, 1, 2, 2, 2, 3, 5), strict=True,
            ) if scaled > last)  # fmt: skip
            moved = max(int(0.8 / divisor * k), 1)
            sizes.append(moved)
            assert (used[current] & ~used[query]).sum() == (used[query] & ~used[current]).sum() == moved
            stay = (used[current] & used[query]).reshape(4, 6)
            assert torch.equal(points[current][:, stay], points[query][:, stay])
            if values[query] < values[current]:
                current, accepted = query, accepted + 1
        assert accepted >= 2 and len(set(sizes)) == {1: 1, 5: 1, 13: 2}[k]

    def test_places_and_colours_are_uniform(self):
        model = make_model(bias=10.0)
        batch = make_batch(1)
        used, colours = torch.zeros(24), torch.zeros(3)
        for key in range(300):
            spy = Spy(model)
            attacked(SparseRs(queries=2), spy, batch, SparseBall(4), key=key)
            for points in spy.points[1:]:
                changed = (points != batch.images)[0].any(0)
                used += changed.flatten()
                colours += points[0][:, changed].sum(1)
        drawn = 600 * 4
        assert (used.sum(), used.min() > 60, used.max() < 145) == (drawn, True, True)  # 100 ± 9
        assert ((colours / drawn - 0.5).abs() < 0.06).all()

    @pytest.mark.parametrize("shape", [(1, 4, 6), (3, 4, 6), (1, 1, 1), (3, 1, 1)], ids=str)
    def test_one_unit_that_moves_gets_another_colour(self, shape):
        """Of images at corners, where one colour of each would be no change."""
        images = (torch.rand(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) < 0.5).double()
        batch = Batch(images, torch.zeros(1, dtype=torch.int64), torch.arange(1))
        model = make_model(shape, bias=10.0)
        spy = Spy(model)
        attacked(SparseRs(queries=200), spy, batch, SparseBall(1))
        points = torch.cat(spy.points)
        values = -F.cross_entropy(model(points), batch.labels.expand(len(points)), reduction="none")
        current, alone = 1, math.prod(shape[1:]) == 1
        for query in range(2, len(points)):
            assert not torch.equal(points[query], points[current])
            assert alone or SparseBall().changed(images, points[query : query + 1]) == 1
            current = query if values[query] < values[current] else current
        assert len(points) == 201

    def test_more_units_than_there_are_means_all(self):
        model, batch = make_model(bias=10.0), make_batch(3)
        found = [attacked(RS, model, batch, SparseBall(k)) for k in (24, 25, 10**6)]
        for other in found[1:]:
            assert torch.equal(other.images, found[0].images)
        assert (found[0].trace["queries"] == 41).all()

    @pytest.mark.parametrize("k", [20, 24])
    def test_units_serve_again_where_few_are_left(self, k):
        """Of 24 units: 8 and 9 move at first."""
        batch = make_batch(1)
        spy = Spy(make_model(bias=10.0))
        attacked(SparseRs(queries=10000 // 50), spy, batch, SparseBall(k))
        used = (torch.cat(spy.points)[1:] != batch.images).any(1).flatten(1)
        assert (used.sum(1) == k).all()

    def test_restarts_go_on_with_what_is_left(self):
        model, ball = make_model(seed=2), SparseBall(1)
        batch = make_batch(30, model=model)
        once, thrice = (attacked(SparseRs(queries=20, restarts=n), model, batch, ball) for n in (1, 3))
        fooled = once.trace["found_at"] >= 0
        assert torch.equal(once.images[fooled], thrice.images[fooled])
        assert torch.equal(once.trace["queries"][fooled], thrice.trace["queries"][fooled])
        later = (thrice.trace["found_at"] > 20) & ~fooled
        assert later.any() and (thrice.trace["queries"][thrice.trace["found_at"] < 0] == 61).all()
        spy = Spy(make_model(bias=10.0))
        attacked(SparseRs(queries=5, restarts=2), spy, make_batch(1), ball)
        assert len(spy.points) == 11 and not torch.equal(spy.points[1], spy.points[6])

    def test_soft_labels_where_a_loss_has_set_them(self):
        """The log-probability of the second class has to drop, though the first is the label."""
        model, batch = make_model(bias=10.0), make_batch(3)
        soft = replace(batch, targets=F.one_hot(torch.ones_like(batch.labels), 4).double())
        found = attacked(SparseRs(queries=60), model, soft, SparseBall(4))
        own, other = (F.log_softmax(model(x), 1)[:, 1] for x in (found.images, batch.images))
        assert (own < other).all()

    def test_it_finds_what_single_pixels_can_do(self):
        """Against enumeration of all one-pixel corners."""
        model, ball = make_model((1, 6, 4), classes=3, seed=4), SparseBall(1)
        batch = make_batch(40, (1, 6, 4), model=model)
        possible = torch.tensor([min(enumerated(model, image, label)) <= 0 for image, label in samples(batch)])
        found = attacked(SparseRs(queries=1000, objective="margin"), model, batch, ball).trace["found_at"] >= 0
        assert 5 < possible.sum() < 35 and not (found & ~possible).any()
        assert (found & possible).sum() >= possible.sum() - 1


def samples(batch):
    return zip(batch.images, batch.labels, strict=True)


def single_changes(image):
    """Every one-pixel corner image, by plain loops."""
    channels, height, width = image.shape
    for row, column in itertools.product(range(height), range(width)):
        for colour in itertools.product((0.0, 1.0), repeat=channels):
            changed = image.clone()
            changed[:, row, column] = torch.tensor(colour, dtype=image.dtype)
            yield changed


def enumerated(model, image, label):
    """How far the label leads at each of them."""
    logits = model(torch.stack(list(single_changes(image))))
    return leads(logits, label.expand(len(logits)))


def linear(shape, classes, scale=0.25, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(math.prod(shape), classes).double()
    layer.bias.data = -layer.weight.data.sum(1) / 2  # all leads are small
    layer.bias.data[0] += scale
    return nn.Sequential(nn.Flatten(), layer)


class TestCornerSearch:
    @pytest.mark.parametrize(("classes", "scale"), [(2, 0.25), (3, 0.25), (12, 0.5)])
    @every_shape
    def test_all_single_changes_are_tried_and_the_best_is_returned(self, shape, classes, scale):
        model = linear(shape, classes, scale, seed=classes)
        batch = make_batch(20, shape, model=model)
        spy = Spy(model)
        found = attacked(CORNERS, spy, batch, SparseBall(1))
        asked, fooled = spy.asked(batch.images), 0
        for number, (image, label) in enumerate(samples(batch)):
            ahead = enumerated(model, image, label)
            at = int(found.trace["found_at"][number])
            assert (at > 0) == (min(ahead) <= 0)
            if at < 0:
                assert leads(model(found.images[number : number + 1]), label[None])[0] == pytest.approx(min(ahead))
            fooled += at > 0
            expected = {tuple(x.flatten().tolist()) for x in single_changes(image)}
            tried = [tuple(x.flatten().tolist()) for x in asked[number][0][1:]]
            assert set(tried) == expected and len(tried) == len(expected) == 2 ** shape[0] * 24
        assert 0 < fooled < 20

    def test_orders_by_class(self):
        """With one single change for each order, every combination of size 2 is that change."""
        model, batch = make_model(classes=5, bias=10.0), make_batch(2)
        spy = Spy(model)
        attacked(CornerSearch(per_size=3, best=1), spy, batch, SparseBall(2))
        for number, (image, _) in enumerate(samples(batch)):
            points = spy.asked(batch.images)[number][0][1:]
            singles = torch.stack(list(single_changes(image)))
            logits = model(singles)
            assert len(points) == len(singles) + 15
            for goal in range(5):
                score = logits[:, goal] - logits[:, 0] if goal else logits[:, 1:].max(1).values - logits[:, 0]
                for combination in points[len(singles) + 3 * goal :][:3]:
                    assert torch.equal(combination, singles[score.argmax()])

    def test_ranks_are_drawn_with_their_weights(self, monkeypatch):
        drawn = []
        query = corner_search.CombinationSearch.query

        def watched(search, rows, changes):
            drawn.append(changes)
            return query(search, rows, changes)

        monkeypatch.setattr(corner_search.CombinationSearch, "query", watched)
        shape, count, best = (1, 3, 4), 4000, 8
        model, batch = linear(shape, 2, scale=50.0), make_batch(1, shape)
        found = attacked(CornerSearch(per_size=count, best=best), model, batch, SparseBall(3))
        assert found.trace["queries"] == 1 + 24 + 2 * 2 * count
        combinations = [changes for changes in drawn if changes.shape[2] > 1]
        assert {changes.shape[2] for changes in combinations} == {2, 3}
        weight = model.get_parameter("1.weight")
        weight, image = weight[1] - weight[0], batch.images.flatten()
        gains = torch.stack([-weight * image, weight * (1 - image)], 1).flatten()  # number 2 j + corner
        order = gains.sort(descending=True).indices[:best].tolist()
        numbers = torch.cat([changes.flatten() for changes in combinations])
        assert set(numbers.tolist()) == set(order)
        for rank, number in enumerate(order):
            share = (2 * (best - rank) - 1) / best**2
            error = 5 * math.sqrt(share * (1 - share) / len(numbers))
            assert float((numbers == number).double().mean()) == pytest.approx(share, abs=error)

    def test_pairs_against_enumeration(self):
        """Of a linear network with two classes the best pair is made of the two best single pixels."""
        shape, ball = (1, 4, 6), SparseBall(2)
        model = linear(shape, 2, seed=3)
        batch = make_batch(40, shape, model=model)
        found = attacked(CornerSearch(per_size=1000, best=5), model, batch, ball).trace["found_at"]
        sizes = []
        for (image, label), at in zip(samples(batch), found.tolist(), strict=True):
            clean = leads(model(image[None]), label[None])[0]
            drops = sorted((clean - lead for lead in enumerated(model, image, label)), reverse=True)
            sizes.append(1 if drops[0] >= clean else 2 if sum(drops[:2]) >= clean else 0)
            assert (at < 0, 0 < at <= 48, at > 48) == (sizes[-1] == 0, sizes[-1] == 1, sizes[-1] == 2)
        assert set(sizes) == {0, 1, 2}

    def test_of_two_changes_of_a_pixel_the_later_counts(self):
        model, batch = linear((1, 1, 2), 2, scale=50.0), make_batch(1, (1, 1, 2))
        search = corner_search.CombinationSearch.starting(model, batch, SparseBall(2))
        spy = Spy(model)
        with torch.no_grad():
            replace(search, model=spy).query(
                torch.zeros(1, dtype=torch.int64), torch.tensor([[[0, 1], [1, 0], [3, 3]]])
            )
        points = torch.stack([batch.images.flatten()] * 3)
        points[0, 0], points[1, 0], points[2, 1] = 1, 0, 1
        assert torch.equal(spy.points[0].flatten(1), points)

    def test_more_single_changes_than_there_are(self):
        model, batch = make_model((1, 1, 2), bias=10.0), make_batch(2, (1, 1, 2))
        found = attacked(CornerSearch(per_size=4), model, batch, SparseBall(9))
        assert (found.trace["queries"] == 1 + 4 + 4 * 4).all()

    @pytest.mark.parametrize(("unit", "units"), [("row", "rows"), ("column", "columns"), ("patch", "patches")])
    def test_refuses_other_units(self, unit, units):
        with pytest.raises(InputError, match=f"^loss.attack.type: found .* of {units}; accepted: pixels or features"):
            CornerSearch().check_ball(SparseBall(1, unit=unit), "loss.attack")

    def test_refuses_pixels_of_many_channels(self):
        shape = (5, 2, 2)
        model, batch = make_model(shape), make_batch(2, shape)
        with pytest.raises(InputError, match=r"^unit: found 'pixel'; accepted: feature, or .*, not 5$"):
            attacked(CORNERS, model, batch, SparseBall(2))
        assert attacked(CORNERS, model, batch, SparseBall(2, unit="feature")).images.shape == batch.images.shape
