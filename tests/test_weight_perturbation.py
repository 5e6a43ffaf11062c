"""AWP and LAP: the update by hand, what moves and what does not, and what is left when a step fails."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import make_batch, make_model, make_step
from torch import nn
from walking import walk

from certtrain.attacks import Ascent, Pgd
from certtrain.bounds import L2Ball, LinfBall
from certtrain.config import structure, unstructure
from certtrain.data import Digits
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.losses import (
    AdversarialTraining,
    CcIbp,
    FastBat,
    Fgsm,
    FgsmRs,
    Ibp,
    Mer,
    NFgsm,
    PgdAt,
    Qub,
    Trades,
)
from certtrain.models import SmallCnn
from certtrain.recipe import Config
from certtrain.training import Adam, AdamW, Awp, Descend, Lap, NonFinite, Sgd, Smoothed, Training, UpdateRule
from certtrain.training import loop as loop_module
from certtrain.verifiers import Certify
from certtrain.workflows.train import resume, train

OPTIMISERS = {
    "sgd": Sgd(lr=0.05, momentum=0.0),
    "momentum": Sgd(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": Adam(lr=1e-3, weight_decay=1e-2),
    "adamw": AdamW(lr=1e-3),
}
EVALUATED = replace(PgdAt().attack, attack_mode="eval", steps=3)
RULES = [Awp(start_epoch=0), Lap(), Lap(restore=True)]
every_rule = pytest.mark.parametrize("rule", RULES, ids=["Awp", "Lap", "Lap-restore"])
every_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)


def in_parts(step, *ends) -> list:
    batch, rows = make_batch(), [slice(a, b) for a, b in zip((0, *ends[:-1]), ends, strict=True)]
    return [(batch.part(part), step.part(part)) for part in rows]


def run(rule, loss, optimiser, *, steps=3, parts=(12,), batch_norm=True, clip=None, step=None):
    """Several updates from the same start; everything that they leave."""
    model = make_model(batch_norm)
    optimizer, figures = optimiser.build(model), []
    for number in range(steps):
        here = (step or make_step(0.1)).again(number)
        figures.append(rule(model, optimizer, loss, in_parts(here, *parts), clip))
    return model, optimizer, figures


def assert_same(one, other, exact=True):
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    for a, b in zip(one[2], other[2], strict=True):
        assert a == (b if exact else pytest.approx(b, rel=1e-9))


def matrices(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.ndim > 1]


class TestReductions:
    @every_optimiser
    @walk("rule", [Awp(gamma=0.0, start_epoch=0), Lap(beta=0.0), Lap(beta=0.0, restore=True)])
    @walk("loss", [NFgsm(), Qub(base=NFgsm())], ids=["NFgsm", "Qub"])
    def test_of_size_0_it_is_the_plain_update(self, rule, loss, optimiser):
        """Weights, running statistics and figures, bit for bit."""
        assert_same(run(rule, loss, optimiser, clip=0.5), run(Descend(), loss, optimiser, clip=0.5))

    def test_awp_of_size_0_under_trades_and_fast_bat(self):
        for loss in (Trades(attack=EVALUATED), FastBat(), Mer(base=Trades(attack=EVALUATED))):
            rule = Awp(gamma=0.0, start_epoch=0)
            assert_same(run(rule, loss, OPTIMISERS["adam"]), run(Descend(), loss, OPTIMISERS["adam"]))

    def test_plain_epochs_come_first(self):
        rule, plain = Awp(gamma=0.1), run(Descend(), NFgsm(), OPTIMISERS["adam"])
        for epoch, same in ((0, True), (9, True), (10, False)):
            found = run(rule, NFgsm(), OPTIMISERS["adam"], step=replace(make_step(0.1), epoch=epoch, epochs=20))
            assert torch.equal(found[0][0].weight, plain[0][0].weight) == same

    @every_rule
    def test_parts_are_one_batch(self, rule):
        """Without batch norm: means over unequal parts, one attack each."""
        for loss in (NFgsm(), Trades(attack=EVALUATED)):
            whole, split = (
                run(rule, loss, OPTIMISERS["momentum"], parts=parts, batch_norm=False) for parts in ((12,), (5, 6, 12))
            )
            assert_same(whole, split, exact=False)


def twins(optimiser):
    """Without batch norm for Adam, which makes steps of what rounding leaves of a gradient that is 0."""
    return [make_model(batch_norm=isinstance(optimiser, Sgd)) for _ in range(2)]


class TestByHand:
    @every_optimiser
    @pytest.mark.parametrize("ball", [LinfBall, L2Ball])
    def test_awp(self, optimiser, ball):
        """theta ← optimiser(theta + nu, gradient there) - nu, over two steps."""
        loss, step, batch = Trades(attack=EVALUATED, weight=2.0), make_step(0.1, ball=ball), make_batch()
        model, hand = twins(optimiser)
        optimizer, by_hand = optimiser.build(model), optimiser.build(hand)
        for number in range(2):
            here = step.again(number)
            figures = Awp(gamma=0.03, start_epoch=0)(model, optimizer, loss, [(batch, here)], None)

            found = loss.attacked(hand, batch, here)
            twin = copy.deepcopy(hand).train()
            slopes = torch.autograd.grad(loss.given(twin, batch, here, found).total, list(twin.parameters()))
            nus = [
                0.03 * p.detach().norm() * g / g.norm() if p.ndim > 1 else torch.zeros_like(p)
                for p, g in zip(hand.parameters(), slopes, strict=True)
            ]
            with torch.no_grad():
                [p.add_(nu) for p, nu in zip(hand.parameters(), nus, strict=True)]
            by_hand.zero_grad()
            total = loss.given(hand, batch, here, found).total
            total.backward()
            by_hand.step()
            with torch.no_grad():
                [p.sub_(nu) for p, nu in zip(hand.parameters(), nus, strict=True)]
            assert figures["loss"] == pytest.approx(float(total.detach()), rel=1e-12)
            for a, b in zip(model.state_dict().values(), hand.state_dict().values(), strict=True):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)

    def test_awp_does_not_undo_the_update(self):
        """By plain gradient descent the weights move by the gradient at theta + nu, as if nu had never been there."""
        model, batch, step, loss = make_model(), make_batch(), make_step(0.1), AdversarialTraining(attack=EVALUATED)
        before = copy.deepcopy(model)
        Awp(gamma=0.05, start_epoch=0)(model, OPTIMISERS["sgd"].build(model), loss, [(batch, step)], None)
        for (_, old), (_, new) in zip(matrices(before), matrices(model), strict=True):
            assert torch.allclose(new, old - 0.05 * new.grad, atol=1e-14) and not torch.equal(new, old)
        here = torch.autograd.grad(loss(before, batch, step).total, before[0].weight)[0]
        assert not torch.allclose(here, model[0].weight.grad, rtol=1e-3)

    @every_optimiser
    @walk("restore", [False, True])
    @walk("loss", [NFgsm(), FgsmRs(), Fgsm()], ids=lambda loss: type(loss).__name__)
    @walk("clip", [None, 0.1])
    def test_lap(self, optimiser, restore, loss, clip):
        """The change is that of torch's own optimiser with its momentum, on the twin of model and optimiser."""
        (model, hand), batch = twins(optimiser), make_batch()
        optimizer, by_hand = optimiser.build(model), optimiser.build(hand)
        for number in range(3):
            here = make_step(0.1).again(number)
            Lap(beta=0.2, gamma=0.3, restore=restore)(model, optimizer, loss, [(batch, here)], clip)

            found = loss.attacked(hand, batch, here)
            twin = copy.deepcopy(hand).train()
            stepped = optimiser.build(twin)
            stepped.load_state_dict(copy.deepcopy(by_hand.state_dict()))  # or they would share its tensors
            stepped.zero_grad()
            F.cross_entropy(twin(found.trace["start"]), batch.labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            stepped.step()
            nus, shares = {}, [1.0, 1 - (math.log(2) / math.log(3)) ** 0.3, 0.0]
            for (name, old), (_, new), share in zip(matrices(hand), matrices(twin), shares, strict=True):
                change = (new - old).detach()
                nus[name] = 0.2 * share * old.detach().norm() * change / change.norm()
            with torch.no_grad():
                [p.add_(nus[name]) for name, p in matrices(hand)]
            by_hand.zero_grad()
            F.cross_entropy(hand(found.images), batch.labels).backward()
            if clip:
                nn.utils.clip_grad_norm_(hand.parameters(), clip)
            by_hand.step()
            if restore:
                with torch.no_grad():
                    [p.sub_(nus[name]) for name, p in matrices(hand)]
            for a, b in zip(model.state_dict().values(), hand.state_dict().values(), strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
        mine, theirs = (o.state_dict()["state"] for o in (optimizer, by_hand))
        for one, other in zip(mine.values(), theirs.values(), strict=True):
            assert all(torch.allclose(torch.as_tensor(one[key]), torch.as_tensor(other[key]), atol=1e-9) for key in one
                       if one[key] is not None)  # fmt: skip

    def test_layers_of_lap(self):
        weights = [Lap(gamma=0.3).layer_weight(number, 21) for number in range(1, 22)]
        assert weights[0] == 1 and weights[-1] == 0 and weights == sorted(weights, reverse=True)
        assert weights[1] == pytest.approx(1 - (0.6931471806 / 3.0445224377) ** 0.3)
        assert Lap(gamma=1.0).layer_weight(3, 9) == pytest.approx(0.5)
        assert Lap().layer_weight(1, 1) == 1


class Watched:
    """Weights at the start of every pass of a model."""

    def __init__(self, model):
        self.seen: list[dict[str, torch.Tensor]] = []
        model.register_forward_pre_hook(
            lambda module, _: self.seen.append({n: p.detach().clone() for n, p in module.named_parameters()})
        )


class TestWhatMoves:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        ("rule", "sizes", "rate", "scale"),
        [(Awp(gamma=0.02, start_epoch=0), (0.02, 0.02, 0.02), 0.0, 1.0),
         (Awp(gamma=0.02, start_epoch=0), (0.02, 0.02), 0.0, 1e-25),
         (Lap(beta=0.02, restore=True), (0.02, 0.02 * (1 - (math.log(2) / math.log(3)) ** 0.3), 0), 1e-3, 1.0)],
        ids=["Awp", "Awp-tiny", "Lap"],
    )  # fmt: skip
    def test_nu_has_its_length_and_nothing_else_moves(self, rule, sizes, rate, scale, dtype):
        """Also where a gradient's squares vanish in float32. Without a step theta is what it was but for rounding."""
        model, batch = make_model(batch_norm=False).to(dtype), make_batch()
        batch = replace(batch, images=batch.images.to(dtype))
        model[-1].weight.data *= scale
        before, watched = {n: p.detach().clone() for n, p in model.named_parameters()}, Watched(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        rule(model, optimizer, NFgsm(), [(batch, make_step(0.1))], None)
        moved = watched.seen[-1]
        for (name, _), size in zip(matrices(model), sizes, strict=False):  # of tiny weights the length vanishes too
            old = before[name].double()
            length = float((moved[name].double() - old).norm() / old.norm())
            # LAP in float32 divides a change by its length that weights near 1 hold to 1e-7 of themselves
            assert length == pytest.approx(size, rel=1e-6 if dtype == torch.float64 else 1e-3, abs=1e-12)
        assert all(torch.equal(moved[name], old) for name, old in before.items() if old.ndim == 1)
        for seen in watched.seen[:-1]:  # the attack, and the pass that finds nu, see theta itself
            assert all(torch.equal(seen[name], old) for name, old in before.items())
        if not rate:
            for name, new in model.named_parameters():
                assert torch.allclose(new, before[name], rtol=1e-6, atol=1e-6 * float(before[name].abs().max()))

    @every_rule
    def test_running_statistics_see_the_loss_alone(self, rule):
        """N-FGSM passes twice in training mode, once in its attack; nu's own pass leaves no trace."""
        model, batch, step = make_model(), make_batch(), make_step(0.1)
        rule(model, Sgd(lr=0.0 + 1e-12).build(model), NFgsm(), [(batch, step)], None)
        assert int(model[1].num_batches_tracked) == 2
        plain = make_model()
        Descend()(plain, Sgd(lr=1e-12).build(plain), NFgsm(), [(batch, step)], None)
        assert torch.allclose(model[1].running_mean, plain[1].running_mean, rtol=0.3)
        assert not torch.equal(model[1].running_mean, plain[1].running_mean)  # the loss' pass was at theta + nu

    @every_rule
    def test_frozen_and_unused_weights_stay(self, rule):
        model = make_model(batch_norm=False)
        model.append(nn.Identity())
        model[-1].spare = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
        model[4].weight.requires_grad_(False)
        before = model[4].weight.clone()
        rule(model, OPTIMISERS["momentum"].build(model), NFgsm(), in_parts(make_step(0.1), 12), None)
        assert torch.equal(model[4].weight, before) and (model[-1].spare == 1).all()
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    @every_rule
    def test_layers_without_a_gradient_do_not_move(self, rule):
        """A network whose last layer is 0 gives the others none."""
        model = make_model(batch_norm=False)
        nn.init.zeros_(model[-1].weight)
        before = copy.deepcopy(model)
        rule(model, Sgd(lr=0.1, momentum=0.0).build(model), NFgsm(), in_parts(make_step(0.1), 12), None)
        assert torch.equal(model[0].weight, before[0].weight)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


class TestFailure:
    @every_rule
    @pytest.mark.parametrize("optimiser", [OPTIMISERS["sgd"], OPTIMISERS["adam"]], ids=["sgd", "adam"])
    def test_a_step_that_is_not_finite_changes_no_weight(self, rule, optimiser):
        model = make_model(batch_norm=False)
        before = copy.deepcopy(model.state_dict())
        huge = replace(rule, gamma=1e200) if isinstance(rule, Awp) else replace(rule, beta=1e200)
        optimizer = optimiser.build(model)
        with pytest.raises(NonFinite, match="loss = "):
            huge(model, optimizer, NFgsm(), in_parts(make_step(0.1), 12), None)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert not optimizer.state

    @every_rule
    def test_a_loss_that_is_nan_from_the_start(self, rule):
        model = make_model(batch_norm=False)
        model[-1].bias.data[0] = math.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NonFinite):
            rule(model, Adam().build(model), NFgsm(), in_parts(make_step(0.1), 12), 1.0)
        for name, value in model.state_dict().items():
            assert torch.equal(before[name].nan_to_num(7.0), value.nan_to_num(7.0))

    @every_rule
    def test_whatever_else_goes_wrong(self, rule):
        model, passes = make_model(), []
        before = {name: value.clone() for name, value in model.named_parameters()}

        def third(*_):
            passes.append(1)
            if len(passes) == 3:
                assert not torch.equal(model[0].weight, before["0.weight"])
                raise KeyboardInterrupt

        model.register_forward_hook(third)
        with pytest.raises(KeyboardInterrupt):
            rule(model, Adam().build(model), NFgsm(), in_parts(make_step(0.1), 12), None)
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


class TestAccepted:
    def test_which_losses(self, tmp_path):
        plain = [NFgsm(), FgsmRs(), Fgsm(), PgdAt(), Trades(), Qub(base=NFgsm()), Mer(base=Trades()), FastBat()]
        for loss in plain:
            Awp().check_loss(loss)
            Lap().check_loss(loss)
        borrowed = AdversarialTraining(attack=Pgd())
        Awp().check_loss(borrowed), Awp().check_loss(Qub(base=borrowed)), Descend().check_loss(Ibp())
        for rule in (Awp(), Lap()):
            for loss in (Ibp(), CcIbp(), CcIbp(adversarial=NFgsm())):
                named = f"^training.update: found {type(rule).__name__} for {type(loss).__name__}; accepted: "
                with pytest.raises(InputError, match=named):
                    rule.check_loss(loss)
                with pytest.raises(InputError, match=named):  # and where nobody asked before
                    rule(make_model(), None, loss, in_parts(make_step(0.1), 12), None)
        for loss in (borrowed, Qub(base=borrowed)):
            with pytest.raises(InputError, match=r"^training.update: found Lap for .*; accepted: .*NFgsm"):
                Lap().check_loss(loss)

    def test_nothing_is_written_for_one_that_is_refused(self, tmp_path):
        config = tiny(Awp(), Ibp())
        with pytest.raises(InputError, match=r"^training.update: found Awp for Ibp; accepted: "):
            train(config, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("given", "named"),
        [({"type": "Awp", "gamma": -1}, "gamma"), ({"type": "Awp", "start_epoch": -1}, "start_epoch"),
         ({"type": "Lap", "beta": -1}, "beta"), ({"type": "Lap", "gamma": 0}, "gamma"),
         ({"type": "Lap", "restore": 1}, "restore")],
    )  # fmt: skip
    def test_fields(self, given, named):
        with pytest.raises(InputError, match=rf"^training\.update\.{named}: found .*; accepted: "):
            structure(Training, {"update": given}, "training")

    def test_by_name_in_a_recipe(self):
        assert structure(Training, {"update": {"type": "Awp"}}).update == Awp()
        for rule in (Awp(gamma=0.01, start_epoch=0), Lap(beta=0.002, restore=True)):
            assert structure(UpdateRule, unstructure(rule)) == rule


def tiny(update, loss) -> Config:
    return Config(
        data=Digits(), model=SmallCnn(width=2, hidden=8), loss=loss,
        training=Training(
            epochs=2, batch_size=600, accumulate=2, milestones=(1,), schedule=Smoothed(start=1, length=1),
            optimiser=Sgd(lr=0.05, momentum=0.9), update=update,
        ),
        certify=Certify(images=1), export=Export(enabled=False),
    )  # fmt: skip


class Killed(BaseException):
    pass


@pytest.mark.parametrize("update", [Awp(start_epoch=1), Lap(beta=0.01)], ids=["Awp", "Lap"])
def test_a_run_goes_on_as_if_it_had_never_stopped(update, tmp_path, monkeypatch):
    config = tiny(update, NFgsm(attack=Ascent(steps=1, step_size=1.0, attack_mode="train")))
    whole = train(config, tmp_path / "whole", quiet=True).model.read_bytes()
    plain = train(tiny(Descend(), config.loss), tmp_path / "plain", quiet=True).model.read_bytes()
    assert plain != whole
    config = replace(config, training=replace(config.training, checkpoint_seconds=0.0))
    save, done = loop_module._save, []

    def save_or_die(*given):
        done.append(1)
        if len(done) == 4:
            raise Killed
        save(*given)

    monkeypatch.setattr(loop_module, "_save", save_or_die)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    assert resume(tmp_path / "cut", quiet=True).model.read_bytes() == whole
