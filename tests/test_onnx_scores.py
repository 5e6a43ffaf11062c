"""Networks that end with an ArgMax: answers about the index, against exhaustive grids and onnxruntime's own index."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from test_vnncomp import box, save_network, save_property

from certtrain.errors import InputError
from certtrain.verifiers.vnncomp import Answer, answer

IDENTITY = [(np.eye(2), [0, 0])]


def with_argmax(path: Path, *, behind=(), shape=None, **options) -> Path:
    """The network of scores in a file, with the index of the largest one as its output."""
    model = onnx.load(path)
    nodes = [helper.make_node("ArgMax", [model.graph.output[0].name], ["index"], **{"axis": 1, **options})]
    for number, (kind, settings) in enumerate(behind):
        nodes.append(helper.make_node(kind, [nodes[-1].output[0]], [f"behind{number}"], **settings))
    model.graph.node.extend(nodes)
    kind = TensorProto.FLOAT if any(kind == "Cast" for kind, _ in behind) else TensorProto.INT64
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(nodes[-1].output[0], kind, shape or [1, 1]))
    path.write_bytes(model.SerializeToString())
    return path


def index_at(network: Path, *points: float) -> int:
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([points], np.float32)})
    return int(np.asarray(found).reshape(-1)[0])


@pytest.fixture
def ask(tmp_path):
    """The answer on an index, confirmed by onnxruntime where it is a counterexample."""

    def ask(network: Path, text: str, ends) -> Answer:
        file = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(*ends)} {text}))", len(ends))
        found = answer(network, file, results=tmp_path / "result.txt", timeout=20.0)
        if found.word == "violated":
            assert found.inputs is not None and found.outputs is not None
            assert found.outputs.tolist() == [index_at(network, *map(float, found.inputs))]
            assert f"(Y_0 {found.outputs[0].item()!r})" in (tmp_path / "result.txt").read_text()
        return found

    return ask


@pytest.mark.parametrize("last", [0, 1])
def test_equal_scores(ask, tmp_path, last):
    """The first, or the last, of equal scores is the index, in bounds as in onnxruntime."""
    network = with_argmax(save_network(tmp_path / "n.onnx", IDENTITY), select_last_index=last)
    point = [("0.5", "0.5"), ("0.5", "0.5")]
    assert index_at(network, 0.5, 0.5) == last
    for index in (0, 1):
        word = "violated" if index == last else "unknown"  # the tie itself is all that would violate it
        assert ask(network, f"(= Y_0 {index})", point).word == word
    assert ask(network, "(>= Y_0 1)", [("0.6", "0.7"), ("0.1", "0.5")]).word == "holds"
    assert ask(network, "(>= Y_0 1)", [("0.6", "0.7"), ("0.1", "0.65")]).word == "violated"


BEHIND = {
    "nothing": ((), [1, 1]), "no dimension": ((), [1]),
    "a cast": ((("Cast", {"to": TensorProto.FLOAT}),), [1, 1]),
    "a cast and a flat one": ((("Cast", {"to": TensorProto.FLOAT}), ("Flatten", {"axis": 0})), [1, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", BEHIND)
def test_what_stands_behind_it(ask, tmp_path, name):
    behind, shape = BEHIND[name]
    network = with_argmax(save_network(tmp_path / "n.onnx", IDENTITY), behind=behind, shape=shape,
                          keepdims=len(shape) - 1)  # fmt: skip
    assert ask(network, "(<= Y_0 0.5)", [("0", "0.4"), ("0.5", "1")]).word == "holds"
    assert ask(network, "(<= Y_0 0.5)", [("0", "0.6"), ("0.5", "1")]).word == "violated"


def test_random_networks_against_grids(ask, tmp_path):
    """Of four scores over a square: which indices occur, alone, in ranges and as all but one."""
    noise, decided = np.random.default_rng(0), 0
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 101)] * 2), -1).reshape(-1, 2).astype(np.float32)
    for number in range(6):
        layers = [(noise.normal(size=(6, 2)), noise.normal(size=6)), (noise.normal(size=(4, 6)), noise.normal(size=4))]
        network = with_argmax(save_network(tmp_path / "n.onnx", layers), shape=["batch", 1])
        (w, b), (v, c) = [(np.float32(weight), np.float32(bias)) for weight, bias in layers]
        found = set((np.maximum(grid @ w.T + b, 0) @ v.T + c).argmax(1).tolist())
        for index in range(4):
            texts = {f"(= Y_0 {index})": {index}, f"(> Y_0 {index})": {*range(index + 1, 4)},
                     f"(or (< Y_0 {index}) (> Y_0 {index}))": {*range(4)} - {index},
                     f"(<= (* 2 Y_0) {2 * index + 1})": {*range(index + 1)}}  # fmt: skip
            for text, unsafe in texts.items():
                word = ask(network, text, [("0", "1")] * 2).word
                assert word in (("violated",) if unsafe & found else ("violated", "holds", "unknown")), (number, text)
                decided += word in ("violated", "holds")
    assert decided >= 92


def test_two_networks_agree_on_the_class(tmp_path):
    """Classes of a network and of another one, whose scores are halved, or moved."""
    noise = np.random.default_rng(1)
    first = [(noise.normal(size=(8, 2)), noise.normal(size=8)), (noise.normal(size=(3, 8)), noise.normal(size=3))]
    halved, moved = [first[0], (first[1][0] / 2, first[1][1] / 2)], [first[0], (first[1][0], first[1][1] + [0, 0, 2])]
    for name, layers in (("f", first), ("halved", halved), ("moved", moved)):
        with_argmax(save_network(tmp_path / f"{name}.onnx", layers), shape=["batch", 1])
    declared = "(declare-input X{0} real [1,2]) (declare-output Y{0} real [1,1])"
    text = f"(vnnlib-version <2.0>)\n(declare-network f {declared.format('f')})\n"
    text += f"(declare-network g (isomorphic-to f) {declared.format('g')})\n"
    for place in ("[0,0]", "[0,1]"):
        text += f"(assert (and (>= Xf{place} -1.0) (<= Xf{place} 1.0) (== Xf{place} Xg{place})))\n"
    (tmp_path / "q.vnnlib").write_text(text + "(assert (!= Yf[0,0] Yg[0,0]))\n")
    for name, words in (
        ("moved", {"violated"}),
        ("halved", {"holds", "unknown", "timeout"}),
    ):  # they tie where classes change
        networks = {"f": tmp_path / "f.onnx", "g": tmp_path / f"{name}.onnx"}
        found = answer(networks, tmp_path / "q.vnnlib", timeout=20.0, results=tmp_path / "result.txt")
        assert found.word in words
        if found.word == "violated":
            assert found.inputs is not None and found.outputs is not None
            values = [float(value) for value in found.inputs]
            indices = [index_at(tmp_path / f"{one}.onnx", *own) for one, own in (("f", values[:2]), (name, values[2:]))]
            assert indices == found.outputs.tolist() and indices[0] != indices[1]


def test_several_indices_are_refused(tmp_path):
    network = with_argmax(save_network(tmp_path / "n.onnx", IDENTITY), axis=0, shape=[1, 2])
    file = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'), ('0', '1'))} (<= Y_0 0)))", 2)
    with pytest.raises(InputError, match=r"ArgMax 'index': found 2 indices; accepted: a single one"):
        answer(network, file)


def test_every_choice_is_a_disjunct():
    """Each index's value is substituted for it everywhere at once: no disjunct has two winners."""
    from certtrain.verifiers.constraints import ONE, Conjunction, compare
    from certtrain.verifiers.onnx_scores import ArgMax, Index, scores_compared
    from certtrain.verifiers.vnnlib_text import Token

    token = Token("==", 1)
    asked = Conjunction(token, (compare(token, "==", {(1,): ONE}, {(): 2 * ONE}),))
    rewritten = scores_compared(asked, 1, 1, {0: Index(4, ArgMax(last=False))}, lambda *_: None)
    (rows,) = rewritten.disjuncts(lambda *_: None)
    read = list(itertools.chain.from_iterable(dict(row.coefficients) for row in rows))
    assert len(rows) == 3 and read.count((3,)) == 3 and {row.strict for row in rows} == {False, True}


