"""Specifications, the stages, the cascade and ``certify``: above all, what must never be called verified."""

import json
import math
from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from torch import nn

from certtrain.attacks import Attack, AttackResult, Pgd
from certtrain.bounds import L2Ball, LinfBall
from certtrain.data import Split
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import (
    AttackStage,
    Certify,
    CleanStage,
    Finding,
    IbpStage,
    Problem,
    Specification,
    Verdict,
    certify,
    certify_split,
    run_cascade,
)


def linear_model(weight, bias=None, dtype=torch.float32) -> nn.Module:
    weight = torch.as_tensor(weight, dtype=dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else torch.as_tensor(bias, dtype=dtype))
    return nn.Sequential(nn.Flatten(), layer).eval()


def random_model(seed=0, classes=4) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes),
    )  # fmt: skip
    for norm in (model[1], model[5]):
        norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 2)
    return model.eval()


def random_images(count=40, seed=1) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.rand(count, 1, 4, 4)


def problem_of(model, images, labels, ball, classes=4) -> Problem:
    return Problem(model, ball.region(images), Specification.robust(labels, classes), torch.arange(len(images)))


def mostly_right(model, images) -> torch.Tensor:
    """The model's own choices, but every fifth."""
    labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return labels


class TestSpecification:
    def test_robust_rows_are_the_margins_in_increasing_order(self):
        specification = Specification.robust(torch.tensor([1, 0]), 3)
        logits = torch.tensor([[1.0, 10.0, 100.0]] * 2)
        assert specification.values(logits).tolist() == [[9.0, -90.0], [-9.0, -99.0]]
        assert specification.clauses.tolist() == [0, 1]

    def test_worst_is_brute_force_over_clauses_of_several_rows(self):
        """Unsafe: in some clause every row is <= 0."""
        torch.manual_seed(0)
        clauses = torch.tensor([2, 0, 1, 0, 2, 2])
        for _ in range(50):
            values = torch.randn(20, 6).round(decimals=1)  # zeros occur
            specification = Specification(torch.zeros(20, 6, 3), torch.zeros(20, 6), clauses)
            found = specification.worst(values)
            for row, value in zip(values, found, strict=True):
                unsafe = any(
                    all(v <= 0 for v, c in zip(row, clauses, strict=True) if c == clause) for clause in range(3)
                )
                assert (value > 0).item() is not unsafe
                expected = min(max(row[clauses == clause]) for clause in range(3))
                assert value == expected

    def test_offsets_and_subset(self):
        torch.manual_seed(0)
        rows, offsets, logits = torch.randn(4, 2, 3), torch.randn(4, 2), torch.randn(4, 3)
        specification = Specification(rows, offsets, torch.tensor([0, 0]), torch.tensor([3, 2, 1, 0]))
        expected = torch.einsum("brk,bk->br", rows, logits) + offsets
        torch.testing.assert_close(specification.values(logits), expected)
        part = specification.subset(torch.tensor([2, 0]))
        torch.testing.assert_close(part.values(logits[[2, 0]]), expected[[2, 0]])
        assert part.labels.tolist() == [1, 3]

    @pytest.mark.parametrize("rows", [[0.0], [math.nan], [-math.inf], [1.0, math.nan], [math.nan, 1.0], [1.0, 0.0]])
    def test_ties_and_nan_are_unsafe(self, rows):
        values = torch.tensor([rows])
        specification = Specification(torch.zeros(1, len(rows), 2), torch.zeros(1, len(rows)), torch.arange(len(rows)))
        assert not (specification.worst(values) > 0).item()
        clause = torch.zeros(len(rows), dtype=torch.int64)  # in one clause, one NaN row must not prove it either
        if all(not value > 0 for value in rows):
            one = Specification(specification.rows, specification.offsets, clause)
            assert not (one.worst(values) > 0).item()

    def test_a_clause_without_rows_holds_everywhere_and_so_is_unsafe(self):
        specification = Specification(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.tensor([1]))
        assert not (specification.worst(torch.tensor([[5.0]])) > 0).item()


