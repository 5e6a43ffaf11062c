"""Branch and bound: never unsound, and complete up to its tolerance. Planted networks and the MILP say what is true."""

import math
from dataclasses import replace

import pytest
import torch
from milp_oracle import minimum
from planted import KINDS, Planted, planted_pair, planted_pairs, random_network
from problems import alone, linear_model, problem_of, tied, unknown
from torch import nn

from certtrain.bounds import L2Ball, LinfBall
from certtrain.bounds.crown import crown_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.verifiers import (
    AlphaStage,
    BabStage,
    Certify,
    CrownIbpStage,
    CrownStage,
    Finding,
    IbpStage,
    Problem,
    Search,
    Specification,
    Stage,
    certify,
    engine,
    neuron_split,
)

FINE = 1e-5  # HiGHS meets each constraint to 1e-6
FIRST: tuple[Stage, ...] = (IbpStage(), CrownIbpStage(), CrownStage(), AlphaStage())


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def truth(problem: Problem) -> torch.Tensor:
    """(B,) the least worst margin on each region, by MILP in float64."""
    network, found = fold(problem.network, problem.region.images.shape[1:], dtype=torch.float64), []
    for number in range(len(problem)):
        one = problem.subset(torch.tensor([number]))
        region = one.region.ball.region(one.region.images.double())
        rows, offsets = one.specification.rows.double(), one.specification.offsets.double()
        clauses = one.specification.clauses
        exact = minimum(network, region, rows, offsets, crown_bounds(network, region), clauses=clauses)
        assert exact.optimal.all()
        found.append(exact.values.min())
    return torch.stack(found)


def random_problem(seed: int, kind: str, count: int = 4, epsilon: float | None = None) -> Problem:
    """``count`` images that a random network of two or three classes gets right."""
    draw = torch.Generator().manual_seed(seed)
    shape = torch.Size((1, 3, 3) if kind in ("conv", "residual", "max_pool") else (1, 1, 2 + seed % 4))
    model = random_network(kind, shape, 2 + seed % 2, draw, 1.0).eval()
    images = torch.rand(count, *shape, generator=draw)
    radius = 0.05 + 0.4 * float(torch.rand((), generator=draw)) if epsilon is None else epsilon
    return problem_of(model, images, model(images).argmax(1), LinfBall(radius), 2 + seed % 2)


def of_clauses(problem: Problem, seed: int, clauses: tuple[int, ...] = (1, 0, 1, 2, 0)) -> Problem:
    """With a random specification whose clauses have several rows and offsets, that holds on the images."""
    draw = torch.Generator().manual_seed(seed)
    logits = problem.network(problem.region.images)
    rows = torch.randn(len(problem), len(clauses), logits.shape[1], generator=draw)
    specification = Specification(rows, torch.zeros(rows.shape[:2]), torch.tensor(clauses))
    offsets = 0.3 * torch.rand(rows.shape[:2], generator=draw) - specification.values(logits)
    return replace(problem, specification=replace(specification, offsets=offsets))


def alike(problem: Problem) -> Problem:
    """Each image's specification says of both rows' average that it is positive where neither row is."""
    logits = problem.network(problem.region.images)
    row = torch.eye(logits.shape[1])[:1].expand(len(problem), 1, -1)
    rows = torch.cat([row, -row], 1)
    offsets = torch.stack([-logits[:, 0], logits[:, 0]], 1) + 0.05
    return replace(problem, specification=Specification(rows, offsets, torch.tensor([0, 0])))


def check(problem: Problem, finding: Finding, exact: torch.Tensor, complete: bool = True) -> None:
    """That a finding says nothing false; and, if it is to be ``complete``, all that there is to say."""
    lower = problem.specification.worst(finding.known.rows)
    lower = lower if finding.lower is None else torch.maximum(lower, finding.lower)
    assert (lower <= exact + FINE).all()
    for number, (status, least) in enumerate(zip(finding.statuses, exact.tolist(), strict=True)):
        assert status in ("verified", "falsified", "timeout", None)
        if status == "verified":
            assert least > -FINE and lower[number] > 0
        if status == "falsified":
            assert least < FINE
            one, point = problem.subset(torch.tensor([number])), finding.counterexamples[number][None]
            assert one.region.ball.contains(one.region.images, point).all()
            assert not (one.specification.worst(one.specification.values(problem.network(point))) > 0).any()
        if complete and abs(least) > 1e-4:
            assert status == ("verified" if least > 0 else "falsified"), (number, least, finding.reasons)


