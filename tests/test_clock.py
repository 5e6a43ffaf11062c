"""Time limits: every stage looks at the clock between the pieces of its work, and keeps what it knows when time is up.

The clock of these tests is a counter of how often it was read: one reading, one second. No test measures time.
"""

import itertools
import math
import types
from dataclasses import dataclass, field, replace

import pytest
import scipy.optimize
import torch
from onnx import TensorProto, helper, numpy_helper
from problems import alone, linear_model, problem_of, unknown
from torch import nn

from certtrain.attacks import Pgd, SparsePgd
from certtrain.bounds import LinfBall, SparseBall, clock
from certtrain.bounds.clock import OutOfTime, done, expected, fitting, left, look, looking, now, until
from certtrain.bounds.crown import crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.errors import InputError
from certtrain.verifiers import (
    AlphaStage,
    AttackStage,
    BabStage,
    Certify,
    CrownIbpStage,
    CrownStage,
    Finding,
    IbpStage,
    InputSplitStage,
    Limits,
    LocationStage,
    Search,
    Stage,
    certify,
    lirpa,
    lp,
    run_cascade,
)  # fmt: skip
from certtrain.verifiers.falsify import FalsifyStage
from certtrain.verifiers.instances import run_instances
from certtrain.verifiers.limits import TOTAL_TIMEOUT
from certtrain.verifiers.neurons import Neurons
from certtrain.verifiers.optimise import Subproblems, maximise, starting_slopes
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import write_property


@dataclass
class Ticks:
    """A clock that goes on by one second a reading."""

    time: float = 0.0

    def __call__(self) -> float:
        self.time += 1
        return self.time


@dataclass
class Hand:
    """A clock that is set by hand."""

    time: float = 0.0

    def __call__(self) -> float:
        return self.time


class TestClock:
    def test_without_a_clock_nothing_happens(self):
        look("work", 1e30, seconds=math.inf)
        done()
        assert left() == math.inf and expected({"work": 1e30}) == 0 and fitting(7, {"work": 1e30}) == 7
        assert list(looking([1, 2])) == [1, 2]

    def test_the_time_is_up_at_the_deadline(self):
        hand = Hand()
        with until(2.0, now=hand) as outer:
            look()
            hand.time = math.nextafter(2.0, 0)
            look()
            assert not outer.late
            hand.time = 2.0
            with pytest.raises(OutOfTime):
                look()
            assert outer.late and left() == 0

    def test_the_earlier_of_two_deadlines_holds_and_whose_it_was_is_known(self):
        for own, around, both in ((1.0, 5.0, False), (5.0, 1.0, True), (5.0, 5.0, True)):
            hand = Hand()
            with until(around, now=hand) as outer, until(own) as inner:
                hand.time = 1.0
                assert now() == 1.0
                if min(own, around) > 1:
                    look()
                    hand.time = 5.0
                with pytest.raises(OutOfTime):
                    look()
                assert inner.late and outer.late == both

    def test_time_that_is_kept_for_later(self):
        hand = Hand()
        with until(10.0, now=hand) as outer:
            with until(keep=3.0) as inner:
                hand.time = 7.0
                with pytest.raises(OutOfTime):
                    look()
            look()
            assert inner.late and outer.late  # the stage was cut short

    def test_what_would_end_too_late_is_not_begun(self):
        hand = Hand()
        with until(10.0, now=hand):
            look("conv", 1.0)
            hand.time = 1.0  # the slowest for its size does not count
            look("conv", 50.0)
            hand.time = 2.0
            look("dense", 1.0)  # 0.02 s each
            assert expected({"conv": 50.0, "unknown": 1e9}) == pytest.approx(1.0)
            look("conv", 399.0)  # of an unknown length was dense; this ends in time
            with pytest.raises(OutOfTime):
                look("conv", 401.0)
            with pytest.raises(OutOfTime):
                look(seconds=8.0)
            look(seconds=7.9)

    def test_pieces_that_fit(self):
        hand = Hand()
        with until(10.0, now=hand):
            assert fitting(1000, {"conv": 1.0}) == 1000  # nothing is known
            look("conv", 1.0)
            hand.time = 1.0
            look("conv", 50.0)
            hand.time = 2.0
            done()
            assert fitting(400, {"conv": 1.0}) == 400
            assert fitting(401, {"conv": 1.0}) == 200
            assert fitting(10, {"conv": 1e9}) == 1
            hand.time = 11.0
            assert fitting(10, {"conv": 1.0}) == 1

    def test_overhead_says_nothing_and_neither_does_what_was_not_announced(self):
        hand = Hand()
        with until(100.0, now=hand):
            look("conv", 1.0)
            hand.time += 0.5e-3
            look()
            assert expected({"conv": 1e9}) == 0
            look("conv", 1.0)
            done()
            hand.time = 50.0  # something else
            look()
            assert expected({"conv": 1e9}) == 0
            look("conv", 1.0)
            with until():
                hand.time = 60.0
                look()
            assert expected({"conv": 1e9}) == 0

    @pytest.mark.parametrize("stall", [0, 1, 2])
    def test_one_stall_says_nothing_of_the_pace(self, stall):
        """A process' first call loads code, in whichever piece comes first, and the processor may be taken away."""
        hand = Hand()
        with until(20.0, now=hand):
            for piece in range(3):
                look("conv", 10.0)
                hand.time += 2.0 if piece == stall else 0.01
                look("conv", 1e4) if piece == 0 else done()
            done()
            assert expected({"conv": 1000.0}) == pytest.approx(1.0)

    def test_the_pace_is_handed_on(self):
        hand = Hand()
        with until(now=hand):
            with until(10.0):
                for _ in range(2):
                    look("conv", 1.0)
                    hand.time += 1.0
                look()
            with until(20.0):
                assert expected({"conv": 3.0}) == 3.0

    def test_a_device_is_waited_for_now_and_then(self):
        hand, waits = Hand(), []
        with until(1.0, now=hand, wait=lambda: waits.append(hand.time)):
            look()
            for _ in range(100):
                look("small", 10.0)
            assert waits == [0.0]
            look("large", 1e10)
            look()
            assert len(waits) == 2
            hand.time = 0.2
            with until(0.9):
                look()
            assert waits[-1] == 0.2

            def slow():
                hand.time = 3.0

        with pytest.raises(OutOfTime), until(1.0, now=hand, wait=slow):
            hand.time = 0.5
            look()


