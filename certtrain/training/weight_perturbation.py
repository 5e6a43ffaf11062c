"""Updates with the gradient at perturbed weights: AWP and LAP."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import RECORDING, AttackResult, buffers_kept, records_start
from ..errors import InputError, check
from ..losses import AdversarialLoss, AdversarialTraining, Loss, LossTerms, Wrapper
from ..step import Batch, Step
from .update import Descend, UpdateRule, accumulate, clipped


@dataclass(frozen=True)
class WeightPerturbation(UpdateRule):
    """Attack at the weights; add nu to those with two dimensions or more (matrices and kernels, not batch norms and
    biases); take a step there with the same adversarial images; subtract nu.

    Only the loss' own passes change the running statistics of batch norms. All parts of a batch are attacked first.
    Weight decay acts on weights + nu, as in the published code. Values recorded by the attack (the constant gradient of
    FgsmGa, the constant logits of NAaer) belong to the weights without nu.
    """

    def check_loss(self, loss: Loss) -> None:
        if not isinstance(loss, AdversarialLoss):
            raise self.refusal(loss, "a method of adversarial training, whose attack can be told apart from its loss")

    def refusal(self, loss: Loss, accepted: str) -> InputError:
        return InputError(
            f"training.update: found {type(self).__name__} for {type(loss).__name__}; accepted: {accepted}"
        )

    def is_on(self, step: Step) -> bool:
        return True

    @property
    def is_subtracted(self) -> bool:
        """Whether nu is subtracted after the step."""
        return True

    @abstractmethod
    def perturbations(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: AdversarialLoss,
        parts: Sequence[tuple[Batch, Step]],
        attacked: Sequence[AttackResult],
        clip: float | None,
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Each perturbed parameter with its nu. Changes only ``.grad``."""

    def __call__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        parts: Sequence[tuple[Batch, Step]],
        clip: float | None,
    ) -> dict[str, float]:
        self.check_loss(loss)
        assert isinstance(loss, AdversarialLoss)
        if not self.is_on(parts[0][1]):
            return Descend()(model, optimizer, loss, parts, clip)
        attacked = [loss.attacked(model, batch, step) for batch, step in parts]
        moves = self.perturbations(model, optimizer, loss, parts, attacked, clip)
        before = [(weight, weight.detach().clone()) for weight, _ in moves]
        try:
            _add(moves, 1)
            result = clipped(model, _backward(model, optimizer, loss, parts, attacked), clip)
        except BaseException:
            with torch.no_grad():  # exact: adding and subtracting nu may end an ulp away
                for weight, value in before:
                    weight.copy_(value)
            raise
        optimizer.step()
        if self.is_subtracted:
            _add(moves, -1)
        return result


@dataclass(frozen=True)
class Awp(WeightPerturbation):
    """AWP: nu is along the gradient of the loss itself, gamma · |theta_l| · d_l / |d_l| in each layer l
    (Wu et al., arXiv 2004.05884). Costs one more forward and backward pass of everything but the attack.

    Args:
        gamma: relative size of nu; published are 5e-3 for TRADES-AWP, 1e-2 for AT-AWP.
        start_epoch: number of epochs without AWP at the start: 9 for TRADES-AWP, which begins with epoch 10 counted
            from 1; 0 for AT-AWP.
    """

    gamma: float = 5e-3
    start_epoch: int = 10

    def __post_init__(self) -> None:
        check(self.gamma >= 0, "gamma", self.gamma, "a number >= 0")
        check(self.start_epoch >= 0, "start_epoch", self.start_epoch, "a whole number >= 0")

    def is_on(self, step: Step) -> bool:
        return step.epoch >= self.start_epoch

    def perturbations(self, model, optimizer, loss, parts, attacked, clip):
        with buffers_kept(model):
            _backward(model, optimizer, loss, parts, attacked)
        return [
            (weight, _along(weight.grad, self.gamma * weight.detach().norm()))
            for weight in _matrices(model)
            if weight.grad is not None
        ]


