"""Properties written in VNN-LIB 2.0: the same sets as in 1.0, in a form that the standard's own parser takes."""

import math
import re
from decimal import Decimal

import pytest
import torch
import vnnlib
from hypothesis import given, settings
from hypothesis import strategies as st

from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.export import Export
from certtrain.recipe import load_config
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib import Property, write_property
from certtrain.verifiers.vnnlib_reader import read_property
from certtrain.workflows.export import export
from tests.test_export import description, edit, everything_in, here, known, trained  # noqa: F401
from tests.test_vnnlib import same

WIDE = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=True)
TINY = st.floats(-(2.0**-126), 2.0**-126, width=32, allow_subnormal=True)
ENDS = st.lists(st.tuples(WIDE | TINY, WIDE | TINY), min_size=1, max_size=6)


def both(folder, lower, upper, label, classes) -> tuple[Property, Property]:
    found = []
    for version in (1.0, 2.0):
        path = folder / f"{version}.vnnlib"
        write_property(path, lower, upper, label, classes, version)
        found.append(read_property(path, lower.numel(), classes))
    return found[0], found[1]


@settings(max_examples=60, deadline=None)
@given(ENDS, st.booleans(), st.integers(0, 3))
def test_both_versions_state_one_property(tmp_path_factory, pairs, single, label):
    folder = tmp_path_factory.getbasetemp()
    dtype = torch.float32 if single else torch.float64
    lower, upper = (torch.tensor([choose(pair) for pair in pairs], dtype=dtype) for choose in (min, max))
    first, second = both(folder, lower, upper, label, 4)
    assert same(first.cases[0], second.cases[0]) and len(first.cases) == len(second.cases) == 1
    assert second.declared is not None and first.declared is None and second.repaired is None
    (case,) = second.cases
    assert (case.lower <= lower.double()).all() and (upper.double() <= case.upper).all()
    query = vnnlib.parse_query_string((folder / "2.0.vnnlib").read_text())  # the standard's parser and type checker
    assert len(query.assertions) == len(pairs) + 1


def test_every_line(tmp_path):
    path = tmp_path / "a.vnnlib"
    write_property(path, torch.tensor([[0.1, -0.0]]), torch.tensor([[0.1, 1e-42]]), 1, 3, 2.0)
    tiny = f"0.{41 * '0'}100052711"
    assert path.read_text().splitlines() == [
        "(vnnlib-version <2.0>)",
        "(declare-network f",
        "  (declare-input X float32 [1,1,2])",
        "  (declare-output Y float32 [1,3]))",
        "(assert (and (>= X[0,0,0] 0.100000001) (<= X[0,0,0] 0.100000002)))",
        f"(assert (and (>= X[0,0,1] 0.0) (<= X[0,0,1] {tiny})))",
        "(assert (or (<= Y[0,1] Y[0,0]) (<= Y[0,1] Y[0,2])))",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.vnnlib"]


@settings(max_examples=60, deadline=None)
@given(ENDS)
def test_numbers_are_in_full_and_outside_of_the_ends(tmp_path_factory, pairs):
    path = tmp_path_factory.getbasetemp() / "numbers.vnnlib"
    lower, upper = (torch.tensor([choose(pair) for pair in pairs]) for choose in (min, max))
    write_property(path, lower, upper, 0, 2, 2.0)
    lines = [line for line in path.read_text().splitlines() if "X[" in line]
    for line, low, high in zip(lines, lower.tolist(), upper.tolist(), strict=True):
        least, most = re.findall(r" (-?[0-9]+\.[0-9]+)\)", line)
        assert Decimal(least) <= Decimal(low) and Decimal(high) <= Decimal(most)
        assert math.isclose(float(least), low, rel_tol=1e-6) and math.isclose(float(most), high, rel_tol=1e-6)


def test_two_classes_and_an_image(tmp_path):
    image = torch.rand(2, 3, 4)
    first, second = both(tmp_path, image - 0.1, image + 0.1, 1, 2)
    assert same(first.cases[0], second.cases[0])
    declared = second.declared
    assert declared is not None
    assert [str(one) for one in (*declared.inputs, *declared.outputs)] == ["X float32 [1,2,3,4]", "Y float32 [1,2]"]


@pytest.mark.parametrize("version", [3.0, 2.1, 0.0, math.nan, math.inf])
def test_other_versions_are_refused(tmp_path, version):
    with pytest.raises(InputError, match=r"version: found .*; accepted: 1.0 or 2.0"):
        write_property(tmp_path / "a.vnnlib", torch.zeros(2), torch.ones(2), 0, 2, version)
    with pytest.raises(InputError, match=r"vnnlib_version: found"):
        Export(vnnlib_version=version)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["2.0", "'2.0'", "2"])
def test_in_a_recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"export: {{vnnlib_version: {text}}}\n")
    assert load_config(path).export.vnnlib_version == 2.0
    assert load_config(None, {"export.vnnlib_version": text}).export.vnnlib_version == 2.0
    assert load_config(None).export.vnnlib_version == 1.0
    path.write_text("export: {vnnlib_version: new}\n")
    with pytest.raises(InputError, match=r"recipe.yaml: export.vnnlib_version: found 'new'"):
        load_config(path)


def test_a_runs_export(here, known, capsys):  # noqa: F811
    first = {path.name: read_property(path, 64, 10) for path in here.specs.iterdir()}
    assert description(here)["export"]["vnnlib_version"] == 1.0
    assert main(["export", str(here.path), "--vnnlib-version", "2.0"]) == 0
    assert "α-β-CROWN" not in capsys.readouterr().out  # it reads the other version
    assert description(here)["export"]["vnnlib_version"] == 2.0
    assert len(first) == len(list(here.specs.iterdir()))
    for path in here.specs.iterdir():
        assert path.read_text().startswith("(vnnlib-version <2.0>)\n")
        assert same(first[path.name].cases[0], read_property(path, 64, 10).cases[0])
    edit(here, {"export.vnnlib_version": "2.0"})
    export(here.path, images="0:2", quiet=True)
    assert all("<2.0>" in path.read_text() for path in here.specs.iterdir())
    found = answer(here.onnx, here.specs / "0000.vnnlib", 20.0)
    assert found.word in ("holds", "violated") and found.declared is not None
    before = everything_in(here.path)
    for bad in ("3.0", "two"):
        assert main(["export", str(here.path), "--vnnlib-version", bad]) == 2
        assert "accepted: 1.0 or 2.0" in capsys.readouterr().err and everything_in(here.path) == before
