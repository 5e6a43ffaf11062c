"""Splitting inputs and descending on outputs: never unsound, and complete for few inputs. The MILP, dense grids and
planted networks say what is true."""

import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from milp_oracle import minimum
from planted import planted_pairs
from problems import alone, linear_model, problem_of, tied, unknown
from torch import Tensor, nn

from certtrain.bounds import Box, L2Ball, LinfBall
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.verifiers import CrownStage, InputSplitStage, Judge, Limits, Problem, Specification, falsify, run_cascade
from certtrain.verifiers.chords import Chords
from certtrain.verifiers.falsify import FalsifyStage
from certtrain.verifiers.input_split import INPUTS, split_inputs
from certtrain.verifiers.stages import holds

FINE = 1e-5
ACTIVATIONS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}
CLAUSES = [(0,), (0, 0), (0, 1), (1, 0, 1, 2, 0), (0, 0, 0, 1)]
BATCH = 3


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def random_network(kind: str, inputs: int, outputs: int, draw: torch.Generator, width: int = 8) -> nn.Module:
    layers, sizes = [], [inputs, width, width, outputs]
    for size, after in pairwise(sizes):
        layer = nn.Linear(size, after)
        layer.weight.copy_(2 * torch.randn(after, size, generator=draw) / size**0.5)
        layer.bias.copy_(0.3 * torch.randn(after, generator=draw))
        layers += [layer, ACTIVATIONS[kind]()]
    return nn.Sequential(nn.Flatten(), *layers[:-1]).eval()


def on_grid(problem: Problem, each: int) -> Tensor:
    """(B,) the least worst margin over a grid of each box, in float64."""
    network = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64)
    axis = torch.linspace(0, 1, each, dtype=torch.float64)
    inputs = problem.region.images.shape[1]
    shares = torch.cartesian_prod(*[axis] * inputs).reshape(-1, inputs)
    found = []
    for number in range(len(problem)):
        one = problem.subset(torch.tensor([number]))
        lower, upper = one.region.lower.double(), one.region.upper.double()
        logits = network(lower + shares * (upper - lower))
        specification = one.specification.subset(torch.zeros(len(logits), dtype=torch.long))
        found.append(specification.worst(specification.values(logits)).min())
    return torch.stack(found)


def by_program(problem: Problem) -> Tensor:
    """(B,) the same, exactly."""
    network, found = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64), []
    for number in range(len(problem)):
        one = problem.subset(torch.tensor([number]))
        region, specification = one.region.to(torch.float64), one.specification
        exact = minimum(network, region, specification.rows.double(), specification.offsets.double(),
                        crown_bounds(network, region), clauses=specification.clauses)  # fmt: skip
        assert exact.optimal.all()
        found.append(exact.values.min())
    return torch.stack(found)


def random_problem(seed: int, kind: str) -> tuple[Problem, Tensor]:
    """Boxes of their own in any units; clauses of several rows whose least worst margin is known: (B,)."""
    draw = torch.Generator().manual_seed(seed)
    most = 2 if kind == "tanh" else 4
    inputs, outputs = (int(torch.randint(1, 1 + n, (), generator=draw)) for n in (most, 3))
    model = random_network(kind, inputs, outputs, draw)
    lower = torch.randn(BATCH, inputs, generator=draw)
    wide = torch.rand(BATCH, inputs, generator=draw) < 0.9
    region = Box(lower, lower + 2 * torch.rand(BATCH, inputs, generator=draw) * wide)
    clauses = torch.tensor(CLAUSES[seed % len(CLAUSES)])
    rows = torch.randn(BATCH, len(clauses), outputs, generator=draw)
    specification = Specification(rows, torch.zeros(rows.shape[:2]), clauses)
    problem = Problem(model, region, specification, torch.arange(BATCH))
    least = on_grid(problem, 1001 if inputs == 1 else 101) if kind == "tanh" else by_program(problem)
    wanted = torch.tensor([0.03, -0.03, 0.3], dtype=torch.float64) * least.abs().clamp(min=0.3)
    offsets = (wanted - least).float().unsqueeze(1).expand(rows.shape[:2]).contiguous()
    return replace(problem, specification=replace(specification, offsets=offsets)), wanted


