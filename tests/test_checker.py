"""The independent checker: it stands alone, agrees with exact arithmetic, and accepts nothing that is not proved."""

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_pair, random_network
from proof_cases import Case, prove, read, write
from torch import nn

from certtrain.checker.arithmetic import Numbers, Rejected
from certtrain.checker.bounds import Enclosure
from certtrain.checker.check import check
from certtrain.checker.network import read_network
from certtrain.checker.vnnlib import read_claim
from certtrain.export import export_onnx
from certtrain.verifiers import Search

ROOT = Path(__file__).parents[1]
CHECKER = ROOT / "certtrain" / "checker"
HALVED = {"stages": ("input_split",)}
SLOPES = {"stages": ("crown", "alpha")}
SEARCHED = {"stages": ("bab",), "search": Search(steps=2, programs=8)}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def random_case(folder: Path, seed: int, kind: str, epsilon: float, count: int = 4, **certify) -> Case:
    draw = torch.Generator().manual_seed(seed)
    shape = torch.Size((1, 3, 3) if kind in ("conv", "residual") else (1, 1, 2 + seed % 3))
    model = random_network(kind, shape, 3, draw, 1.0).eval()
    images = torch.rand(count, *shape, generator=draw)
    return prove(folder, model, images, model(images).argmax(1), epsilon, **certify)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    """Networks of every kind, proved by every rule: intervals, lines, slopes, trees of signs."""
    found, folder = list[Case](), tmp_path_factory.mktemp("cases")
    with torch.no_grad():
        for number, kind in enumerate(("dense", "leaky", "conv", "residual")):
            found.append(random_case(folder / kind, number, kind, 0.1, alpha_steps=5))
        for seed, kind, how in (
            (2, "dense", SLOPES), (11, "leaky", SLOPES), (1, "dense", SEARCHED), (5, "leaky", SEARCHED),
            (1, "dense", HALVED),
        ):  # fmt: skip
            _, twin = planted_pair(seed, kind)
            label = torch.tensor([twin.label])
            found.append(prove(folder / f"twin{len(found)}", twin.model, twin.image[None], label, twin.epsilon, **how))
    return found


def test_every_rule_occurs_and_every_proof_is_accepted(cases):
    rules = set()
    for case in cases:
        assert all(verdict.proof or verdict.status != "verified" for verdict in case.verdicts)
        for proof in case.proofs:
            assert check(case.model, proof) > 0
            rules |= {goal["by"] for box in read(proof)[0]["boxes"] for goal in box["goals"]}
    assert rules == {"interval", "lines", "slopes", "signs", "halves"}


def test_bounds_are_below_the_exact_ones_and_close(cases):
    for case in cases[:6]:
        for proof in case.proofs[:2]:
            found, exact = check(case.model, proof), check(case.model, proof, exact=True)
            assert isinstance(exact, Fraction) and found <= exact
            assert float(exact) - found < 1e-9 * (1 + float(exact))


