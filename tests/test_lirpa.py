"""auto_LiRPA's bounds: how they are asked for (a stand-in answers), and, where it is installed, what they say."""

import copy
import importlib
import logging
import subprocess
import sys
import textwrap
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from networks import Apply, points_inside, randomise_norms
from problems import alone, decided, linear_model, mostly_right, problem_of, random_images, random_model, unknown
from torch import nn

from certtrain.bounds import Box, Interval, L2Ball, LinfBall, compute_rows
from certtrain.bounds.crown import bound_forms, crown_bounds, interval_bounds
from certtrain.bounds.folding import fold
from certtrain.bounds.rounding import REAL
from certtrain.errors import InputError
from certtrain.models.base import Normalise
from certtrain.verifiers import CleanStage, CrownStage, Problem, Specification, run_cascade
from certtrain.verifiers.bounds_so_far import BoundsSoFar
from certtrain.verifiers.limits import within_memory
from certtrain.verifiers.lirpa import INSTALL, METHODS, LirpaStage, lirpa_bounds, lirpa_rows, require

STAND_IN = """
    import logging, warnings
    import torch

    __version__ = "0.7.9"
    logging.basicConfig(level=logging.INFO)
    warnings.simplefilter("once")
    calls, nodes, wrong = [], [], 0


    def answer(model, given, rows):
        raise NotImplementedError


    class PerturbationLpNorm:
        def __init__(self, x_L, x_U):
            self.x_L, self.x_U = x_L, x_U


    class BoundedTensor:
        def __init__(self, x, ptb):
            self.x, self.ptb = x, ptb


    class BoundedModule:
        def __init__(self, model, images, bound_opts):
            print("converting")
            self.model, self.options = model, bound_opts
            model.to("cpu")

        def __call__(self, images):
            return self.model(images) + wrong

        def nodes(self):
            return nodes

        def compute_bounds(self, x, C, method, bound_upper):
            modes = torch.is_grad_enabled(), torch.get_default_dtype()
            calls.append((self.model, x[0], C, method, self.options, *modes))
            return answer(self.model, x[0], C), None
"""


