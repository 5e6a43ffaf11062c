"""A score of two classes as two logits: exact, whatever bounds, proves, attacks, trains or exports it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from problems import random_images
from torch import Tensor, nn

import certtrain
from certtrain import BinaryScore, certify, export_onnx
from certtrain.attacks import Attack, Pgd
from certtrain.bounds import Interval, L1Ball, L2Ball, LinfBall, SparseBall, compute_bounds, compute_margins
from certtrain.errors import InputError
from certtrain.losses import Loss
from certtrain.noise import Noise
from certtrain.step import Batch, Step
from certtrain.verifiers import Certify
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import write_property

ATTACKS = sorted(name for name, cls in Attack.members().items() if cls.__module__.startswith("certtrain."))

BALLS = {"linf": LinfBall(0.15), "l2": L2Ball(0.3), "l1": L1Ball(0.4), "sparse": SparseBall(2)}
ENDINGS = {"logit": ((), 0.0), "sigmoid": ((nn.Sigmoid(),), 0.5), "shifted": ((), 0.37), "below": ((), -1.25)}


def linear_score(seed: int, features: int = 4) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(features, 1)
    with torch.no_grad():
        layer.bias.copy_(-layer.weight.sum(1) / 2 + 0.1 * torch.randn(1))  # the boundary passes through the images
    return layer


def score_network(seed: int, side: int = 4, *ending: nn.Module) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(side * side, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1), *ending
    ).eval()  # fmt: skip


def two_logits(network: nn.Sequential, threshold: float = 0.0) -> nn.Sequential:
    """The same network as a user would write it with two logits: rows 0 and w in its last layer."""
    *head, last = copy.deepcopy(network)
    layer = nn.Linear(last.in_features, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.zeros_like(last.weight), last.weight]))
        layer.bias.copy_(torch.cat([torch.zeros(1), last.bias - threshold]))
    return nn.Sequential(*head, layer).eval()


def centred(network: nn.Sequential, images: Tensor) -> nn.Sequential:
    """With the mean score at 0, so that both classes occur."""
    with torch.no_grad():
        network[5].bias -= network[:6](images).mean()
    return network


@pytest.mark.parametrize("ending", ENDINGS)
def test_its_logits(ending):
    layers, threshold = ENDINGS[ending]
    network, images = score_network(0, 4, *layers), random_images(20)
    score, logits = network(images), BinaryScore(network, threshold)(images)
    assert logits.shape == (20, 2) and (logits[:, 0] == 0).all()
    assert torch.equal(logits[:, 1], (score - threshold)[:, 0])
    assert torch.equal(logits.argmax(1) == 1, (score > threshold)[:, 0])


def test_cross_entropy_is_that_of_a_binary_logit():
    network, images, labels = score_network(1), random_images(30), torch.arange(30) % 2
    found = F.cross_entropy(BinaryScore(network)(images), labels)
    wanted = F.binary_cross_entropy_with_logits(network(images)[:, 0], labels.float())
    assert torch.allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("ending", ENDINGS)
def test_verdicts_of_linear_scores_by_their_corners(ending):
    """The worst points of a monotone score over a box are its corners: each verdict is right, and none is missing."""
    layers, threshold = ENDINGS[ending]
    images, epsilon = random_images(16)[:, :, :2, :2].contiguous(), 0.08
    lower, upper = (images - epsilon).clamp(0, 1).flatten(1), (images + epsilon).clamp(0, 1).flatten(1)
    picks = torch.tensor(list(itertools.product([False, True], repeat=4)))
    corners = torch.where(picks, upper[:, None], lower[:, None])  # (16, 16, 4)
    seen = set()
    for seed in range(6):
        layer = linear_score(seed)
        weight, bias = (t.detach().clone().double() for t in (layer.weight, layer.bias))
        with torch.no_grad():
            layer.bias += 0 if layers else threshold
        model = BinaryScore(nn.Sequential(nn.Flatten(), layer, *layers), threshold).eval()
        labels, signs = [0] * 16 + [1] * 16, torch.tensor([[-1.0], [1.0]]).double()
        clean = (signs * (images.flatten(1).double() @ weight.T + bias)[:, 0]).flatten()
        worst = (signs[..., None] * (corners.double() @ weight.T + bias)[..., 0]).amin(2).flatten()
        for arithmetic in ("nearest",) if layers else ("nearest", "float32", "real"):  # the others know no sigmoid
            settings = Certify(arithmetic=arithmetic, timeout=20)
            verdicts = certify(model, torch.cat([images, images]), labels, epsilon, settings)
            for label, verdict, right, least in zip(labels, verdicts, clean.tolist(), worst.tolist(), strict=True):
                if min(abs(right), abs(least)) < 1e-5:
                    continue  # float32 may decide either way
                wanted = "misclassified" if right <= 0 else "verified" if least > 0 else "falsified"
                assert (verdict.status, verdict.label) == (wanted, label)
                assert verdict.prediction == (label if right > 0 else 1 - label)
                if wanted == "falsified":
                    assert int(model(verdict.counterexample[None]).argmax()) != label
                if not layers and verdict.lower_bound is not None:
                    assert verdict.lower_bound <= least + 1e-5
                seen.add((label, wanted))
    assert len(seen) == 6


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("seed", range(2))
def test_verdicts_are_those_of_two_logits(ball, seed):
    images = random_images(12, seed)
    network = centred(score_network(seed), images)
    score, twin = BinaryScore(network), two_logits(network)
    labels = (network(images) > 0)[:, 0].long()
    labels[::4] = 1 - labels[::4]
    for stages in (("ibp",), ("crown_ibp",), ("crown",), ("alpha",), ("ibp", "crown", "attack", "bab")):
        settings = Certify(stages=stages, timeout=20)
        found, wanted = (certify(model, images, labels, BALLS[ball], settings) for model in (score, twin))
        assert [v.status for v in found] == [v.status for v in wanted]
        for one, other in zip(found, wanted, strict=True):
            if stages != ("ibp", "crown", "attack", "bab") and one.lower_bound is not None:
                assert one.lower_bound == pytest.approx(other.lower_bound, abs=1e-4)


@pytest.mark.parametrize("ending", ENDINGS)
def test_branch_and_bound_against_points(ending):
    """Complete over ReLU networks; verified images have no counterexample on a fine grid of corners and points."""
    layers, threshold = ENDINGS[ending]
    torch.manual_seed(3)
    images = torch.rand(24, 1, 1, 3)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1), *layers
    ).eval()  # fmt: skip
    centred(network, images)
    with torch.no_grad():
        network[5].bias += 0 if layers else threshold
    model, epsilon = BinaryScore(network, threshold), 0.12
    labels = (network(images) > threshold)[:, 0].long()
    settings = Certify(stages=("ibp", "crown", "attack", "input_split" if layers else "bab"), timeout=30)
    verdicts = certify(model, images, labels, epsilon, settings)
    assert {v.status for v in verdicts} == {"verified", "falsified"}
    steps = torch.linspace(-1, 1, 13)
    grid = torch.cartesian_prod(steps, steps, steps) * epsilon
    for image, label, verdict in zip(images, labels, verdicts, strict=True):
        points = (image.flatten() + grid).clamp(0, 1).reshape(-1, 1, 1, 3)
        flipped = ((network(points) > threshold)[:, 0].long() != label).any()
        assert not (verdict.status == "verified" and flipped)


@pytest.mark.parametrize("ending", ENDINGS)
def test_exported_and_through_the_front_door(ending, tmp_path):
    layers, threshold = ENDINGS[ending]
    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    network = centred(score_network(2, 2, *layers), images)
    with torch.no_grad():
        network[5].bias += 0 if layers else threshold
    model, ball = BinaryScore(network, threshold), LinfBall(0.05)
    file = export_onnx(model, tmp_path / "model.onnx", images)
    assert file.folded and file.operators.get("Gemm") == 4 and "Mul" not in file.operators
    words = set()
    for label in (0, 1):
        verdicts = certify(model, images, [label] * 8, ball, Certify(timeout=30))
        for image, verdict in zip(images, verdicts, strict=True):
            write_property(tmp_path / "p.vnnlib", *ball.ends(image), label, 2)
            found = answer(tmp_path / "model.onnx", tmp_path / "p.vnnlib", 30)
            assert found.word == ("holds" if verdict.status == "verified" else "violated")
            words.add((label, found.word))
    assert len(words) == 4


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_and_are_those_of_the_score(ending, dtype):
    layers, threshold = ENDINGS[ending]
    network, images = score_network(4, 4, *layers).to(dtype), random_images(5).to(dtype)
    model, box = BinaryScore(network, threshold), Interval.box(images, 0.05)
    score, logits = compute_bounds(network, box), compute_bounds(model, box)
    slack = 1e-6 if dtype == torch.float32 else 1e-14
    assert logits.center.dtype == dtype and (logits.center[:, 0] == 0).all() and (logits.radius[:, 0] == 0).all()
    assert torch.allclose(logits.lower[:, 1], score.lower[:, 0] - threshold, atol=slack)
    for label in (0, 1):
        margins, _ = compute_margins(model, box, torch.full((5,), label))
        wanted = score.lower[:, 0] - threshold if label else threshold - score.upper[:, 0]
        assert torch.allclose(margins[:, 0], wanted, atol=slack)


def test_a_score_at_the_threshold_is_wrong_for_both():
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0), layer.bias.fill_(0.0)
    model = BinaryScore(nn.Sequential(nn.Flatten(), layer), 0.5)
    images = torch.full((2, 1, 1, 1), 0.5)
    assert [v.status for v in certify(model, images, [0, 1], 0.0)] == ["misclassified"] * 2


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_find_what_is_there(name):
    images = random_images(8)
    network = centred(score_network(5), images)
    model, attack = BinaryScore(network), Attack.members()[name]()
    ball = next(ball for ball in (LinfBall(0.5), SparseBall(12)) if attack.needs.matches(ball))
    labels = (network(images) > 0)[:, 0].long()
    found = attack(
        model, Batch(images, labels, torch.arange(8)), ball, Step.evaluation(ball, Noise(0, torch.arange(8)))
    )
    sign = 2 * labels - 1
    before, after = ((sign * network(x)[:, 0]).detach() for x in (images, found.images))
    assert (after < before).any()


@pytest.mark.parametrize("name", sorted(Loss.members()))
def test_losses_train_it(name):
    loss = Loss.members()[name]
    if "teacher" in loss.__dataclass_fields__:
        pytest.skip("a teacher's file: the loss' own contract has it")
    images, labels = random_images(8), torch.arange(8) % 2
    model = BinaryScore(score_network(6)).train()
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    noise, ball = Noise(0, torch.arange(8)), LinfBall(0.05)
    states = loss().declare_state((1, 4, 4), 2)
    from certtrain.step import State

    tensors = {key: spec.allocate(8, 8, torch.device("cpu")) for key, spec in states.items()}
    step = Step(ball, torch.tensor(0.05), torch.tensor(0.05), 0.5, noise, State(tensors, states))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.1)
    loss()(model, Batch(images, labels, torch.arange(8)), step).total.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, kept[key])}
    assert any(key.startswith("model.") for key in changed) and not {"scale", "shift"} & changed


def test_a_small_network_is_trained_and_certified():
    torch.manual_seed(0)
    images = torch.rand(64, 1, 2, 2)
    labels = (images.flatten(1).mean(1) > 0.5).to(torch.uint8)
    images = (images + 0.25 * (2.0 * labels - 1)[:, None, None, None]).clamp(0, 1)
    model = BinaryScore(nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1)))
    assert sum(p.numel() for p in model.parameters()) == 4 * 16 + 16 + 16 + 1
    loss, optimizer = Loss.members()["CcIbp"](), torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        step = Step.evaluation(LinfBall(0.05), Noise(0, torch.arange(64)))
        optimizer.zero_grad()
        loss(model, Batch(images, labels, torch.arange(64)), step).total.backward()
        optimizer.step()
    verdicts = certify(model, images, labels, 0.05)
    certified = {label: sum(v.status == "verified" for v in verdicts if v.label == label) for label in (0, 1)}
    assert certified[0] + certified[1] >= 48 and min(certified.values()) >= 10
    assert torch.equal(model.scale, torch.tensor([0.0, 1.0])) and torch.equal(model.shift, torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("outputs", [0, 2, 3])
def test_only_one_score_is_taken(outputs):
    model = BinaryScore(nn.Sequential(nn.Flatten(), nn.Linear(16, outputs)))
    with pytest.raises(InputError, match=r"^BinaryScore: found an output of shape .*accepted: \(B, 1\)"):
        certify(model, random_images(2), [0, 1], 0.1)
    for function in (lambda z: z.flatten(), lambda z: z[:, :, None], lambda z: (z, z)):
        other = BinaryScore(_Returns(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), function))
        with pytest.raises(InputError, match=r"^BinaryScore: found .*accepted: \(B, 1\)"):
            other(random_images(2))


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1], [0.5, 1], [True, False]])
def test_labels_are_0_and_1(labels):
    with pytest.raises(InputError, match=r"^y: found"):
        certify(BinaryScore(score_network(0)), random_images(2), labels, 0.1)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_threshold_that_is_none(threshold):
    with pytest.raises(InputError, match=r"^threshold: found .*accepted: a finite number"):
        BinaryScore(score_network(0), threshold)


def test_it_is_copied_saved_and_moved_like_any_module(tmp_path):
    model = BinaryScore(score_network(7), 0.25)
    images = random_images(3)
    other = BinaryScore(score_network(8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    twice = copy.deepcopy(model).double()
    assert twice(images.double()).dtype == torch.float64
    certify(twice, images.double(), [0, 1, 0], 0.01, Certify(stages=("ibp", "attack"), attack=Pgd(steps=2)))
    assert certtrain.BinaryScore is BinaryScore and "BinaryScore" in certtrain.__all__


class _Returns(nn.Module):
    def __init__(self, network, function):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, x):
        return self.function(self.network(x))