def test_the_folder_runs_alone_with_numpy_onnx_and_safetensors(cases, tmp_path):
    shutil.copytree(CHECKER, tmp_path / "alone" / "checker")
    blocked = "import sys\nallowed = {'numpy', 'onnx', 'safetensors', 'checker', "
    blocked += "'google', 'ml_dtypes', 'typing_extensions'}\n"  # what onnx itself needs
    blocked += "import importlib.abc\nclass Block(importlib.abc.MetaPathFinder):\n"
    blocked += "    def find_spec(self, name, path=None, target=None):\n"
    blocked += "        top = name.partition('.')[0]\n"
    blocked += "        if top not in allowed and top not in sys.stdlib_module_names and not top.startswith('_'):\n"
    blocked += "            raise ModuleNotFoundError(name)\n"
    blocked += "sys.meta_path.insert(0, Block())\nfrom checker.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
    case = cases[-1]
    words = [sys.executable, "-c", blocked, str(case.model), str(case.proofs[0])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tmp_path / "alone", capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("proved with the margin ")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            names |= set() if node.level else {str(node.module).partition(".")[0]}
    return names - set(sys.stdlib_module_names)


def lines_of_code(path: Path) -> int:
    """Lines with code: no blank ones, comments or docstrings."""
    source, texts, lines = path.read_text(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - texts)


def test_it_imports_nothing_else_and_is_short():
    files = sorted(CHECKER.glob("*.py"))
    assert set().union(*map(imported, files)) == {"numpy", "onnx", "safetensors"}
    assert all(len(line) <= 100 for path in files for line in path.read_text().splitlines())
    more = lines_of_code(CHECKER / "more_operators.py")
    assert more <= 300 and sum(map(lines_of_code, files)) - more <= 1100


def rejects(model: Path, proof: Path, match: str | None = None) -> None:
    with pytest.raises(Rejected, match=match):
        check(model, proof)


def test_bad_files_are_rejected_with_a_reason(cases, tmp_path):
    case, other = cases[-2], cases[0]
    header, arrays = read(case.proofs[0])
    rejects(other.model, case.proofs[0], "another network")
    content = case.proofs[0].read_bytes()
    for cut in (0, 4, 20, len(content) // 2, len(content) - 1):
        short = tmp_path / "short"
        short.write_bytes(content[:cut])
        rejects(case.model, short, "no proof")
    huge = tmp_path / "huge"
    huge.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    rejects(case.model, huge, "no proof")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(case.model.read_bytes()[:-30])
    rejects(damaged, case.proofs[0])
    name = next(name for name in arrays if name.endswith(".slopes"))
    tree = next(name for name in arrays if name.endswith(".tree"))
    for changes, why in (
        ({name: np.full(arrays[name].shape, np.nan, np.float32)}, "not finite"),
        ({name: arrays[name][:, :-1]}, "shape"),
        ({name: arrays[name].astype(np.int32)}, "no array"),
        ({tree: arrays[tree][:-1]}, "missing"),
        ({tree: np.append(arrays[tree], np.int32(-1))}, "goes on"),
        ({tree: np.where(arrays[tree] >= 0, 10**6, -1).astype(np.int32)}, "there are"),
        ({"box.lower": arrays["box.lower"][:-1]}, "shape"),
        ({"box.lower": arrays["box.upper"] + 1}, "above its upper end"),
    ):
        rejects(case.model, write(tmp_path / "changed", header, {**arrays, **changes}), why)
    goals = header["boxes"][0]["goals"]
    for changes, why in (
        ({"format": "other"}, "no proof of the format"), ({"version": 2}, "version"),
        ({"network": "0" * 64}, "another"),
        ({"boxes": []}, "boxes"), ({"boxes": [{"bounds": "ibp", "goals": []}]}, "nothing is said"),
        ({"boxes": [{"bounds": "crown", "goals": [{**goals[0], "by": "magic"}, *goals[1:]]}]}, "magic"),
        ({"boxes": [{"bounds": "guessed", "goals": goals}]}, "guessed"), ({"boxes": [7]}, "no object"),
        ({"boxes": [{"bounds": "crown", "goals": [{"disjuncts": [99], "by": "lines"}]}]}, "disjuncts"),
        ({"claim": {"label": -1}}, "label"), ({"claim": {"label": True}}, "label"), ({"claim": []}, "claim"),
        ({"claim": {"vnnlib": "0" * 64}}, "property"),
    ):  # fmt: skip
        rejects(case.model, write(tmp_path / "changed", {**header, **changes}, arrays), why)


def test_parts_of_a_box_are_within_it_and_cover_it(cases, tmp_path):
    case = cases[-1]
    header, arrays = read(case.proofs[0])
    (name,) = {name.rpartition(".")[0] for name in arrays if name.endswith(".methods")}
    tree, values, methods = (arrays[f"{name}.{part}"] for part in ("tree", "values", "methods"))
    assert len(methods) == (tree < 0).sum() == len(values) + 1 > 1
    for changes, why in (
        ({"values": values + 10}, "not within"), ({"values": values[:-1]}, "not within"),
        ({"methods": methods[:-1]}, "shape"), ({"methods": methods + np.uint8(3)}, "methods"),
        ({"tree": tree[:-1]}, "missing"), ({"tree": np.where(tree >= 0, 99, tree).astype(np.int32)}, "there are"),
    ):  # fmt: skip
        changed = {**arrays, **{f"{name}.{part}": array for part, array in changes.items()}}
        rejects(case.model, write(tmp_path / "changed", header, changed), why)


def test_further_steps_tighten_bounds_by_any_slopes(tmp_path):
    torch.manual_seed(0)
    hidden = nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU()
    model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(20, 2)).eval()
    export_onnx(model, tmp_path / "model.onnx", torch.rand(2, 1, 1, 3))
    numbers = Numbers()
    network = read_network(tmp_path / "model.onnx", numbers)
    ends = np.full(3, 0.1), np.full(3, 0.9)
    plain = Enclosure(network, numbers, *ends, refine=True)
    second = network.relus[1]
    (place,) = network.operations[second].inputs
    entries = np.flatnonzero((plain.lower[place] < 0) & (plain.upper[place] > 0))
    neurons, draw, tighter = np.arange(20), np.random.default_rng(0), 0
    points = [Enclosure(network, numbers, point, point) for point in draw.uniform(0.1, 0.9, (50, 3))]
    for _ in range(20):
        below, above = draw.uniform(-0.5, 1.5, (2, len(entries), len(neurons)))
        found = Enclosure(network, numbers, *ends, True, {second: (entries, neurons, below, above)})
        assert (found.lower[place] >= plain.lower[place]).all() and (found.upper[place] <= plain.upper[place]).all()
        tighter += int((found.lower[place] > plain.lower[place]).sum())
        for at in points:
            assert (found.lower[place] <= at.upper[place]).all() and (at.lower[place] <= found.upper[place]).all()
    assert tighter


def test_a_step_may_stand_in_any_proof_and_is_checked(cases, tmp_path):
    case = cases[-2]
    header, arrays = read(case.proofs[0])
    ones = np.ones((3, 2))
    steps = {"s.entries": np.arange(3), "s.neurons": np.arange(2), "s.below": ones, "s.above": ones}
    box = {**header["boxes"][0], "steps": [{"relu": 1, "name": "s"}]}
    path = tmp_path / "stepped"
    write(path, {**header, "boxes": [box]}, {**arrays, **steps})
    assert check(case.model, path, exact=True) >= check(case.model, path) > 0
    for changes, why in (
        ({"s.entries": np.arange(3) + 999}, "beyond"), ({"s.below": np.ones((2, 2))}, "shape"),
        ({"s.neurons": np.array([-1, 0])}, "beyond"),
    ):  # fmt: skip
        rejects(case.model, write(path, {**header, "boxes": [box]}, {**arrays, **steps, **changes}), why)
    for step, why in (({"relu": 9, "name": "s"}, "no ReLU"), ({"relu": "1", "name": "s"}, "relu"), (3, "no object")):
        far = {**box, "steps": [step]}
        rejects(case.model, write(path, {**header, "boxes": [far]}, {**arrays, **steps}), why)


def run(*words: object) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "certtrain.checker", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    return done.returncode, done.stdout


def test_the_command_line_says_proved_or_rejected(cases, tmp_path):
    case = cases[0]
    code, text = run(case.model, case.proofs[0])
    assert code == 0 and text.startswith("proved with the margin ")
    code, text = run(cases[1].model, case.proofs[0])
    assert code == 1 and text == "rejected: the proof is about another network, by its checksum\n"
    assert run(case.model, tmp_path / "none")[0] == 2
    assert run(case.model)[0] == 2


def mutations(header: dict, arrays: dict[str, np.ndarray], draw: np.random.Generator, count: int):
    """``count`` proofs with one number changed: of an array, its sign, its place, or in the header."""
    names = [name for name, array in sorted(arrays.items()) if array.size]
    for _ in range(count):
        name = names[draw.integers(len(names))]
        array = arrays[name].copy()
        place = draw.integers(array.size)
        value = array.reshape(-1)[place]
        if array.dtype.kind in "iu":
            limit = 256 if array.dtype == np.uint8 else 12
            array.reshape(-1)[place] = draw.integers(0 if array.dtype.kind == "u" else -1, limit)
        else:
            array.reshape(-1)[place] = (value * 2, -value, value + 0.5, 0)[draw.integers(4)]
        yield header, {**arrays, name: array}
    for change in ({"claim": {"label": (header["claim"]["label"] + 1) % 2}}, {"network": "1" * 64}):
        yield {**header, **change}, arrays


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_changed_proof_is_accepted_only_where_it_proves_its_claim_exactly(cases, tmp_path, count):
    """Exact re-evaluation decides; of the float64 check on accepted and rejected mutants alike."""
    draw, seen = np.random.default_rng(0), {True: 0, False: 0}
    for case in (cases[0], *cases[4:]):
        for changed in mutations(*read(case.proofs[0]), draw, count):
            mutant = write(tmp_path / "mutant", *changed)
            try:
                found = check(case.model, mutant)
            except Rejected:
                found = None
            seen[found is not None] += 1
            if found is not None:
                exact = check(case.model, mutant, exact=True)
                assert 0 < found <= exact
    assert all(seen.values()), seen


@pytest.mark.parametrize("seed, kind", [(1, "dense"), (2, "dense"), (5, "leaky"), (7, "conv"), (3, "residual")])
def test_no_proof_about_a_network_with_a_counterexample_is_accepted(cases, tmp_path, seed, kind):
    """Its robust twin's proof, mutants of that, and every rule by name, all claimed of the planted network."""
    case, twin = planted_pair(seed, kind)
    assert case.counterexample is not None
    label = torch.tensor([twin.label])
    proved = prove(tmp_path / "twin", twin.model, twin.image[None], label, twin.epsilon, **SEARCHED)
    planted = prove(tmp_path / "planted", case.model, case.image[None], label, case.epsilon, **SEARCHED)
    assert planted.proofs == [] and planted.verdicts[0].status != "verified"
    numbers = Numbers()
    network = read_network(planted.model, numbers)
    attempts = [({"bounds": bounds, "goals": [{"disjuncts": list(range(network.outputs - 1)), "by": by}]}, {})
                for bounds in ("ibp", "crown") for by in ("interval", "lines")]  # fmt: skip
    if proved.proofs:
        header, arrays = read(proved.proofs[0])
        box = {name: arrays[name] for name in ("box.lower", "box.upper")}
        drawn = mutations(header, {n: a for n, a in arrays.items() if n not in box}, np.random.default_rng(1), 100)
        attempts += [(changed["boxes"][0], values) for changed, values in drawn if changed["network"] != "1" * 64]
    else:
        header, box = {"format": "certtrain-proof", "version": 1}, {}
        lower, upper = ((case.image + side * case.epsilon).clamp(0, 1).flatten().numpy() for side in (-1, 1))
        box = {"box.lower": lower, "box.upper": upper}
    for boxes, values in attempts:
        claim = {**header, "network": network.sha256, "claim": {"label": case.label}, "boxes": [boxes]}
        rejects(planted.model, write(tmp_path / "attempt", claim, {**values, **box}))


def test_a_changed_weight_changes_the_network(cases, tmp_path):
    case = cases[0]
    content = bytearray(case.model.read_bytes())
    place = content.find(np.float32(read_weights(case.model)).tobytes())
    assert place > 0
    content[place + 3] ^= 0x80  # its sign
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(content)
    rejects(changed, case.proofs[0], "another network")


def read_weights(model: Path) -> float:
    import onnx

    (first, *_) = [onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer if len(t.dims) > 1]
    return float(first.flat[0])


class Mixed(nn.Module):
    """Convolutions with groups, strides and dilation; average pools; sums, joins, slices and means."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, stride=2)
        self.last = nn.Linear(24, 3)

    def forward(self, x):
        a = nn.functional.leaky_relu(self.first(x), 0.2)
        b = torch.relu(self.second(a)) - 0.5
        c = nn.functional.avg_pool2d(a, 3, stride=2, padding=1, count_include_pad=False)
        d = torch.cat([b * 2.0 + c, c - b], 1)
        e = torch.cat([d.mean((2, 3)), d[:, :4].amax((2, 3)) * 0 if False else d[:, :, 0, 0], d[:, :, 1, 1]], 1)
        return self.last(e)


def test_operators_and_their_bounds(tmp_path):
    torch.manual_seed(0)
    model, images = Mixed().eval(), torch.rand(3, 2, 4, 4)
    path = tmp_path / "mixed.onnx"
    export_onnx(model, path, images)
    for numbers, slack in ((Numbers(), 1e-5), (Numbers(single=True), 0.0)):
        network = read_network(path, numbers)
        for image in images.double().numpy():
            flat = image.reshape(-1)
            point = Enclosure(network, numbers, flat, flat)
            logits = model(torch.from_numpy(image[None]).float())[0].double().numpy()
            assert (point.lower[-1] - slack <= logits).all() and (logits <= point.upper[-1] + slack).all()
            assert (point.upper[-1] - point.lower[-1]).max() < (1e-12 if not numbers.single else 1e-4)
            wide = Enclosure(network, numbers, flat - 0.05, flat + 0.05, refine=True)
            inside = torch.rand(500, *image.shape) * 0.1 - 0.05 + torch.from_numpy(image).float()
            values = model(inside).double().numpy()
            assert (wide.lower[-1] - 1e-5 <= values).all() and (values <= wide.upper[-1] + 1e-5).all()
            rows = wide.backward(len(network.operations) - 1, np.concatenate([np.eye(3), -np.eye(3)]), wide.lines())
            assert (rows[:3] <= values + 1e-5).all() and (rows[3:] <= 1e-5 - values).all()


def test_the_network_in_float32_in_any_order_stays_within_the_bounds(tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    path, image = tmp_path / "model.onnx", torch.rand(1, 1, 5, 10)
    export_onnx(model, path, image)
    numbers = Numbers(single=True)
    flat = image.flatten().double().numpy()
    network = read_network(path, numbers)
    found = Enclosure(network, numbers, flat, flat)
    for seed in range(200):
        order, middle = torch.randperm(50, generator=torch.Generator().manual_seed(seed)), torch.randperm(40)
        x = image.flatten()
        one, two = model[1], model[3]
        total = one.bias.clone()
        for i in order:
            total = total + one.weight[:, i] * x[i]
        total, result = torch.relu(total), two.bias.clone()
        for i in middle:
            result = result + two.weight[:, i] * total[i]
        assert (found.lower[-1] <= result.double().numpy()).all() and (result.double().numpy() <= found.upper[-1]).all()


def test_properties_are_read_exactly():
    text = """; a comment
    (declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real) (declare-const Y_1 Real)
    (assert (<= X_0 0.1)) (assert (>= X_0 -1e-1)) (assert (or (and (>= X_1 0) (<= X_1 1)) (and (>= X_1 2) (<= X_1 3))))
    (assert (or (and (<= (+ Y_0 (* 2 Y_1)) 0.3) (not (< Y_0 1))) (>= (- Y_1) Y_0)))"""
    claim = read_claim(text, 2, 2, Numbers(exact=True))
    assert [[list(ends) for ends in box] for box in claim.boxes] == [
        [[Fraction(-1, 10), 0], [Fraction(1, 10), 1]], [[Fraction(-1, 10), 2], [Fraction(1, 10), 3]]
    ]  # fmt: skip
    assert [one.box for one in claim.disjuncts] == [0, 0, 1, 1]
    assert claim.disjuncts[0].rows.tolist() == [[1, 2], [-1, 0]]
    assert claim.disjuncts[0].offsets.tolist() == [Fraction(-3, 10), 1]
    assert claim.disjuncts[1].rows.tolist() == [[1, 1]]
    near = read_claim(text, 2, 2, Numbers()).boxes[0]
    assert Fraction(near[0][0]) <= Fraction(-1, 10) and Fraction(near[1][0]) >= Fraction(1, 10)
    for bad in ("(assert (<= X_0 0.1)", "(assert (<= X_9 0.1))", "(assert (<= X_0 Y_0))",
                "(assert (<= (* Y_0 Y_1) 0))", "(assert (= Y_0 1) extra)", "(frob)", ")", "(assert (<= X_0 1))",
                "(assert (<= X_0 (foo 1)))"):  # fmt: skip
        with pytest.raises(Rejected):
            read_claim(bad, 2, 2, Numbers())