def forget() -> dict:
    names = [name for name in sys.modules if name.split(".")[0] == "auto_LiRPA"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package called auto_LiRPA of the given source first on the path."""
    kept = forget()
    monkeypatch.syspath_prepend(tmp_path)

    def put(source: str) -> Path:
        (tmp_path / "auto_LiRPA").mkdir()
        (tmp_path / "auto_LiRPA" / "__init__.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()
        return tmp_path

    yield put
    forget()
    sys.modules.update(kept)


@pytest.fixture
def stand_in(install):
    install(STAND_IN)
    return require()


@pytest.fixture
def auto_lirpa():
    try:
        return require()
    except InputError as error:
        pytest.skip(str(error))


def named(name: str) -> type[SimpleNamespace]:
    """A class of auto_LiRPA's operations, by its name."""
    return type(name, (SimpleNamespace,), {"bound_backward": None})


def linear_problem(offsets=(0.0, 0.0)) -> Problem:
    """Two images, two rows that are the logits themselves."""
    images = torch.tensor([[0.9, 0.3], [0.6, 0.55]]).reshape(2, 1, 1, 2)
    specification = Specification(
        torch.eye(2).expand(2, 2, 2), torch.tensor(offsets).expand(2, 2), torch.tensor([0, 1])
    )
    model = linear_model([[1.0, 0.0], [0.0, 1.0]])
    return Problem(model, LinfBall(0.1).region(images), specification, torch.arange(2))


def exact(model, given, rows):
    """The rows' minimum over the box, of ``linear_model``."""
    weight = rows @ model[1].weight
    low, high = given.ptb.x_L.flatten(1)[:, None], given.ptb.x_U.flatten(1)[:, None]
    return (torch.where(weight > 0, low, high) * weight).sum(2) + rows @ model[1].bias


class TestRequire:
    def refused(self) -> str:
        with pytest.raises(InputError) as caught:
            require()
        assert "\n" not in str(caught.value) and INSTALL in str(caught.value) and "0.7 or later" in str(caught.value)
        return str(caught.value)

    def test_nothing_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
        assert "found nothing;" in self.refused()

    def test_an_old_one_is_not_even_imported(self, install):
        install("__version__ = '0.3'\nraise SystemExit('imported')")
        assert "found version 0.3;" in self.refused()

    @pytest.mark.parametrize("version", ["0.6.9", "0.10", "1.0", "0.7"])
    def test_versions_are_compared_as_numbers(self, install, version):
        install(f"__version__ = '{version}'")
        if version == "0.6.9":
            assert "found version 0.6.9;" in self.refused()
        else:
            assert require().__version__ == version

    def test_one_of_no_version(self, install):
        install("")
        assert "found one of no version;" in self.refused()

    def test_one_that_lacks_a_dependency(self, install):
        install("__version__ = '0.7.1'\nimport appdirs_of_another_name")
        assert "version 0.7.1, which does not import (ModuleNotFoundError(" in self.refused()

    def test_importing_it_changes_no_global_setting(self, install):
        filters, root = warnings.filters[:], logging.getLogger()
        handlers, level = root.handlers[:], root.level
        install(STAND_IN)
        require()
        assert warnings.filters == filters and (root.handlers, root.level) == (handlers, level)

    def test_it_is_not_imported_at_start_up(self, install):
        path = install("__version__ = '0.7.1'\nraise SystemExit('imported')")
        code = f"""
import sys
sys.path.insert(0, {str(path)!r})
import certtrain.workflows.train, certtrain.command_line, certtrain.verifiers.lirpa
assert "auto_LiRPA" not in sys.modules
"""
        root = Path(__file__).parents[1]
        result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


class TestAsking:
    def test_offsets_count(self, stand_in):
        stand_in.answer = exact
        finding = alone(LirpaStage(), linear_problem())
        assert finding.known.rows.tolist() == [pytest.approx([0.8, 0.2]), pytest.approx([0.5, 0.45])]
        finding = alone(LirpaStage(), linear_problem((-0.7, -0.4)))
        assert finding.known.rows.tolist() == [pytest.approx([0.1, -0.2]), pytest.approx([-0.2, 0.05])]
        assert finding.statuses == [None, None]
        assert alone(LirpaStage(), linear_problem((-0.4, -0.3))).statuses == [None, "verified"]

    @pytest.mark.parametrize("method", METHODS)
    def test_what_it_is_asked(self, stand_in, method):
        stand_in.answer = exact
        problem = linear_problem()
        alone(LirpaStage(method, steps=7), problem)
        ((model, given, rows, name, options, grad, dtype),) = stand_in.calls
        assert model is not problem.network and not model.training and rows.shape == (2, 2, 2)
        assert torch.equal(given.ptb.x_L, problem.region.hull.lower)
        assert torch.equal(given.ptb.x_U, problem.region.hull.upper)
        assert name == METHODS[method] and options["optimize_bound_args"]["iteration"] == 8
        assert grad == (method == "alpha") and dtype == torch.float32

    def test_precision_is_the_regions(self, stand_in):
        stand_in.answer = exact
        model = linear_model([[1.0, 0.0]], dtype=torch.float64)
        region = LinfBall(0.1).region(torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64))
        assert lirpa_rows(model, region, torch.ones(1, 1, 1), "ibp").dtype == torch.float64
        assert stand_in.calls[0][-1] == torch.float64 and torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite_prove_nothing(self, stand_in, value):
        problem = linear_problem()
        stand_in.answer = lambda model, given, rows: torch.full(rows.shape[:2], value).where(rows[..., 0] > 0, 0.01)
        if value == torch.inf:
            with pytest.raises(InputError, match="above the model's own value"):
                alone(LirpaStage(), problem)
            return
        finding = alone(LirpaStage(), problem)
        assert finding.known.rows.tolist() == [[-torch.inf, pytest.approx(0.01)]] * 2

    @pytest.mark.parametrize("where", ["lower", "bias"])
    def test_values_inside_that_are_not_finite_prove_nothing(self, stand_in, where):
        """auto_LiRPA takes a relaxation's NaN for 0, and answers a finite bound."""
        node = named("BoundRelu")(lower=torch.zeros(2), upper=None, get_bias=lambda coefficients, bias: 0)
        stand_in.nodes.append(node)

        def answer(model, given, rows):
            node.get_bias(torch.ones(1), torch.tensor([0.0, torch.nan if where == "bias" else 0.0]))
            node.lower = torch.tensor([0.0, -torch.inf if where == "lower" else 0.0])
            return exact(model, given, rows)

        stand_in.answer = answer
        assert not any(decided(alone(LirpaStage(), linear_problem())))

    def test_bounds_that_the_model_itself_refutes(self, stand_in):
        stand_in.answer = lambda model, given, rows: exact(model, given, rows) + 0.01
        with pytest.raises(InputError, match="above the model's own value"):
            alone(LirpaStage(), linear_problem())

    def test_a_bound_that_only_a_mixed_corner_refutes(self, stand_in):
        """x_0 - x_1 is least at (low, high), which is neither end of the box: found by descent, in one step."""
        model = linear_model([[1.0, -1.0]])
        region = LinfBall(0.1).region(torch.full((1, 1, 1, 2), 0.5))
        for above, refuted in ((0.0, False), (0.01, True)):
            stand_in.answer = lambda model, given, rows, above=above: exact(model, given, rows) + above
            if refuted:
                with pytest.raises(InputError, match="above the model's own value"):
                    lirpa_rows(model, region, torch.ones(1, 1, 1), "crown")
            else:
                assert lirpa_rows(model, region, torch.ones(1, 1, 1), "crown").tolist() == [[pytest.approx(-0.2)]]

    def test_descent_meets_what_random_points_do_not(self, stand_in):
        """One corner in 2^30 is the least, and the bound is above it alone."""
        weight = torch.linspace(-1, 1, 30)[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
        model = linear_model([weight.tolist()])
        region = LinfBall(0.1).region(torch.full((1, 1, 1, 30), 0.5))
        stand_in.answer = lambda model, given, rows: exact(model, given, rows) * 0.99
        with pytest.raises(InputError, match="above the model's own value"):
            lirpa_rows(model, region, torch.ones(1, 1, 1), "crown")

    def test_no_bound_is_above_what_was_seen(self, stand_in):
        """Not by what rounding may explain, either: the row is 0 at a corner, and a tie is unsafe."""
        model = linear_model([[1.0, -1.0]])
        region = Box(torch.tensor([[[[0.0, 0.5]]]]), torch.tensor([[[[0.5, 0.5]]]]))
        specification = Specification(torch.ones(1, 1, 1), torch.full((1, 1), 0.5), torch.tensor([0]))
        stand_in.answer = lambda model, given, rows: exact(model, given, rows) + 1e-7
        problem = Problem(model, region, specification, torch.arange(1))
        assert alone(LirpaStage(), problem).statuses == [None]

    @pytest.mark.parametrize("wrong", [0.01, -0.01])
    def test_a_model_that_it_evaluates_otherwise(self, stand_in, wrong):
        stand_in.answer, stand_in.wrong = lambda model, given, rows: exact(model, given, rows) - 1, wrong
        with pytest.raises(InputError, match="evaluates otherwise than it runs"):
            alone(LirpaStage(), linear_problem())

    def test_its_own_evaluation_is_compared_away_from_the_middle_and_the_ends(self, stand_in):
        """A product of two centred inputs is right at the centre, and so is a difference at both ends."""
        stand_in.answer = lambda model, given, rows: exact(model, given, rows) - 1
        for wrong in (Apply(lambda _, x: x.prod(-1)), Apply(lambda _, x: x[..., 0] - x[..., 1])):
            stand_in.BoundedModule.__call__ = lambda self, x, wrong=wrong: self.model(x) + wrong(x).flatten(1)
            region = Box(torch.full((1, 1, 1, 2), -1.0), torch.full((1, 1, 1, 2), 1.0))
            with pytest.raises(InputError, match="evaluates otherwise than it runs"):
                lirpa_rows(linear_model([[1.0, 1.0]]), region, torch.ones(1, 1, 1), "crown")

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("name", "attributes", "taken"),
        [
            ("Relu", {}, True),
            ("Erf", {}, False),
            ("Sin", {}, False),
            ("Cos", {}, False),
            ("Tan", {}, False),
            ("Tile", {}, False),
            ("MaxPool", {"pads": [0, 0, 0, 0], "dilations": [1, 1], "ceil_mode": 0}, True),
            ("MaxPool", {"pads": [0, 0, 0, 0]}, True),
            ("MaxPool", {"pads": [1, 1, 1, 1], "dilations": [1, 1], "ceil_mode": 0}, False),
            ("MaxPool", {"pads": [0, 1, 0, 1]}, False),
            ("MaxPool", {"pads": [0, 0, 0, 0], "dilations": [2, 1]}, False),
            ("MaxPool", {"pads": [0, 0, 0, 0], "ceil_mode": 1}, False),
            ("AveragePool", {"pads": [0, 0, 0, 0], "count_include_pad": 0}, True),
            ("AveragePool", {}, True),
            ("AveragePool", {"pads": [1, 1, 1, 1], "count_include_pad": 1}, True),
            ("AveragePool", {"pads": [1, 1, 1, 1], "count_include_pad": 0}, False),
            ("AveragePool", {"pads": [0, 1, 0, 1]}, False),
            ("AveragePool", {"pads": [0, 0, 0, 0], "ceil_mode": 1}, False),
            ("LeakyRelu", {"alpha": 0.1}, True),
            ("LeakyRelu", {"alpha": 1.0}, True),
            ("LeakyRelu", {"alpha": 1.5}, False),
            ("LeakyRelu", {"alpha": -0.1}, False),
            ("Pow", {"exponent": 3.0}, True),
            ("Pow", {"exponent": 0.5}, True),
            ("Pow", {"exponent": 2.0}, False),
            ("Pow", {"exponent": 4.0}, False),
            ("Pow", {"exponent": None}, False),
        ],
    )
    def test_operations_that_are_taken(self, stand_in, name, attributes, taken, method):
        stand_in.answer = exact
        power = attributes.get("exponent")
        exponent = SimpleNamespace(value=None if power is None else torch.tensor(power))
        node = named(f"Bound{name}")(attr=attributes, inputs=[None, exponent], lower=None, upper=None, get_bias=max)
        stand_in.nodes.append(node)
        if taken:
            assert any(decided(alone(LirpaStage(method), linear_problem())))
            return
        with pytest.raises(InputError, match=rf"found {name}, whose bounds by auto_LiRPA 0\.7\.9") as caught:
            alone(LirpaStage(method), linear_problem())
        assert "\n" not in str(caught.value) and not stand_in.calls

    @pytest.mark.parametrize(
        ("name", "attributes", "mode"),
        [
            ("Relu", {}, "patches"),
            ("Conv", {"group": 1, "dilations": [1, 1]}, "patches"),
            ("Conv", {"group": 2, "dilations": [1, 1]}, "matrix"),
            ("Conv", {"group": 1, "dilations": [1, 2]}, "matrix"),
            ("Add", {"from_input": (True, True)}, "patches"),
            ("Add", {"from_input": (True, False)}, "matrix"),
            ("Tanh", {}, "matrix"),
            ("MaxPool", {}, "matrix"),
        ],
    )
    def test_the_mode_is_one_that_is_right(self, stand_in, name, attributes, mode):
        stand_in.answer = exact
        inputs = [SimpleNamespace(from_input=given) for given in attributes.get("from_input", ())]
        node = named(f"Bound{name}")(attr=attributes, inputs=inputs, lower=None, upper=None, get_bias=max)
        stand_in.nodes.append(node)
        alone(LirpaStage(), linear_problem())
        assert [call[4]["conv_mode"] for call in stand_in.calls] == [mode]

    def test_a_softmax_with_a_share_near_nothing_proves_nothing(self, stand_in):
        """0.7.1 adds 1e-8 under logarithms of its shares."""
        stand_in.answer = exact
        given = SimpleNamespace(
            lower=torch.tensor([[-1.0, 0.0], [-6.0, 0.0]]), upper=torch.tensor([[0.0, 1.0], [0.0, 6.0]])
        )
        node = named("BoundSoftmax")(axis=-1, inputs=[given], attr={}, lower=None, upper=None, get_bias=max)
        stand_in.nodes.append(node)
        assert decided(alone(LirpaStage(), linear_problem())) == [True, False]

    def test_its_errors_say_which_model_and_method(self, stand_in):
        def answer(model, given, rows):
            logging.getLogger("auto_LiRPA.utils").error("Name: onnx::Elu, Attr: {}")
            raise NotImplementedError("There are unsupported operations")

        with pytest.raises(InputError, match=r"0\.7\.9 cannot bound by crown \(NotImplementedError\(\)\)"):
            alone(LirpaStage(), linear_problem())
        stand_in.answer = answer
        with pytest.raises(InputError, match="no rule for onnx::Elu") as caught:
            alone(LirpaStage(), linear_problem())
        assert "\n" not in str(caught.value)

    def test_out_of_memory_is_the_cascades_business(self, stand_in):
        def answer(model, given, rows):
            if len(rows) > 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return exact(model, given, rows)

        stand_in.answer = answer
        assert within_memory(lambda: alone(LirpaStage(), linear_problem())) is None
        assert [verdict.status for verdict in run_cascade(linear_problem(), [LirpaStage()])] == ["verified"] * 2

    def test_proofs_that_have_to_cover_rounding(self, stand_in):
        problem = linear_problem()
        known = unknown(problem, replace(fold(problem.network, (1, 1, 2)), rounding=REAL))
        finding = alone(LirpaStage(), problem, known)
        assert finding.statuses == [None, None] and finding.known is known and not stand_in.calls
        assert finding.reasons == ["auto_LiRPA's bounds hold in nearest arithmetic only"] * 2

    def test_it_needs_no_folded_network(self, stand_in):
        stand_in.answer = exact
        known = BoundsSoFar(SimpleNamespace(rounding=None), torch.full((2, 2), -torch.inf), {})
        assert alone(LirpaStage(), linear_problem(), known).statuses == ["verified"] * 2

    def test_nothing_is_said(self, stand_in, capfd):
        stand_in.answer = exact
        alone(LirpaStage(), linear_problem())
        assert capfd.readouterr() == ("", "")

    def test_no_images(self, stand_in):
        problem = linear_problem()
        empty = problem.region.take(torch.arange(0))
        assert lirpa_rows(problem.network, empty, torch.zeros(0, 3, 2), "crown").shape == (0, 3)
        assert lirpa_bounds(problem.network, empty, "crown").lower.shape == (0, 2)
        assert not stand_in.calls

    @pytest.mark.parametrize(("method", "steps"), [("forward", 1), ("alpha", -1)])
    def test_settings_out_of_range(self, method, steps):
        problem = linear_problem()
        with pytest.raises(InputError, match=r"accepted: (ibp, crown_ibp, crown, alpha|a whole number >= 0)"):
            lirpa_rows(problem.network, problem.region, problem.specification.rows, method, steps=steps)