class TestStages:
    def test_clean_stage(self):
        model = linear_model([[1.0, 0.0], [0.0, 1.0]])
        images = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.5, 0.5], [0.6, 0.4]]).reshape(4, 1, 1, 2)
        labels = torch.tensor([0, 0, 0, 1])  # right, wrong, tied, wrong
        finding = CleanStage()(problem_of(model, images, labels, LinfBall(0.0), 2))
        assert finding.decided.tolist() == [False, True, True, True] and finding.status == "misclassified"

    def test_clean_stage_counts_nan_as_wrong(self):
        model = linear_model([[math.nan, 0.0], [0.0, 1.0]])
        finding = CleanStage()(problem_of(model, torch.rand(2, 1, 1, 2), torch.tensor([0, 1]), LinfBall(0.0), 2))
        assert finding.decided.all()

    @pytest.mark.parametrize("kind", [LinfBall, L2Ball])
    def test_linear_networks_are_decided_up_to_their_exact_radius(self, kind):
        """z = <w, x> + b: the radius is |z| over the dual norm (images far from the pixels' edges)."""
        torch.manual_seed(0)
        weight = torch.randn(2, 16)
        images = 0.5 + 0.02 * torch.randn(30, 1, 4, 4)
        difference = weight[0] - weight[1]
        margins = images.flatten(1) @ difference
        model, labels = linear_model(weight), (margins < 0).long()
        dual = difference.abs().sum() if kind is LinfBall else difference.norm()
        attack = Pgd(steps=20, step_size=0.5, objective="margin")
        for number in range(30):
            radius = float(margins[number].abs() / dual)
            x, y = images[number : number + 1], labels[number : number + 1]
            if radius > 0.3 or radius < 1e-3:
                continue
            assert certify(model, x, y, kind(radius * 0.98), Certify(attack=attack))[0].status == "verified"
            beyond = certify(model, x, y, kind(radius * 1.02), Certify(attack=attack))[0]
            assert beyond.status != "verified"
            if kind is LinfBall:
                assert beyond.status == "falsified"

    def test_the_lower_bound_of_a_linear_network_is_its_worst_margin(self):
        model = linear_model([[2.0, 0.0], [0.0, 1.0]], [0.1, 0.0])
        x = torch.tensor([0.9, 0.5]).reshape(1, 1, 1, 2)
        verdict = certify(model, x, torch.tensor([0]), 0.2, Certify(stages=("ibp",)))[0]
        assert verdict.status == "verified" and verdict.stage == "ibp"
        assert verdict.lower_bound == pytest.approx(2 * 0.7 + 0.1 - 0.7, rel=1e-6)

    @pytest.mark.parametrize("width", [1e-3, 1e-4])
    def test_a_needle_that_attacks_miss_is_never_verified(self, width):
        """The network errs at one corner of the box alone, within ``width`` of it."""
        count, epsilon = 16, 0.1
        sign = torch.tensor([1.0, -1.0] * (count // 2))
        images = torch.full((1, 1, 4, 4), 0.5)
        corner = float((sign * (0.5 + epsilon * sign)).sum())
        hidden, out = nn.Linear(count, 1), nn.Linear(1, 2)
        with torch.no_grad():
            hidden.weight.copy_(sign[None]), hidden.bias.fill_(-(corner - width))
            out.weight.copy_(torch.tensor([[0.0], [2 / width]])), out.bias.copy_(torch.tensor([1.0, 0.0]))
        model = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), out).eval()
        labels = torch.tensor([0])
        worst = images + epsilon * sign.reshape(1, 1, 4, 4)
        assert model(images).argmax() == 0 and model(worst).argmax() == 1
        settings = Certify(attack=Pgd(steps=3, step_size=0.1, objective="margin"))
        assert certify(model, images, labels, epsilon, settings)[0].status == "unknown"
        assert certify(model, images, labels, epsilon * 0.9, settings)[0].status == "verified"

    def test_candidates_outside_the_region_never_count(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.full((1, 1, 1, 1), 0.6)
        problem = problem_of(model, images, torch.tensor([0]), LinfBall(0.05), 2)
        finding = AttackStage(Leaving(far=0.2))(problem)
        assert model(images - 0.2).argmax() == 1 and not finding.decided.any()

    def test_not_even_by_less_than_a_millionth(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.full((1, 1, 1, 1), 0.5 + 3e-7)
        problem = problem_of(model, images, torch.tensor([0]), LinfBall(1e-7), 2)
        assert IbpStage()(problem).decided.all()  # the region is safe …
        finding = AttackStage(Leaving(far=6e-7))(problem)  # … and this point of another one is not
        assert not finding.decided.any()

    def test_replay_has_the_last_word(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        images = torch.tensor([0.52, 0.53, 0.9]).reshape(3, 1, 1, 1)
        problem = problem_of(model, images, torch.tensor([0, 0, 0]), LinfBall(0.1), 2)
        assert AttackStage(Pgd())(problem).decided.tolist() == [True, True, False]
        seen = []

        def replay(image):
            seen.append(image.shape)
            return torch.tensor([1.0, 0.0]) if len(seen) == 1 else torch.tensor([0.0, 0.0])

        finding = AttackStage(Pgd(), replay=replay)(problem)
        assert finding.decided.tolist() == [False, True, False]  # refused; a tie is unsafe; never a suspect
        assert seen == [(1, 1, 1)] * 2
        verdict = run_cascade(problem, [CleanStage(), AttackStage(Pgd(), replay=lambda image: torch.tensor([1.0, 0]))])
        assert all(v.status == "unknown" and v.counterexample is None for v in verdict)

    def test_replay_may_be_more_precise_than_the_network(self):
        model = linear_model([[1.0], [0.0]], [-0.5, 0.0])
        problem = problem_of(model, torch.full((1, 1, 1, 1), 0.52), torch.tensor([0]), LinfBall(0.1), 2)
        exact = linear_model([[1.0], [0.0]], [-0.5, 0.0], torch.float64)
        replay = AttackStage(Pgd(), replay=lambda image: exact(image[None].double())[0])
        assert replay(problem).decided.all()

    def test_specifications_of_several_rows_in_the_ibp_stage(self):
        """Unsafe where z0 <= 0 and z1 <= 0 together: one row alone may fail."""
        model = linear_model([[1.0, 0.0], [0.0, 1.0]], [-0.5, -0.5])
        images = torch.tensor([[0.9, 0.1], [0.6, 0.55], [0.2, 0.3]]).reshape(3, 1, 1, 2)
        rows = torch.eye(2).expand(3, 2, 2)
        specification = Specification(rows, torch.zeros(3, 2), torch.tensor([0, 0]))
        problem = Problem(model, LinfBall(0.2).region(images), specification, torch.arange(3))
        finding = IbpStage()(problem)
        assert finding.decided.tolist() == [True, False, False]
        assert finding.lower_bound.tolist() == pytest.approx([0.2, -0.1, -0.4], abs=1e-6)

    def test_nan_bounds_prove_nothing(self):
        model = linear_model([[math.inf, 0.0], [0.0, 1.0]])
        finding = IbpStage()(problem_of(model, torch.zeros(1, 1, 1, 2), torch.tensor([0]), LinfBall(0.0), 2))
        assert not finding.decided.any()


@dataclass(frozen=True)
class Leaving(Attack):
    """Goes down by ``far``, wherever the ball ends."""

    far: float = 0.2

    def allowed(self, ball):
        return ball.with_epsilon(self.far)

    def propose(self, model, batch, ball, step):
        return AttackResult(batch.images - self.far)


@dataclass
class Recording:
    """A stage that decides what it is told to, and remembers what it saw."""

    name: str
    status: str
    indices: tuple[int, ...]
    bound: float | None = None

    def __post_init__(self):
        self.seen: list[int] = []

    def __call__(self, problem: Problem) -> Finding:
        self.seen += problem.index.tolist()
        decided = torch.tensor([int(i) in self.indices for i in problem.index], dtype=torch.bool)
        bound = None if self.bound is None else torch.full((len(problem),), self.bound)
        return Finding(decided, self.status, bound, problem.region.images)


class TestCascade:
    def test_each_stage_sees_only_what_is_left_and_the_best_bound_is_kept(self):
        model, images = random_model(), random_images(6)
        stages = [
            Recording("one", "misclassified", (4, 1)),
            Recording("two", "falsified", (0,), bound=-2.0),
            Recording("three", "verified", (5, 1), bound=-3.0),
            Recording("four", "verified", (), bound=-1.0),
        ]
        verdicts = run_cascade(problem_of(model, images, torch.zeros(6, dtype=torch.int64), LinfBall(0.1)), stages)
        assert [stage.seen for stage in stages] == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [2, 3, 5], [2, 3]]
        assert [(v.index, v.status, v.stage, v.lower_bound) for v in verdicts] == [
            (0, "falsified", "two", -2.0), (1, "misclassified", "one", None), (2, "unknown", "four", -1.0),
            (3, "unknown", "four", -1.0), (4, "misclassified", "one", None), (5, "verified", "three", -2.0),
        ]  # fmt: skip
        assert torch.equal(verdicts[4].counterexample, images[4]) and verdicts[2].counterexample is None
        assert all(verdict.seconds > 0 for verdict in verdicts)

    def test_stages_stop_when_nothing_is_left(self):
        never = Recording("two", "verified", ())
        problem = problem_of(random_model(), random_images(2), torch.zeros(2, dtype=torch.int64), LinfBall(0.1))
        run_cascade(problem, [Recording("one", "falsified", (0, 1)), never])
        assert never.seen == []

    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("ball", [LinfBall(0.01), LinfBall(0.04), L2Ball(0.1)], ids=str)
    def test_every_verdict_is_what_it_says(self, seed, ball):
        model, images = random_model(seed), random_images(40, seed)
        labels = mostly_right(model, images)
        verdicts = certify(model, images, labels, ball)
        with torch.no_grad():
            right = (model(images).argmax(1) == labels).tolist()
            for number, verdict in enumerate(verdicts):
                assert verdict.index == number and verdict.label == labels[number]
                assert verdict.prediction == model(images[number : number + 1]).argmax()
                assert (verdict.status == "misclassified") is not right[number]
                if verdict.counterexample is not None:
                    assert verdict.status in ("misclassified", "falsified")
                    one = verdict.counterexample[None]
                    assert ball.contains(images[number : number + 1], one, slack=1e-7).all()
                    assert model(one).argmax() != labels[number]
                else:
                    assert verdict.status in ("verified", "unknown")
        # the counting chain, image by image
        clean = [v.status != "misclassified" for v in verdicts]
        attacked = [v.status not in ("misclassified", "falsified") for v in verdicts]
        certified = [v.status == "verified" for v in verdicts]
        assert all(a <= b <= c for a, b, c in zip(certified, attacked, clean, strict=True))

    def test_a_planted_counterexample_is_never_verified_and_what_is_verified_survives_a_strong_attack(self):
        total = {"verified": 0, "fooled": 0}
        for seed in range(6):
            model, images = random_model(seed), random_images(60, seed)
            labels = mostly_right(model, images)
            ball = LinfBall(0.03)
            weak = Certify(attack=Pgd(steps=1, step_size=0.1), batch_size=60)
            status = [verdict.status for verdict in certify(model, images, labels, ball, weak)]
            batch = Batch(images, labels, torch.arange(60))
            strong = Pgd(steps=30, step_size=0.2, restarts=4, objective="margin")
            found = strong(model, batch, ball, Step.evaluation(ball, Noise(9, batch.index))).images
            fooled = (model(found).argmax(1) != labels).tolist()
            assert not any(bad and word == "verified" for bad, word in zip(fooled, status, strict=True))
            total["verified"] += status.count("verified")
            total["fooled"] += sum(fooled)
        assert total["verified"] > 20 and total["fooled"] > 20  # else nothing was tested

    def test_statuses_do_not_depend_on_the_batch_size(self):
        model, images = random_model(), random_images(50)
        labels = mostly_right(model, images)
        found, bounds = [], []
        for size in (1, 7, 50, 200):
            verdicts = certify(model, images, labels, 0.02, Certify(batch_size=size), seed=4)
            found.append([(v.index, v.label, v.prediction, v.status, v.stage) for v in verdicts])
            bounds.append([v.lower_bound for v in verdicts if v.lower_bound is not None])
            assert bounds[-1] == pytest.approx(bounds[0], abs=1e-5)
        assert found[0] == found[1] == found[2] == found[3]
        assert {"verified", "misclassified"} <= {row[3] for row in found[0]}

    def test_certify_split_is_certify_from_the_start_and_from_the_middle(self):
        model, images = random_model(), random_images(20)
        labels = mostly_right(model, images)
        split, settings = Split(images, labels, 1), Certify(batch_size=6, images=17)

        def plain(verdicts):
            return [{k: v for k, v in verdict.record().items() if k != "seconds"} for verdict in verdicts]

        batches = list(certify_split(model, split, 4, LinfBall(0.02), settings, seed=3))
        assert [len(batch) for batch in batches] == [6, 6, 5]
        whole = plain(chain.from_iterable(batches))
        assert whole == plain(certify(model, images[:17], labels[:17], 0.02, settings, seed=3))
        rest = chain.from_iterable(certify_split(model, split, 4, LinfBall(0.02), settings, 3, start=12))
        assert plain(rest) == whole[12:]


class TestCertify:
    def test_no_images(self):
        assert certify(random_model(), torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64), 0.1) == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_both_precisions(self, dtype):
        model, images = random_model().to(dtype), random_images(10).to(dtype)
        labels = mostly_right(model, images)
        verdicts = certify(model, images, labels, 0.001)
        assert {verdict.status for verdict in verdicts} == {"verified", "misclassified"}
        assert {verdict.arithmetic for verdict in verdicts} == {f"nearest {str(dtype).removeprefix('torch.')}"}

    @pytest.mark.parametrize(
        "bad",
        [1.1, -0.1, float("nan"), float("inf")],
    )
    def test_pixels_out_of_range(self, bad):
        images = random_images(3)
        images[1, 0, 2, 2] = bad
        with pytest.raises(InputError, match=r"^x: found .*accepted"):
            certify(random_model(), images, torch.zeros(3, dtype=torch.int64), 0.1)

    @pytest.mark.parametrize("labels", [[0, 4, 0], [0, -1, 0], [0, 1], [0, 1, 2, 3], []])
    def test_labels_out_of_range_or_of_another_number(self, labels):
        with pytest.raises(InputError, match=r"^y: found .*accepted: 3 of 0 to 3"):
            certify(random_model(), random_images(3), torch.tensor(labels, dtype=torch.int64), 0.1)

    @pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf")])
    def test_a_bad_radius(self, epsilon):
        with pytest.raises(InputError, match=r"^epsilon: found .*accepted"):
            certify(random_model(), random_images(1), torch.tensor([0]), epsilon)

    def test_epsilon_may_be_any_set(self):
        model, images = random_model(), random_images(20)
        labels = mostly_right(model, images)
        as_number, as_ball = (certify(model, images, labels, e) for e in (0.02, LinfBall(0.02)))
        assert [v.status for v in as_number] == [v.status for v in as_ball]
        smaller = certify(model, images, labels, L2Ball(0.02))  # lies inside the box
        proved = [v.index for v in as_number if v.status == "verified"]
        assert proved and all(smaller[number].status == "verified" for number in proved)

    def test_epsilon_zero_is_the_clean_prediction(self):
        model, images = random_model(), random_images(20)
        labels = mostly_right(model, images)
        right = (model(images).argmax(1) == labels).tolist()
        found = [verdict.status for verdict in certify(model, images, labels, 0.0)]
        assert found == ["verified" if ok else "misclassified" for ok in right]

    def test_every_mode_and_number_of_the_model_comes_back(self):
        model = random_model()
        model.train()
        model[1].eval()
        modes = [module.training for module in model.modules()]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        images = random_images(4)
        certify(model, images, torch.tensor([0, 1, 2, 3]), 0.05)
        with pytest.raises(InputError):
            certify(model, images, torch.tensor([0, 1, 2, 9]), 0.05)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_a_model_in_training_mode_is_judged_in_evaluation_mode(self):
        images = random_images(20)
        labels = mostly_right(random_model(), images)
        expected = certify(random_model(), images, labels, 0.02)
        found = certify(random_model().train(), images, labels, 0.02)
        assert [(v.status, v.lower_bound) for v in found] == [(v.status, v.lower_bound) for v in expected]

    @pytest.mark.parametrize("stages", [(), ("attack",), ("ibp",), ("ibp", "attack"), ("attack", "ibp")])
    def test_any_stages_in_any_order(self, stages):
        model, images = random_model(), random_images(30)
        labels = mostly_right(model, images)
        verdicts = certify(model, images, labels, 0.02, Certify(stages=stages))
        words = {v.status for v in verdicts}
        assert ("verified" in words) is ("ibp" in stages)
        assert {v.stage for v in verdicts if v.status == "unknown"} <= {(*("clean",), *stages)[-1]}
        full = certify(model, images, labels, 0.02)
        if len(stages) == 2:  # an image can be proved or refuted, never both
            assert [v.status for v in verdicts] == [v.status for v in full]


class TestVerdict:
    def test_records_are_json_with_the_fields_of_the_run_folder(self):
        model, images = random_model(), random_images(30)
        labels = mostly_right(model, images)
        for verdict in certify(model, images, labels, 0.05):
            record = json.loads(json.dumps(verdict.record(), allow_nan=False))
            assert set(record) >= {"index", "label", "prediction", "status", "stage", "lower_bound", "seconds"}
            assert record["index"] == verdict.index and record["status"] == verdict.status
            assert "counterexample" not in record

    def test_a_bound_that_was_never_computed_is_null(self):
        verdict = Verdict(0, None, 1, "unknown", "attack", None, 0.1234567, "nearest float32", torch.zeros(1))
        assert verdict.record()["lower_bound"] is None and verdict.record()["seconds"] == 0.123457

    @pytest.mark.parametrize(
        ("values", "field"),
        [({"batch_size": 0}, "batch_size"), ({"images": 0}, "images"), ({"stages": ("ibp", "ibp")}, "stages")],
    )
    def test_settings_out_of_range(self, values, field):
        with pytest.raises(InputError, match=f"^{field}: found .*accepted"):
            Certify(**values)
