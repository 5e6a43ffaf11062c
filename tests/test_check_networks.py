"""The script that reads networks and compares their numbers with onnxruntime's."""

import json
import sys

import check_networks
import numpy as np
import pytest
from onnx import TensorProto
from test_onnx_network import ROW, Graph, dense


@pytest.fixture
def folder(tmp_path):
    """A network that is read, one that is refused, and one whose outputs are infinite."""
    graph = Graph(ROW)
    (tmp_path / "a.onnx").write_bytes(graph.model(dense(graph, "x", 5, 3, "Relu")).SerializeToString())
    graph = Graph(ROW)
    x = graph("Cast", graph("ArgMax", "x", name="here"), to=TensorProto.FLOAT)
    (tmp_path / "b.onnx").write_bytes(graph.model(x).SerializeToString())
    graph = Graph(ROW)
    x = graph("Exp", graph("Mul", "x", np.float32(1e6)))
    (tmp_path / "c.onnx").write_bytes(graph.model(x).SerializeToString())
    return tmp_path


def test_each_network_has_a_line(folder, monkeypatch, capsys):
    lines = folder / "lines.json"
    monkeypatch.setattr(sys, "argv", ["check_networks.py", str(folder), "--json", str(lines)])
    check_networks.main()
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["file"] for one in found] == ["a.onnx", "b.onnx", "c.onnx"]
    assert found[0]["difference"] <= 1e-6 and found[2]["difference"] == 0  # infinite in the same places
    assert found[1]["difference"] is None and "ArgMax 'here'" in found[1]["reason"]
    said = capsys.readouterr().out
    assert f"| {folder} | 3 | 2 | 2 |" in said and "2 agree, 1 refused" in said


def test_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_networks.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as end:
        check_networks.main()
    assert end.value.code == 2 and "none: found no folder; accepted: " in capsys.readouterr().err