class Attention(nn.Module):
    """One head over four tokens of four pixels, a residual, GELU: nothing that our tracer takes."""

    def __init__(self):
        super().__init__()
        self.embed, self.heads = nn.Linear(4, 8), nn.Linear(8, 24)
        self.out, self.last = nn.Linear(8, 8), nn.Linear(32, 3)

    def forward(self, x):
        tokens = self.embed(x.reshape(-1, 4, 4))
        query, key, value = self.heads(tokens).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.transpose(1, 2) / 8**0.5, dim=-1)
        return self.last(F.gelu(tokens + self.out(weights @ value)).flatten(1))


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), *middle, nn.Linear(8, 3))


def convolutions(normalisation: nn.Module) -> nn.Module:
    return nn.Sequential(
        normalisation, nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8),
        nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


NETWORKS = {
    "convolutions": lambda: convolutions(Normalise((0.45,), (0.25,))),
    "convolutions without patches": lambda: convolutions(Apply(lambda module, x: (x - 0.45) / 0.25)),
    "max pool": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(),
        nn.Linear(8, 3),
    ),
    "dropout": lambda: mlp(nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU()),
    "attention": Attention,
    "gelu": lambda: mlp(nn.GELU()),
    "gelu by tanh": lambda: mlp(nn.GELU(approximate="tanh")),
    "silu": lambda: mlp(nn.SiLU()),
    "softmax": lambda: mlp(nn.Softmax(1)),
    "tanh": lambda: mlp(nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid()),
}  # fmt: skip


