"""Verdicts in exact and in float32 arithmetic: through every stage, the leaves of branch and bound included."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from evaluation import cancelling, exactly, in_some_order
from planted import planted_pairs, random_network
from problems import problem_of, tied
from torch import nn

from certtrain.bounds import L2Ball, LinfBall, UnsupportedOperation
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import FLOAT32, REAL
from certtrain.errors import InputError
from certtrain.verifiers import BabStage, Certify, Limits, Search, certify, run_cascade

STAGES = ("ibp", "crown_ibp", "crown", "alpha", "bab")
CAREFUL = pytest.mark.parametrize("arithmetic", ["real", "float32"])


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def statuses(verdicts) -> list[str]:
    return [verdict.status for verdict in verdicts]


@pytest.mark.parametrize("stage", STAGES)
def test_a_net_that_nearest_certifies_wrongly(stage):
    """Exactly, class 1 wins by 1/4. IBP proves the contrary in nearest; no stage does in the other arithmetics."""
    model, image = cancelling(), torch.tensor([[1.0, 1.0]])
    _, logits = exactly(fold(model, torch.Size([2]), dtype=torch.float64), [Fraction(1), Fraction(1)])
    assert logits[1] - logits[0] == Fraction(1, 4)
    found = {
        arithmetic: certify(model, image, torch.tensor([0]), 0.0, Certify(stages=(stage,), arithmetic=arithmetic))[0]
        for arithmetic in ("nearest", "real", "float32")
    }
    assert found["nearest"].status == ("verified" if stage == "ibp" else "unknown")  # others see the huge terms cancel
    assert found["real"].status == found["float32"].status == "unknown"
    assert [verdict.arithmetic for verdict in found.values()] == ["nearest float32", "real", "float32"]


@CAREFUL
def test_planted_networks_are_decided_all_the_same(arithmetic):
    for case, twin in planted_pairs(10, seed=7000, kinds=("dense", "leaky")):
        for one, expected in ((case, {"falsified", "misclassified"}), (twin, {"verified"})):
            settings = Certify(arithmetic=arithmetic, timeout=20.0)
            (verdict,) = certify(one.model, one.image[None], torch.tensor([one.label]), one.epsilon, settings)
            assert verdict.status in expected, verdict
            if verdict.counterexample is not None:
                assert verdict.counterexample.dtype == torch.float32
                assert one.model(verdict.counterexample[None]).argmax() != one.label


@CAREFUL
@pytest.mark.parametrize(("margin", "expected"), [(1e-2, "verified"), (1e-3, "verified"), (-1e-2, "falsified")])
def test_leaves_are_decided_in_the_arithmetic(arithmetic, margin, expected):
    """Bounds alone never prove these: without an ascent it takes a leaf's multipliers."""
    problem, search = tied(margin), Search(steps=0, tighten=False)
    verdicts = run_cascade(problem, [BabStage(search)], Limits(20.0), arithmetic=arithmetic)
    assert statuses(verdicts) == [expected]
    if expected == "verified":
        assert verdicts[0].lower_bound == pytest.approx(margin, rel=1e-2) and verdicts[0].lower_bound <= margin


def test_a_margin_that_float32_can_lose_is_proved_in_real_alone():
    problem = tied(1e-7)
    found = {name: run_cascade(problem, [BabStage()], Limits(20.0), arithmetic=name) for name in ("real", "float32")}
    assert statuses(found["real"]) == ["verified"] and statuses(found["float32"]) == ["unknown"]


def close_calls(seed: int):
    """A random network, an image, and a bias that leaves the label hardly any margin on the box: 0 to 40 roundings."""
    draw = torch.Generator().manual_seed(seed)
    kind, shape = ("dense", torch.Size([1, 1, 5])) if seed % 2 else ("conv", torch.Size([1, 3, 3]))
    model = random_network(kind, shape, 2, draw, 3.0).eval().requires_grad_(False)
    image, epsilon = torch.rand(1, *shape, generator=draw), 0.02
    label = int(model(image).argmax())
    (verdict,) = certify(model.double(), image.double(), torch.tensor([label]), epsilon, Certify(stages=("bab",)))
    least = verdict.lower_bound
    model.float()
    if least is None:  # it has a counterexample already
        return None
    last = list(model.modules())[-1]
    last.bias[label] -= least - 2.0**-24 * float(last.bias.abs().max()) * 40 * float(torch.rand((), generator=draw))
    return model, image, label, epsilon


