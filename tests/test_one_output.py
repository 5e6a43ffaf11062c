"""Networks of fewer than two classes, and specifications that say nothing: nothing is proved of them."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from problems import random_images
from torch import nn
from walking import walk

import certtrain
from certtrain import export_onnx
from certtrain.attacks import Attack, lead
from certtrain.bounds import Box, Interval, LinfBall, SparseBall, compute_margins
from certtrain.data import Split
from certtrain.diagnostics import DIAGNOSTICS, Subject
from certtrain.errors import InputError
from certtrain.evaluation.adversary import Intervals, RestartedPgd, is_right
from certtrain.evaluation.relaxations import Relaxations
from certtrain.export import write_files
from certtrain.ledger import Ledger
from certtrain.losses import Loss
from certtrain.models import Architecture, FeedForward, Mlp
from certtrain.noise import Noise
from certtrain.recipe import Config
from certtrain.run_folder import JsonLines
from certtrain.step import Batch, Step
from certtrain.verifiers import Certify, EmbeddedQuestion, Problem, Specification, run_cascade
from certtrain.verifiers.stages import AttackStage, IbpStage
from certtrain.workflows.train import train

ATTACKS = sorted(name for name, cls in Attack.members().items() if cls.__module__.startswith("certtrain."))

STEPS = (nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


class Returns(nn.Module):
    """What a network makes of its outputs."""

    def __init__(self, network, function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x):
        return self.function(self.network(x))


def network(*last) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *STEPS, *last).eval()


ODD = {
    "one logit": network(nn.Linear(8, 1)),
    "one logit and a sigmoid": network(nn.Linear(8, 1), nn.Sigmoid()),
    "one feature map": nn.Sequential(nn.Conv2d(1, 1, 4), nn.Flatten()).eval(),
    "no output": network(nn.Linear(8, 4), Returns(nn.Identity(), lambda z: z[:, :0])),
    "no batch": network(nn.Linear(8, 1), nn.Flatten(0)),
    "a score for each pixel": nn.Conv2d(1, 3, 1).eval(),
    "tokens": nn.Sequential(nn.Flatten(2), nn.Linear(16, 3)).eval(),
}
NO_TENSOR = {
    "a tuple": Returns(network(nn.Linear(8, 3)), lambda z: (z, z)),
    "a dictionary": Returns(network(nn.Linear(8, 3)), lambda z: {"logits": z}),
    "a list": Returns(network(nn.Linear(8, 3)), lambda z: [z]),
    "nothing": Returns(network(nn.Linear(8, 3)), lambda z: None),
}
BINARY = ("one logit", "one logit and a sigmoid", "one feature map")
IMAGES, LABELS, INDEX = random_images(4), torch.zeros(4, dtype=torch.int64), torch.arange(4)
BATCH = Batch(IMAGES, LABELS, INDEX)
SPLIT = Split(IMAGES, LABELS, 1)


def step(ball=None) -> Step:
    return Step.evaluation(ball or LinfBall(0.05), Noise(0, INDEX))


@walk("kind", [*ODD, *NO_TENSOR])
@walk("stages", [("ibp",), ("crown_ibp", "crown", "alpha"), ("attack",), ("bab",), ("input_split",)])
def test_certify(kind, stages):
    with pytest.raises(InputError, match=r"^model: found an output .*accepted: (logits \(B, K\) of two|one tensor)"):
        certtrain.certify((ODD | NO_TENSOR)[kind], IMAGES, LABELS, 0.1, Certify(stages=stages))


@pytest.mark.parametrize("kind", BINARY)
def test_what_to_do_is_said(kind):
    with pytest.raises(InputError, match=r"shape \(1, 1\).*BinaryScore"):
        certtrain.certify(ODD[kind], IMAGES, LABELS, 0.1)


@pytest.mark.parametrize("kind", ODD)
def test_bounds_of_margins(kind):
    with pytest.raises(InputError, match=r"found an output of shape|has no bound rule|dimensions|sizes|start_dim"):
        compute_margins(ODD[kind], Interval.box(IMAGES, 0.1), LABELS)


@pytest.mark.parametrize("classes", [-1, 0, 1])
def test_a_specification_of_fewer_than_two_classes(classes):
    with pytest.raises(InputError, match=r"^model: found an output of shape"):
        Specification.robust(LABELS, classes)
    with pytest.raises(InputError, match=r"^classes: found .*accepted: two or more"):
        Mlp().build((1, 4, 4), classes)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("kind", ["one logit", "no batch", "a score for each pixel", "wider", "narrower"])
def test_a_network_that_the_specification_does_not_speak_of(kind, classes):
    others = {"wider": network(nn.Linear(8, classes + 1)), "narrower": network(nn.Linear(8, classes - 1))}
    model, region = (ODD | others)[kind], LinfBall(0.1).region(IMAGES)
    problem = Problem(model, region, Specification.robust(LABELS, classes), INDEX)
    for arithmetic in ("nearest", "float32"):
        with pytest.raises(InputError, match=r"model: found an output of shape|has no bound rule|start_dim"):
            run_cascade(problem, [IbpStage()], arithmetic=arithmetic)


@pytest.mark.parametrize("kind", BINARY)
def test_a_sweep_writes_no_verdict(kind, tmp_path):
    file = JsonLines(tmp_path / "verdicts.jsonl")
    for classes in (1, 2):
        question = EmbeddedQuestion(
            ODD[kind], SPLIT, classes, LinfBall(0.1), Certify(stages=("ibp",)), 0, {"weights": "w"}
        )  # fmt: skip
        with pytest.raises(InputError, match=r"^model: found an output of shape"):
            Ledger(file, JsonLines(tmp_path / "verdicts" / "settings.jsonl")).ask(question, range(4), quiet=True)
        assert not list(file)


@walk("kind", [*ODD, *NO_TENSOR])
@walk("name", ATTACKS)
def test_attacks(kind, name):
    attack = Attack.members()[name]()
    ball = next(ball for ball in (LinfBall(0.05), SparseBall(2)) if attack.needs.matches(ball))
    with pytest.raises(InputError, match=r"^model: found an output"):
        attack((ODD | NO_TENSOR)[kind], BATCH, ball, step(ball))


@pytest.mark.parametrize("mode", ["train", "eval", "batch", "clean"])
def test_attacks_in_every_mode(mode):
    attack = Attack.members()["Pgd"](attack_mode=mode)
    with pytest.raises(InputError, match=r"^model: found an output"):
        attack(ODD["one logit"], BATCH, LinfBall(0.05), step())


@walk("kind", BINARY)
@walk("name", sorted(Loss.members()))
def test_losses(kind, name):
    with pytest.raises(InputError, match=r"^model: found an output"):
        Loss.members()[name]()(ODD[kind], BATCH, step())
    clean = dataclasses.replace(step(), clean=True)
    with pytest.raises(InputError, match=r"^model: found an output"):
        Loss.members()[name]()(ODD[kind], BATCH, clean)


@walk("kind", BINARY)
@walk("name", DIAGNOSTICS)
def test_diagnostics(kind, name):
    ball = next(ball for ball in (LinfBall(0.05), SparseBall(2)) if DIAGNOSTICS[name].needs.matches(ball))
    subject = Subject(ODD[kind], BATCH, ball, Noise(0, INDEX), top=1)
    with pytest.raises(InputError, match=r"^model: found an output"):
        DIAGNOSTICS[name](subject)


@pytest.mark.parametrize("kind", BINARY)
def test_evaluation(kind):
    model = ODD[kind]
    with pytest.raises(InputError, match=r"^model: found an output"):
        lead(model(IMAGES), LABELS)
    with pytest.raises(InputError, match=r"^model: found an output"):
        is_right(model, IMAGES, LABELS)
    for adversary in (Intervals(), Relaxations(), RestartedPgd("pgd-2", 2)):
        with pytest.raises(InputError, match=r"^model: found an output"):
            adversary(model, BATCH, LinfBall(0.05), step())


@pytest.mark.parametrize("kind", [*ODD, *NO_TENSOR])
def test_export(kind, tmp_path):
    with pytest.raises(InputError, match=r"^model: found an output"):
        export_onnx((ODD | NO_TENSOR)[kind], tmp_path / "model.onnx", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [ODD["one logit"], network(nn.Linear(8, 3))], ids=["one", "three of two"])
def test_properties_of_other_outputs_than_classes(model, tmp_path):
    folder = types.SimpleNamespace(onnx=tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"found an output of shape|found '?3 outputs'?; accepted: 2"):
        write_files(folder, model, SPLIT, 2, LinfBall(0.1), range(2), 1.0)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Narrow(FeedForward):
    """An architecture of the user's own, with so many outputs whatever the data."""

    outputs: int = 1

    def plan(self, height, width):
        return [], [8], False

    def layers(self, shape, classes):
        return [*super().layers(shape, classes)[:-1], nn.Linear(8, self.outputs)]