def assert_counterexample(problem: Problem, number: int, point: Tensor) -> None:
    """In its own box, and wrong."""
    one = problem.subset(torch.tensor([number]))
    assert one.region.contains(point[None]).all()
    assert not holds(one.specification, problem.network(point[None])).any()


def boxes_of(*ends: tuple[float, float]) -> Box:
    table = torch.tensor(ends).unsqueeze(-1)
    return Box(table[:, 0], table[:, 1])


def one_row(model: nn.Module, region: Box, row: list[float], offset: float = 0.0) -> Problem:
    count = len(region)
    rows = torch.tensor(row).expand(count, 1, -1).contiguous()
    specification = Specification(rows, torch.full((count, 1), offset), torch.tensor([0]))
    return Problem(model, region, specification, torch.arange(count))


class TestAgainstTheTruth:
    @pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    def test_verified_iff_the_least_margin_is_positive(self, kind, arithmetic):
        if kind == "tanh" and arithmetic != "nearest":
            pytest.skip("roundings of tanh are not bounded")
        for seed in range(8):
            problem, least = random_problem(seed, kind)
            for number, verdict in enumerate(run_cascade(problem, [InputSplitStage(60.0)], arithmetic=arithmetic)):
                assert verdict.status == ("verified" if least[number] > 0 else "falsified"), (seed, number, verdict)
                assert verdict.lower_bound is not None and verdict.lower_bound <= least[number] + FINE
                assert (verdict.lower_bound > 0) == (verdict.status == "verified")
                if verdict.counterexample is not None:
                    assert_counterexample(problem, number, verdict.counterexample)

    @pytest.mark.parametrize(("arithmetic", "refine"), [("nearest", False), ("nearest", True), ("real", True)])
    def test_after_cheaper_stages(self, arithmetic, refine):
        """What they know of the whole boxes is built upon."""
        stages = [CrownStage(refine=refine), FalsifyStage(starts=1, steps=3), InputSplitStage(60.0)]
        for seed in range(20, 26):
            problem, least = random_problem(seed, "relu")
            for number, verdict in enumerate(run_cascade(problem, stages, arithmetic=arithmetic)):
                assert verdict.status == ("verified" if least[number] > 0 else "falsified"), (seed, number, verdict)
                if verdict.lower_bound is not None:
                    assert verdict.lower_bound <= least[number] + FINE

    def test_planted_networks_and_their_twins(self):
        """Spikes that descents miss, as small as a fiftieth of a box."""
        seen = 0
        for case, twin in planted_pairs(24, seed=7000, kinds=("dense", "leaky")):
            if case.image.numel() > 4:
                continue
            seen += 1
            for one, status in ((case, "falsified"), (twin, "verified")):
                classes = one.model(one.image[None]).shape[1]
                problem = problem_of(
                    one.model, one.image[None], torch.tensor([one.label]), LinfBall(one.epsilon), classes
                )
                box = replace(problem, region=Box(*problem.region.ball.ends(one.image[None])))
                for asked in (problem, box):
                    finding = alone(InputSplitStage(30.0), asked)
                    assert finding.statuses == [status], (finding.reasons, finding.lower)
                if status == "falsified":
                    assert_counterexample(box, 0, finding.counterexamples[0])
        assert seen >= 5

    def test_needles_beside_the_cuts(self):
        """Halves leave no gap: needles a ten thousandth wide, on either side of where a box is cut first."""
        tips = [cut + side * 3e-4 for cut in (0.5, 0.25, 0.75, 0.125) for side in (-1, 1)]
        for tip in tips:
            around, above = nn.Linear(1, 2), nn.Linear(2, 1)
            around.weight.copy_(torch.tensor([[1.0], [-1.0]])), around.bias.copy_(torch.tensor([-tip, tip]))
            above.weight.fill_(-1e4), above.bias.fill_(1.0)
            model = nn.Sequential(around, nn.ReLU(), above, nn.ReLU(), linear_model([[-1.0]], [0.5])).eval()
            verdict = run_cascade(one_row(model, boxes_of((0.0, 1.0)), [1.0]), [InputSplitStage(60.0)])[0]
            assert verdict.status == "falsified" and abs(float(verdict.counterexample) - tip) < 1e-4

    @pytest.mark.parametrize("batch", [1, 2, 512])
    def test_however_many_boxes_are_halved_at_a_time(self, batch):
        for seed in range(30, 34):
            problem, least = random_problem(seed, "relu")
            found = split_inputs(problem, unknown(problem), 60.0, partial(Judge(), problem), batch)
            assert found.proved.tolist() == (least > 0).tolist() and found.reasons == [None] * BATCH
            assert [point is not None for point in found.counterexamples] == (least < 0).tolist()
            assert (found.lower <= least + FINE).all()

    def test_problems_do_not_disturb_each_other(self):
        for seed in range(40, 46):
            problem, _ = random_problem(seed, "leaky")
            together = alone(InputSplitStage(), problem)
            for number in range(BATCH):
                one = alone(InputSplitStage(), problem.subset(torch.tensor([number])))
                assert one.statuses == [together.statuses[number]]

    def test_a_clause_that_no_row_alone_refutes(self):
        """x - 0.4 and 0.6 - x: one of them is positive at each point, neither on the whole box."""
        model = linear_model([[1.0]])
        rows, offsets = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[-0.4, 0.6]])
        for clauses, gap, expected in (
            ((0, 0), 0.0, "verified"),
            ((0, 0), 0.21, "falsified"),
            ((0, 1), 0.0, "falsified"),
        ):
            specification = Specification(rows, offsets - gap / 2, torch.tensor(clauses))
            problem = Problem(model, boxes_of((-1.0, 2.0)), specification, torch.arange(1))
            for arithmetic in ("nearest", "real", "float32"):
                verdict = run_cascade(problem, [InputSplitStage()], arithmetic=arithmetic)[0]
                assert verdict.status == expected

    def test_wrong_bounds_of_the_whole_box_would_show(self):
        """What is known is taken as given: that other tests pass says that it is right."""
        problem = one_row(linear_model([[1.0]]), boxes_of((-1.0, 1.0)), [1.0])
        known = unknown(problem)
        assert alone(InputSplitStage(), problem, known).statuses == ["falsified"]
        assert alone(InputSplitStage(), problem, known.with_rows(torch.ones(1, 1))).statuses == ["verified"]


