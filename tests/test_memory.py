"""Limits of memory: sizes follow a stated limit, the machine or what is free, and change no result."""

import math

import pytest
import torch
from problems import alone
from test_branch_and_bound import random_problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from certtrain.bounds import Box, LinfBall, memory
from certtrain.bounds.clock import until
from certtrain.bounds.crown import COPIES, crown_bounds, rows_at_a_time
from certtrain.bounds.folding import fold
from certtrain.bounds.forward_linear import forward_bounds
from certtrain.bounds.memory import LEAST, at_once, kept, planned, size_of, within
from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.verifiers import AlphaStage, BabStage, Certify, CrownStage, Search, Specification, run_cascade
from certtrain.verifiers.cascade import _images_at_a_time
from certtrain.verifiers.engine import BranchAndBound, OpenList, OpenSubproblems
from certtrain.verifiers.input_split import INPUTS
from certtrain.verifiers.neuron_split import SignBounder
from certtrain.verifiers.optimise import ASCENT, ascents_at_a_time
from certtrain.verifiers.sign_space import SignSpace
from certtrain.verifiers.stages import _by_forward_lines

ONE = torch.zeros(1)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "bytes_"),
        [("2GiB", 2 * GIB), ("512MiB", GIB // 2), ("1.5GB", 1_500_000_000), ("2147483648", 2 * GIB), (2 * GIB, 2 * GIB),
         (" 2 gib ", 2 * GIB), ("300000kb", 300_000_000), ("256MiB", LEAST)],
    )  # fmt: skip
    def test_are_read(self, text, bytes_):
        assert size_of(text) == bytes_

    @pytest.mark.parametrize(
        "text",
        ["", "GiB", "2GiBs", "-2GiB", "nan", "inf", "1e12", "1_000_000_000", "2.5.1GB", "255MiB", "0", True, 2.0e9 * 0,
         "9" * 400, "2 GiB 3", "２GiB"],
    )  # fmt: skip
    def test_others_are_refused(self, text):
        with pytest.raises(InputError, match="accepted: a size of 256MiB or more, such as 2GiB, 512MiB"):
            size_of(text)

    def test_in_a_recipe(self):
        assert Certify().memory is None and Certify(memory="2GiB").memory == "2GiB"
        with pytest.raises(InputError, match="memory: found 'much'"):
            Certify(memory="much")


