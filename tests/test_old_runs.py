"""Run folders that certtrain 0.1 wrote open, resume, verify and evaluate: see tests/runs_0_1/README.md.

Only the command line and public calls are used: what stands behind them may move, the files may not.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import certtrain
from certtrain.command_line import main

RUNS = Path(__file__).parent / "runs_0_1"
ALL_STAGES = "ibp,crown_ibp,attack,crown,alpha,bab"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(RUNS / name, tmp_path / name))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def statuses(file: Path) -> dict[int, str]:
    return {line["index"]: line["status"] for line in lines(file)}


def timeless(file: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in ("seconds", "settings")} for line in lines(file)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made_here() -> bool:
    """Whether torch and the processor are of the kind that the folders were made with."""
    info = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    here = {name.strip(): value.strip() for name, value in info}
    processor = [here.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    instructions = torch.backends.cpu.get_cpu_capability()
    kind = {"torch": torch.__version__, "processor": processor, "instructions": instructions}
    return kind == json.loads((RUNS / "made_with.json").read_text())


@pytest.mark.parametrize("name, checkpoint", [("finished", "last"), ("exported", "last"), ("exported", "best")])
def test_networks_load(name, checkpoint):
    """Every recorded field is understood, and every tensor is found under its name."""
    model, config = certtrain.load_model(RUNS / name, checkpoint)
    file = {"last": "model", "best": "best"}[checkpoint]
    recorded = safetensors.torch.load_file(RUNS / name / f"{file}.safetensors")
    assert model.state_dict().keys() == recorded.keys()
    assert all(torch.equal(value, recorded[key]) for key, value in model.state_dict().items())
    assert config.perturbation == certtrain.LinfBall(0.05) and config.seed == int(name == "exported")
    images = torch.rand(4, 1, 8, 8)
    assert len(certtrain.certify(model, images, model(images).argmax(1), epsilon=0.001)) == 4


@pytest.mark.parametrize("name", ["finished", "exported"])
def test_a_finished_run_has_nothing_to_resume(name, copied, capsys):
    run = copied(name)
    before = contents(run)
    assert main(["train", "--resume", str(run)]) == 0
    assert contents(run) == before
    assert "certified by IBP alone" in capsys.readouterr().out


def test_an_interrupted_run_ends_as_the_uninterrupted_one(copied):
    run, finished = copied("interrupted"), RUNS / "finished"
    (run / ".lock").write_text('{"process": 1, "host": "gone"}')  # as the killed process left it
    assert not (run / "model.safetensors").exists()
    assert len(lines(run / "metrics.jsonl")) == 9
    assert main(["train", "--resume", str(run)]) == 0
    epochs, expected = lines(run / "metrics.jsonl"), lines(finished / "metrics.jsonl")
    assert [line["kind"] for line in epochs] == ["epoch"] * 16 + ["final"]
    assert statuses(run / "verdicts.jsonl").keys() == statuses(finished / "verdicts.jsonl").keys()
    if made_here():
        assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
        assert [line.get("loss") for line in epochs] == [line.get("loss") for line in expected]
        assert statuses(run / "verdicts.jsonl") == statuses(finished / "verdicts.jsonl")
    else:  # torch's plain kernels instead of AVX512 (ATEN_CPU_CAPABILITY=default) moved losses by up to 0.7 %
        for line, wanted in zip(epochs[:-1], expected, strict=False):
            assert line["loss"] == pytest.approx(wanted["loss"], rel=0.02)


def test_stored_verdicts_are_kept_and_more_are_added(copied):
    run = copied("finished")
    stored = lines(run / "verdicts.jsonl")
    assert main(["verify", str(run), "--images", "0:50"]) == 0
    found = lines(run / "verdicts.jsonl")
    assert found[:40] == stored
    assert [line["index"] for line in found] == list(range(50))
    assert {line["status"] for line in found} <= {"verified", "falsified", "misclassified"}
    settings = {line["settings"]: line for line in lines(run / "verdicts" / "settings.jsonl")}
    assert all(found[place]["settings"] in settings for place in range(50))
    assert settings[stored[0]["settings"]] == lines(RUNS / "finished" / "verdicts" / "settings.jsonl")[0]


def test_the_verifier_agrees_with_stored_verdicts(copied):
    """Without them it finds the same, image by image: every one is decided, so that two answers would contradict."""
    run = copied("finished")
    stored = statuses(run / "verdicts.jsonl")
    kept = lines(run / "verdicts.jsonl")[:7]
    (run / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"index": 7, "lab')
    found = certtrain.verify(run, images="0:40", quiet=True)
    assert statuses(run / "verdicts.jsonl") == stored
    assert found.records[:7] == kept and len(found.records) == 40 and found.file == run / "verdicts.jsonl"


def test_undecided_verdicts_are_tried_again_with_more_stages(copied):
    run = copied("finished")
    (file,) = (run / "verdicts").glob("embedded-*.jsonl")
    before = statuses(file)
    assert list(before.values()).count("unknown") == 21
    found = certtrain.verify(run, images="0:30", epsilon=0.08, quiet=True)
    assert found.file == file
    after = statuses(file)
    assert "unknown" not in after.values() and "timeout" not in after.values()
    decided = {index: status for index, status in before.items() if status != "unknown"}
    assert decided == {index: after[index] for index in decided}


def test_stored_evaluations_are_kept_and_found_again(copied):
    run = copied("finished")
    words = ["evaluate", str(run), "--attacks", "pgd-10-1", "--epsilons", "0.05", "--images", "60"]
    before = contents(run / "evaluation")
    assert main(words) == 0
    assert contents(run / "evaluation") == before
    stored = {name: timeless(run / "evaluation" / name) for name in before}
    shutil.rmtree(run / "evaluation")
    assert main(words) == 0
    found = {name: timeless(run / "evaluation" / name) for name in before}
    assert found.keys() == stored.keys()
    for name, expected in stored.items():
        assert [line for line in found[name] if "index" in line] == [line for line in expected if "index" in line]


def test_exported_files_are_read_by_the_front_door(copied, tmp_path, capsys):
    run = copied("exported")
    for line in (run / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert hashlib.sha256((run / name).read_bytes()).hexdigest() == digest
    verdicts = statuses(run / "verdicts.jsonl")
    answers = ["holds" if verdicts[index] == "verified" else "violated" for index in range(3)]
    onnx, results = str(run / "model.onnx"), tmp_path / "results.csv"
    for index, answer in enumerate(answers):
        assert main(["verify", "--onnx", onnx, "--vnnlib", str(run / f"specs/{index:04d}.vnnlib")]) == 0
        assert capsys.readouterr().out.strip().splitlines()[-1] == answer
    assert main(["verify", "--instances", str(run / "instances.csv"), "--results", str(results)]) == 0
    rows = [row[:3] for row in csv.reader(results.read_text().splitlines())]
    short = {"holds": "unsat", "violated": "sat"}
    assert rows == [["model.onnx", f"specs/{n:04d}.vnnlib", short[answer]] for n, answer in enumerate(answers)]


def test_an_exported_run_is_verified_and_exported_anew(copied):
    run = copied("exported")
    stored = statuses(run / "verdicts.jsonl")
    (run / "verdicts.jsonl").unlink()
    assert main(["verify", str(run), "--images", "0:30"]) == 0  # counterexamples have to fool onnxruntime too
    assert statuses(run / "verdicts.jsonl") == stored
    specs = contents(run / "specs")
    assert main(["export", str(run), "--images", "0:3"]) == 0
    assert contents(run / "specs") == specs  # the same boxes, to the last digit


@pytest.mark.parametrize("section", ["certify", "loss"])
def test_a_study_that_spells_out_a_default_attack_goes_on(section, copied, tmp_path):
    """The runs that it made do not tell that attack from none."""
    run = copied("finished").rename(tmp_path / "cc-seed0")
    description = json.loads((run / "run.json").read_text())
    recorded = description["config"]
    (run / "run.json").write_text(json.dumps({**description, "config": {**recorded, "name": "old-cc-seed0"}}))
    base = {**recorded, "name": "old"}
    for steps, code in ((recorded[section]["attack"]["steps"], 0), (7, 2)):
        attack = {**recorded[section]["attack"], "steps": steps}
        rows = [{"name": "CC", "changes": {section: {"attack": attack}}}]
        study = tmp_path / "study.yaml"
        study.write_text(json.dumps({"name": "old", "base": base, "rows": rows}))
        assert main(["compare", str(study), "--out", str(tmp_path), "--report-only"]) == code