class TestEnds:
    def test_counterexamples_at_the_very_ends(self):
        """One float of a box is wrong."""
        for lower, upper in ((0.1, 0.3), (-7.3, -7.1), (1e-30, 1e-3), (0.7, 0.7), (1e4, 1e4 + 7)):
            for sign in (1.0, -1.0):
                region = boxes_of((lower, upper))
                end = region.lower if sign > 0 else region.upper
                model = linear_model([[sign]])
                at_end = float(model(end)[0, 0])
                problem = one_row(model, region, [1.0], -at_end)
                verdict = run_cascade(problem, [InputSplitStage(5.0)])[0]
                assert verdict.status == "falsified", (lower, upper, sign, verdict)
                assert_counterexample(problem, 0, verdict.counterexample)

    @pytest.mark.parametrize("margin", [0.0, -1e-8, -1e-7, -1e-5])
    @pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
    def test_a_tie_is_never_verified(self, margin, arithmetic):
        assert run_cascade(tied(margin), [InputSplitStage(5.0)], arithmetic=arithmetic)[0].status == "falsified"

    @pytest.mark.parametrize("margin", [1e-5, 1e-4])
    @pytest.mark.parametrize("arithmetic", ["nearest", "real", "float32"])
    def test_a_small_margin_is_verified(self, margin, arithmetic):
        assert run_cascade(tied(margin), [InputSplitStage(5.0)], arithmetic=arithmetic)[0].status == "verified"

    def test_boxes_too_small_to_be_halved_are_within_tolerance(self):
        """No float of the box is wrong where the judge is asked, and no bound says so."""
        region = boxes_of((1.0, 1.0 + 2**-23))
        problem = one_row(linear_model([[1.0]]), region, [1.0], -1.0)
        found = split_inputs(problem, unknown(problem), 5.0, lambda number, point: False)
        assert found.reasons == ["within tolerance"] and not found.proved.any()
        finding = alone(InputSplitStage(5.0, Judge(replay=lambda image: torch.full((1,), 9.0))), problem)
        assert finding.statuses == [None] and finding.reasons == ["within tolerance"]

    def test_out_of_time(self):
        problem, least = random_problem(3, "leaky")
        finding = alone(InputSplitStage(1e-6), problem)
        for number, status in enumerate(finding.statuses):
            assert status in ("timeout", "falsified" if least[number] < 0 else "verified")
            assert (finding.reasons[number] in ("timeout", "wall clock")) == (status == "timeout")
        assert "timeout" in finding.statuses and (finding.lower <= least + FINE).all()
        verdicts = run_cascade(problem, [InputSplitStage(60.0)], Limits(60.0, time.perf_counter()))
        assert {verdict.status for verdict in verdicts} <= {"timeout", "verified", "falsified"}
        assert not any(v.status == "verified" and least[v.index] < 0 for v in verdicts)

    def test_a_problem_without_time_ends_alone(self):
        """What others have proved stays proved."""
        easy, hard = (0.6, 0.61), (0.1, 0.9)
        problem = one_row(tied(1e-6).network, boxes_of(easy, hard), [1.0, -1.0])
        problem = replace(problem, region=problem.region.map(lambda x: x.reshape(-1, 1, 1, 1)))
        finding = alone(InputSplitStage(1e-9), problem)
        assert finding.statuses[1] == "timeout" and finding.statuses[0] in ("verified", "timeout")
        assert finding.seconds is not None and (finding.seconds > 0).all()

    def test_too_many_inputs(self):
        for count in (INPUTS, INPUTS + 1):
            model = linear_model([[1.0] * 40])
            upper = (torch.arange(40) < count).float().expand(2, -1).clone()
            upper[1] = 0.0
            problem = one_row(model, Box(torch.zeros(2, 40), upper), [1.0], 1.0)
            finding = alone(InputSplitStage(), problem)
            if count > INPUTS:
                assert finding.statuses == [None, None]
                assert all(f"{INPUTS} inputs" in reason for reason in finding.reasons)
                verdict = run_cascade(problem, [InputSplitStage()])[0]
                assert verdict.status == "unknown" and f"{INPUTS} inputs" in verdict.reason
            else:
                assert finding.statuses == ["verified"] * 2

    def test_balls_that_are_no_boxes(self):
        problem = problem_of(
            linear_model([[1.0], [0.0]]), torch.full((1, 1, 1, 1), 0.5), torch.tensor([0]), L2Ball(0.1), 2
        )
        finding = alone(InputSplitStage(), problem)
        assert finding.statuses == [None] and "boxes" in finding.reasons[0]

    def test_networks_that_overflow_are_not_verified(self):
        model = linear_model([[3e38]])
        problem = one_row(
            nn.Sequential(model, nn.ReLU(), linear_model([[1e10]])).eval(), boxes_of((1.0, 2.0)), [1.0], 1.0
        )
        assert alone(InputSplitStage(1.0), problem).statuses != ["verified"]