@pytest.mark.parametrize("outputs", [1, 9, 11])
@pytest.mark.parametrize("certified", [True, False])
def test_training_does_not_start(outputs, certified, tmp_path):
    config = Config(model=Narrow(outputs=outputs), certify=Certify(enabled=certified))
    with pytest.raises(InputError, match=r"^model: found (an output of shape \(1, 1\)|'?\d+ outputs)"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_every_architecture_asks_for_two_classes():
    for kind in Architecture.members().values():
        if kind is not Narrow:
            with pytest.raises(InputError, match="accepted: two or more"):
                kind().build((3, 32, 32), 1)


WRONG_SHAPES = {
    "no rows": (torch.zeros(4, 0, 3), torch.zeros(4, 0), torch.zeros(0, dtype=torch.int64)),
    "one row for all": (torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    "other offsets": (torch.zeros(4, 2, 3), torch.zeros(4, 1), torch.zeros(2, dtype=torch.int64)),
    "other clauses": (torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("kind", WRONG_SHAPES)
def test_specifications_that_say_nothing_or_do_not_fit(kind):
    with pytest.raises(InputError, match=r"^specification: found rows .*accepted: .*one row or more"):
        Specification(*WRONG_SHAPES[kind])


def test_a_specification_without_labels_is_not_attacked():
    region = Box(IMAGES - 0.1, IMAGES + 0.1)
    specification = Specification(torch.ones(4, 1, 3), torch.zeros(4, 1), torch.zeros(1, dtype=torch.int64))
    problem = Problem(network(nn.Linear(8, 3)), region, specification, INDEX)
    with pytest.raises(InputError, match=r"^specification: found no labels"):
        run_cascade(problem, [AttackStage()])


TRIVIAL = {
    # every point of the box is unsafe
    "no output constraint": ("", "violated"),
    "0 <= 1": ("(assert (<= 0.0 1.0))", "violated"),
    "a tie of constants": ("(assert (<= 1.0 1.0))", "violated"),
    "an output and itself": ("(assert (<= Y_0 Y_0))", "violated"),
    "one disjunct is true": ("(assert (or (<= Y_0 -1e6) (<= 0.0 1.0)))", "violated"),
    "a conjunction of truths": ("(assert (and (<= 0.0 1.0) (>= Y_0 Y_0)))", "violated"),
    "inputs alone": ("(assert (or (<= X_0 0.25) (>= X_0 0.75)))", "violated"),
    # no point is
    "an output and itself, strictly": ("(assert (< Y_0 Y_0))", "holds (no input satisfies the asserts)"),
    "1 <= 0": ("(assert (<= 1.0 0.0))", "holds (no input satisfies the asserts)"),
    "1 < 1": ("(assert (< 1.0 1.0))", "holds (no input satisfies the asserts)"),
    "an output and more than itself": ("(assert (<= (+ Y_0 1.0) Y_0))", "holds (no input satisfies the asserts)"),
    "a false conjunct": ("(assert (and (<= Y_0 1e6) (<= 1.0 0.0)))", "holds (no input satisfies the asserts)"),
    "all disjuncts are false": ("(assert (or (<= 1.0 0.0) (<= 2.0 1.0)))", "holds (no input satisfies the asserts)"),
    "as far as the network goes": ("(assert (<= Y_0 -1e6))", "holds"),
    "the other way": ("(assert (>= Y_0 -1e6))", "violated"),
}


@walk("kind", TRIVIAL)
@walk("outputs", [1, 2])
@walk("arithmetic", ["nearest", "float32", "real"])
def test_properties_that_are_decided_by_their_text(kind, outputs, arithmetic, tmp_path):
    from test_vnncomp import save_network, save_property

    from certtrain.verifiers.vnncomp import answer

    weights = np.random.default_rng(0).normal(size=(outputs, 3))
    onnx = save_network(tmp_path / "n.onnx", [([[1.0], [-1.0], [0.5]], [0.0, 0.5, 0.0]), (weights, [0.0] * outputs)])
    text, word = TRIVIAL[kind]
    text = f"(assert (>= X_0 0.0))\n(assert (<= X_0 1.0))\n{text}"
    found = answer(onnx, save_property(tmp_path / "p.vnnlib", text, outputs=outputs), 20, arithmetic=arithmetic)
    assert str(found) == word


def test_worst_of_rows_that_are_constant():
    """A row of zeros is its offset: at most 0 is unsafe whatever the output, NaN never proves."""
    zeros, clause = torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64)
    for offset, wanted in ((0.0, False), (-1.0, False), (1.0, True), (math.nan, False)):
        specification = Specification(zeros, torch.tensor([[offset]]), clause)
        assert bool(specification.worst(specification.values(torch.randn(1, 2))) > 0) == wanted
