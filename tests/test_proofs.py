"""Proofs of a run's and a property's verdicts: written, checked, told apart."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from proof_cases import prove, read, write
from torch import nn

from certtrain.checker.arithmetic import Rejected
from certtrain.checker.check import check as check_file
from certtrain.command_line import main
from certtrain.config import structure
from certtrain.errors import InputError
from certtrain.export import export_onnx
from certtrain.recipe import Config
from certtrain.run_folder import JsonLines
from certtrain.verifiers import Certify
from certtrain.verifiers.vnncomp import answer
from certtrain.workflows.check import check
from certtrain.workflows.train import train
from certtrain.workflows.verify import verify

RECIPE = {
    "name": "proved", "device": "cpu", "threads": 1, "data": {"type": "Digits"},
    "model": {"type": "SmallCnn", "width": 4, "hidden": 16},
    "perturbation": {"type": "LinfBall", "epsilon": 0.02}, "loss": {"type": "CcIbp", "alpha": 0.5},
    "training": {"epochs": 6, "batch_size": 128, "milestones": [], "epsilon_multiplier": 1.0,
                 "schedule": {"type": "Smoothed", "start": 1, "length": 2}},
    "certify": {"images": 40, "timeout": 5, "proofs": True}, "evaluate": {"enabled": False},
    "export": {"images": 5},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "proved"
    train(structure(Config, RECIPE), folder, quiet=True)
    return folder


def verdicts(path: Path) -> list[dict]:
    return list(JsonLines(path))


def test_training_ends_with_proofs_that_are_checked(run):
    lines = verdicts(run / "verdicts.jsonl")
    verified = [line for line in lines if line["status"] == "verified"]
    assert len(verified) > 10 and {line["arithmetic"] for line in lines} == {"real"}
    assert all(line["proof"] == f"{line['index']:05d}.safetensors" for line in verified)
    assert not any("proof" in line for line in lines if line["status"] != "verified")
    final = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    count = len(verified)
    assert final["proofs"] == {"checked": count, "proved": count, "rejected": 0, "checker": "1"}
    assert final["proved_accuracy"] == final["certified_accuracy"] == count / 40
    header, arrays = read(run / "proofs" / "0.02-real" / verified[0]["proof"])
    assert header["image"]["number"] == verified[0]["index"] and header["claim"] == {"label": verified[0]["label"]}
    assert arrays["box.lower"].dtype == np.float32


def test_a_tampered_proof_and_one_about_another_image_are_rejected(run, capsys):
    folder = run / "proofs" / "0.02-real"
    assert main(["check", str(run), "--processes", "1"]) == 0
    assert "accuracy independently proved" in capsys.readouterr().out
    there = [folder / line["proof"] for line in verdicts(run / "verdicts.jsonl") if "proof" in line]
    first, second, third = there[:3]
    kept = {path: path.read_bytes() for path in (first, second, third)}
    try:
        first.write_bytes(kept[second])
        header, arrays = read(second)
        write(second, header, {**arrays, "box.lower": arrays["box.lower"] + np.float32(0.01)})
        third.write_bytes(kept[third][:-1])
        found = check(run, quiet=True)  # only what changed is checked again
        reasons = {line["index"]: line["reason"] for line in found.records if line["status"] == "rejected"}
        assert found.rejected == 3 and found.proved == len(found.records) - 3
        assert "about" in reasons[int(first.stem)] and "box" in reasons[int(second.stem)]
        assert "no proof" in reasons[int(third.stem)]
        assert main(["check", str(run), "--images", f"{int(third.stem)}:{int(third.stem) + 1}"]) == 1
        third.unlink()
        assert verify(run, images=f"{int(third.stem)}:{int(third.stem) + 1}", quiet=True).records[0]["proof"]
        assert third.exists()  # written again
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert check(run, quiet=True, processes=2).rejected == 0


def test_proofs_in_float32_stand_beside_those_in_real_arithmetic(run):
    assert main(["verify", str(run), "--proofs", "--arithmetic", "float32", "--images", "0:8"]) == 0
    found = check(run, arithmetic="float32", quiet=True)
    assert found.proved == found.verified > 0 and found.folder == run / "proofs" / "0.02-float32"
    for path in sorted(found.folder.glob("*.safetensors")):
        assert check_file(run / "model.onnx", path, single=True) <= check_file(run / "model.onnx", path)


def test_words_that_do_not_fit_are_refused(run, tmp_path, capsys):
    def refused(*words: object) -> str:
        assert main([*map(str, words)]) == 2
        return capsys.readouterr().err

    assert "real or float32" in refused("verify", run, "--proofs", "--arithmetic", "nearest")
    assert "--proof" in refused("verify", run, "--proof", tmp_path / "p")
    assert "--proofs" in refused("verify", "--onnx", "a", "--vnnlib", "b", "--proofs")
    assert "found no proofs" in refused("check", run, "--epsilon", "0.5")
    assert "real or float32" in refused("check", run, "--arithmetic", "nearest")
    assert "run.json" in refused("check", tmp_path)
    assert Certify(proofs=True).arithmetic == "real" and Certify(proofs=True, arithmetic="float32").proofs


def test_a_property_has_a_proof(run, tmp_path):
    """Of robustness as exported, and of several boxes and disjuncts of several rows."""
    network = run / "model.onnx"
    numbers = [line["index"] for line in verdicts(run / "verdicts.jsonl") if "proof" in line and line["index"] < 5]
    for number in numbers:
        property, proof = run / "specs" / f"{number:04d}.vnnlib", tmp_path / "proof"
        assert answer(network, property, proof=proof).word == "holds"
        assert check_file(network, proof, property) > 0
        with pytest.raises(Rejected, match="file was not given"):
            check_file(network, proof)
    other = run / "specs" / f"{(numbers[-1] + 1) % 5:04d}.vnnlib"
    with pytest.raises(Rejected, match="another property"):
        check_file(network, proof, other)
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    with torch.no_grad():
        export_onnx(model, tmp_path / "small.onnx", torch.rand(4, 1, 1, 3))
        low = float(model(torch.rand(2000, 1, 1, 3)).sum(1).min())
    lines = [f"(declare-const X_{i} Real)" for i in range(3)] + [f"(declare-const Y_{i} Real)" for i in range(3)]
    lines += [f"(assert (>= X_{i} 0)) (assert (<= X_{i} 1))" for i in (0, 1)]
    lines += ["(assert (or (and (>= X_2 0) (<= X_2 0.4)) (and (>= X_2 0.5) (<= X_2 1))))"]
    each = low / 3 - 1.0
    rows = " ".join(f"(<= Y_{j} {each:.3f})" for j in range(3))  # their sum is above 3 each, though not every Y_j
    lines += [f"(assert (or (and {rows}) (<= (+ Y_0 Y_1 Y_2) {low - 3:.3f})))"]
    property = tmp_path / "several.vnnlib"
    property.write_text("\n".join(lines))
    settings = Certify(stages=("ibp", "crown_ibp", "crown", "alpha", "bab"), timeout=20)
    found = answer(tmp_path / "small.onnx", property, proof=tmp_path / "several", certify=settings)
    assert found.word == "holds" and found.no_proof is None, found
    assert check_file(tmp_path / "small.onnx", tmp_path / "several", property) > 0
    (tmp_path / "several.vnnlib.gz").write_bytes(gzip.compress(property.read_bytes()))
    with pytest.raises(InputError, match="compressed"):
        answer(tmp_path / "small.onnx", tmp_path / "several.vnnlib.gz", proof=tmp_path / "p")


def test_what_the_checker_does_not_know_is_refused_at_once(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)).eval()
    images = torch.rand(2, 1, 2, 2)
    with torch.no_grad(), pytest.raises(InputError, match="Sigmoid is not known here"):
        prove(tmp_path, model, images, model(images).argmax(1), 0.01)
