"""A stage written as CONTRIBUTING.md says, in one file of a package of one's own, decides in cascades and in runs."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from certtrain.bounds import LinfBall, SparseBall
from certtrain.config import structure, unstructure
from certtrain.errors import InputError
from certtrain.recipe import Config, load_config
from certtrain.run_folder import RunFolder
from certtrain.verifiers import (
    BabStage,
    Certify,
    CleanStage,
    IbpStage,
    Limits,
    LocationStage,
    Stage,
    certify,
    run_cascade,
)
from certtrain.verifiers.cascade import robustness
from certtrain.verifiers.records import worth_another_try
from certtrain.workflows.run import recorded_config
from certtrain.workflows.train import train
from certtrain.workflows.verify import verify

CORNERS = '''
"""Looks at random corners of the hull."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from certtrain.bounds import forward
from certtrain.errors import InputError, check
from certtrain.noise import Noise, key_of
from certtrain.verifiers import Finding, Judge, Stage
from certtrain.verifiers.stage import holds


@dataclass(frozen=True)
class RandomCorners(Stage):
    """Falsifies by random corners of boxes."""

    name: ClassVar[str] = "random_corners"
    traces: ClassVar[bool] = False
    corners: int = 16
    seed: int = 0
    judge: Judge = field(default_factory=Judge)

    def __post_init__(self):
        check(self.corners >= 1, "corners", self.corners, "a whole number >= 1")

    def prepared(self, seed, judge):
        return replace(self, seed=seed, judge=judge)

    def check_ball(self, ball, where="certify"):
        if not ball.is_box:
            raise InputError(f"{where}: found the stage random_corners for a {ball.kind}; accepted: a box (LinfBall)")

    def __call__(self, problem, known):
        found = [None] * len(problem)
        hull, images = problem.region.hull, problem.region.images
        for number in range(self.corners):
            noise = Noise(key_of(self.seed, "corners", number), problem.index)
            up = noise.uniform(images.shape[1:], "up") > 0.5
            points = problem.region.nearest(torch.where(up, hull.upper, hull.lower))
            wrong = ~holds(problem.specification, forward(problem.network, points).logits)
            for row in wrong.nonzero().flatten().tolist():
                if found[row] is None and self.judge(problem, row, points[row]):
                    found[row] = points[row]
        return Finding([None if point is None else "falsified" for point in found], known, counterexamples=found)