@pytest.mark.parametrize(
    ("kind", "size"), [(TensorProto.BOOL, 3), (TensorProto.INT8, 129), (TensorProto.BFLOAT16, 258)]
)
def test_casts_that_change_the_index(tmp_path, kind, size):
    """An index that the type of a cast behind it does not hold, such as 2 as a truth value, is refused."""
    scores = save_network(tmp_path / "n.onnx", [(np.eye(size, 2), np.zeros(size))])
    network = with_argmax(scores, behind=[("Cast", {"to": kind}), ("Cast", {"to": TensorProto.FLOAT})])
    file = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'), ('0', '1'))} (>= Y_0 2.0)))", 2)
    with pytest.raises(InputError, match=f"an index below {size} that is cast to .*; accepted: a type that holds it"):
        answer(network, file, timeout=20.0)


def test_casts_that_keep_the_index(ask, tmp_path):
    scores = save_network(tmp_path / "n.onnx", [(np.eye(128, 2), np.zeros(128))])
    casts = [("Cast", {"to": kind}) for kind in (TensorProto.INT8, TensorProto.FLOAT16, TensorProto.FLOAT)]
    network = with_argmax(scores, behind=casts)
    assert ask(network, "(>= Y_0 2.0)", [("-1.0", "-0.5"), ("-1.0", "-0.5")]).word == "violated"


def test_indices_of_too_many_choices(tmp_path):
    """A thousand values of each of two indices are refused before they are written out."""
    text = "(vnnlib-version <2.0>)\n"
    for name in "fg":
        with_argmax(save_network(tmp_path / f"{name}.onnx", [(np.eye(1000, 1), np.zeros(1000))]))
        text += f"(declare-network {name} (declare-input X{name} real [1,1]) (declare-output Y{name} real [1,1]))\n"
    text += "".join(f"(assert (and (>= X{name}[0,0] 0.0) (<= X{name}[0,0] 1.0)))\n" for name in "fg")
    (tmp_path / "q.vnnlib").write_text(text + "(assert (!= Yf[0,0] Yg[0,0]))\n")
    networks = {name: tmp_path / f"{name}.onnx" for name in "fg"}
    with pytest.raises(InputError, match="accepted: at most 1000000 disjuncts"):
        answer(networks, tmp_path / "q.vnnlib", timeout=20.0)