def network(name: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(NETWORKS[name]()).to(dtype).eval()


def region_of(count=3, epsilon=0.05, dtype=torch.float32, ball=LinfBall):
    torch.manual_seed(1)
    return ball(epsilon).region(torch.rand(count, 1, 4, 4).to(dtype))


def worst_above(model, bounds, region) -> float:
    """The furthest that an output of a point of the boxes lies outside."""
    outputs = torch.stack([model(points).detach() for points in points_inside(model, region.hull)])
    return float(torch.maximum(bounds.lower - outputs, outputs - bounds.upper).max())


def wave(function, scale=1.0) -> nn.Module:
    torch.manual_seed(0)
    return mlp(Apply(lambda module, x: function(scale * x))).eval()


@pytest.mark.lirpa
@pytest.mark.usefixtures("auto_lirpa")
class TestBounds:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("epsilon", [0.02, 0.3])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_no_output_is_outside(self, name, epsilon, method):
        model, region = network(name), region_of(epsilon=epsilon)
        bounds = lirpa_bounds(model, region, method)
        assert bounds.lower.shape == bounds.upper.shape == (3, 3) and not bounds.lower.requires_grad
        assert bounds.lower.isfinite().all() and bounds.upper.isfinite().all()
        assert worst_above(model, bounds, region) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("epsilon", [0.02, 0.1])
    def test_agreement_with_ours_on_convolutions(self, dtype, epsilon):
        model, region = network("convolutions", dtype), region_of(epsilon=epsilon, dtype=dtype)
        forms = Specification.robust(torch.tensor([0, 1, 2]), 3).rows.to(dtype)
        folded = fold(model, torch.Size((1, 4, 4)))
        ours = {
            "ibp": compute_rows(model, region, forms),
            "crown_ibp": bound_forms(folded, region, forms, interval_bounds(folded, region)),
            "crown": bound_forms(folded, region, forms, crown_bounds(folded, region)),
        }
        tolerance = 1e-4 if dtype == torch.float32 else 1e-8
        for method, bound in ours.items():
            theirs = lirpa_rows(model, region, forms, method)
            torch.testing.assert_close(theirs, bound.detach(), rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("name", ["convolutions", "max pool", "attention", "tanh"])
    def test_slopes_climb(self, name):
        """With plain torch 2.15, those of ReLUs do not (see ``_TorchSubstitutes``)."""
        model, region = network(name), region_of(epsilon=0.3)
        crown, still, alpha = (
            lirpa_bounds(model, region, method, steps=steps)
            for method, steps in (("crown", 0), ("alpha", 0), ("alpha", 20))
        )
        assert (alpha.lower >= still.lower - 1e-5).all() and (alpha.upper <= still.upper + 1e-5).all()
        assert (alpha.upper - alpha.lower).mean() < 0.99 * (crown.upper - crown.lower).mean()

    @pytest.mark.parametrize(
        ("name", "method"), [*(("convolutions", m) for m in METHODS), ("max pool", "crown"), ("attention", "crown")]
    )
    def test_batches_of_any_size(self, name, method):
        model, region = network(name), region_of()
        together = lirpa_bounds(model, region, method)
        for number in range(3):
            single = lirpa_bounds(model, region.take(torch.tensor([number])), method)
            torch.testing.assert_close(single.lower[0], together.lower[number], rtol=1e-3, atol=1e-3)
        assert lirpa_bounds(model, region.take(torch.arange(0)), method).upper.shape == (0, 3)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("name", ["convolutions", "dropout", "attention"])
    def test_the_model_is_untouched(self, name, training):
        model, region = network(name).train(training), region_of()
        first = next(model.parameters()).requires_grad_(False)
        model.register_forward_hook(lambda *_: None)
        modes = [module.training for module in model.modules()]
        before, places = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]
        bounds = lirpa_bounds(model, region, "alpha", steps=2)
        assert modes == [module.training for module in model.modules()] and len(model._forward_hooks) == 1
        assert places == [p.data_ptr() for p in model.parameters()] and list(before) == list(model.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [p.requires_grad for p in model.parameters()] == [p is not first for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert worst_above(model.eval(), bounds, region) <= 1e-5  # dropout and batch norm as in evaluation

    def test_boxes_in_other_units(self):
        model, lower = network("convolutions"), 3 * torch.rand(2, 1, 4, 4) - 5
        region = Box(lower, lower + 0.5)
        assert worst_above(model, lirpa_bounds(model, region, "crown"), region) <= 1e-5

    def test_sets_that_are_no_boxes(self):
        model, region = network("convolutions"), region_of(epsilon=0.3, ball=L2Ball)
        bounds, box = lirpa_bounds(model, region, "ibp"), lirpa_bounds(model, region_of(epsilon=0.3), "ibp")
        assert torch.equal(bounds.lower, box.lower) and worst_above(model, bounds, region) <= 1e-5

    def test_a_point(self):
        model, region = network("convolutions"), region_of(epsilon=0.0)
        bounds = lirpa_bounds(model, region, "crown")
        torch.testing.assert_close(bounds.lower, model(region.images).detach(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("name", ["convolutions", "tanh", "gelu"])
    def test_broken_weights_prove_nothing(self, name, value, method):
        model, region = network(name), region_of()
        next(module for module in model.modules() if isinstance(module, nn.Linear)).weight.data[0, 0] = value
        try:
            bounds = lirpa_bounds(model, region, method)
        except InputError:
            return
        assert (bounds.lower == -torch.inf).all() and (bounds.upper == torch.inf).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_what_overflows_proves_nothing(self, method):
        model = wave(torch.exp, 400.0)
        with suppress(InputError):
            assert (lirpa_bounds(model, region_of(), method).lower == -torch.inf).all()

    def test_a_logarithm_with_loose_bounds_proves_nothing(self):
        """0.7.1's α-CROWN is 30 above the function, whose tangent it takes at -13."""
        model, region = wave(lambda x: torch.log(x * x + 1e-3)), region_of(epsilon=0.1)
        assert worst_above(model, lirpa_bounds(model, region, "crown"), region) <= 1e-5
        assert (lirpa_bounds(model, region, "alpha").lower == -torch.inf).all()

    @pytest.mark.parametrize("slope", [-0.5, 1.5])
    def test_leaky_relus_that_it_has_wrong(self, slope):
        with pytest.raises(InputError, match=r"slopes in \[0, 1\]"):
            lirpa_bounds(wave(lambda x: F.leaky_relu(x, slope)), region_of(), "crown")

    def test_operations_without_a_rule_are_named(self, capfd):
        with pytest.raises(InputError, match="it has no rule for onnx::Elu") as caught:
            lirpa_bounds(mlp(nn.ELU()), region_of(), "crown")
        assert "\n" not in str(caught.value) and capfd.readouterr().out == ""

    def test_models_that_it_cannot_trace_say_why(self):
        with pytest.raises(InputError, match="too wide") as caught:
            lirpa_rows(Failing(), region_of(), torch.eye(3).expand(3, 3, 3), "crown")
        assert "\n" not in str(caught.value)

    def test_global_settings_stay(self, capfd):
        filters, root = warnings.filters[:], logging.getLogger()
        handlers, level = root.handlers[:], root.level
        lirpa_bounds(network("dropout", torch.float64), region_of(dtype=torch.float64), "alpha")
        assert warnings.filters == filters and (root.handlers, root.level) == (handlers, level)
        assert torch.get_default_dtype() == torch.float32 and capfd.readouterr().out == ""

    def test_weights_that_changed_count(self):
        model, region = network("convolutions"), region_of()
        before = lirpa_bounds(model, region, "ibp")
        with torch.no_grad():
            model[-1].bias += 1
        torch.testing.assert_close(lirpa_bounds(model, region, "ibp").lower, before.lower + 1)


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("too wide")


@pytest.mark.lirpa
@pytest.mark.usefixtures("auto_lirpa")
class TestStage:
    def test_verdicts_are_those_of_our_own_stage(self):
        model, images = random_model(5), random_images()
        problem = problem_of(model, images, mostly_right(model, images), LinfBall(0.1))
        ours = run_cascade(problem, [CleanStage(), CrownStage()])
        theirs = run_cascade(problem, [CleanStage(), LirpaStage()])
        assert [verdict.status for verdict in theirs] == [verdict.status for verdict in ours]
        assert {verdict.status for verdict in ours} == {"verified", "misclassified", "unknown"}
        for one, other in zip(ours, theirs):
            assert one.lower_bound == pytest.approx(other.lower_bound, abs=1e-4)

    def test_under_no_grad_slopes_are_optimised(self):
        model, images = random_model(5), random_images()
        problem = problem_of(model, images, model(images).argmax(1), LinfBall(0.1))
        crown, alpha = (alone(LirpaStage(method), problem) for method in ("crown", "alpha"))
        assert sum(decided(alpha)) > sum(decided(crown))

    def test_what_was_known_is_kept(self):
        model, images = random_model(), random_images(4)
        problem = problem_of(model, images, model(images).argmax(1), LinfBall(0.3))
        known = unknown(problem)
        known = known.with_rows(torch.full_like(known.rows, 0.5))
        finding = alone(LirpaStage("ibp"), problem, known)
        assert (finding.known.rows >= 0.5).all() and all(decided(finding))

    def test_other_specifications(self):
        model, images = network("attention"), region_of().images
        rows = torch.tensor([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]]).expand(3, 2, 3)
        values = (rows @ model(images).detach().unsqueeze(-1)).squeeze(-1)
        specification = Specification(rows, 0.05 - values, torch.tensor([0, 1]))  # holds on the images, by 0.05
        for epsilon, holds in ((1e-3, True), (0.3, False)):
            problem = Problem(model, LinfBall(epsilon).region(images), specification, torch.arange(3))
            known = BoundsSoFar(SimpleNamespace(rounding=None), torch.full((3, 2), -torch.inf), {})
            assert decided(alone(LirpaStage(), problem, known)) == [holds] * 3

    def test_interval_hulls_are_supersets(self):
        """Ends of the hull are what is bounded: the corner of the exact box is in it."""
        region = region_of(epsilon=0.1)
        exact_box = Interval.from_bounds((region.images - 0.1).clamp(min=0), (region.images + 0.1).clamp(max=1))
        assert (region.hull.lower <= exact_box.lower).all() and (region.hull.upper >= exact_box.upper).all()
