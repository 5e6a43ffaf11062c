"""The command line of the VNN-LIB standard: words, where they go, and what is refused."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_vnncomp import IDENTITY, TENT, save_network, save_property
from test_vnncomp_second import assert_accepted, interval, query

import certtrain
from certtrain.command_line import capabilities, main
from certtrain.errors import InputError
from certtrain.verifiers import vnnlib_second
from certtrain.verifiers.onnx_operators import RULES
from certtrain.verifiers.solving import said, solve
from tests import test_onnx_versions as versions

BOX = interval("0.0", "1.0")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A tent of height 1 at 0.3, and queries about it."""
    monkeypatch.chdir(tmp_path)
    save_network(tmp_path / "tent.onnx", TENT)
    for name, height in (("unsat", "1.001"), ("sat", "0.999")):
        (tmp_path / f"{name}.vnnlib").write_text(query(BOX + f"(assert (> Y[0,0] {height}))"))
    return tmp_path


def test_words(here, capsys):
    assert main(["verify", "unsat.vnnlib", "--network", "f=tent.onnx", "--timeout", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == "unsat\n" and "arithmetic: nearest" in err
    assert main(["verify", "--timeout=20", "--network=f=tent.onnx", "sat.vnnlib"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("sat\nX float32 [1,1]\n") and "arithmetic: onnxruntime" in err
    assert_accepted(out, (here / "sat.vnnlib").read_text(), here / "tent.onnx")


def test_time_is_up_before_the_imports_are_done(here, capsys):
    assert main(["verify", "unsat.vnnlib", "--network", "f=tent.onnx", "--timeout", "1e-6"]) == 0
    out, err = capsys.readouterr()
    assert out == "timed-out\n" and "reason: timeout" in err


def test_an_open_answer_says_why_on_stderr(here, capsys):
    """The tent's top is where it is tied."""
    (here / "tie.vnnlib").write_text(query(interval("0.3", "0.3") + "(assert (> Y[0,0] Y[0,0]))"))
    save_network(here / "identity.onnx", IDENTITY)
    (here / "edge.vnnlib").write_text(query(interval("0.0", "1.0") + "(assert (> Y[0,0] 1.0))"))
    assert main(["verify", "edge.vnnlib", "--network", "f=identity.onnx", "--timeout", "20"]) == 0
    out, err = capsys.readouterr()
    assert out == "unknown\n" and "reason: only ties found" in err


def test_one_network_needs_no_name_and_files_no_gz(here, capsys):
    for words in (["--network", "tent.onnx"], ["--network", "./tent.onnx"], ["--network", f"{here}/tent.onnx"]):
        assert main(["verify", "unsat.vnnlib", *words]) == 0 and capsys.readouterr().out == "unsat\n"
    (here / "a=b.onnx").write_bytes((here / "tent.onnx").read_bytes())
    assert main(["verify", "unsat.vnnlib", "--network", "./a=b.onnx"]) == 0 and capsys.readouterr().out == "unsat\n"
    for name in ("unsat.vnnlib", "tent.onnx"):
        (here / f"{name}.gz").write_bytes(gzip.compress((here / name).read_bytes()))
        (here / name).unlink()
    assert main(["verify", "unsat.vnnlib", "--network", "f=tent.onnx"]) == 0 and capsys.readouterr().out == "unsat\n"


def test_first_version(here, capsys):
    """It declares no network: the one file has no name, and assignments are in its own form."""
    save_property(here / "old.vnnlib", "(assert (>= X_0 0))(assert (<= X_0 1))(assert (>= Y_0 0.999))")
    assert main(["verify", "old.vnnlib", "--network", "tent.onnx"]) == 0
    assert re.fullmatch(r"sat\n\(\(X_0 \S+\)\n\(Y_0 \S+\)\)\n", capsys.readouterr().out)


def test_other_options_work_with_a_query(here, capsys):
    words = ["--results", "r.txt", "--json", "r.json", "--arithmetic", "real", "--stages", "ibp,crown",
             "--certify.alpha_steps", "3", "--memory", "2GiB"]  # fmt: skip
    assert main(["verify", "unsat.vnnlib", "--network", "f=tent.onnx", *words]) == 0
    out, err = capsys.readouterr()
    assert out in ("unsat\n", "unknown\n") and "arithmetic: real" in err
    assert (here / "r.txt").read_text() == out and '"arithmetic": "real"' in (here / "r.json").read_text()


def test_a_plugin_that_prints_does_not_reach_stdout(here, capsys):
    (here / "noise.py").write_text("print('noise')\n")
    assert main(["verify", "unsat.vnnlib", "--network", "f=tent.onnx", "--plugin", "noise.py"]) == 0
    out, err = capsys.readouterr()
    assert out == "unsat\n" and "noise" in err


REFUSED = {
    "no network": ([], ["unsat.vnnlib: found a query without networks", "--network NAME=FILE"]),
    "a name twice": (["--network", "f=tent.onnx", "--network", "f=tent.onnx"], ["'f=tent.onnx'", "once"]),
    "no file": (["--network", "f="], ["'f='", "NAME=FILE"]),
    "an empty word": (["--network", ""], ["--network: found ''"]),
    "one without a name": (["--network", "f=tent.onnx", "--network", "tent.onnx"], ["'tent.onnx'"]),
    "a file that is not there": (["--network", "f=none.onnx"], ["none.onnx", "No such file"]),
    "a bad timeout": (["--network", "f=tent.onnx", "--timeout", "soon"], ["--timeout", "'soon'", "seconds > 0"]),
    "no time": (["--network", "f=tent.onnx", "--timeout", "0"], ["timeout", "0"]),
    "options of runs": (["--network", "f=tent.onnx", "--images", "0:5"], ["--images", "accepted: --timeout"]),
    "a second word": (["--network", "f=tent.onnx", "sat.vnnlib"], ["'sat.vnnlib'", "stray"]),
    "a stage that is none": (["--network", "f=tent.onnx", "--stages", "magic"], ["magic"]),
}


@pytest.mark.parametrize(("words", "mentions"), REFUSED.values(), ids=REFUSED)
def test_refusals_go_to_stderr(words, mentions, here, capsys):
    before = sorted(here.iterdir())
    assert main(["verify", "unsat.vnnlib", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(mention in err for mention in mentions) and "accepted" in err
    assert sorted(here.iterdir()) == before


def test_files_that_are_no_queries(here, capsys):
    (here / "notes.txt").write_text("holds\n")
    (here / "folder.vnnlib").mkdir()
    for path, mentions in (
        ("none.vnnlib", ["none.vnnlib", "No such file"]),
        ("notes.txt", ["notes.txt, line 1", "'holds'"]),
        ("folder.vnnlib", ["--network", "a folder"]),
        (".", ["--network", "a folder"]),
    ):
        assert main(["verify", path, "--network", "f=tent.onnx"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and all(mention in err for mention in mentions) and err.count("\n") == 1
    assert main(["verify", "folder"]) == 2  # a run, as ever
    assert "folder" in capsys.readouterr().err


def test_runs_take_no_networks(here, capsys):
    assert main(["verify", "--network", "f=tent.onnx"]) == 2
    assert "found no query" in capsys.readouterr().err


def test_the_words_of_other_ways_stay(here, capsys):
    assert main(["verify", "--onnx", "tent.onnx", "--vnnlib", "unsat.vnnlib"]) == 0
    assert capsys.readouterr().out == "holds\n"
    assert main(["verify", "--onnx", "[('f', 'tent.onnx')]", "--vnnlib", "sat.vnnlib"]) == 0
    assert capsys.readouterr().out == "violated\n"
    assert main(["verify", "--onnx", f"{here}/[('f', 'tent.onnx')]", "--vnnlib", "unsat.vnnlib"]) == 0
    assert capsys.readouterr().out == "holds\n"
    assert main(["verify", "--onnx", "[('f')]", "--vnnlib", "sat.vnnlib"]) == 2
    out, err = capsys.readouterr()
    assert out == "error\n" and "--onnx: found ) in a list of networks" in err


def test_without_torch():
    """In a process of its own, within the time that the standard's callers wait: 0.3 s of CPU."""
    code = """
import io, os, resource, sys
from contextlib import redirect_stdout
from certtrain.command_line import main
for words in (["--name"], ["--version"], ["capabilities"], ["supports", "--vnnlib-versions"]):
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            code = main(words)
    except SystemExit as end:
        code = end.code
    assert not code
    print(out.getvalue().splitlines()[0])
assert not {"torch", "numpy", "onnx", "vnnlib"} & set(sys.modules), sorted(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, version, *lines, seconds = result.stdout.splitlines()
    assert (name, version) == ("certtrain", certtrain.__version__)
    assert lines == ["onnx-opset-versions: 7 23", "1.0"] and float(seconds) < 0.3


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "certtrain", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{certtrain.__version__}\n"


@pytest.mark.parametrize("command", ["capabilities", "supports"])
def test_capabilities(command, capsys):
    for name, items in capabilities.CAPABILITIES.items():
        assert main([command, f"--{name}"]) == 0
        assert capsys.readouterr().out.splitlines() == list(items)
    assert main([command]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(capabilities.CAPABILITIES)
    for words in (["--dreams"], ["dreams"], ["--vnnlib-versions", "--onnx-operators"]):
        assert main([command, *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and "accepted" in err and err.count("\n") == 1


def test_capabilities_are_those_of_the_readers():
    found = capabilities.CAPABILITIES
    assert set(found["onnx-operators"]) == {*RULES, "Constant", "Shape", "Size"}
    assert found["onnx-opset-versions"] == (str(versions.FIRST), str(versions.LAST))
    assert found["onnx-element-types"] == vnnlib_second.TYPES
    for kind in ("float64", "int32"):
        assert kind not in found["onnx-element-types"]


def test_from_python(here):
    found = certtrain.solve("sat.vnnlib", {"f": "tent.onnx"}, 20.0, results="r.txt")
    assert found.word == "violated" and said(found) == (here / "r.txt").read_text()
    for networks in ("tent.onnx", here / "tent.onnx", {"f": here / "tent.onnx"}):
        found = solve(here / "unsat.vnnlib", networks, timeout=20.0)
        assert found.word == "holds" and said(found) == "unsat\n"
    with pytest.raises(InputError, match=r"none.onnx"):
        certtrain.solve("sat.vnnlib", "none.onnx")


def test_memory_that_runs_out_leaves_a_query_open(here, capsys, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr("certtrain.verifiers.vnncomp.check_property", full)
    assert main(["verify", "sat.vnnlib", "--network", "f=tent.onnx", "--results", "r.txt", "--json", "r.json"]) == 0
    out, err = capsys.readouterr()
    assert out == (here / "r.txt").read_text() == "unknown\n" and "reason: out of memory" in err
    assert '"reason": "out of memory"' in (here / "r.json").read_text()


def test_options_of_queries_are_refused_elsewhere(here, capsys):
    for words in (["--onnx", "tent.onnx", "--vnnlib", "sat.vnnlib"], ["--instances", "i.csv", "--results", "r.csv"]):
        for more in (["--network", "f=tent.onnx"], ["--serialise-assignments", "folder"]):
            assert main(["verify", *words, *more]) == 2
            out, err = capsys.readouterr()
            assert out == "error\n" and f"{more[0]}: cannot be given here" in err and not (here / "folder").exists()


PAIR = """(vnnlib-version <2.0>)
(declare-network f (declare-input X {0} [1,1]) (declare-hidden H {0} [1,2] "y0") (declare-output Y {0} [1,1]))
(declare-network g {1} (declare-input U {0} [1,1]) (declare-output V {0} [1,1]))
(assert (and (>= X[0,0] 0.0) (<= X[0,0] 1.0) (>= U[0,0] 0.5) (<= U[0,0] 1.0)))
(assert (> Y[0,0] (+ V[0,0] {2})))
"""
"""A tent of height 1 at 0.3, and of 0.2 at 0.5: the first is higher by 1.0 + 1.8 at most."""


@pytest.mark.parametrize("kind", ["float32", "real"])
def test_serialised_assignments(here, kind, capsys):
    save_network(here / "g.onnx", TENT)
    (here / "pair.vnnlib").write_text(PAIR.format(kind, "", "2.7"))
    words = ["verify", "pair.vnnlib", "--network", "f=tent.onnx", "--network", "g=g.onnx", "--timeout", "20"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    names = ["X", "H", "Y", "U", "V"]
    assert [line.split()[0] for line in printed.splitlines() if kind in line] == names
    for _ in range(2):  # a folder that is there is used again
        assert main([*words, "--serialise-assignments", "folder"]) == 0
        assert capsys.readouterr().out == "sat\n"
        assert sorted(path.name for path in (here / "folder").iterdir()) == sorted(f"{name}.pb" for name in names)
    tensors = {name: onnx.load_tensor(here / "folder" / f"{name}.pb") for name in names}
    lines = ["sat"]
    for name, tensor in tensors.items():
        array = numpy_helper.to_array(tensor)
        assert tensor.name == name and array.dtype == (np.float32 if kind == "float32" else np.float64)
        lines += [f"{name} {kind} {str(list(array.shape)).replace(' ', '')}", *map(float, array.ravel())]
    number = np.float32 if kind == "float32" else np.float64
    assert lines == [line if kind in line or line == "sat" else float(number(line)) for line in printed.splitlines()]


def test_nothing_is_serialised_without_an_assignment(here, capsys):
    words = ["verify", "--network", "f=tent.onnx", "--serialise-assignments", "folder"]
    assert main([*words, "unsat.vnnlib"]) == 0 and capsys.readouterr().out == "unsat\n"
    assert not (here / "folder").exists()
    before = (here / "tent.onnx").read_bytes()
    for place in ("tent.onnx", "none/folder"):
        assert main([*words[:-1], place, "sat.vnnlib"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and place in err and "accepted: a folder" in err
    assert (here / "tent.onnx").read_bytes() == before and not (here / "none").exists()
    save_property(here / "old.vnnlib", "(assert (>= X_0 0))(assert (<= X_0 1))(assert (>= Y_0 0.999))")
    assert main([*words, "old.vnnlib"]) == 0 and capsys.readouterr().out == "sat\n"
    assert sorted(path.name for path in (here / "folder").iterdir()) == ["X_0.pb", "Y_0.pb"]
    assert numpy_helper.to_array(onnx.load_tensor(here / "folder" / "Y_0.pb")) >= 0.999


def test_several_networks(here, capsys):
    save_network(here / "g.onnx", TENT)
    for relation, files in (("", ["f=tent.onnx", "g=g.onnx"]), ("(isomorphic-to f)", ["g=g.onnx", "f=tent.onnx"]),
                            ("(equal-to f)", ["f=tent.onnx"]), ("(equal-to f)", ["tent.onnx"])):  # fmt: skip
        words = [word for file in files for word in ("--network", file)]
        for height, word in (("2.81", "unsat"), ("2.7", "sat")):
            (here / "pair.vnnlib").write_text(PAIR.format("float32", relation, height))
            assert main(["verify", "pair.vnnlib", *words, "--timeout", "20"]) == 0
            assert capsys.readouterr().out.splitlines()[0] == word
            files_by_name = dict(file.split("=") for file in files) if "=" in files[0] else files[0]
            assert said(certtrain.solve("pair.vnnlib", files_by_name, 20.0)).splitlines()[0] == word
    words = ["--network", "f=tent.onnx", "--network", "g=tent.onnx"]
    (here / "pair.vnnlib").write_text(PAIR.format("float32", "(equal-to f)", "2.7"))
    assert main(["verify", "pair.vnnlib", *words]) == 2  # an unnecessary file, though it is the same
    out, err = capsys.readouterr()
    assert out == "" and "pair.vnnlib, line 3: found 'g equal-to f with a file of its own'" in err
    assert main(["verify", "pair.vnnlib", "--network", "[('f','tent.onnx'),('g','tent.onnx')]"]) == 0
    assert capsys.readouterr().out.startswith("sat\n")
    (here / "pair.vnnlib").write_text(PAIR.format("float32", "", "2.7"))
    for files, mentions in (
        (["f=tent.onnx"], ["pair.vnnlib, line 3", "declare-network g without a file", "f, g"]),
        (["tent.onnx"], ["pair.vnnlib, line 3", "declare-network g without a file", "f, g"]),
        (["f=tent.onnx", "g=g.onnx", "h=g.onnx"], ["'h', which is not declared", "f, g"]),
    ):
        words = [word for file in files for word in ("--network", file)]
        assert main(["verify", "pair.vnnlib", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and all(mention in err for mention in mentions)