'''

LIPSCHITZ = '''
"""Verifies two-layer networks by a Lipschitz constant in the maximum norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from certtrain.bounds import forward
from certtrain.verifiers import Stage
from certtrain.verifiers.stage import proof, undecided


@dataclass(frozen=True)
class Lipschitz(Stage):
    name: ClassVar[str] = "lipschitz"
    slack: float = 1e-4

    def __call__(self, problem, known):
        layers = [layer for layer in problem.network.modules() if isinstance(layer, nn.Linear)]
        if len(layers) != 2 or not problem.region.is_box:
            return undecided(problem, known, "lipschitz takes boxes and two layers")
        inner = layers[0].weight.abs() @ problem.region.hull.radius.flatten(1).T  # (hidden, B)
        rows, offsets = known.rows_of(problem.specification)
        change = (rows @ layers[1].weight).abs() @ inner.T.unsqueeze(-1)
        center = problem.specification.values(forward(problem.network, problem.region.hull.center).logits)
        return proof(problem, known.with_rows(center - change.squeeze(-1) - self.slack))
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory):
    """A package of two files, a stage in each."""
    root = tmp_path_factory.mktemp("site")
    folder = root / "stages_of_my_own"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .corners import RandomCorners\nfrom .lipschitz import Lipschitz\n")
    (folder / "corners.py").write_text(CORNERS)
    (folder / "lipschitz.py").write_text(LIPSCHITZ)
    sys.path.insert(0, str(root))
    try:
        yield importlib.import_module("stages_of_my_own")
    finally:
        sys.path.remove(str(root))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(20, 1, 3, 3)


def problem_of(model: nn.Module, images: torch.Tensor, epsilon: float):
    labels = model(images).argmax(1)
    return robustness(model, images, labels, torch.arange(len(images)), 2, LinfBall(epsilon))


class TestCascades:
    def test_it_decides_and_hands_on_what_it_leaves_open(self, package, images):
        found = set()
        for seed in range(6):
            model = network(seed)
            with torch.no_grad():
                model[-1].bias -= model(images).mean(0)
            stages = [CleanStage(), package.RandomCorners(corners=4), package.Lipschitz(), BabStage()]
            verdicts = run_cascade(problem_of(model, images, 0.05), stages)
            alone = run_cascade(problem_of(model, images, 0.05), [CleanStage(), BabStage()])
            assert [v.status for v in verdicts] == [v.status for v in alone]
            found |= {(verdict.stage, verdict.status) for verdict in verdicts}
            for verdict in verdicts:
                places = [*verdict.spent]
                assert places == ["clean", "random_corners", "lipschitz", "bab"][: len(places)]
        assert found == {
            ("random_corners", "falsified"), ("lipschitz", "verified"), ("bab", "verified"), ("bab", "falsified"),
        }  # fmt: skip

    def test_one_that_only_runs_networks_takes_what_cannot_be_traced(self, package, images):
        class Wild(nn.Module):
            def forward(self, x):
                return torch.fft.rfft(x.flatten(1)).abs()[:, :2]

        problem = problem_of(Wild().eval(), images, 0.2)
        assert {v.stage for v in run_cascade(problem, [CleanStage(), package.RandomCorners()])} == {"random_corners"}
        with pytest.raises(Exception, match="rfft"):
            run_cascade(problem, [package.RandomCorners(), IbpStage()])

    def test_reasons_are_kept(self, package, images):
        model = nn.Sequential(network(), nn.ReLU(), nn.Linear(2, 2)).eval()
        (verdict, *_) = run_cascade(problem_of(model, images[:1], 0.9), [package.Lipschitz()])
        assert (verdict.status, verdict.reason) == ("unknown", "lipschitz takes boxes and two layers")

    def test_a_stage_with_a_timeout_of_its_own_gets_what_is_left(self, images):
        assert BabStage(timeout=9.0).within(4.0) == (BabStage(timeout=4.0), False)
        assert BabStage(timeout=4.0).within(9.0) == (BabStage(timeout=4.0), True)
        assert BabStage(timeout=4.0).within(-1.0) == (BabStage(timeout=0.0), False)
        assert IbpStage().within(4.0) == (IbpStage(), False)
        (verdict, *_) = run_cascade(problem_of(network(), images[:1], 0.05), [BabStage(timeout=30.0)], Limits(20.0))
        assert verdict.status != "unknown"

    def test_branch_and_bound_goes_over_locations_once(self, images):
        model = network()
        problem = robustness(model, images, model(images).argmax(1), torch.arange(20), 2, SparseBall(1))
        assert {v.stage for v in run_cascade(problem, [BabStage()])} == {"location"}
        verdicts = run_cascade(problem, [LocationStage(timeout=30.0), BabStage()])
        assert {v.stage for v in verdicts} <= {"location", "bab"}


class TestRecipes:
    def test_by_name_and_by_section(self, package, images):
        given = {"stages": ["random_corners", {"type": "Lipschitz", "slack": 0.01}, "bab"]}
        settings = structure(Certify, given)
        assert settings.stages == ("random_corners", package.Lipschitz(0.01), "bab")
        assert structure(Certify, json.loads(json.dumps(unstructure(settings)))) == settings
        clean, corners, lipschitz, bab = settings.build(seed=7)
        assert (clean, lipschitz, corners.seed, bab.timeout) == (CleanStage(), package.Lipschitz(0.01), 7, 60.0)
        model = network()
        verdicts = certify(model, images, model(images).argmax(1), 0.02, settings)
        assert {v.stage for v in verdicts} <= {"random_corners", "lipschitz", "bab"}

    @pytest.mark.parametrize(
        ("stages", "message"),
        [
            (["lipschits"], r"^stages: found 'lipschits'; accepted: alpha, .*lipschitz, .*random_corners"),
            (["clean", "ibp"], r"^stages: found 'clean'; accepted: alpha"),
            (
                ["lipschitz", {"type": "Lipschitz"}],
                r"^stages: found \('lipschitz', 'lipschitz'\); .* once",
            ),
            (
                [{"type": "RandomCorners", "corners": 0}],
                r"^stages\[0\].corners: found 0; accepted: a whole",
            ),
            ([{"type": "RandomCorners", "number": 3}], r"^stages\[0\].number: no such field; accepted: corners, "),
            ([{"type": "Random"}], r"^stages\[0\].type: found 'Random'; accepted: AlphaStage, .*RandomCorners"),
            ([3], r"^stages\[0\]: found 3; accepted: text"),
            ("ibp", r"^stages: found 'ibp'; accepted: a list"),
        ],
    )
    def test_bad_ones_are_refused(self, package, stages, message):
        with pytest.raises(InputError, match=message):
            structure(Certify, {"stages": stages})

    def test_sets_that_it_refuses_are_refused_before_a_run_begins(self, package):
        with pytest.raises(InputError, match=r"^certify: found the stage random_corners for a SparseBall; "):
            Certify(stages=("random_corners",)).check_ball(SparseBall(1))
        with pytest.raises(InputError, match=r"^certify.stages\[1\]: found the stage random_corners"):
            Certify(stages=("ibp", package.RandomCorners())).check_ball(SparseBall(1))

    def test_what_it_offers_an_undecided_image(self, package):
        record = {"status": "unknown", "reason": None}
        few, many = (Certify(stages=("ibp", package.RandomCorners(corners))) for corners in (4, 8))
        assert worth_another_try(record, many, unstructure(few))
        assert not worth_another_try(record, few, unstructure(few))
        assert worth_another_try(record, Certify(stages=("ibp", "lipschitz")), unstructure(Certify(stages=("ibp",))))
        assert not worth_another_try(record, Certify(timeout=99.0), unstructure(Certify()))  # none was cut short
        assert worth_another_try(record, Certify(alpha_steps=21), unstructure(Certify()))
        assert not worth_another_try(record, Certify(lirpa="alpha"), unstructure(Certify()))  # which has no such stage

    def test_a_run_with_it_is_recorded_and_taken_up(self, package, tmp_path):
        recipe = unstructure(load_config(Path(__file__).parents[1] / "configs" / "smoke.yaml"))
        stages = ["ibp", {"type": "RandomCorners", "corners": 3}, "lipschitz"]
        recipe["certify"] |= {"stages": stages, "images": 12}
        recipe["perturbation"]["epsilon"] = 0.3
        run = train(structure(Config, recipe), tmp_path / "run", quiet=True).path
        config = recorded_config(*RunFolder.open(run))
        recorded = json.loads((run / "run.json").read_text())["plugins"]
        assert [*recorded] == ["stages_of_my_own.corners:RandomCorners"]  # the other one is there by its name alone
        assert config.certify.stages == ("ibp", package.RandomCorners(3), "lipschitz")
        lines = [json.loads(line) for line in (run / "verdicts.jsonl").read_text().splitlines()]
        assert len(lines) == 12 and {"random_corners"} <= {line["stage"] for line in lines}
        before = (run / "verdicts.jsonl").read_bytes()
        verify(run, quiet=True, images="0:12")
        assert (run / "verdicts.jsonl").read_bytes() == before


def test_every_stage_has_a_name_of_its_own(package):
    names = Stage.named()
    named = [stage for stage in Stage.members().values() if stage.name]
    assert len(names) == len(named) and all(stage in names.values() for stage in named)
    recipes = {name: stage for name, stage in names.items() if not stage.__module__.startswith("test_")}
    assert {"clean", "attack", "ibp", "crown_ibp", "crown", "alpha", "bab", "falsify", "random_corners"} <= {*names}
    for name, stage in recipes.items():
        assert stage.from_section(Certify()).name == name