def test_float32_holds_for_every_order_of_evaluation():
    generator, verified, beaten = np.random.default_rng(0), 0, 0
    for seed in range(30):
        made = close_calls(seed)
        if made is None:
            continue
        model, image, label, epsilon = made
        network = fold(model, image.shape[1:], dtype=torch.float64)
        region = LinfBall(epsilon).region(image)
        points = region.nearest(image + epsilon * torch.from_numpy(generator.choice([-1, 1], (60, *image.shape[1:]))))
        margins = []
        for point in points.float():
            logits = in_some_order(network, point.numpy(), generator)
            margins.append(logits[label] - logits[1 - label])
        for settings in (Certify(stages=STAGES), Certify(stages=("crown",))):
            (verdict,) = certify(model, image, torch.tensor([label]), epsilon, replace(settings, arithmetic="float32"))
            assert verdict.status != "verified" or min(margins) > 0
            verified += verdict.status == "verified"
        (nearest,) = certify(model, image, torch.tensor([label]), epsilon, Certify(stages=STAGES))
        beaten += nearest.status == "verified" and min(margins) <= 0
    assert verified > 0 and beaten > 0  # what nearest proves, some orders of evaluation refute


@CAREFUL
def test_bounds_are_lower_but_hardly(arithmetic):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))
    images = torch.rand(12, 1, 4, 4)
    labels = model.eval()(images).argmax(1)
    wide = certify(model.double(), images.double(), labels, 0.05, Certify(stages=STAGES[:3]))
    found = certify(model.float(), images, labels, 0.05, Certify(stages=STAGES[:3], arithmetic=arithmetic))
    for careful, plain in zip(found, wide, strict=True):
        if careful.stage == plain.stage:
            assert 0 < plain.lower_bound - careful.lower_bound < (1e-11 if arithmetic == "real" else 1e-3)


@CAREFUL
class TestRefused:
    def test_activations_without_a_bound_of_their_rounding(self, arithmetic):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
        with pytest.raises(UnsupportedOperation, match="found tanh; accepted in this arithmetic: relu, leaky_relu"):
            certify(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), 0.1, Certify(arithmetic=arithmetic))

    def test_other_sets_than_boxes(self, arithmetic):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        with pytest.raises(InputError, match=f"arithmetic {arithmetic}: found L2Ball .*accepted: a box"):
            certify(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), L2Ball(0.1), Certify(arithmetic=arithmetic))

    def test_networks_of_another_precision(self, arithmetic):
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval().double()
        with pytest.raises(InputError, match=r"found LinfBall and torch.float64; accepted: .* torch.float32"):
            certify(model, torch.rand(2, 1, 2, 2).double(), torch.tensor([0, 1]), 0.1, Certify(arithmetic=arithmetic))


def test_a_rounding_needs_the_networks_weights_as_they_are():
    """Batch norms are folded in the model's own float32: that network is the one that is exported and certified."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    nn.init.uniform_(model[1].weight), model[1].running_var.uniform_(0.5, 2)
    narrow, wide = (fold(model, torch.Size([1, 4, 4]), dtype=dtype) for dtype in (torch.float32, torch.float64))
    for first, second in zip(narrow.operations, wide.operations, strict=True):
        if hasattr(first, "weight"):
            assert torch.equal(first.weight.double(), second.weight) and torch.equal(first.bias.double(), second.bias)
    assert REAL.unit == 0 and FLOAT32.unit == 2.0**-24
    images = torch.rand(4, 1, 4, 4)
    labels = model(images).argmax(1)
    problem = problem_of(model, images, labels, LinfBall(0.01), 2)
    for arithmetic in ("real", "float32"):
        verdicts = run_cascade(problem, Certify().build(0), arithmetic=arithmetic)
        assert {verdict.arithmetic for verdict in verdicts} == {arithmetic}