class TestBudget:
    def test_without_a_limit_nothing_that_decides_results_depends_on_what_is_free(self, monkeypatch):
        found = set()
        monkeypatch.setattr(memory, "_installed", lambda: 64 * GIB)
        for free in (1 << 20, GIB, 50 * GIB):
            monkeypatch.setattr(memory, "_available", lambda second, free=free: free)
            found.add((planned(ONE), kept(ONE)))
        assert found == {(memory.ROUND, 8 * GIB)}

    def test_what_is_computed_together_follows_what_is_free(self, monkeypatch):
        for free, size in ((100 * GIB, memory.CHUNK), (4 << 20, 1 << 20), (7 << 20, 1 << 20), (0, 1)):
            monkeypatch.setattr(memory, "_available", lambda second, free=free: free)
            assert at_once(ONE) == size

    def test_a_limit_leaves_out_what_the_process_takes_already(self, monkeypatch):
        monkeypatch.setattr(memory, "_resident", lambda: GIB)
        monkeypatch.setattr(memory, "_available", lambda second: 0)  # a stated limit is the user's word
        with within("2GiB"):
            assert planned(ONE) == at_once(ONE) == memory.CHUNK and kept(ONE) == GIB // 4
            with within(None):
                assert kept(ONE) == GIB // 4
            with within(GIB + (16 << 20)):
                assert at_once(ONE) == 4 << 20
            with within("512MiB"):  # less than the process takes: slowly, not never
                assert at_once(ONE) == 2 << 20
        assert kept(ONE) == memory._installed() // memory.SHARE

    def test_a_group_of_processes_limits_both(self, tmp_path, monkeypatch):
        files = {
            "/proc/self/cgroup": "0::/mine\n", "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   4194304 kB\n",
            "/sys/fs/cgroup/mine/memory.max": "3221225472\n", "/sys/fs/cgroup/mine/memory.current": "2147483648\n",
            "/sys/fs/cgroup/mine/memory.stat": "anon 1\ninactive_file 1073741824\n",
            "/sys/fs/cgroup/memory.max": "max\n",
        }  # fmt: skip
        monkeypatch.setattr(memory, "_read", lambda path: files.get(str(path), ""))
        memory._available.cache_clear()
        memory._installed.cache_clear()
        assert memory._available(-1) == 2 * GIB and memory._installed() == 3 * GIB
        files["/proc/self/cgroup"] = "0::/mine/of/a:unit\n"  # a limit holds for all groups inside
        memory._installed.cache_clear()
        assert memory._available(-4) == 2 * GIB and memory._installed() == 3 * GIB
        files["/proc/self/cgroup"] = ""
        assert memory._available(-2) == 4 * GIB
        files.clear()  # a system that says nothing
        assert memory._available(-3) > 1 << 60 and memory._resident() == 0
        memory._available.cache_clear()
        memory._installed.cache_clear()

    def test_rows_are_sized_by_the_layers_before_them(self, monkeypatch):
        network = fold(_network(), torch.Size((1, 8, 8)))
        widths = [shape.numel() for shape in network.shapes]
        assert widths == [64, 256, 256, 256, 16, 16, 3]
        monkeypatch.setattr(memory, "CHUNK", COPIES * 4 * 256 * 30)
        assert rows_at_a_time(network, 1, ONE) == 30 and rows_at_a_time(network, 4, ONE) == 7
        assert rows_at_a_time(network, 1, ONE, 0) == 120 and rows_at_a_time(network, 100, ONE) == 1
        assert rows_at_a_time(network, 1, ONE.double()) == 15
        monkeypatch.setattr(memory, "ROUND", ASCENT * 4 * sum(widths) * 6)
        assert [ascents_at_a_time(network, rows, ONE) for rows in (1, 3, 7)] == [6, 2, 0]

    def test_images_are_kept_as_fits(self):
        network = fold(_network(), torch.Size((1, 8, 8)))
        with within("256MiB"):
            robust = [Specification.robust(torch.zeros(5, dtype=torch.int64), classes) for classes in (100, 10)]
            few, many = (_images_at_a_time(network, torch.zeros(one.offsets.shape), one) for one in robust)
            dense = Specification(robust[0].rows, robust[0].offsets, robust[0].clauses)
            fewest = _images_at_a_time(network, torch.zeros(dense.offsets.shape), dense)
        assert many > few > 200 and few > fewest


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()


