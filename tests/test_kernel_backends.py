"""Which backend computes, and that the CPU's threads change neither results nor the manners of a process."""

import textwrap

import processes
import pytest
import torch
from op_table import NAMES, outcome, table
from walking import walk

from certtrain import kernels
from certtrain.kernels import dispatch, registration
from certtrain.kernels.cpu import threads
from certtrain.kernels.reference import backend as plain_torch

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


@pytest.fixture
def without_interpreter(monkeypatch):
    """Triton's interpreter makes ``gpu`` available to other tests of the same process."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield
    forget()


def forget():
    dispatch._missing.cache_clear()
    dispatch._automatic.cache_clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def used(call, monkeypatch):
    """The names of the backends whose functions a call reaches."""
    names, load = [], dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda name: names.append(name) or load(name))
    call()
    return set(names)


def topk(dtype=torch.float32):
    return kernels.topk_mask(torch.tensor([[1, 3, 2]], dtype=dtype), 2)


class TestChoice:
    def test_names_and_reasons(self, without_interpreter):
        found = kernels.available_backends()
        assert list(found) == ["gpu", "cpu", "reference"]
        assert found["cpu"] is None and found["reference"] is None

    @no_cuda
    def test_the_reason_why_there_is_no_gpu(self, without_interpreter):
        assert "torch sees no CUDA device" in (kernels.available_backends()["gpu"] or "")

    def test_the_reason_is_a_missing_package(self, monkeypatch, without_interpreter):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        found = kernels.available_backends()
        assert found == {"gpu": "triton is not installed", "cpu": "numba is not installed", "reference": None}
        assert dispatch.backend_for(torch.zeros(1)) is plain_torch

    def test_unknown(self):
        with (
            pytest.raises(ValueError, match=r"use_backend: found 'cuda'; accepted: gpu, cpu, reference"),
            kernels.use_backend("cuda"),
        ):
            pass

    @no_cuda
    def test_unavailable(self, without_interpreter):
        expected = r"use_backend: backend 'gpu' is not available: .*; accepted here: cpu, reference"
        with pytest.raises(ValueError, match=expected), kernels.use_backend("gpu"):
            pass

    @pytest.mark.parametrize("name", ["cpu", "reference"])
    def test_is_made(self, name, monkeypatch):
        with kernels.use_backend(name):
            assert used(topk, monkeypatch) == {name}

    def test_holds_for_small_tensors(self, monkeypatch):
        center = torch.ones(2, 3)
        assert used(lambda: kernels.ibp_relu(center, center), monkeypatch) == set()
        with kernels.use_backend("cpu"):
            assert used(lambda: kernels.ibp_relu(center, center), monkeypatch) == {"cpu"}

    def test_small_means_few_entries(self, monkeypatch):
        center = torch.ones(registration.SMALL)
        assert used(lambda: kernels.ibp_relu(center[1:], center[1:]), monkeypatch) == set()
        assert used(lambda: kernels.ibp_relu(center, center), monkeypatch) == {"cpu"}

    @pytest.mark.parametrize(
        "dtype, expected",
        [(torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float16, "reference"), (torch.bfloat16, "reference")],
        ids=str,
    )
    def test_automatic(self, dtype, expected, monkeypatch):
        assert used(lambda: topk(dtype), monkeypatch) == {expected}

    def test_impossible_for_these_tensors(self):
        expected = r"backend 'cpu' was asked for: found torch.float16; accepted for these tensors: .*reference"
        with kernels.use_backend("cpu"), pytest.raises(ValueError, match=expected):
            topk(torch.float16)

    def test_impossible_device(self):
        with kernels.use_backend("cpu"), pytest.raises(ValueError, match=r"found tensors on meta; .*reference"):
            dispatch.backend_for(torch.zeros(1, device="meta"))

    def test_nests_and_ends_with_an_exception(self, monkeypatch):
        monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
        with kernels.use_backend("reference"):
            with pytest.raises(ZeroDivisionError), kernels.use_backend("cpu"):
                assert dispatch.chosen() == "cpu"
                raise ZeroDivisionError
            assert dispatch.chosen() == "reference"
            with kernels.use_backend(None):
                assert dispatch.chosen() is None
            with pytest.raises(ValueError), kernels.use_backend("none"):
                pass
            assert dispatch.chosen() == "reference"
        assert dispatch.chosen() is None

    def test_from_the_environment(self, monkeypatch):
        monkeypatch.setenv("CERTTRAIN_BACKEND", "reference")
        assert used(topk, monkeypatch) == {"reference"}
        with kernels.use_backend("cpu"):
            assert used(topk, monkeypatch) == {"cpu"}

    def test_impossible_in_the_environment(self, monkeypatch):
        monkeypatch.setenv("CERTTRAIN_BACKEND", "numba")
        with pytest.raises(ValueError, match=r"CERTTRAIN_BACKEND: found 'numba'; accepted: gpu, cpu, reference"):
            topk()


@pytest.mark.usefixtures("two_threads")
class TestThreads:
    def test_all_items_once(self):
        seen = [0] * 7

        def kernel(first, last):
            for item in range(first, last):
                seen[item] += 1

        threads.run(kernel, 7, 100 * threads.GRAIN)
        assert seen == [1] * 7
        threads.run(kernel, 7, 0)
        assert seen == [2] * 7

    @pytest.mark.parametrize(
        "items, work, expected", [(20, 1 << 30, 8), (7, 1 << 30, 7), (1, 1 << 30, 1), (7, 1, 1), (0, 1 << 30, 0)]
    )
    def test_as_many_parts_as_the_work_deserves(self, items, work, expected):
        parts = []
        threads.run(lambda first, last: parts.append((first, last)), items, work)
        assert len([part for part in parts if part != (0, 0)]) == expected

    @pytest.mark.parametrize("part", [0, 1])
    def test_an_exception_reaches_the_caller(self, part):
        def kernel(first, last):
            if first < last and first == part:
                raise LookupError(f"part {part}")

        with pytest.raises(LookupError, match=f"part {part}"):
            threads.run(kernel, 2, 100 * threads.GRAIN)

    def test_without_an_openmp_runtime(self, monkeypatch):
        x = torch.randn(1 << 20)
        expected = kernels.ibp_relu(x, x.abs())
        monkeypatch.setattr(threads, "_team", lambda: None)
        monkeypatch.setattr(threads, "_on_a_team", None)
        assert all(torch.equal(a, b) for a, b in zip(kernels.ibp_relu(x, x.abs()), expected))


def script(code):
    """Run in a process of its own, as pytest's workers have one thread. A sixty-fourth of the work is worth two."""
    done = processes.run(textwrap.dedent(PREAMBLE) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


PREAMBLE = """
    import os, sys, torch
    from certtrain import kernels
    from certtrain.kernels.cpu import threads

    assert threads._forked
    threads._forked = False  # the process that this one was forked from has no team that it could miss
    threads.GRAIN >>= 6
    torch.set_num_threads(2)
    teams = []
    on_a_team = threads._on_a_team
    threads._on_a_team = lambda *given: teams.append(1) or on_a_team(*given)

    def randn(*shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
"""


def test_one_thread_and_two_give_the_same_bits():
    script("""
        def cases(dtype):
            def tensor(*shape, seed=0):
                return randn(*shape, seed=seed, dtype=dtype)

            image, last = tensor(7, 5, 43, 47), tensor(7, 5, 43, 47).contiguous(memory_format=torch.channels_last)
            rows = tensor(211, 197)
            vectors = [tensor(5, seed=1), tensor(5, seed=2)]
            hidden, weight, labels = tensor(61, 101), tensor(307, 101, seed=3), torch.arange(61) * 5
            forms, lines = tensor(3, 7, 5303), [tensor(3, 5303, seed=s).abs() for s in (4, 5, 6)]
            pictures, scores = tensor(9, 3, 6007).sigmoid(), tensor(9, 6007)
            mask, chosen = (scores > 2).to(torch.uint8), torch.arange(7 * 13).reshape(7, 13) % 29 - 1
            return [
                (
                    lambda *a: kernels.cut_box_minima(*a, chosen),
                    tensor(28, 197), tensor(28, seed=1), tensor(7, 197, seed=2), tensor(7, seed=3),
                ),
                (kernels.ibp_relu, image, image.abs()),
                (lambda *a: kernels.ibp_affine(*a, relu=True), image, image.abs(), *vectors),
                (lambda *a: kernels.ibp_affine(*a, relu=True), last, last.abs(), *vectors),
                (lambda *a: kernels.ibp_affine(*a), rows, rows.abs(), tensor(197, seed=1), tensor(197, seed=2)),
                (lambda *a: kernels.batch_statistics_norm(*a, 1e-3), image, *vectors),
                (lambda *a: kernels.batch_statistics_norm(*a, 1e-3), last, *vectors),
                (lambda *a: kernels.ibp_margins(*a, labels), hidden, hidden.abs(), weight, tensor(307)),
                (kernels.crown_relu_step, forms, tensor(3, 7), *lines),
                (lambda *a: kernels.sparse_apply(*a, 77), pictures, tensor(9, 3, 6007), scores),
                (lambda s: kernels.topk_mask(s, 40), tensor(64, 1001)),
                (lambda g, p, m, x: kernels.spgd_step(g, p, m, x, mask, 77, alpha=0.1, beta=0.2, projected=True),
                 tensor(9, 3, 6007, seed=7), tensor(9, 3, 6007, seed=8).sigmoid() - 0.5, scores, pictures),
            ]

        def results(given):
            for number, (op, *leaves) in enumerate(given):
                leaves = [leaf.detach().requires_grad_() for leaf in leaves]
                before = len(teams)
                found = op(*leaves)
                found = [found] if isinstance(found, torch.Tensor) else list(found)
                floats = [part for part in found if part.requires_grad]
                if floats:
                    found += torch.autograd.grad(floats, leaves, [part.detach() for part in floats])
                yield found
                assert len(teams) - before >= (torch.get_num_threads() - 1) * (1 + bool(floats)), number

        with kernels.use_backend("cpu"):
            for dtype in (torch.float32, torch.float64):
                given = cases(dtype)
                torch.set_num_threads(2)
                two = list(results(given))
                torch.set_num_threads(1)
                for number, (a, b) in enumerate(zip(results(given), two)):
                    same = [torch.equal(x.contiguous(), y.contiguous()) for x, y in zip(a, b, strict=True)]
                    assert all(same), (dtype, number, same)
    """)


def test_two_python_threads_at_once():
    script("""
        from concurrent.futures import ThreadPoolExecutor

        def work(seed):
            scores, center = randn(128, 501, seed=seed), randn(1 << 15, seed=seed)
            return kernels.topk_mask(scores, 20), *kernels.ibp_relu(center, center.abs())

        with kernels.use_backend("reference"):
            expected = {seed: work(seed) for seed in range(2)}
        with kernels.use_backend("cpu"), ThreadPoolExecutor(2) as pool:
            for round in range(10):
                for seed, found in enumerate(pool.map(work, range(2))):
                    assert all(torch.equal(a, b) for a, b in zip(found, expected[seed]))
        assert len(teams) >= 40
    """)


def test_a_forked_child_computes_alone():
    script("""
        def work():
            return kernels.ibp_relu(center, radius)

        center = randn(1 << 15)
        radius = center.abs()
        with kernels.use_backend("cpu"):
            expected = work()
            assert teams
            child = os.fork()
            if not child:
                before = len(teams)
                same = [bytes(a.numpy()) == bytes(b.numpy()) for a, b in zip(work(), expected)]
                os._exit(0 if all(same) and len(teams) == before else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            work()  # and the parent's team is as it was
            assert len(teams) == 2
    """)


@walk("name", NAMES)
@walk("dtype", [torch.float32, torch.float64], ids=str)
def test_backends_agree(name, dtype):
    """Outputs and every gradient."""
    found = []
    for backend in ("cpu", "reference"):
        with kernels.use_backend(backend):
            found.append(outcome(table(dtype)[name]))
    torch.testing.assert_close(*found)
