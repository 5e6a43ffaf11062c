"""The cascade: cheapest stage first, and every verdict is what it says."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from problems import mostly_right, problem_of, random_images, random_model

from certtrain.attacks import Pgd
from certtrain.bounds import L2Ball, LinfBall
from certtrain.errors import InputError
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import Certify, Finding, Problem, Stage, Verdict, certify, run_cascade
from certtrain.verifiers.bounds_so_far import BoundsSoFar


@dataclass(frozen=True)
class Recording(Stage):
    """A stage that decides what it is told to, and remembers what it saw."""

    name: str = ""
    status: str = ""
    indices: tuple[int, ...] = ()
    bound: float | None = None
    seen: list[int] = field(default_factory=list)

    def __call__(self, problem: Problem, known: BoundsSoFar) -> Finding:
        self.seen.extend(problem.index.tolist())
        statuses = [self.status if int(i) in self.indices else None for i in problem.index]
        bound = None if self.bound is None else torch.full((len(problem),), self.bound)
        return Finding(statuses, known, bound, list(problem.region.images))


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
