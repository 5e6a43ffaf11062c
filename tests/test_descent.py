"""Descents over many images, clauses and starts at once: where they start, what they cost, and when they stop."""

import pytest
import torch
from problems import alone, linear_model, problem_of, unknown
from torch import Tensor, nn

from certtrain.bounds import Box, LinfBall
from certtrain.verifiers import BabStage, CrownStage, FalsifyStage, Judge, Problem, Search, Specification
from certtrain.verifiers.chords import Chords
from certtrain.verifiers.descent import Points, random_points, relaxed_minimisers
from certtrain.verifiers.problem import rows_of_clauses
from certtrain.verifiers.search_descent import LEAST, MOST, ROOT, STEPS, SearchDescents, best_of_each


class Refusing(Judge):
    """Refuses every candidate."""

    def __call__(self, problem: Problem, number: int, image: Tensor) -> bool:
        return False


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def evaluated(monkeypatch) -> list[int]:
    """Numbers of points evaluated together, in order."""
    counts: list[int] = []
    original = Chords.__call__

    def watched(self, points: Tensor, share: Tensor):
        counts.append(len(points))
        return original(self, points, share)

    monkeypatch.setattr(Chords, "__call__", watched)
    return counts


def box_problem(model: nn.Module, lower: list, upper: list, rows: list, offsets: list) -> Problem:
    """One box, all rows in one clause."""
    specification = Specification(
        torch.tensor([rows]), torch.tensor([offsets]), torch.zeros(len(rows), dtype=torch.int64)
    )
    return Problem(model, Box(torch.tensor([lower]), torch.tensor([upper])), specification, torch.arange(1))


class TestShapesOfMargins:
    def test_a_dead_zone_is_left_at_random(self):
        """1 - 20 relu(x - 0.9) is flat on nine tenths of the box."""
        model = nn.Sequential(linear_model([[1.0]], [-0.9]), nn.ReLU(), nn.Linear(1, 1)).eval()
        model[2].weight.fill_(-20.0), model[2].bias.fill_(1.0)
        finding = alone(FalsifyStage(starts=1), box_problem(model, [0.0], [1.0], [[1.0]], [0.0]))
        assert finding.statuses == ["falsified"] and finding.counterexamples[0].item() >= 0.95

    def test_steps_are_in_units_of_each_width(self):
        """Each input has to go to its own end, and the widths differ by a factor of 1e12."""
        model = linear_model([[1e6, 1e-6, 1.0]])
        problem = box_problem(model, [0.0, 0.0, -1.0], [1e-6, 1e6, 1.0], [[1.0]], [0.98])
        finding = alone(FalsifyStage(starts=1), problem)
        assert finding.statuses == ["falsified"]

    def test_a_box_as_wide_as_float32_is_searched(self):
        problem = box_problem(linear_model([[1e-38]]), [-3e38], [3e38], [[1.0]], [2.5])
        assert alone(FalsifyStage(starts=3), problem).statuses == ["falsified"]
        robust = box_problem(linear_model([[1e-38]]), [-3e38], [3e38], [[1.0]], [3.5])
        assert alone(FalsifyStage(starts=3), robust).statuses == [None]

    def test_all_rows_of_a_clause_at_once(self):
        """tanh(x) <= 0.3 and -tanh(x) <= -0.2: a thin slice, from either side."""
        model = nn.Sequential(linear_model([[1.0]]), nn.Tanh()).eval()
        problem = box_problem(model, [-4.0], [5.0], [[1.0], [-1.0]], [-0.3, 0.2])
        finding = alone(FalsifyStage(), problem)
        assert finding.statuses == ["falsified"] and 0.2 <= finding.counterexamples[0].tanh().item() <= 0.3

    def test_a_network_without_a_gradient_ends(self):
        model = linear_model([[0.0]], [1.0])
        assert alone(FalsifyStage(), box_problem(model, [0.0], [0.0], [[1.0]], [0.0])).statuses == [None]
        overflowing = linear_model([[3e38]])
        finding = alone(FalsifyStage(judge=Judge(lambda image: torch.ones(1, 1))),
                        box_problem(overflowing, [1e3], [2e3], [[1.0]], [0.0]))  # fmt: skip
        assert finding.statuses == [None]


