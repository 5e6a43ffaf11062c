"""Instance rows whose network column is a list of named networks: the grammar, and what tables make of it."""

import ast
import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_vnncomp import TENT, save_network
from test_vnncomp_second import interval, query

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.verifiers.instances import Instance, read_instances, run_instances
from certtrain.verifiers.network_list import by_file, named_networks

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
FILES = st.text(st.characters(codec="utf-8", exclude_characters="'\"\\\n\r\0"), min_size=1).map(
    lambda text: f"onnx/{text}"
)


@given(st.dictionaries(NAMES, FILES, min_size=1, max_size=4), st.sampled_from(["'", '"']), st.sampled_from(["", " "]))
def test_lists_as_python_reads_them(networks, quote, space):
    pairs = [f"({quote}{name}{quote},{space}{quote}{file}{quote})" for name, file in networks.items()]
    text = f"[{space}{f',{space}'.join(pairs)}{space}]"
    assert ast.literal_eval(text) == list(networks.items())
    found = named_networks(text, "here")
    assert isinstance(found, dict) and list(found.items()) == [(n, str(Path(f))) for n, f in networks.items()]


@given(st.text(st.sampled_from("[](){},'\"fgx \\\n=.")))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        found = named_networks(text, "t.csv, line 3")
    except InputError as error:
        assert str(error).startswith("t.csv, line 3: found ") and "accepted" in str(error) and "\n" not in str(error)
    else:
        assert found == text.strip() if isinstance(found, str) else found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("onnx/a.onnx", "onnx/a.onnx"),
        (" a[1].onnx ", "a[1].onnx"),
        ("onnx/[1].onnx", "onnx/[1].onnx"),
        ("(a).onnx", "(a).onnx"),
        ("[ ( 'f' , 'a' , ) , ]", {"f": "a"}),
        ("[('f','a b,c.onnx')]", {"f": "a b,c.onnx"}),
        ("b/2.0/[('f','onnx/x'),('g','/abs/y')]", {"f": "b/2.0/onnx/x", "g": "/abs/y"}),
    ],
)
def test_files_and_lists(text, found):
    assert named_networks(text, "here") == found


REFUSED = {
    "[]": "]",
    "[": "the end",
    "[f,g]": "f",
    "[('f')]": ")",
    "['f','a']": "'f'",
    "(('f','a'),)": "(",
    "{'f': 'a'}": "{'f': 'a'}",
    "[('f','a'": "the end",
    "[('f','a')": "the end",
    "[('f','a')] x": "x",
    "[('f','a') ('g','b')]": "(",
    "[('f','a'),('f','b')]": "network 'f' a second time",
    "[('1f','a')]": "network '1f'",
    "[('f','')]": "no file for f",
    r"[('f','a\'b')]": r"'a\'b'",
    "[('f','a)]": "'a",
    "[('f',__import__('os').system('touch harm'))]": "__import__",
    "[" * 100_000: "[",
}


@pytest.mark.parametrize(("text", "found"), REFUSED.items(), ids=[str(place) for place in range(len(REFUSED))])
def test_what_is_no_list(text, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="accepted: a file, or a list") as error:
        named_networks(text, "t.csv, line 3")
    assert str(error.value).startswith(f"t.csv, line 3: found {found}") and not list(tmp_path.iterdir())


def test_names_are_relative_to_a_folder():
    assert by_file("a.onnx", Path("b")) == Path("b/a.onnx")
    assert by_file({"f": "a.onnx", "g": "/c"}, Path("b")) == {"f": Path("b/a.onnx"), "g": Path("/c")}


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    (tmp_path / "onnx").mkdir()
    save_network(tmp_path / "onnx" / "tent.onnx", TENT)
    for name, height in (("unsat", "1.001"), ("sat", "0.999")):
        asked = query(interval("0.0", "1.0") + f"(assert (> Y[0,0] {height}))")
        (tmp_path / f"{name}.vnnlib").write_text(asked)
    one = "[('f', 'onnx/tent.onnx')]"
    rows = [
        (one, "unsat.vnnlib", "20"), ("[('f','onnx/tent.onnx'", "sat.vnnlib", "20"), (one, "./sat.vnnlib", "20"),
        ("[('f', 'onnx/none.onnx')]", "sat.vnnlib", "20"), ("onnx/tent.onnx", "sat.vnnlib", "20"),
    ]  # fmt: skip
    with (tmp_path / "instances.csv").open("w") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_of_a_table(table):
    said = []
    assert read_instances("instances.csv")[0] == Instance("[('f', 'onnx/tent.onnx')]", "unsat.vnnlib", 20.0)
    run_instances("instances.csv", "r.csv", records="r.jsonl", watch=lambda *line: said.append(line[2]))
    rows = list(csv.reader((table / "r.csv").open()))
    assert [row[2] for row in rows] == ["unsat", "error", "sat", "error", "sat"]
    assert [row[:2] for row in rows] == [row[:2] for row in csv.reader((table / "instances.csv").open())]
    assert "instances.csv, line 2: found the end in a list of networks; accepted: " in said[1]
    assert "none.onnx" in said[3] and "No such file" in said[3]
    records = [json.loads(line) for line in (table / "r.jsonl").read_text().splitlines()]
    assert [record["onnx"] for record in records] == [row[0] for row in rows]
    assert records[1]["answer"] == "error" and "line 2" in records[1]["reason"]


