"""The contests of scripts/benchmark_verification.py: their arguments, and small ones from beginning to end."""

import json
import os
import sys
import textwrap
from pathlib import Path

import benchmark_verification
import pytest
import torch
from contenders import AlphaBetaCrown, Checkout, Ran, Track, Usage, tiny
from contests import _contradictions, _ratios, _sample

import certtrain
from certtrain.verifiers.abcrown import Abcrown
from certtrain.verifiers.instances import Instance
from certtrain.verifiers.vnnlib import write_property

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Runs the script in this process; contenders are processes of their own."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmark_verification.py", *map(str, words)])
        benchmark_verification.main()

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with two instances of a tiny network: one holds, one is violated."""
    folder = tmp_path_factory.mktemp("instances")
    tiny(folder)
    write_property(folder / "violated.vnnlib", torch.zeros(2), torch.ones(2) / 2, 1, 2)
    (folder / "instances.csv").write_text("tiny.onnx,tiny.vnnlib,30\ntiny.onnx,violated.vnnlib,30\n")
    return folder / "instances.csv"


@pytest.mark.parametrize(
    "words, said",
    [
        (["hard"], "hard wants --instances"),
        (["easy"], "easy wants --folders"),
        (["networks"], "networks wants --runs"),
        (["hard", "--instances", "TABLE", "--only", "none"], "found no property with ['none']"),
        (["hard", "--instances", "TABLE", "--tree", "TMP"], "found no scripts/verify.py"),
        (["hard", "--instances", "TMP/none.csv"], "none.csv: found"),
    ],
)
def test_bad_arguments_end_in_one_line(benchmark, table, tmp_path, capsys, words, said):
    words = [word.replace("TABLE", str(table)).replace("TMP", str(tmp_path)) for word in words]
    with pytest.raises(SystemExit) as end:
        benchmark(*words, "--without-abcrown")
    assert end.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_the_contest_answers(benchmark, table, tmp_path):
    file = tmp_path / "found.json"
    benchmark("hard", "--instances", table, "--limits", 20, "--without-abcrown", "--clock", "processor", "--json", file)
    found = json.loads(file.read_text())["hard"]
    answers = {row["instance"]: row["answer"] for row in found["rows"]}
    assert answers == {"tiny tiny": "holds", "tiny violated": "violated"}
    assert found["decided at 20 s"] == {"ours": 2} and not found["contradictions"]
    assert all(50 < row["peak_mib"] < 5000 and row["processor"] > 0 for row in found["rows"])


@pytest.mark.parametrize("other, code", [("violated", 1), ("timeout", None)])
def test_a_contradiction_ends_with_code_1(benchmark, table, monkeypatch, other, code):
    def answer(contender, instance, limit, track):
        return Ran("holds" if contender.name == "ours" else other, Usage(1.0, 1.0, 100.0, 0, False, ""))

    monkeypatch.setattr(Checkout, "answer", answer)
    monkeypatch.setattr(Checkout, "start_up", lambda contender, track: Usage(0.5, 0.5, 100.0, 0, False, ""))
    words = ["hard", "--instances", table, "--tree", ROOT, "--without-abcrown"]
    if code is None:
        benchmark(*words)
    else:
        with pytest.raises(SystemExit) as end:
            benchmark(*words)
        assert end.value.code == code


def test_closed_subproblems_are_counted(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(22, 12), torch.nn.ReLU(), torch.nn.Linear(12, 2)).eval()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([1.1, 0.0]))  # proved by some splits, not by bounds alone
    certtrain.export_onnx(model, tmp_path / "net.onnx", torch.rand(1, 22))
    write_property(tmp_path / "p.vnnlib", -torch.ones(22), torch.ones(22), 0, 2)
    ran = Checkout("ours", ROOT).search(
        Instance(f"{tmp_path}/net.onnx", f"{tmp_path}/p.vnnlib", 30.0), 30.0, Track(0, True)
    )
    counts = ran.counts
    assert ran.answer == "holds", ran.usage.output
    assert counts["children"] > 0
    assert counts["closed"] == 1 + counts["children"] // 2  # a binary tree of one root, without an open leaf


def test_the_run_itself_is_measured():
    code = "import time; block = bytearray(300 << 20)\nwhile time.process_time() < 0.5: pass"
    usage = Track(0).measured([sys.executable, "-c", code], 30.0, os.environ)
    assert usage.code == 0 and 0.5 <= usage.processor <= usage.wall + 0.1 and 300 < usage.peak_mib < 400


def test_clocks_count_cpu_seconds():
    code = "from time import *; a, b = time(), perf_counter(); sleep(1.5); print(time() - a, perf_counter() - b)"
    command = [sys.executable, "-c", code]
    wall, processor = (Track(0, clock).measured(command, 30.0, os.environ) for clock in (False, True))
    assert all(float(word) >= 1.4 for word in wall.output.split())
    assert all(float(word) < 0.5 for word in processor.output.split())


def test_opposite_answers_are_contradictions():
    def row(who, answer, seconds=1.0):
        return {"instance": "a", "contender": who, "answer": answer, "processor": seconds, "decided": answer == "holds"}

    assert _contradictions([row("ours", "holds"), row("other", "violated")]) == ["a: ours holds, other violated"]
    assert not _contradictions([row("ours", "holds"), row("other", "timeout")])
    assert _ratios([row("ours", "holds"), row("other", "holds", 4.0)], "other") == {"a": 0.25, "geometric mean": 0.25}
    assert _ratios([row("ours", "timeout"), row("other", "holds")], "other") == {}


def test_a_sample_is_spread_over_the_table(tmp_path):
    (tmp_path / "t.csv").write_text("".join(f"n.onnx,{i}.vnnlib,1\n" for i in range(10)))
    names = [Path(one.property).name for one in _sample(tmp_path / "t.csv", 4)]
    assert names == ["0.vnnlib", "2.vnnlib", "5.vnnlib", "7.vnnlib"] and len(_sample(tmp_path / "t.csv", 99)) == 10


def test_published_settings_are_kept_but_for_the_device_and_what_needs_a_licence(tmp_path):
    (tmp_path / "exp_configs" / "vnncomp22").mkdir(parents=True)
    (tmp_path / "exp_configs" / "vnncomp22" / "oval22.yaml").write_text(
        "general: {csv_name: x.csv, conv_mode: matrix, complete_verifier: bab-refine}\ndata: {start: 3}\n"
        "solver: {batch_size: 2000}\nbab: {branching: {candidates: 10}, cut: {enabled: true, cplex_cuts: true}}\n"
    )
    rival = AlphaBetaCrown("α-β-CROWN", Abcrown(Path(sys.executable), tmp_path))
    found = rival.settings("nets/oval_base.onnx", 30.0)
    assert found["solver"] == {"batch_size": 2000} and "data" not in found
    assert found["bab"] == {"branching": {"candidates": 10}, "cut": {"enabled": False}, "timeout": 30.0}
    assert found["general"] == {"csv_name": "x.csv", "conv_mode": "matrix", "complete_verifier": "bab", "device": "cpu"}
    assert rival.settings("other.onnx", 30.0)["solver"]["batch_size"] == 64


@pytest.mark.parametrize(
    "said, answer",
    [
        ("Result: safe in 3.2 seconds", "holds"),
        ("Result: unsafe-pgd in 3.2 seconds", "violated"),
        ("Result: unsafe-bab (timed out) in 31.0 seconds", "timeout"),
        ("Traceback", "error"),
    ],
)
def test_the_log_of_the_rival_is_read(table, tmp_path, said, answer):
    program = f"""
        import sys, yaml
        from pathlib import Path
        general = yaml.safe_load(open(sys.argv[2]))["general"]
        line, = (Path(general["root_path"]) / general["csv_name"]).read_text().split()
        network, property, limit = line.split(",")
        assert (Path(general["root_path"]) / network).is_file() and (Path(general["root_path"]) / property).is_file()
        print("Number of Verified Splits: 3 of 8\\nNumber of Verified Splits: 9 of 10")
        print(limit, general["device"], {said!r}, sep="\\n")
    """
    (tmp_path / "abcrown.py").write_text(textwrap.dedent(program))
    rival = AlphaBetaCrown("α-β-CROWN", Abcrown(Path(sys.executable), tmp_path))
    folder = table.parent
    ran = rival.search(Instance(str(folder / "tiny.onnx"), str(folder / "tiny.vnnlib"), 30.0), 30.0, Track(0))
    assert ran.answer == answer and ran.counts == {"children": 18, "closed": 12}, ran.usage.output
    assert "30\ncpu" in ran.usage.output