class TestWork:
    def many_classes(self, images: int = 2) -> tuple[Problem, Tensor]:
        """Of 200 classes; all but three clauses of the first image and one of the second are closed."""
        model = linear_model(torch.eye(200)[:, :6] * 0.01, torch.eye(200)[0])
        problem = problem_of(
            model, torch.full((images, 6), 0.5), torch.zeros(images, dtype=torch.int64), LinfBall(0.1), 200
        )
        known = torch.ones(images, 199)
        known[0, [3, 50, 198]] = -1.0
        known[1, 7] = -1.0
        return problem, known

    def test_only_open_clauses_cost(self, evaluated):
        problem, known = self.many_classes()
        alone(FalsifyStage(starts=100, steps=5), problem, unknown(problem).with_rows(known))
        assert sum(evaluated) == 6 * 100 * 4 and len(evaluated) == 12

    def test_no_more_than_fits_goes_together(self, evaluated):
        problem, known = self.many_classes()
        alone(FalsifyStage(starts=100, steps=1, most=50), problem, unknown(problem).with_rows(known))
        assert max(evaluated) <= 50 and sum(evaluated) == 2 * 100 * 4

    def test_refuted_images_stop(self, evaluated):
        """The first box is wrong at its lower end, the second nowhere."""
        specification = Specification(
            torch.ones(2, 1, 1), torch.tensor([[0.9], [5.0]]), torch.zeros(1, dtype=torch.int64)
        )
        problem = Problem(
            linear_model([[1.0]]), Box(-torch.ones(2, 1), torch.ones(2, 1)), specification, torch.arange(2)
        )
        finding = alone(FalsifyStage(starts=6, steps=8), problem)
        assert finding.statuses == ["falsified", None]
        first, rest = evaluated[:9], evaluated[9:]
        assert first[0] == 4 and first[-1] == 2 and rest == [4] * 9

    def test_a_refused_candidate_is_asked_about_again_at_the_end_only(self):
        asked = []
        judge = Judge(lambda image: asked.append(image) or torch.ones(1, 1))
        alone(FalsifyStage(starts=3, judge=judge), box_problem(linear_model([[1.0]]), [-1.0], [1.0], [[1.0]], [0.5]))
        assert len(asked) == 2 * 3

    def test_a_search_spends_its_share(self, evaluated, monkeypatch):
        children = []
        original = SearchDescents.earn

        def watched(self, image, evaluations):
            children.append(len(image) * evaluations)
            return original(self, image, evaluations)

        monkeypatch.setattr(SearchDescents, "earn", watched)
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
        images = torch.rand(3, 1, 1, 8)
        problem = problem_of(model.eval(), images, model(images).argmax(1), LinfBall(0.5), 3)
        for share in (0.0, 0.1):
            evaluated.clear(), children.clear()
            alone(BabStage(Search(descents=share, most=60), 1e6, Refusing()), problem)
            assert sum(children) > 1000 and bool(evaluated) == bool(share)
            first = len(problem) * ROOT * (STEPS + 1)  # the descents at the roots
            assert sum(evaluated) <= first * (share > 0) + 1.1 * share * sum(children)