class TestResults:
    @pytest.mark.parametrize("kind", ["dense", "conv", "residual"])
    def test_bounds_do_not_depend_on_the_budget(self, kind, monkeypatch):
        problem = random_problem(3, kind, count=3)
        network, region = fold(problem.network, problem.region.images.shape[1:]), problem.region
        expected = crown_bounds(network, region)
        for budget in (1, 5000, 1 << 40):
            monkeypatch.setattr(memory, "CHUNK", budget)
            for place, found in crown_bounds(network, region).items():
                for end in ("lower", "upper"):
                    assert torch.allclose(getattr(found, end), getattr(expected[place], end), rtol=1e-6, atol=1e-6)

    def test_rows_and_images_one_at_a_time(self, monkeypatch):
        """Alpha-CROWN's bounds of rows that are not optimised together, and of clauses of several rows."""
        problem = random_problem(11, "conv", count=3)
        known = alone(CrownStage(), problem).known
        expected = alone(AlphaStage(), problem, known)
        monkeypatch.setattr(memory, "ROUND", 1)
        found = alone(AlphaStage(), problem, known)
        assert found.statuses == expected.statuses
        worst = [problem.specification.worst(finding.known.rows) for finding in (found, expected)]
        open_ = worst[1] <= 0
        assert torch.allclose(worst[0][open_], worst[1][open_], atol=1e-5)
        assert found.known.alphas is not None and found.known.alphas.shape == expected.known.alphas.shape

    def test_slopes_that_do_not_fit_are_not_kept(self, monkeypatch):
        problem = random_problem(11, "conv", count=2)
        monkeypatch.setattr(memory, "_installed", lambda: 8)
        finding = alone(AlphaStage(), problem, alone(CrownStage(), problem).known)
        assert finding.known.alphas is None
        assert alone(BabStage(), problem, finding.known).statuses == alone(BabStage(), problem).statuses

    @pytest.mark.parametrize("kind", ["dense", "residual"])
    def test_a_search_with_packed_subproblems_ends_alike(self, kind, monkeypatch):
        problem = random_problem(7, kind, count=4)
        expected = alone(BabStage(), problem).statuses
        packed = list[int]()
        whole = SignSpace.packed
        monkeypatch.setattr(SignSpace, "packed", lambda self, some: packed.append(len(some)) or whole(self, some))
        monkeypatch.setattr(memory, "_installed", lambda: 8)
        assert alone(BabStage(Search(batch=2)), problem).statuses == expected

    def test_a_batch_of_many_images_goes_in_parts(self, monkeypatch):
        problem, stages = random_problem(5, "dense", count=6), Certify(stages=("ibp", "crown", "bab")).build(0)
        expected = [verdict.status for verdict in run_cascade(problem, stages)]
        monkeypatch.setattr(memory, "_installed", lambda: 8)
        seen = list[int]()
        found = run_cascade(problem, stages, watch=lambda stage, images: seen.append(images))
        assert [verdict.status for verdict in found] == expected and set(seen) == {1}


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    bytes_ = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves(result) if isinstance(part, torch.Tensor)]
        self.bytes_ = max(self.bytes_, *(part.untyped_storage().nbytes() for part in tensors), 0)
        return result


def test_no_array_of_a_backward_pass_is_larger_than_its_share(monkeypatch):
    network, images = fold(_network(), torch.Size((1, 8, 8))), torch.rand(32, 1, 8, 8)
    region, largest = LinfBall(0.5).region(images), []
    for budget in (COPIES * 4 * 256 * 32 * 2, 1 << 40):
        monkeypatch.setattr(memory, "CHUNK", budget)
        with _Largest() as mode:
            crown_bounds(network, region)
        largest.append(mode.bytes_)
    assert largest[0] == 4 * 256 * 32 * 2 and largest[1] > 5 * largest[0]


def test_rows_are_copied_for_a_part_of_the_points_at_a_time(monkeypatch):
    torch.manual_seed(0)
    robust = Specification.robust(torch.randint(0, 30, (5,)), 30)
    specification = Specification(robust.rows, robust.offsets, robust.clauses)
    image, logits = torch.randint(0, 5, (64,)), torch.randn(64, 30)
    some = specification.subset(image)
    expected, largest = some.worst(some.values(logits)), []
    for budget in (1, 3 * 29 * 30 * 4, 1 << 40):
        monkeypatch.setattr(memory, "ROUND", budget)
        with _Largest() as mode:
            assert torch.equal(specification.worst_at(image, logits), expected)
        largest.append(mode.bytes_)
    assert largest[:2] == [64 * 30 * 4, 3 * 29 * 30 * 4] and largest[2] == 64 * 29 * 30 * 4
    assert specification.worst_at(image[:0], logits[:0]).shape == (0,)


def test_the_command_line_refuses_other_sizes(capsys):
    assert main(["verify", "--onnx", "net.onnx", "--vnnlib", "one.vnnlib", "--memory", "much"]) == 2
    assert "--memory: found 'much'; accepted: a size of 256MiB or more" in capsys.readouterr().err


def test_packed_subproblems_keep_their_signs():
    problem = random_problem(7, "residual", count=4)
    known = alone(CrownStage(), problem).known
    space = SignSpace(problem, known)
    roots = space.restored(space.roots())
    assert not roots.signs.any() and (roots.alphas.min() >= 0)
    torch.manual_seed(0)
    signs = torch.randint(-1, 2, roots.signs.shape).to(torch.int8)
    packed = space.packed(type(roots)(**{**vars(roots), "signs": signs}))
    assert packed.decided.shape[1] == int((signs != 0).sum(1).max())
    again = space.restored(space.packed(space.restored(packed)))
    assert torch.equal(again.signs, signs) and torch.equal(again.image, roots.image)
    assert torch.equal(space.restored(packed.joined(space.roots())).signs, torch.cat([signs, torch.zeros_like(signs)]))