def check_every_stage(problem: Problem, exact: torch.Tensor) -> set:
    """Each stage by itself; what branch and bound answered."""
    for stage in FIRST:
        check(problem, alone(stage, problem), exact, complete=False)
    finding = alone(BabStage(), problem)
    check(problem, finding, exact)
    return set(finding.statuses)


def problem_from(case: Planted) -> Problem:
    classes = case.model(case.image[None]).shape[1]
    return problem_of(case.model, case.image[None], torch.tensor([case.label]), LinfBall(case.epsilon), classes)


class TestPlanted:
    """Counterexamples known by construction, of which attacks miss a third; and twins that have none."""

    def test_no_stage_proves_a_planted_network_or_refutes_its_twin(self, planted):
        stages = *FIRST, BabStage(Search(most=3)), BabStage(Search(most=3, tighten=False), timeout=1e-3)
        for case, twin in planted_pairs(planted, seed=2000):
            for stage in stages:
                problem = problem_from(case)
                finding = alone(stage, problem)
                values = problem.specification.values(case.model(case.counterexample[None]))
                check(problem, finding, problem.specification.worst(values).double(), complete=False)
                assert finding.statuses[0] != "verified"
                assert alone(stage, problem_from(twin)).statuses[0] in ("verified", "timeout", None)

    @pytest.mark.parametrize("kind", KINDS)
    def test_branch_and_bound_decides_both(self, kind, planted):
        for case, twin in planted_pairs(planted if kind == "dense" else -(-planted // 10), seed=3001, kinds=(kind,)):
            finding = alone(BabStage(timeout=20.0), problem_from(case))
            assert finding.statuses == ["falsified"], finding.reasons
            point = finding.counterexamples[0][None]
            assert LinfBall(case.epsilon).contains(case.image[None], point).all()
            assert case.model(point).argmax() != case.label
            finding = alone(BabStage(timeout=20.0), problem_from(twin))
            assert finding.statuses == ["verified"] and finding.lower > 0, finding.reasons

    def test_the_whole_cascade_decides_all(self, planted):
        for pair in planted_pairs(-(-planted // 5), seed=4000):
            for case in pair:
                settings = Certify(timeout=20.0)
                verdict = certify(case.model, case.image[None], torch.tensor([case.label]), case.epsilon, settings)[0]
                robust = case.counterexample is None
                assert verdict.status in (("verified",) if robust else ("falsified", "misclassified")), verdict


class TestAgainstMilp:
    @pytest.mark.parametrize("kind", KINDS)
    def test_statuses_and_bounds(self, kind):
        seen = set()
        for seed in range(12 if kind in ("dense", "leaky") else 4):
            problem = random_problem(seed, kind)
            exact = truth(problem)
            seen |= check_every_stage(problem, exact)
            for search, timeout in [
                (Search(most=1), 60.0), (Search(most=3), 60.0), (Search(batch=3), 1e-4), (Search(batch=2), 0.02),
            ]:  # fmt: skip
                check(problem, alone(BabStage(search, timeout), problem), exact, complete=False)
        assert {"verified", "falsified"} <= seen

    @pytest.mark.parametrize("kind", ["dense", "leaky", "residual"])
    def test_every_search_finds_the_same(self, kind):
        searches = [
            Search(), Search(tighten=False), Search(candidates=3), Search(batch=1), Search(rate=0.3, candidates=50),
        ]  # fmt: skip
        if kind != "residual":  # without an ascent only leaves prove what is not proved at once: 2^44 of them
            searches += [Search(steps=0), Search(batch=1, steps=0, tighten=False), Search(steps=2, rate=1.0)]
        for seed in range(20, 24):
            problem = random_problem(seed, kind, count=3)
            exact = truth(problem)
            for search in searches[seed % 2 :: 2]:  # each of them on two
                check(problem, alone(BabStage(search), problem), exact)

    @pytest.mark.parametrize("kind", ["dense", "leaky", "conv"])
    def test_clauses_of_several_rows_with_offsets(self, kind):
        seen = set()
        for seed in range(41, 53 if kind != "conv" else 44):
            problem = of_clauses(random_problem(seed, kind, count=3), seed)
            exact = truth(problem)
            seen |= check_every_stage(problem, exact)
        assert {"verified", "falsified"} <= seen

    @pytest.mark.parametrize("kind", ["dense", "leaky"])
    def test_a_clause_that_no_row_alone_refutes(self, kind):
        """One row is -z + a, the other z - b with a > b: at each point one of them is positive, on no leaf the same."""
        for seed in range(60, 66):
            problem = alike(random_problem(seed, kind, count=2, epsilon=0.3))
            exact = truth(problem)
            assert exact.tolist() == pytest.approx([0.05, 0.05], abs=FINE)
            finding = alone(BabStage(), problem)
            assert finding.statuses == ["verified"] * 2, finding.reasons
            check(problem, finding, exact)

    def test_double_precision(self):
        for seed in range(70, 74):
            problem = random_problem(seed, "dense")
            wide = replace(
                problem, network=problem.network.double(),
                region=problem.region.ball.region(problem.region.images.double()),
            )  # fmt: skip
            check(wide, alone(BabStage(), wide), truth(wide))

    def test_bounds_never_fall_from_stage_to_stage(self):
        for seed in range(80, 90):
            problem = random_problem(seed, "dense")
            known, last = unknown(problem), torch.full((len(problem),), -torch.inf)
            for stage in (*FIRST, BabStage(Search(most=1)), BabStage(Search(most=4)), BabStage()):
                finding = stage(problem, known)
                known = finding.known
                found = problem.specification.worst(known.rows)
                found = found if finding.lower is None else torch.maximum(found, finding.lower)
                assert (found >= last).all()
                last = found


class TestSampling:
    @pytest.mark.parametrize("kind", KINDS)
    def test_none_of_millions_of_points_is_below_a_bound(self, kind):
        """400,000 points for each kind of network, corners among them, against the best bound of every stage."""
        problem = random_problem(900, kind)
        known, hull = unknown(problem), problem.region.hull
        for stage in (*FIRST, BabStage()):
            finding = stage(problem, known)
            known = finding.known
        lower = problem.specification.worst(known.rows)
        lower = lower if finding.lower is None else torch.maximum(lower, finding.lower)
        draw, least = torch.Generator().manual_seed(0), torch.full((len(problem),), torch.inf)
        asked = problem.specification
        each = replace(asked, forms=asked.rows.repeat(1000, 1, 1), offsets=asked.offsets.repeat(1000, 1))
        for number in range(100):
            share = torch.rand(1000, *hull.center.shape, generator=draw)
            share = share if number % 2 else share.round()
            points = hull.lower + share * (hull.upper - hull.lower)
            values = each.worst(each.values(problem.network(points.flatten(0, 1))))
            least = torch.minimum(least, values.reshape(1000, len(problem)).amin(0))
        assert (least >= lower - FINE).all() and (least < lower + 2).all()


class TestBatches:
    @pytest.mark.parametrize("kind", ["dense", "conv"])
    def test_images_do_not_disturb_each_other(self, kind):
        for seed in range(100, 104):
            problem = random_problem(seed, kind, count=6, epsilon=0.25)
            together = alone(BabStage(), problem)
            for number in range(len(problem)):
                one = alone(BabStage(), problem.subset(torch.tensor([number])))
                assert one.statuses == [together.statuses[number]]
                if one.statuses == ["verified"]:
                    assert float(one.lower) == pytest.approx(float(together.lower[number]), abs=FINE)

    def test_small_memory(self, monkeypatch):
        problem = random_problem(7, "residual", count=4)
        expected = alone(BabStage(), problem).statuses
        for most in ("CHUNK", "ROUND"):
            monkeypatch.setattr(f"certtrain.bounds.memory.{most}", 1)
        assert alone(BabStage(), problem).statuses == expected
        check(problem, alone(BabStage(Search(most=20)), problem), truth(problem), complete=False)

    def test_an_image_that_is_out_of_time_ends_alone(self, monkeypatch):
        """The clock runs for one image, in the middle of the others' batches."""
        problem = random_problem(228, "conv", count=6, epsilon=0.35)  # four of the six need several splits
        complete, slow = alone(BabStage(), problem), engine.BranchAndBound._examine_batch
        reasons = alone(BabStage(Search(most=1)), problem).reasons
        victim = next(number for number, reason in enumerate(reasons) if reason is not None)

        def examine(self, batch):
            slow(self, batch)
            self.progress.seconds[victim] += 1000.0

        monkeypatch.setattr(engine.BranchAndBound, "_examine_batch", examine)
        found = alone(BabStage(Search(batch=2)), problem)
        assert found.statuses[victim] == "timeout" and found.reasons[victim] == "timeout"
        assert [s for i, s in enumerate(found.statuses) if i != victim] == [
            s for i, s in enumerate(complete.statuses) if i != victim
        ]
        check(problem, found, truth(problem), complete=False)


class TestEdges:
    def test_what_is_decided_already_is_left_alone_and_still_bounds_the_worst_margin(self):
        for seed in range(120, 140):
            problem = random_problem(2 * seed + 1, "dense")  # three classes
            exact, known = truth(problem), unknown(problem)
            some = torch.tensor([1e-3, -torch.inf]).expand(len(problem), 2)  # as if only the first row were known
            finding = BabStage()(problem, known.with_rows(torch.minimum(some, exact[:, None].float() - 1e-6)))
            check(problem, finding, exact)
            assert (finding.lower <= 1e-3).all()
            everything = BabStage()(problem, known.with_rows(torch.full((len(problem), 2), 0.5)))
            assert everything.statuses == ["verified"] * len(problem) and (everything.lower == 0.5).all()

    @pytest.mark.parametrize("stages", [("alpha",), ("bab",), ("crown_ibp", "alpha", "bab")])
    def test_networks_without_a_neuron_or_without_an_open_one(self, stages):
        torch.manual_seed(0)
        affine = linear_model([[2.0, 1.0], [0.5, -1.0]], [0.1, 0.0])
        stable = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        stable[1].bias.fill_(5.0), stable[1].weight.mul_(0.1), stable[3].weight.mul_(3.0)
        for model in (affine, stable):
            images = torch.rand(12, 1, 1, 2)
            labels = model(images).argmax(1)
            problem = problem_of(model, images, labels, LinfBall(0.3), 2)
            verdicts = certify(model, images, labels, 0.3, Certify(stages=stages))
            for verdict, least in zip(verdicts, truth(problem).tolist(), strict=True):
                assert verdict.status == ("verified" if least > 0 else "falsified")
                assert verdict.lower_bound == pytest.approx(least, abs=FINE)

    def test_no_images(self):
        problem = random_problem(0, "dense")
        assert alone(BabStage(), problem.subset(torch.arange(0))).statuses == []

    def test_what_the_logits_do_not_depend_on_changes_nothing(self):
        class Aside(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model, self.relu, self.dropout = model, nn.ReLU(), nn.Dropout()

            def forward(self, x):
                self.relu(x - 0.5)
                logits = self.model(x)
                self.relu(logits - 1)
                return self.dropout(logits)

        for seed in range(6):
            problem = random_problem(seed, "dense")
            aside = replace(problem, network=Aside(problem.network).eval())
            for stage in (*FIRST, BabStage()):
                assert alone(stage, aside).statuses == alone(stage, problem).statuses

    def test_weights_get_no_gradients(self):
        for seed in range(10):
            problem = random_problem(seed, "dense", epsilon=0.3)
            alone(AlphaStage(), problem), alone(BabStage(), problem)
            assert all(p.grad is None and p.requires_grad for p in problem.network.parameters())

    @pytest.mark.parametrize("stages", [("crown_ibp",), ("crown",), ("alpha",), ("bab",), ("crown", "alpha", "bab")])
    def test_an_overflow_proves_nothing(self, stages):
        """The network answers correctly at the image, and inf for the other class 0.1 away."""
        hidden = (layer for _ in range(3) for layer in (nn.Linear(1, 1), nn.ReLU()))
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(1, 2))
        for layer, weight, bias in zip(model[1:6:2], (1e30, 1e30, 1.0), (-0.5e30, 0.0, 0.0), strict=True):
            layer.weight.fill_(weight), layer.bias.fill_(bias)
        model[7].weight.copy_(torch.tensor([[0.0], [1.0]])), model[7].bias.copy_(torch.tensor([1.0, 0.0]))
        image = torch.full((1, 1, 1, 1), 0.5)
        assert model.eval()(image).argmax() == 0 and model(image + 0.1)[0, 1] == math.inf
        verdict = certify(model, image, torch.tensor([0]), 0.2, Certify(stages=stages))[0]
        assert verdict.status in ("unknown", "falsified") and verdict.lower_bound is None

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_not_finite_are_refused(self, bad):
        problem = random_problem(0, "dense")
        problem.network[1].weight[0, 0] = bad
        with pytest.raises(InputError, match="found a weight that is not finite; accepted"):
            certify(problem.network, problem.region.images, problem.specification.labels, 0.1)

    @pytest.mark.parametrize(
        "values",
        [{"batch": 0}, {"steps": -1}, {"rate": 0.0}, {"rate": math.nan}, {"candidates": 0}, {"most": 0}],
        ids=str,
    )
    def test_settings_out_of_range(self, values):
        with pytest.raises(InputError, match=f"^{next(iter(values))}: found .*accepted"):
            Search(**values)

    def test_what_it_does_not_take_stays_open_with_a_reason(self):
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
        images = torch.rand(3, 1, 2, 2)
        problem = problem_of(smooth, images, smooth(images).argmax(1), LinfBall(0.1), 3)
        kinked = random_problem(0, "dense")
        for refused in (problem, replace(kinked, region=L2Ball(0.1).region(kinked.region.images))):
            finding = alone(BabStage(), refused)
            assert finding.statuses == [None] * len(refused)
            assert all("splits ReLUs and LeakyReLUs, over boxes" in reason for reason in finding.reasons)
        verdicts = certify(smooth, images, smooth(images).argmax(1), 0.9, Certify(stages=("ibp", "bab")))
        assert {v.status for v in verdicts} <= {"verified", "unknown"}
        assert all((v.reason is not None) is (v.status == "unknown") for v in verdicts)

    def test_a_limit_of_splits_is_the_reason(self):
        for seed in range(200, 240):
            finding = alone(BabStage(Search(most=1)), random_problem(seed, "conv", epsilon=0.3))
            for status, reason in zip(finding.statuses, finding.reasons, strict=True):
                assert (status is None) is (reason == "1 splits")
            if None in finding.statuses:
                return
        raise AssertionError("no problem needed a split")


class TestLeaves:
    def calls(self, monkeypatch) -> list[float]:
        """The bounds of the leaves that are solved."""
        bounds, solve = [], neuron_split.LinearProgramSolver.solve

        def counted(self, *arguments):
            solved = solve(self, *arguments)
            bounds.extend(solved.bound.tolist())
            return solved

        monkeypatch.setattr(neuron_split.LinearProgramSolver, "solve", counted)
        return bounds

    def test_leaves_prove_what_bounds_could_not(self, monkeypatch):
        """Without an ascent, and without bounding anew, the multipliers stay 0: only an LP sees the signs."""
        bounds, proved = self.calls(monkeypatch), 0
        for seed in range(300, 330):
            problem = random_problem(seed, "dense", count=4)
            before = len(bounds)
            finding = alone(BabStage(Search(steps=0, tighten=False)), problem)
            check(problem, finding, truth(problem))
            proved += finding.statuses.count("verified") if len(bounds) > before else 0
        assert proved > 0 and any(bound > 0 for bound in bounds)

    @pytest.mark.parametrize(("margin", "expected"), [(1e-2, "verified"), (-1e-2, "falsified"), (0.0, "falsified")])
    def test_a_margin_of_any_sign(self, margin, expected):
        assert alone(BabStage(), tied(margin)).statuses == [expected]

    def test_a_leaf_within_tolerance_stays_unknown_with_the_reason(self, monkeypatch):
        """A minimum just below 0, that float32 evaluates to above it."""
        bounds = self.calls(monkeypatch)
        problem = tied(0.0)
        stage = BabStage(judge=lambda problem, number, image: False)  # nothing replays
        finding = alone(stage, problem)
        assert finding.statuses == [None] and finding.reasons == ["within tolerance"]
        assert bounds and min(bounds) <= 0
        deep = alone(stage, tied(-1e-2))
        assert deep.statuses == [None] and deep.reasons == ["leaf"]

    def test_the_search_goes_on_after_a_leaf_within_tolerance(self, monkeypatch):
        """Every first leaf is said to be undecided: counterexamples elsewhere are found nevertheless."""
        solve = neuron_split.solve_leaf
        for seed in range(20):
            case, _ = planted_pair(5000 + seed, "dense")
            doubted = []

            def doubtful(*arguments, doubted=doubted, **options):
                leaf = solve(*arguments, **options)
                if len(doubted) < 3:
                    doubted.append(leaf)
                    return replace(leaf, bound=-1e-9, point=None)
                return leaf

            monkeypatch.setattr(neuron_split, "solve_leaf", doubtful)
            assert alone(BabStage(timeout=20.0), problem_from(case)).statuses == ["falsified"]