class TestFalsify:
    def test_easy_counterexamples_are_found(self):
        found = 0
        for seed in range(60, 75):
            problem, least = random_problem(seed, list(ACTIVATIONS)[seed % 3])
            offsets = problem.specification.offsets - 0.2
            easy = replace(problem, specification=replace(problem.specification, offsets=offsets))
            finding = alone(FalsifyStage(), easy)
            for number, status in enumerate(finding.statuses):
                assert status in ("falsified", None)
                if status == "falsified":
                    assert_counterexample(easy, number, finding.counterexamples[number])
                    found += 1
                else:
                    assert finding.counterexamples[number] is None
            assert not any(status for number, status in enumerate(finding.statuses) if least[number] - 0.2 > FINE)
        assert found >= 25

    def test_of_all_problems_of_a_batch(self):
        """Each of them is wrong near another end; half of the boxes are right."""
        ends = [(-1.0 - i, 0.1 + i) for i in range(6)]
        problem = one_row(linear_model([[1.0]]), boxes_of(*ends), [1.0])
        offsets = torch.tensor([[1.0 + i + (0.5 if i % 2 else -0.01)] for i in range(6)])
        problem = replace(problem, specification=replace(problem.specification, offsets=offsets))
        finding = alone(FalsifyStage(), problem)
        assert finding.statuses == ["falsified", None] * 3

    def test_descents_follow_the_largest_row(self):
        """x + 0.5 and -x - 5: the second is far below 0 everywhere, and falls the other way."""
        specification = Specification(
            torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[0.5, -5.0]]), torch.tensor([0, 0])
        )
        problem = Problem(linear_model([[1.0]]), boxes_of((-1.0, 1.5)), specification, torch.arange(1))
        finding = alone(FalsifyStage(starts=1), problem)
        assert finding.statuses == ["falsified"] and finding.counterexamples[0].item() <= -0.5

    @pytest.mark.parametrize("region", ["box", "linf", "l2"])
    def test_points_lie_in_any_region(self, region):
        draw = torch.Generator().manual_seed(0)
        model, images = random_network("relu", 4, 3, draw), torch.rand(30, 4, generator=draw)
        problem = problem_of(
            model, images, model(images).argmax(1), L2Ball(0.1) if region == "l2" else LinfBall(0.1), 3
        )
        if region == "box":
            problem = replace(problem, region=Box(*problem.region.ball.ends(images)))
        finding = alone(FalsifyStage(), problem)
        assert "falsified" in finding.statuses and None in finding.statuses
        for number, point in enumerate(finding.counterexamples):
            if point is not None:
                assert_counterexample(problem, number, point)

    def test_a_judge_has_the_last_word(self):
        problem = one_row(linear_model([[1.0]]), boxes_of((-1.0, 1.0)), [1.0])
        assert alone(FalsifyStage(), problem).statuses == ["falsified"]
        refused = alone(FalsifyStage(judge=Judge(replay=lambda image: torch.ones(1))), problem)
        assert refused.statuses == [None] and refused.counterexamples == [None]

    def test_only_open_clauses_are_tried(self, monkeypatch):
        asked = []
        original = falsify.descend

        def watched(problem, chords, members, start, refute, **settings):
            asked.extend(zip(start.image.tolist(), start.clause.tolist()))
            return original(problem, chords, members, start, refute, **settings)

        monkeypatch.setattr(falsify, "descend", watched)
        rows = torch.tensor([[1.0], [1.0], [-1.0]]).expand(2, -1, -1)
        specification = Specification(rows, torch.full((2, 3), 5.0), torch.tensor([0, 1, 1]))
        problem = Problem(linear_model([[1.0]]), boxes_of((-1.0, 1.0), (-1.0, 1.0)), specification, torch.arange(2))
        known = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
        alone(FalsifyStage(starts=2), problem, unknown(problem).with_rows(known))
        assert set(asked) == {(0, 1), (1, 0)} and len(asked) == 4
        asked.clear()
        alone(FalsifyStage(), problem, unknown(problem).with_rows(torch.ones(2, 3)))
        assert not asked

    def test_the_same_seed_starts_at_the_same_points(self, monkeypatch):
        points: list[Tensor] = []
        original = Chords.__call__
        watched = lambda chords, x, share: points.append(x.detach()) or original(chords, x, share)  # noqa: E731
        monkeypatch.setattr(Chords, "__call__", watched)
        problem = one_row(linear_model([[1.0, 1.0]]), Box(torch.zeros(2, 2), torch.ones(2, 2)), [1.0], 1.0)
        runs = []
        for seed in (0, 0, 1):
            points.clear()
            alone(FalsifyStage(seed=seed, starts=3, steps=0), problem)
            runs.append(torch.cat(points).reshape(3, 2, 2))
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
        first, *others = runs[0]
        assert (first == 0.5).all() and ((torch.stack(others) >= 0) & (torch.stack(others) <= 1)).all()
        assert len(torch.stack(others).flatten(0, 1).unique(dim=0)) == 4

    def test_seconds_are_kept(self):
        problem = one_row(linear_model([[1.0]]), boxes_of((-1.0, 1.0)), [1.0], 5.0)
        started = time.perf_counter()
        finding = alone(FalsifyStage(steps=10**7, starts=10**4, seconds=0.2), problem)
        assert finding.statuses == [None] and 0.15 < time.perf_counter() - started < 5.0
        assert alone(
            FalsifyStage(seconds=0.0), one_row(linear_model([[1.0]]), boxes_of((-1.0, 1.0)), [1.0])
        ).statuses == [None]

    def test_no_gradient_reaches_the_network(self):
        model = linear_model([[1.0]])
        problem = one_row(model, boxes_of((-1.0, 1.0)), [1.0], 5.0)
        alone(FalsifyStage(starts=1, steps=2), problem)
        assert all(parameter.grad is None for parameter in model.parameters())