def test_an_open_list_keeps_the_lowest_bounds_whole(monkeypatch):
    bounds = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    none = torch.zeros(6, dtype=torch.int64)
    some = OpenSubproblems(torch.arange(6), none, bounds, none)
    bounder: SignBounder = object.__new__(SignBounder)
    monkeypatch.setattr(SignBounder, "packed", lambda self, subproblems: subproblems)
    monkeypatch.setattr(SignBounder, "restored", lambda self, packed: packed)
    open_ = OpenList(bounder, some, 4 * some.bytes_each)
    open_.add(some)
    assert open_.whole.bound.tolist() == [1.0, 0.0] and open_.packed.bound.tolist() == [5.0, 4.0, 2.0, 3.0]
    assert open_.take(torch.tensor([5, 0, 2, 1])).bound.tolist() == [3.0, 1.0, 5.0, 0.0]
    assert open_.take(torch.tensor([1, 0])).bound.tolist() == [0.0, 1.0]
    whole, packed = open_.remove(torch.tensor([1, 4]))
    assert whole.bound.tolist() == [0.0] and packed.bound.tolist() == [2.0]
    assert sorted(open_.bound.tolist()) == [1.0, 3.0, 4.0, 5.0] and len(open_) == 4
    open_.remove(open_.bound > 3)
    assert sorted(open_.image.tolist()) == [1, 4]


class _Counter:
    """A clock that moves by a second for every subproblem bounded."""

    def __init__(self):
        self.time, self.sizes = 0.0, list[int]()

    def __call__(self) -> float:
        return self.time


class TestTime:
    def _search(self, monkeypatch, timeout, slow=1.0):
        counter, examine = _Counter(), BranchAndBound._examine_batch

        def timed(self, batch):
            counter.sizes.append(len(batch))
            examine(self, batch)
            counter.time += slow * len(batch)

        monkeypatch.setattr(BranchAndBound, "_examine_batch", timed)
        problem = random_problem(228, "conv", count=6, epsilon=0.35)  # four of the six need several splits
        with until(now=counter):
            finding = alone(BabStage(timeout=timeout), problem)
        return counter, finding

    def test_under_a_limit_the_batches_are_the_same_until_it_ends(self, monkeypatch):
        with monkeypatch.context() as patch:
            whole, _ = self._search(patch, math.inf)
        counter, _ = self._search(monkeypatch, 10.0)
        assert 1 < len(counter.sizes) < len(whole.sizes) and counter.sizes == whole.sizes[: len(counter.sizes)]

    def test_without_a_limit_the_clock_decides_nothing(self, monkeypatch):
        runs = []
        for slow in (0.0, 1.0, 1e6):
            with monkeypatch.context() as patch:
                counter, finding = self._search(patch, math.inf, slow)
            runs.append((counter.sizes, finding.statuses, finding.lower.tolist()))
        assert runs[0] == runs[1] == runs[2]


def test_forward_bounds_of_sets_that_vary_in_different_inputs_keep_their_share(monkeypatch):
    """Lines have a column for each input that varies in any set of the batch."""
    network, images = fold(_network(), torch.Size((1, 8, 8))), torch.rand(60, 1, 8, 8)
    radius = (torch.rand(60, 64).argsort(1) < INPUTS).float().reshape(images.shape)
    region = Box(images - radius, images + radius)
    monkeypatch.setattr(memory, "CHUNK", COPIES * 4 * 256 * 2 * (1 + 64))
    expected = forward_bounds(network, region)
    with _Largest() as mode:
        found = _by_forward_lines(network, region)
    assert mode.bytes_ <= 4 * 256 * 2 * (1 + 64)
    for place, bounds in found.items():
        torch.testing.assert_close(bounds.lower, expected[place].lower)
        torch.testing.assert_close(bounds.upper, expected[place].upper)