class TestStarts:
    def problem(self) -> Problem:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        images = torch.rand(5, 1, 1, 6)
        return problem_of(model, images, model(images).argmax(1), LinfBall(0.1), 4)

    def test_random_numbers_are_an_images_own(self):
        problem = self.problem()
        image, clause, stream = (
            torch.tensor([0, 0, 3, 4, 4]),
            torch.tensor([0, 2, 1, 1, 1]),
            torch.tensor([2, 2, 2, 5, 6]),
        )
        some = Points(image, clause, problem.region.images[image], stream)
        points = random_points(problem, some, 7)
        assert problem.region.take(image).contains(points).all() and len(points.unique(dim=0)) == 5
        alone_ = problem.subset(torch.tensor([4]))
        last = Points(torch.zeros(1, dtype=torch.int64), clause[-1:], some.points[-1:], stream[-1:])
        assert torch.equal(random_points(alone_, last, 7), points[-1:])
        assert not torch.equal(random_points(alone_, last, 8), points[-1:])

    def test_an_image_is_refuted_alike_in_every_batch(self):
        problem = self.problem()
        together = alone(FalsifyStage(starts=4), problem)
        assert {"falsified", None} == {*together.statuses}
        for number, status in enumerate(together.statuses):
            one = problem.subset(torch.tensor([number]))
            found = alone(FalsifyStage(starts=4), one)
            assert found.statuses == [status]
            if status:
                assert torch.allclose(found.counterexamples[0], together.counterexamples[number], atol=1e-6)

    def test_relaxed_minimisers_are_least_for_their_clause(self):
        """Of a linear network the bound is exact, and no point of the box is lower."""
        model = linear_model(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.5, -1.0], [0.0, 1.0, 3.0]]))
        images = torch.full((2, 1, 1, 3), 0.5)
        problem = problem_of(model, images, torch.tensor([0, 2]), LinfBall(0.2), 3)
        known = alone(CrownStage(), problem).known
        members, _ = rows_of_clauses(problem.specification.clauses)
        image, clause = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        points = relaxed_minimisers(problem, known, members, Points(image, clause, images[image], clause))
        at = problem.specification.subset(image).values(model(points)).gather(1, clause[:, None])[:, 0]
        for _ in range(50):
            others = problem.region.take(image).nearest(points + 0.3 * torch.randn(points.shape))
            values = problem.specification.subset(image).values(model(others)).gather(1, clause[:, None])[:, 0]
            assert (values >= at - 1e-6).all()

    def test_the_lowest_of_each_image(self):
        image, value = torch.tensor([1, 0, 1, 1, 0, 2]), torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0, 9.0])
        assert best_of_each(image, value, 2).tolist() == [4, 1, 3, 2, 5]

    def descents(self, share: float = 0.5) -> SearchDescents:
        problem = self.problem()
        return SearchDescents(problem, Chords.of(unknown(problem).network, torch.float32, {}), share, 100)

    def note(self, descents: SearchDescents, count: int) -> None:
        """Offer ``count`` points of the first image, of which the last two are the same."""
        image = torch.zeros(count, dtype=torch.int64)
        margin = torch.arange(float(count)).clamp(max=max(1, count - 2))
        descents.note(image, image, torch.arange(float(count)), descents.problem.region.images[image], margin)

    def test_a_point_is_descended_from_once_and_paid_for(self):
        descents, image = self.descents(), torch.zeros(1, dtype=torch.int64)
        self.note(descents, 6)
        assert descents.points(lambda number: False) is None
        points = descents.points(lambda number: True)
        assert points is not None and points.image.tolist() == [0] * ROOT  # these are free
        own, drawn = points.points[:5], points.points[5:]  # the sixth was the same as the fifth
        assert torch.equal(own, descents.problem.region.images[points.image[:5]])
        assert len(drawn.unique(dim=0)) == ROOT - 5
        assert descents.problem.region.take(points.image[5:]).contains(drawn).all()
        self.note(descents, 8)
        assert descents.points(lambda number: True) is None  # nothing is due
        descents.earn(image.repeat(2 * LEAST * STEPS - 1), 1)
        assert descents.points(lambda number: True) is None  # too little is
        descents.earn(image, 1)
        points = descents.points(lambda number: True)
        assert points is not None and len(points) == LEAST
        descents.earn(image.repeat(100 * STEPS), 1)
        self.note(descents, 8)
        assert descents.points(lambda number: True) is None  # none is new
        self.note(descents, 20)
        assert len(descents.points(lambda number: True)) == MOST

    def test_none_without_a_share(self):
        descents = self.descents(0.0)
        self.note(descents, 6)
        assert descents.points(lambda number: True) is None