@dataclass(frozen=True)
class Lap(WeightPerturbation):
    """LAP: nu is along the optimiser's own step at the attack's start, largest in early layers (Lin et al., ICML 2024,
    arXiv 2405.16262). With the loss NFgsm it is N-LAP, with FgsmRs R-LAP, with Fgsm V-LAP.
    Over a sparse set the start is sPGD's random one.

    nu_l = beta · w_l · |theta_l| · D_l / |D_l|, where D is the change of the weights by one step of the optimiser, on
    copies of weights and optimiser, for the cross-entropy at the attack's start; and w_l = 1 - (ln l / ln L)^gamma for
    the l-th of L matrices and kernels, in the model's order: 1 for the first, 0 for the last. Costs one more forward
    and backward pass. D descends, and the released code never subtracts nu, so that the weights take a second step of
    a fixed relative size. This is the default here too, because the published numbers and betas are from that code.

    Args:
        beta: published for CIFAR-10 at epsilon 8, 12, 16, 32 / 255: N-LAP 0.001, 0.002, 0.005, 0.75; R-LAP 0.002, 0.03,
            0.05, 0.3; V-LAP 0.03, 0.058, 0.07, 0.48.
        gamma: exponent of the decay of w_l.
        restore: whether nu is subtracted after the step, as in AWP.
    """

    beta: float = 1e-3
    gamma: float = 0.3
    restore: bool = False

    def __post_init__(self) -> None:
        check(self.beta >= 0, "beta", self.beta, "a number >= 0")
        check(self.gamma > 0, "gamma", self.gamma, "a number > 0")

    def check_loss(self, loss: Loss) -> None:
        super().check_loss(loss)
        inner = loss
        while isinstance(inner, Wrapper):
            inner = inner.base
        attacks = isinstance(inner, AdversarialTraining)
        if not attacks or not (inner.attack is None or records_start(inner.attack)):
            raise self._records_no_start(loss)

    def _records_no_start(self, loss: Loss) -> InputError:
        return self.refusal(loss, f"a method whose attack is {RECORDING}, such as NFgsm, FgsmRs, Fgsm")

    @property
    def is_subtracted(self) -> bool:
        return self.restore

    def perturbations(self, model, optimizer, loss, parts, attacked, clip):
        def terms() -> Iterator[LossTerms]:
            for (batch, _), result in zip(parts, attacked, strict=True):
                if "start" not in result.trace:  # a set's default attack, which ``check_loss`` has not seen
                    raise self._records_no_start(loss)
                yield LossTerms(F.cross_entropy(model(result.trace["start"]), batch.labels))

        with buffers_kept(model):
            accumulate(optimizer, parts, terms())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        changes = _changes(optimizer)
        weights = _matrices(model)
        return [
            (
                weight,
                _along(changes[weight], self.beta * self.layer_weight(number, len(weights)) * weight.detach().norm()),
            )
            for number, weight in enumerate(weights, 1)
            if weight in changes
        ]

    def layer_weight(self, number: int, count: int) -> float:
        """The weight w of layer ``number``, from 1 on, of ``count`` layers."""
        return 1.0 if number == 1 else 1 - (math.log(number) / math.log(count)) ** self.gamma


def _backward(model: nn.Module, optimizer, loss: AdversarialLoss, parts, attacked) -> dict[str, Tensor]:
    terms = (loss.given(model, batch, step, result) for (batch, step), result in zip(parts, attacked, strict=True))
    return accumulate(optimizer, parts, terms)


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]


@torch.no_grad()
def _changes(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """The change of each parameter with a gradient by one step of the optimiser, computed with a copy of it."""
    twin = copy.deepcopy(optimizer)
    pairs = [
        (parameter, other)
        for group, others in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for parameter, other in zip(group["params"], others["params"], strict=True)
        if parameter.grad is not None
    ]
    for parameter, other in pairs:
        other.grad = parameter.grad.clone()
    twin.step()
    return {parameter: other.detach() - parameter.detach() for parameter, other in pairs}


@torch.no_grad()
def _along(direction: Tensor, length: Tensor) -> Tensor:
    """The vector with this direction and this length (0-d); 0 if the direction is 0."""
    largest = direction.abs().amax()
    scaled = direction / torch.where(largest > 0, largest, 1)  # so that squares neither overflow nor underflow
    norm = scaled.norm()
    return scaled * (length / torch.where(norm > 0, norm, 1))


@torch.no_grad()
def _add(moves: list[tuple[nn.Parameter, Tensor]], sign: int) -> None:
    for weight, change in moves:
        weight.add_(change, alpha=sign)