@pytest.mark.parametrize("left", [0, 1, 2, 4])
def test_resuming(table, left, capsys):
    words = ["verify", "--instances", "instances.csv", "--results", "r.csv", "--json", "r.jsonl"]
    assert main(words) == 0
    whole = (table / "r.csv").read_text()
    capsys.readouterr()
    lines = whole.splitlines(keepends=True)
    (table / "r.csv").write_text("".join(lines[:left]) + lines[left][:20])  # killed within a line
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5 - left
    assert [line.rpartition(",")[0] for line in (table / "r.csv").read_text().splitlines()] == [
        line.rpartition(",")[0] for line in whole.splitlines()
    ]


PAIR = """(vnnlib-version <2.0>)
(declare-network f (declare-input X float32 [1,1]) (declare-output Y float32 [1,1]))
(declare-network g {} (declare-input U float32 [1,1]) (declare-output V float32 [1,1]))
(assert (and (>= X[0,0] 0.0) (<= X[0,0] 1.0) (>= U[0,0] 0.5) (<= U[0,0] 1.0)))
(assert (> Y[0,0] (+ V[0,0] {})))
"""
"""A tent of height 1 at 0.3, and of 0.2 at 0.5: the first is higher by 2.8 at most."""


def test_rows_of_several_networks(table):
    save_network(table / "onnx" / "g.onnx", TENT)
    for name, relation, height in (
        ("two", "", "2.7"), ("isomorphic", "(isomorphic-to f)", "2.81"), ("equal", "(equal-to f)", "2.7"),
    ):  # fmt: skip
        (table / f"{name}.vnnlib").write_text(PAIR.format(relation, height))
    f, g = "('f', 'onnx/tent.onnx')", "('g', 'onnx/g.onnx')"
    rows = {
        (f"[{f}, {g}]", "two"): "sat",
        (f"[{g}, {f}]", "isomorphic"): "unsat",
        (f"[{f}, ('g', 'onnx/tent.onnx')]", "equal"): "sat",  # as a table of 2026 has it
        (f"[{f}]", "equal"): "sat",
        ("onnx/tent.onnx", "equal"): "sat",
        (f"[{f}, {g}]", "equal"): "g equal-to f with a file of its own",
        (f"[{f}]", "two"): "two.vnnlib, line 3: found 'declare-network g without a file'; accepted: a file for each",
        ("onnx/tent.onnx", "two"): "declare-network g without a file",
        (f"[{f}, {g}, ('h', 'onnx/g.onnx')]", "two"): "'h', which is not declared; accepted: a file for each of f, g",
        (f"[{f}, ('g', 'onnx/none.onnx')]", "two"): "none.onnx",
        (f"[{f}, {f}]", "two"): "instances.csv, line 11: found network 'f' a second time",
        ("[('g', 'onnx/g.onnx')]", "two"): "declare-network f without a file",
    }
    with (table / "instances.csv").open("w") as file:
        csv.writer(file, lineterminator="\n").writerows((networks, f"{name}.vnnlib", 20) for networks, name in rows)
    said = []
    run_instances("instances.csv", "r.csv", watch=lambda *line: said.append(line[2]))
    found = [row[2] for row in csv.reader((table / "r.csv").open())]
    for wanted, status, line in zip(rows.values(), found, said, strict=True):
        assert status == (wanted if wanted in ("sat", "unsat") else "error") and wanted in line