def convolutions(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(),
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


LAYERS = 6
COUNT = 3


def problem(ball=None):
    """Of three images, at a radius where linear bounds do not prove all, and descent refutes none or few."""
    model = convolutions()
    torch.manual_seed(1)
    images = torch.rand(COUNT, 1, 8, 8)
    with torch.no_grad():
        return problem_of(model, images, model(images).argmax(1), ball or LinfBall(0.06))


def few():
    """Over boxes in which five inputs vary."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    images = torch.rand(COUNT, 1, 1, 5) * 0.4 + 0.3
    with torch.no_grad():
        return problem_of(model.eval(), images, model(images).argmax(1), LinfBall(0.3))


STAGES = {
    "ibp": (IbpStage(), problem, LAYERS),
    "crown_ibp": (CrownIbpStage(), problem, 4 * LAYERS),
    "crown": (CrownStage(), problem, 4 * LAYERS),
    "alpha": (AlphaStage(steps=6), problem, 7 * LAYERS),
    "falsify": (FalsifyStage(steps=10, starts=3), problem, 33),
    "attack": (AttackStage(Pgd(steps=12, step_size=0.1, restarts=2, objective="margin")), problem, 24),
    "sparse attack": (AttackStage(SparsePgd(steps=12)), lambda: problem(SparseBall(2)), 12),
    "input_split": (InputSplitStage(timeout=1e9), few, 6),
    "bab": (BabStage(Search(most=4, batch=4), timeout=1e9), problem, 4 * LAYERS),
    "location": (LocationStage(Search(most=4), timeout=1e9), lambda: problem(SparseBall(1)), 4 * LAYERS),
}


def seen(finding: Finding):
    rows = [finding.known.rows, *(end for b in finding.known.bounds.values() for end in (b.lower, b.upper))]
    return [*finding.statuses], rows + ([finding.lower] if finding.lower is not None else [])


@pytest.mark.parametrize("name", STAGES)
class TestStages:
    def test_a_clock_that_does_not_run_out_changes_nothing(self, name):
        stage, make, _ = STAGES[name]
        plain = seen(alone(stage, make()))
        with until(1e9, now=Ticks()) as outer:
            timed = seen(alone(stage, make()))
        assert timed[0] == plain[0] and not outer.late
        assert all(torch.equal(a, b) for a, b in zip(timed[1], plain[1], strict=True))

    def test_it_looks_often(self, name, monkeypatch):
        stage, make, least = STAGES[name]
        looks = counted(monkeypatch)
        with until(1e9, now=Ticks()):
            alone(stage, make())
        assert len(looks) >= least

    def test_it_stops_soon_with_what_it_knows(self, name, monkeypatch):
        stage, make, _ = STAGES[name]
        ticks = Ticks()
        with until(1e9, now=ticks):
            whole = alone(stage, make())
        problem, known = make(), unknown(make())
        points = [problem.region.nearest(problem.region.hull.lower + torch.rand_like(problem.region.images)
                                         * 2 * problem.region.hull.radius) for _ in range(20)]  # fmt: skip
        looks = counted(monkeypatch)
        for share in (0.0, 0.05, 0.2, 0.6, 0.95):
            looks.clear()
            deadline = max(1.0, share * ticks.time)
            with until(deadline, now=Ticks()) as outer:
                try:
                    found = alone(stage, problem, known)
                except OutOfTime:
                    assert outer.late and name in ("ibp", "crown_ibp", "bab", "location", "input_split")
                    continue
            late = [at for at in looks if at >= deadline]
            assert len(late) <= 3  # refining, the pass that follows, and the stage itself
            for status, full in zip(found.statuses, whole.statuses, strict=True):
                assert status in (None, "timeout") or status == full or full in (None, "timeout")
            for number, status in enumerate(found.statuses):
                if status == "falsified":
                    point = found.counterexamples[number]
                    assert problem.region.contains(point.expand_as(problem.region.images))[number]
                    assert int(problem.network(point[None]).argmax()) != int(problem.specification.labels[number])
            network = found.known.network
            for point in points:
                values, margins = network.values(point), problem.specification.values(problem.network(point))
                assert (found.known.rows <= margins + 1e-4).all()
                for place, bounds in found.known.bounds.items():
                    entered = values[network.operations[place].inputs[0]]
                    assert (bounds.lower - 1e-4 <= entered).all() and (entered <= bounds.upper + 1e-4).all()


def counted(monkeypatch) -> list[float]:
    """The times of all looks."""
    looks, original = [], clock.Clock.look

    def watched(self, *arguments):
        looks.append(self.now.time if isinstance(self.now, Ticks | Hand) else 0.0)
        return original(self, *arguments)

    monkeypatch.setattr(clock.Clock, "look", watched)
    return looks


class TestKept:
    def test_crown_keeps_the_layers_that_are_done(self):
        """Layer by layer: those before the cut are as without a clock, those behind it no worse than intervals."""
        model = convolutions()
        network, region = fold(model, (1, 8, 8)), LinfBall(0.05).region(torch.rand(2, 1, 8, 8))
        with torch.no_grad():
            whole, intervals, ticks = crown_bounds(network, region), interval_bounds(network, region), Ticks()
            with until(1e9, now=ticks):
                crown_bounds(network, region)
            finished = []
            for deadline in [*range(1, 10 * int(ticks.time), 3), 10**9]:
                with until(float(deadline), now=Ticks()):
                    found = crown_bounds(network, region)
                same = [torch.equal(found[p].lower, whole[p].lower) and torch.equal(found[p].upper, whole[p].upper)
                        for p in whole]  # fmt: skip
                finished.append(len(list(itertools.takewhile(bool, same))))
                for place, bounds in found.items():
                    assert (bounds.lower >= intervals[place].lower - 1e-6).all()
                    assert (bounds.upper <= intervals[place].upper + 1e-6).all()
                if finished[-5:] == [len(whole)] * 5:  # all later ones are
                    break
        assert finished[0] <= 1 and finished[-1] == len(whole) and set(finished) >= set(range(2, len(whole) + 1))

    def test_an_ascent_keeps_the_best_of_its_steps(self):
        some = problem()
        known = unknown(some)
        with torch.no_grad():
            bounds = crown_bounds(known.network, some.region)
            sub = Subproblems(some.region, *known.rows_of(some.specification),
                              *Neurons.of(known.network).ends(bounds, known.rows))  # fmt: skip
            slopes = starting_slopes(sub.lower, sub.upper, sub.forms.shape[1])
            after = [maximise(known.network, sub, slopes, steps=steps).best for steps in range(6)]
            ticks, met = Ticks(), set()
            with until(1e9, now=ticks):
                maximise(known.network, sub, slopes, steps=5)
            for deadline in [*range(1, int(ticks.time) + 2, 3), 10**9]:
                with until(float(deadline), now=Ticks()) as outer:
                    try:
                        best = maximise(known.network, sub, slopes, steps=5).best
                    except OutOfTime:
                        continue
                assert outer.late or deadline >= ticks.time - 3
                (step,) = [k for k in range(6) if torch.equal(best, after[k])]
                met.add(step)
        assert met == set(range(6))

    def test_an_attack_keeps_the_counterexample_that_it_met(self):
        model = linear_model([[1.0, 0.0], [0.0, 1.0]])
        images = torch.tensor([[0.55, 0.45], [0.9, 0.1]]).reshape(2, 1, 1, 2)
        some = problem_of(model, images, torch.tensor([0, 0]), LinfBall(0.2), 2)
        with until(12.0, now=Ticks()) as outer:
            found = alone(AttackStage(Pgd(steps=1000, step_size=0.1, objective="margin")), some)
        assert outer.late and found.statuses == ["falsified", None]
        with until(2.0, now=Ticks()):
            assert alone(AttackStage(Pgd(steps=1000, objective="margin")), some).statuses == [None, None]

    def test_descent_has_its_own_time_which_cuts_nothing_else_short(self):
        with until(1e9, now=Ticks()) as outer:
            found = alone(FalsifyStage(seconds=5.0), problem())
            assert found.statuses == [None] * COUNT
        assert not outer.late


class TestPrograms:
    def program(self):
        region = LinfBall(0.1).region(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64))
        return lp.LinearProgram(region, torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))

    @pytest.mark.parametrize("given", [math.inf, 100.0, 3.0])
    def test_highs_gets_what_is_left(self, given, monkeypatch):
        options, original = [], scipy.optimize.linprog
        monkeypatch.setattr(
            scipy.optimize, "linprog", lambda *a, **k: options.append(k["options"]) or original(*a, **k)
        )
        hand = Hand(2.0)
        self.program().solve(given)
        assert {option.get("time_limit", math.inf) for option in options} == {given}
        options.clear()
        with until(12.0, now=hand):
            self.program().solve(given)
        assert {option["time_limit"] for option in options} == {min(given, 10.0)}

    def test_a_program_that_was_cut_short_is_out_of_time_not_undecided(self, monkeypatch):
        cut = types.SimpleNamespace(status=1, x=None)
        monkeypatch.setattr(scipy.optimize, "linprog", lambda *a, **k: cut)
        assert self.program().solve(1.0).point is None
        with until(1e9, now=Hand()) as outer:
            assert self.program().solve(1.0).point is None and not outer.late
            with pytest.raises(OutOfTime):
                self.program().solve()


class TestLirpa:
    def test_its_passes_look_at_the_clock(self):
        with until(1.0, now=Hand(0.5)):
            assert lirpa._in_time(lambda a, b: (a, b), 1, b=2) == (1, 2)
        with until(1.0, now=Hand(1.5)), pytest.raises(OutOfTime):
            lirpa._in_time(lambda a, b: (a, b), 1, b=2)

    def test_out_of_time_is_no_fault_of_the_model(self, monkeypatch):
        tried = []

        def late(*arguments):
            tried.append(arguments)
            raise OutOfTime

        monkeypatch.setattr(lirpa, "require", lambda: types.SimpleNamespace(__version__="0.7.1"))
        monkeypatch.setattr(lirpa, "_lower_bounds", late)
        some = problem()
        with pytest.raises(OutOfTime):
            lirpa.lirpa_rows(some.network, some.region, some.specification.rows, "crown")
        assert len(tried) == 1  # not again in another mode
        verdicts = run_cascade(some, [lirpa.LirpaStage()], Limits(1e9))
        assert {v.status for v in verdicts} == {"unknown"}  # a clock that ran out, and nobody's deadline

    @pytest.mark.lirpa
    @pytest.mark.parametrize("method", ["crown_ibp", "crown", "alpha"])
    def test_it_stops_soon(self, method, monkeypatch):
        try:
            lirpa.require()
        except InputError as error:
            pytest.skip(str(error))
        looks, some = counted(monkeypatch), problem()
        with until(1e9, now=Ticks()):
            alone(lirpa.LirpaStage(method), some)
        assert len(looks) > LAYERS - 2
        for deadline in (1.0, 3.0):
            looks.clear()
            with until(deadline, now=Ticks()), pytest.raises(OutOfTime):
                alone(lirpa.LirpaStage(method), some)
            assert len(looks) <= deadline + 1


@dataclass(frozen=True)
class Slow(Stage):
    """A stage of so many pieces, each of so many seconds; it knows nothing before the end."""

    hand: Hand
    pieces: int
    seconds: float = 1.0
    status: str | None = None
    name: str = field(default="slow", kw_only=True)
    seen: list[int] = field(default_factory=list)

    def __call__(self, problem, known):
        self.seen.append(len(problem))
        for _ in range(self.pieces):
            look(seconds=self.seconds)
            self.hand.time += self.seconds
        return Finding([self.status] * len(problem), known)


class TestCascade:
    @pytest.mark.parametrize(
        ("seconds", "count"), [(1.0, 1), (5.0, COUNT), (25.0, 1), (25.0, COUNT), (125.0, COUNT), (625.0, 1)]
    )
    def test_a_call_of_some_images_takes_so_many_times_the_limit_at_most(self, seconds, count):
        some, ticks = problem().subset(torch.arange(count)), Ticks()
        stages = Certify(stages=("ibp", "crown_ibp", "attack", "crown", "alpha", "bab"), timeout=1e9).build(0)
        with until(now=ticks):
            verdicts = run_cascade(some, stages, Limits(seconds))
        assert ticks.time <= count * seconds * 1.1 + 60  # readings between stages that are no looks
        for verdict in verdicts:
            assert verdict.status in ("timeout", "verified", "falsified")
            assert (verdict.status == "timeout") == (verdict.reason in ("timeout", "wall clock"))
            assert verdict.seconds == pytest.approx(sum(verdict.spent.values()))

    def test_decisions_do_not_depend_on_the_time(self):
        stages = Certify(stages=("ibp", "crown", "attack", "alpha", "bab"), timeout=1e9).build(0)
        whole = {v.index: v.status for v in run_cascade(problem(), stages)}
        decided = 0
        for seconds in range(10, 2000, 150):
            with until(now=Ticks()):
                for verdict in run_cascade(problem(), stages, Limits(float(seconds))):
                    assert verdict.status in ("timeout", whole[verdict.index])
                    decided += verdict.status != "timeout"
        assert decided > 3

    def test_a_cut_stage_leaves_what_is_left_to_the_next(self):
        """100 s for three images; the first would take 150."""
        hand = Hand()
        long, short = Slow(hand, 2, 75.0), Slow(hand, 10, 1.0, name="short")
        with until(now=hand):
            verdicts = run_cascade(problem(), [long, short], Limits(100 / 3))
        assert long.seen == short.seen == [3] and hand.time == 85
        assert {(v.status, v.reason, v.stage) for v in verdicts} == {("timeout", "timeout", "short")}
        assert verdicts[0].spent == pytest.approx({"slow": 25.0, "short": 10 / 3})
        hand.time, proving = 0.0, replace(short, status="verified")
        with until(now=hand):
            assert {v.status for v in run_cascade(problem(), [long, proving], Limits(100 / 3))} == {"verified"}

    def test_a_sweep_that_ends_says_so(self):
        hand = Hand()
        with until(now=hand):
            verdicts = run_cascade(problem(), [Slow(hand, 100)], Limits(1000.0, 20.0))
        assert hand.time == 19 and {(v.status, v.reason) for v in verdicts} == {("timeout", TOTAL_TIMEOUT)}

    def test_what_comes_before_the_stages_counts(self, monkeypatch):
        hand = Hand()

        def slow(*arguments):
            hand.time += 7.0
            return fold(*arguments)

        monkeypatch.setattr("certtrain.verifiers.cascade.fold", slow)
        with until(now=hand):
            run_cascade(problem(), [Slow(hand, 100)], Limits(5.0))
        assert 7 < hand.time <= 15

    def test_without_a_limit_nothing_is_cut(self):
        hand = Hand()
        with until(now=hand):
            verdicts = run_cascade(problem(), [Slow(hand, 100)])
        assert hand.time == 100 and {v.status for v in verdicts} == {"unknown"}

    def test_certify(self):
        some = problem()
        images, labels = some.region.images, some.specification.labels
        ticks = Ticks()
        with until(now=ticks):
            verdicts = certify(some.network, images, labels, 0.06, Certify(timeout=20.0, batch_size=2))
        assert {v.status for v in verdicts} <= {"timeout", "verified"} and ticks.time <= 3 * 22 + 60


@pytest.fixture
def files(tmp_path):
    """A network and a property that take thousands of looks."""
    model = convolutions()
    weights, nodes, last = [], [], "x"
    for number, layer in enumerate(model):
        names = [f"{kind}{number}" for kind in ("w", "b") if hasattr(layer, "weight")]
        weights += [numpy_helper.from_array(t.detach().numpy(), n) for n, t in zip(names, layer.parameters())]
        kind, options = {
            nn.Conv2d: ("Conv", {"pads": [1] * 4, "strides": [getattr(layer, "stride", (1,))[0]] * 2}),
            nn.ReLU: ("Relu", {}), nn.Flatten: ("Flatten", {}), nn.Linear: ("Gemm", {"transB": 1}),
        }[type(layer)]  # fmt: skip
        nodes.append(helper.make_node(kind, [last, *names], [f"y{number}"], **options))
        last = f"y{number}"
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 4])], weights,
    )  # fmt: skip
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "net.onnx").write_bytes(file.SerializeToString())
    image = problem().region.images[0]
    write_property(tmp_path / "p.vnnlib", image - 0.06, image + 0.06, int(model(image[None]).argmax()), 4)
    (tmp_path / "table.csv").write_text("net.onnx,p.vnnlib,100000\nnet.onnx,p.vnnlib,40\n")
    return tmp_path


class TestFrontDoor:
    def test_it_ends_in_time_wherever_it_is(self, files):
        whole = Ticks()
        with until(now=whole):
            full = answer(files / "net.onnx", files / "p.vnnlib", 1e9)
        assert full.word == "holds"
        for share in (0.0, 0.01, 0.1, 0.3, 0.5, 0.9):
            ticks = Ticks()
            limit = max(1.0, share * whole.time)
            with until(now=ticks):
                found = answer(files / "net.onnx", files / "p.vnnlib", limit)
            assert ticks.time <= 1.1 * limit + 60
            assert found.word in ("timeout", "holds")
            assert (found.word == "timeout") == (found.reason == "timeout")

    def test_reading_looks_at_the_clock(self, files, monkeypatch):
        looks = counted(monkeypatch)
        monkeypatch.setattr("certtrain.verifiers.vnncomp.check_property", lambda *a: (_ for _ in ()).throw(OutOfTime))
        with until(now=Ticks()):
            assert answer(files / "net.onnx", files / "p.vnnlib", 1e9).word == "timeout"
        assert len(looks) >= len(convolutions()) + 3 * 64  # operators; inputs and their ends

    def test_a_table(self, files):
        with until(now=Ticks()):
            run_instances(files / "table.csv", files / "out.csv")
        first, second = (line.split(",") for line in (files / "out.csv").read_text().split())
        assert first[2] == "unsat" and second[2] == "timeout" and float(second[3]) <= 40 * 1.1 + 60
