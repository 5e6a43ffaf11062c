"""A study: read, run, stopped, taken up again, and counted."""

import csv
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import processes as forks
import pytest
import torch
import yaml
from PIL import Image

import certtrain.training.loop as loop_module
import certtrain.workflows.compare as compare_module
from certtrain.command_line import main
from certtrain.comparison import Curve, processes, read_study
from certtrain.comparison.curves import value_at
from certtrain.comparison.figure import against_epsilon, trained_at
from certtrain.comparison.numbers import Statistic, radius
from certtrain.comparison.results import TrialResult, unanswered
from certtrain.comparison.study import changed, slug_of
from certtrain.config import unstructure
from certtrain.errors import InputError
from certtrain.locking import exclusive
from certtrain.run_folder import JsonLines, RunFolder, sha256
from certtrain.training import Interrupted, TrainingStopped
from certtrain.workflows.compare import compare
from certtrain.workflows.train import train

BASE = {
    "threads": 1,
    "data": {"type": "Digits", "validation": 0.1},
    "model": {"type": "SmallCnn", "width": 2, "hidden": 8},
    "perturbation": {"type": "LinfBall", "epsilon": 0.05},
    "loss": {"type": "FgsmRs"},
    "training": {
        "epochs": 2, "batch_size": 400, "optimiser": {"type": "Sgd", "lr": 0.05}, "milestones": [], "clip": None,
        "schedule": {"type": "Linear", "start": 1, "length": 0}, "epsilon_multiplier": 1.0, "initialisation": "default",
    },
    "certify": {"enabled": False},
    "export": {"enabled": False},
}  # fmt: skip
ROWS = [
    {"name": "FGSM-RS"},
    {"name": "TRADES", "changes": {"loss": {"type": "Trades"}}, "sweep": {"loss.weight": [3, 6.5]}},
]


def written(folder: Path, **changes) -> Path:
    """A study's file."""
    study = {"name": "tiny", "seeds": [0, 1], "base": BASE, "rows": ROWS,
             "evaluate": {"attacks": ["pgd-2"], "images": 50}} | changes  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in study.items() if value is not None}, sort_keys=False))
    return path


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    """``table.md`` by row and column."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


# --- the file


def test_rows_and_their_recipes(tmp_path):
    study = read_study(written(tmp_path))
    assert [row.label for row in study.rows] == ["FGSM-RS", "TRADES weight=3", "TRADES weight=6.5"]
    assert [row.group for row in study.rows] == ["FGSM-RS", "TRADES", "TRADES"]
    assert [row.slug for row in study.rows] == ["fgsm-rs", "trades-weight-3", "trades-weight-6.5"]
    assert [unstructure(row.config)["loss"].get("weight") for row in study.rows] == [None, 3.0, 6.5]
    assert {row.config.training.batch_size for row in study.rows} == {400}
    assert study.reference == "FGSM-RS" and study.robustness == "pgd-2" and study.folder == Path("runs/tiny")
    trials = list(study.trials(tmp_path / "out"))
    assert [trial.seed for trial in trials] == [0, 0, 0, 1, 1, 1]
    assert trials[4].path == tmp_path / "out" / "trades-weight-3-seed1"
    assert trials[4].config.seed == 1 and trials[4].config.name == "tiny-trades-weight-3-seed1"
    assert dataclasses.replace(trials[4].config, seed=0, name="digits_ccibp") == study.rows[1].config


def test_a_sweep_is_a_product(tmp_path):
    sweep = {"loss.kind": ["static", "decreasing"], "loss.bound": ["published", "centred"]}
    rows = [{"name": "N", "changes": {"loss": {"type": "Qub"}}, "sweep": sweep}]
    found = read_study(written(tmp_path, rows=rows)).rows
    assert [row.label for row in found] == [
        "N kind=static bound=published", "N kind=static bound=centred", "N kind=decreasing bound=published",
        "N kind=decreasing bound=centred",
    ]  # fmt: skip
    rows = [{"name": "N", "sweep": {"training.epochs": [3], "training.optimiser.lr": ["1/10"], "model.width": [1, 2]}}]
    found = read_study(written(tmp_path, rows=rows)).rows
    assert found[1].label == "N epochs=3 lr=1/10 width=2" and found[1].config.training.optimiser.lr == 0.1


def test_changes_are_written_in_as_into_a_recipe():
    base = {"loss": {"type": "A", "x": 1, "attack": {"type": "P", "n": 1, "m": 2}}, "seed": 3}
    assert changed(base, {"loss": {"attack": {"n": 5}}})["loss"]["attack"] == {"type": "P", "n": 5, "m": 2}
    assert changed(base, {"loss": {"type": "B"}}) == {"loss": {"type": "B"}, "seed": 3}
    assert base["loss"]["attack"]["n"] == 1


def test_the_base_may_be_a_file(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = written(tmp_path / "configs", base="../base.yaml")
    assert read_study(path).rows == read_study(written(tmp_path)).rows


def test_slugs():
    assert slug_of("FGSM-RS + QUB (static)") == "fgsm-rs-qub-static" and slug_of("¹⁄₂ …") == ""
    assert slug_of("a weight=0.5") == "a-weight-0.5"


BAD = {
    "no file": (None, ["no such file"]),
    "no YAML": ("rows: [", ["not valid YAML"]),
    "a key too many": ({"colour": 1}, ["study.yaml: colour: no such field", "curves"]),
    "no name": ({"name": None}, ["name: found None"]),
    "a name that is a path": ({"name": "a/b"}, ["name: found 'a/b'"]),
    "a name that is a folder above": ({"name": ".."}, ["name: found '..'"]),
    "no rows": ({"rows": None}, ["rows: found None"]),
    "empty rows": ({"rows": []}, ["rows: found []"]),
    "a row without a name": ({"rows": [{"changes": {}}]}, ["rows[0].name: found None"]),
    "a row with a comma": ({"rows": [{"name": "a,b"}]}, ["rows[0].name", "comma"]),
    "a row of text": ({"rows": ["FGSM"]}, ["rows[0]: found 'FGSM'", "changes"]),
    "a typo in a row": ({"rows": [{"name": "a", "change": {}}]}, ["rows[0].change: no such field", "sweep"]),
    "a name twice": ({"rows": [{"name": "a"}, {"name": "a"}]}, ["rows: found 'a twice'"]),
    "one folder for two": ({"rows": [{"name": "a b"}, {"name": "A-B"}]}, ["'a b'", "'A-B'", "a-b"]),
    "a typo in a recipe": ({"rows": [{"name": "a", "changes": {"loss": {"alpa": 1}}}]}, ["row a: loss.alpa"]),
    "an unknown loss": ({"rows": [{"name": "a", "changes": {"loss": {"type": "X"}}}]}, ["row a: loss.type: found 'X'"]),
    "QUB over MART": ({"rows": [{"name": "a", "changes": {"loss": {"type": "Qub", "base": {"type": "Mart"}}}}]},
                      ["row a: loss.base: found 'Mart'"]),
    "a sweep of nothing": ({"rows": [{"name": "a", "sweep": {"loss.x": []}}]}, ["row a: sweep: loss.x: found []"]),
    "a sweep out of range": ({"rows": [{"name": "a", "sweep": {"training.epochs": [1, 0]}}]},
                             ["row a epochs=0: training.epochs: found 0"]),
    "a set that the loss does not know": (
        {"base": {**BASE, "perturbation": {"type": "L2Ball", "epsilon": 1}},
         "rows": [{"name": "a", "changes": {"loss": {"type": "FastBat"}}}]},
        ["row a", "FastBat", "L2Ball"]),
    "AWP over a certified loss": (
        {"rows": [{"name": "a", "changes": {"loss": {"type": "CcIbp"}, "training": {"update": {"type": "Awp"}}}}]},
        ["row a: training.update", "CcIbp"]),
    "seeds that are none": ({"seeds": ["x"]}, ["seeds: found ['x']"]),
    "a seed twice": ({"seeds": [1, 1]}, ["seeds: found [1, 1]"]),
    "a seed of true": ({"seeds": [True]}, ["seeds: found [True]"]),
    "no seeds": ({"seeds": []}, ["seeds: found []"]),
    "an unknown attack": ({"evaluate": {"attacks": ["pdg-10"]}}, ["evaluate.attacks: found 'pdg-10'", "pgd-STEPS"]),
    "a base of text in text": ({"base": 5}, ["base: found 5", "path"]),
    "a base that is not there": ({"base": "nowhere.yaml"}, ["nowhere.yaml: no such file"]),
    "an unknown reference": ({"reference": "X"}, ["reference: found 'X'", "TRADES weight=3"]),
    "an unknown robustness": ({"robustness": "pgd-9"}, ["robustness: found 'pgd-9'", "pgd-2"]),
    "a curve without a metric": ({"curves": [{"kind": "epoch"}]}, ["curves[0].metric"]),
    "a curve twice": ({"curves": [{"metric": "loss"}, {"metric": "loss", "kind": "measurement"}]},
                      ["curves: found", "loss twice"]),
    "a best checkpoint that nothing keeps": (
        {"evaluate": {"attacks": ["pgd-2"], "checkpoints": ["last", "best"]}},
        ["row FGSM-RS: evaluate.checkpoints: found 'best'", "training.select"]),
    "rows on different data": (
        {"rows": [{"name": "a"}, {"name": "b", "changes": {"data": {"validation": 0.2}}}]},
        ["row b: data.validation: found 0.2; accepted: 0.1"]),
    "curves of text": ({"curves": "loss"}, ["curves: found 'loss'"]),
}  # fmt: skip


@pytest.mark.parametrize(("content", "mentions"), BAD.values(), ids=BAD)
def test_bad_studies(content, mentions, tmp_path, capsys):
    """Exit code 2, one line, nothing written."""
    path = tmp_path / "study.yaml"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        written(tmp_path, **content)
    before = everything_in(tmp_path)
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said
    assert all(mention in said for mention in [*mentions, "accepted"]), said
    assert everything_in(tmp_path) == before and not (tmp_path / "out").exists()


WORDS = {
    "no study": ([], ["found no study", "STUDY.yaml"]),
    "an unknown row": (["STUDY", "--only", "FGSM"], ["--only: found 'FGSM'", "FGSM-RS"]),
    "a seed of another study": (["STUDY", "--seeds", "7"], ["--seeds: found 7", "0, 1"]),
    "a seed of text": (["STUDY", "--seeds", "0,x"], ["--seeds: found 'x'"]),
    "no jobs": (["STUDY", "--jobs", "0"], ["--jobs: found 0"]),
    "half a job": (["STUDY", "--jobs", "0.5"], ["--jobs: found '0.5'"]),
    "another option": (["STUDY", "--epochs", "5"], ["--epochs: cannot be given"]),
}


@pytest.mark.parametrize(("words", "mentions"), WORDS.values(), ids=WORDS)
def test_bad_words(words, mentions, tmp_path, capsys):
    words = [str(written(tmp_path)) if word == "STUDY" else word for word in words]
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(mention in said for mention in [*mentions, "accepted"]), said
    assert not (tmp_path / "out").exists()


# --- running


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a finished study; nobody may change it."""
    folder = tmp_path_factory.mktemp("study")
    curves = [{"metric": "loss", "beside": ["validation_accuracy"]}, {"metric": "nothing"}]
    path = written(folder, curves=curves)
    assert main(["compare", str(path), "--out", str(folder / "out")]) == 0
    return folder


def test_trains_and_evaluates_what_is_missing(done):
    study = read_study(done / "study.yaml")
    for trial in study.trials(done / "out"):
        folder, description = RunFolder.open(trial.path)
        assert folder.final() and description["seed"] == trial.seed and not list(unanswered(trial))
        rows = json.loads(folder.evaluation.read_text())["rows"]
        assert {(row["checkpoint"], row["attack"], row["images"]) for row in rows} == {
            ("last", "clean", 50), ("last", "pgd-2", 50), ("last", "ibp", 50),
        }  # fmt: skip
    assert {path.name for path in (done / "out").glob("*.*") if path.is_file() and not path.name.startswith(".")} == {
        "table.md", "table.csv", "figure.png", "curves-loss.png", "curves-loss.csv", "calls.jsonl",
    }  # fmt: skip


def test_the_table_counts_what_the_runs_say(done):
    """Against the evaluations' own rows, by Python's statistics."""
    found = table_of(done / "out")
    for slug, label in (("fgsm-rs", "FGSM-RS"), ("trades-weight-3", "TRADES weight=3")):
        paths = [done / "out" / f"{slug}-seed{seed}" for seed in (0, 1)]
        rows = [json.loads((path / "evaluation.json").read_text())["rows"] for path in paths]
        for title, attack in (("clean", "clean"), ("pgd-2, 0.05", "pgd-2"), ("certified by IBP, 0.05", "ibp")):
            shares = [100 * row["correct"] / 50 for some in rows for row in some if row["attack"] == attack]
            wanted = f"{statistics.mean(shares):.2f} ± {statistics.stdev(shares):.2f}"
            assert len(shares) == 2 and found[label][title] == wanted
        assert found[label]["n"] == "2"
    assert found["FGSM-RS"]["time / FGSM-RS"] == "1.00"
    text = (done / "out" / "table.md").read_text()
    assert "50 test images" in text and "6 of 6 runs" in text and f"torch {torch.__version__}" in text
    assert "threads 1" in text and f"python scripts/compare.py {done / 'study.yaml'}\n" in text


def test_figures_are_pictures(done):
    for name in ("figure.png", "curves-loss.png"):
        with Image.open(done / "out" / name) as image:
            image.verify()
            assert image.format == "PNG" and min(image.size) > 300
    lines = list(csv.DictReader((done / "out" / "curves-loss.csv").open()))
    assert {line["metric"] for line in lines} == {"loss", "validation_accuracy"} and len(lines) == 3 * 2 * 2
    wanted = [list(RunFolder(done / "out" / f"fgsm-rs-seed{seed}").metrics)[1]["loss"] for seed in (0, 1)]
    (line,) = (x for x in lines if (x["row"], x["metric"], x["epoch"]) == ("FGSM-RS", "loss", "2"))
    assert float(line["mean"]) == pytest.approx(statistics.mean(wanted)) and line["n"] == "2"
    assert float(line["sd"]) == pytest.approx(statistics.stdev(wanted))


def test_a_second_call_does_nothing(done, capsys):
    before = everything_in(done)
    assert main(["compare", str(done / "study.yaml"), "--out", str(done / "out")]) == 0
    assert main(["compare", str(done / "study.yaml"), "--out", str(done / "out"), "--report-only"]) == 0
    assert everything_in(done) == before
    assert "| FGSM-RS | 2 |" in capsys.readouterr().out


def test_other_weights_and_other_questions_are_evaluated_again(done, tmp_path):
    path = tmp_path / "study"
    subprocess.run(["cp", "-rp", str(done), str(path)], check=True)
    weights = {
        trial.path: sha256(trial.path / "model.safetensors")
        for trial in read_study(path / "study.yaml").trials(path / "out")
    }
    written(path, evaluate={"attacks": ["pgd-2", "pgd-1"], "images": 20, "epsilons": ["1/255", 0.05]}, curves=None)
    compare(path / "study.yaml", out=path / "out", quiet=True)
    found = table_of(path / "out")["FGSM-RS"]
    assert {"clean", "pgd-2, 1/255", "pgd-2, 0.05", "pgd-1, 1/255", "pgd-1, 0.05"} <= set(found)
    assert all(found.values()) and "20 test images" in (path / "out" / "table.md").read_text()
    assert {trial: sha256(trial / "model.safetensors") for trial in weights} == weights
    trial = next(read_study(path / "study.yaml").trials(path / "out"))
    other = path / "out" / "trades-weight-3-seed0" / "model.safetensors"
    (trial.path / "model.safetensors").write_bytes(other.read_bytes())
    assert len(list(unanswered(trial))) == 5


def test_another_recipe_is_refused(done, tmp_path, capsys):
    path = tmp_path / "study"
    subprocess.run(["cp", "-rp", str(done), str(path)], check=True)
    changes = {"name": "FGSM-RS", "changes": {"training": {"optimiser": {"lr": 0.1}}}}
    written(path, rows=[ROWS[1], changes], seeds=[0, 1, 2])
    before = everything_in(path)
    assert main(["compare", str(path / "study.yaml"), "--out", str(path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "fgsm-rs-seed0: training.optimiser.lr: found a run with 0.05" in said
    assert "accepted: 0.1" in said and everything_in(path) == before


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("checkpoint", [True, False], ids=["after a checkpoint", "before one"])
def test_goes_on_with_what_was_interrupted(done, checkpoint, tmp_path, monkeypatch):
    """Cut short in its second run; then as if it had never stopped."""
    fast = {**BASE, "training": {**BASE["training"], "checkpoint_seconds": 0.0}}
    path = written(tmp_path, base=fast, rows=[ROWS[0], ROWS[1] | {"sweep": {"loss.weight": [3]}}], seeds=[0])
    save, saved = loop_module._save, []

    def save_or_die(folder, recipe, position, *rest):
        saved.append(folder.path.name)
        if saved.count("trades-weight-3-seed0") == (3 if checkpoint else 1):
            raise Killed
        save(folder, recipe, position, *rest)

    monkeypatch.setattr(loop_module, "_save", save_or_die)
    with pytest.raises(Killed):
        compare(path, out=tmp_path / "out", quiet=True)
    monkeypatch.undo()
    assert (tmp_path / "out" / "trades-weight-3-seed0" / "resume.pt").exists() is checkpoint
    kept = everything_in(tmp_path / "out" / "fgsm-rs-seed0")
    found = compare(path, out=tmp_path / "out", quiet=True)
    assert {stage for row in found.stages().values() for stage in row.values()} == {"evaluated"}
    assert everything_in(tmp_path / "out" / "fgsm-rs-seed0") == kept
    for trial in found.study.trials(tmp_path / "out"):
        assert (trial.path / "model.safetensors").read_bytes() == (
            done / "out" / trial.path.name / "model.safetensors"
        ).read_bytes()


def test_goes_on_from_files_that_were_half_written(tmp_path):
    path, out = written(tmp_path, rows=ROWS[:1], seeds=[0]), tmp_path / "out"
    (out / "fgsm-rs-seed0").mkdir(parents=True)
    (out / "fgsm-rs-seed0" / ".run.json.1.tmp").write_text('{"config')
    (out / "calls.jsonl").write_text('{"command": "one"}\n{"comm')
    found = compare(path, out=out, command="two", quiet=True)
    assert found.stages() == {"FGSM-RS": {0: "evaluated"}}
    assert [call["command"] for call in JsonLines(out / "calls.jsonl")] == ["one", "two"]
    assert not list(out.glob("*/.run.json*"))


def test_only_seeds_list_and_report_only(tmp_path, capsys):
    path, out = written(tmp_path), tmp_path / "out"
    assert main(["compare", str(path), "--out", str(out), "--list"]) == 0
    assert not out.exists() and capsys.readouterr().out.count("missing") == 6
    assert main(["compare", str(path), "--out", str(out), "--report-only"]) == 0
    assert {path.name for path in out.iterdir()} == {"table.md", "table.csv"}
    empty = table_of(out)["FGSM-RS"]
    assert empty.pop("n") == "0" and empty.pop("tiny") and set(empty.values()) == {""}
    assert main(["compare", str(path), "--out", str(out), "--only", "TRADES", "--seeds", "1"]) == 0
    runs = {path.name for path in out.iterdir() if path.is_dir()}
    assert runs == {"trades-weight-3-seed1", "trades-weight-6.5-seed1"}
    found = table_of(out)
    assert found["TRADES weight=3"]["n"] == "1" and "±" not in found["TRADES weight=3"]["clean"] != ""
    assert found["FGSM-RS"]["n"] == "0" and found["TRADES weight=3"]["time / FGSM-RS"] == ""
    assert main(["compare", str(path), "--out", str(out), "--only", "TRADES weight=3", "--seeds", "0"]) == 0
    assert main(["compare", str(path), "--out", str(out), "--list"]) == 0
    assert capsys.readouterr().out.count("evaluated") == 3


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def diverges(config, path, **options):
        if config.seed == 0:
            raise TrainingStopped("step 3: the loss is not finite")
        return train(config, path, **options)

    monkeypatch.setattr(compare_module, "train", diverges)
    path = written(tmp_path, rows=ROWS[:1])
    assert main(["compare", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "failed: FGSM-RS, seed 0: step 3: the loss is not finite" in capsys.readouterr().err
    assert table_of(tmp_path / "out")["FGSM-RS"]["n"] == "1"
    assert "failed: FGSM-RS, seed 0" in (tmp_path / "out" / "table.md").read_text()


def test_one_process_at_a_run(tmp_path):
    path = written(tmp_path, rows=ROWS[:1], seeds=[0])
    (tmp_path / "out").mkdir()
    with (
        exclusive(tmp_path / "out" / ".fgsm-rs-seed0.lock", "it"),
        pytest.raises(InputError, match="another process"),
    ):
        compare(path, out=tmp_path / "out", quiet=True)


# --- several processes


@pytest.fixture
def forked(monkeypatch):
    """Processes that have their imports behind them, in place of fresh interpreters."""

    def popen(words, *, stdin, stdout, stderr, start_new_session):
        assert words[:2] == [sys.executable, "-c"] and stdin == subprocess.DEVNULL and start_new_session
        return forks.start(*words[1:], stdout=stdout.fileno(), stderr=stderr.fileno())

    # of that module alone: the forks' own server is a fresh interpreter
    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))


def test_jobs_make_the_same_networks(done, forked, tmp_path):
    path, out = written(tmp_path, rows=ROWS[1:], seeds=[1]), tmp_path / "out"
    found = compare(path, out=out, jobs=2, command="the call", quiet=True)
    assert found.stages() == {"TRADES weight=3": {1: "evaluated"}, "TRADES weight=6.5": {1: "evaluated"}}
    for slug in ("trades-weight-3", "trades-weight-6.5"):
        run = f"{slug}-seed1/model.safetensors"
        assert (out / run).read_bytes() == (done / "out" / run).read_bytes()
        assert "epoch 2/2" in (out / "logs" / f"{slug}-seed1.log").read_text()
    assert list(JsonLines(out / "calls.jsonl")) == [{"command": "the call"}]


def test_a_signal_is_handed_on_and_the_runs_are_saved(forked, tmp_path):
    training = {**BASE["training"], "epochs": 100_000, "checkpoint_seconds": 1e6}
    path = written(tmp_path, base={**BASE, "training": training}, rows=ROWS[:1], seeds=[0])
    out = tmp_path / "out"

    def press():
        deadline = time.monotonic() + 200
        while len(list(out.glob("*/metrics.jsonl"))) < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Interrupted) as stopped:
        compare(path, out=out, jobs=2, quiet=True)
    thread.join()
    assert stopped.value.signal == signal.SIGINT and len(list(out.glob("*/resume.pt"))) == 1
    assert compare(path, out=out, report_only=True, quiet=True).stages() == {
        "FGSM-RS": {0: "interrupted"},
    }


def test_what_a_process_is_refused_is_told(tmp_path, monkeypatch):
    """The other one is ended, and not left behind."""
    path, out, started = written(tmp_path, rows=ROWS, seeds=[0]), tmp_path / "out", []
    start = processes._start
    monkeypatch.setattr(processes, "START", REFUSED)
    monkeypatch.setattr(processes, "_start", lambda *given: started.append(start(*given)) or started[-1])
    with pytest.raises(InputError, match=r"^FGSM-RS, seed 0: it: found another process; accepted: one at a time$"):
        compare(path, out=out, jobs=2, quiet=True)
    assert [process.poll() for process in started] == [2, 143]  # the third was not started


REFUSED = """
import signal, sys, time
from pathlib import Path
out, only = (Path(sys.argv[sys.argv.index(word) + 1]) for word in ("--out", "--only"))
if str(only) == "FGSM-RS":
    while not (out / "at work").exists():
        time.sleep(0.01)
    sys.exit(print("error: FGSM-RS, seed 0: it: found another process; accepted: one at a time") or 2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(out / "at work").touch()
time.sleep(100)
"""
"""Stands for two processes of a study: the first is refused when the second is at work, which then saves its run."""


# --- counting, with planted runs


def plant(
    trial, clean=None, pgd=None, *, seconds=(1.0, 2.0, 9.0), device="cpu", best=None, data="0", changed_row=None
) -> None:
    description = {
        "config": unstructure(trial.config), "device": "cpu", "device_name": device, "threads": 1,
        "versions": {"torch": "9.9"},
        "dataset": {"sha256": data, "shape": [1, 8, 8], "classes": 10, "test": 50},
    }  # fmt: skip
    folder = RunFolder.create(trial.path, description)
    folder.model.write_bytes(b"weights")
    folder.metrics.append(
        *({"kind": "epoch", "epoch": n + 1, "seconds": s, "loss": 1.0 / s} for n, s in enumerate(seconds)),
        {"kind": "diagnosis", "epoch": 3, "split": [0.5, float(trial.seed)]}, {"kind": "final", "seconds": 9.0},
    )  # fmt: skip
    cells = [("last", "clean", 0.0, clean), ("last", "pgd-2", 0.05, pgd), ("best", "pgd-2", 0.05, best)]
    folder.best.write_bytes(b"others")
    fields = ("checkpoint", "attack", "epsilon", "accuracy")
    same = {"images": 50, "first_image": 0, "versions": [{"torch": "9.8", "device": "elsewhere"}]}
    weights = {name: sha256(folder.weights_of(name)) for name in ("last", "best")}
    rows = [
        {**dict(zip(fields, cell, strict=True)), **same, "weights_sha256": weights[cell[0]], **(changed_row or {})}
        for cell in cells
        if cell[3] is not None
    ]
    folder.evaluation.write_text(json.dumps({"rows": rows}))


def test_hand_computed_numbers(tmp_path):
    """Mean and deviation of 0.5, 0.6, 0.7 are 0.6 and 0.1; the median of epochs of 1, 1 and 7 seconds is 1."""
    rows = [{"name": name} for name in ("A", "B", "C", "D")]
    path = written(tmp_path, rows=rows, seeds=[0, 1, 2], curves=[{"metric": "split.1", "kind": "diagnosis"}])
    out = tmp_path / "out"
    for trial in read_study(path).trials(out):
        if trial.row.label == "A":
            plant(trial, 0.5 + trial.seed / 10, 0.2)
        if trial.row.label == "B" and trial.seed < 2:
            plant(trial, 0.25, None if trial.seed else 0.125, seconds=(2.5, 5.0), best=0.5)
        if trial.row.label == "C" and trial.seed == 2:
            plant(trial, 1.0, 0.0, device="another")
    compare(path, out=out, report_only=True)
    found = table_of(out)
    titles = ["tiny", "n", "clean, last", "pgd-2, 0.05, last", "pgd-2, 0.05, best", "s/epoch", "time / A"]
    assert list(found["A"]) == titles
    assert list(found["A"].values()) == ["A", "3", "60.00 ± 10.00", "20.00 ± 0.00", "", "1.00 ± 0.00", "1.00"]
    wanted = ["B", "2", "25.00 ± 0.00", "12.50 (n = 1)", "50.00 ± 0.00", "2.50 ± 0.00", "2.50"]
    assert list(found["B"].values()) == wanted
    assert list(found["C"].values()) == ["C", "1", "100.00", "0.00", "", "1.00", ""]  # another machine's seconds
    assert list(found["D"].values()) == ["D", "0", "", "", "", "", ""]
    text = (out / "table.md").read_text()
    assert "6 of 12 runs" in text and "torch 9.8, 9.9;" in text and "device another, cpu, elsewhere;" in text
    (row, *_) = csv.DictReader((out / "table.csv").open())
    assert float(row["clean, last"]) == pytest.approx(0.6) and float(row["clean, last sd"]) == pytest.approx(0.1)
    assert row["clean, last n"] == "3" and row["pgd-2, 0.05, best"] == "" and row["pgd-2, 0.05, best n"] == "0"
    lines = list(csv.DictReader((out / "curves-split.1.csv").open()))
    assert [(line["row"], float(line["mean"]), line["sd"], line["n"]) for line in lines] == [
        ("A", 1.0, "1.0", "3"), ("B", 0.5, str(statistics.stdev([0, 1])), "2"), ("C", 2.0, "", "1"),
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"first_image": 50}, {"images": 49}, {"weights_sha256": "0"}])
def test_other_images_and_other_weights_are_not_averaged_in(change, tmp_path):
    path, out = written(tmp_path, rows=ROWS[:1]), tmp_path / "out"
    for trial in read_study(path).trials(out):
        plant(trial, 0.5 + trial.seed / 10, 0.2 + trial.seed / 10, changed_row=change if trial.seed else None)
    compare(path, out=out, report_only=True)
    found = table_of(out)["FGSM-RS"]
    assert (found["n"], found["clean"], found["pgd-2, 0.05"]) == ("2", "50.00 (n = 1)", "20.00 (n = 1)")
    assert "of 50 test images" in (out / "table.md").read_text()


def test_runs_on_other_data_are_not_averaged_in(tmp_path, capsys):
    path, out = written(tmp_path, rows=ROWS[:1]), tmp_path / "out"
    for trial in read_study(path).trials(out):
        plant(trial, 0.5, 0.2, data=f"{trial.seed}" * 64)
    assert main(["compare", str(path), "--out", str(out), "--report-only"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "fgsm-rs-seed1: found a run on images" in said and "accepted" in said


def test_what_is_not_trained_yet_does_not_count(tmp_path):
    path, out = written(tmp_path, rows=ROWS[:1]), tmp_path / "out"
    for trial in read_study(path).trials(out):
        plant(trial, 0.5, 0.2)
        if trial.seed == 1:
            metrics = RunFolder(trial.path).metrics
            metrics.rewrite([line for line in metrics if line["kind"] != "final"])
    compare(path, out=out, report_only=True)
    assert table_of(out)["FGSM-RS"]["n"] == "1" and "1 of 2 runs are trained" in (out / "table.md").read_text()


def test_certified_accuracy_says_of_how_many(tmp_path):
    path, out = written(tmp_path, rows=ROWS[:1], seeds=[0]), tmp_path / "out"
    (trial,) = read_study(path).trials(out)
    plant(trial, 0.5, 0.2)
    RunFolder(trial.path).metrics.append(
        {"kind": "final", "seconds": 9.0, "epsilon": 0.05, "certified_accuracy": 0.25, "images": 8}
    )
    compare(path, out=out, report_only=True)
    assert table_of(out)["FGSM-RS"]["certified, 0.05"] == "25.00"
    assert "of 50 (certified: 8) test images" in (out / "table.md").read_text()


def test_another_step_size_is_evaluated_again(done, tmp_path):
    path = tmp_path / "study"
    subprocess.run(["cp", "-rp", str(done), str(path)], check=True)
    written(path, evaluate={"attacks": ["pgd-2"], "images": 50, "step_size": 0.125}, curves=None)
    trial = next(read_study(path / "study.yaml").trials(path / "out"))
    assert list(unanswered(trial)) == [("last", "pgd-2", 0.05)]
    compare(path / "study.yaml", out=path / "out", quiet=True)
    rows = json.loads((trial.path / "evaluation.json").read_text())["rows"]
    assert [row["settings"]["step_size"] for row in rows if row["attack"] == "pgd-2"] == [0.125]


def test_a_broken_evaluation_is_named(tmp_path, capsys):
    path = written(tmp_path, rows=ROWS[:1], seeds=[0])
    (trial,) = read_study(path).trials(tmp_path / "out")
    plant(trial, 0.5, 0.5)
    RunFolder(trial.path).evaluation.write_text("{")
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--report-only"]) == 2
    assert "evaluation.json: cannot be read" in capsys.readouterr().err


def test_statistics():
    assert Statistic.of([]) is None and Statistic.of([None]) is None
    assert Statistic.of([0.5, None]) == Statistic(0.5, None, 1)
    assert Statistic.of([1.0, 3.0]) == Statistic(2.0, pytest.approx(2**0.5), 2)  # type: ignore[arg-type]


def test_radii():
    assert [radius(x) for x in (8 / 255, 1 / 255, 0.1, 0.031, 0.0, 1.0, 0.5)] == [
        "8/255", "1/255", "0.1", "0.031", "0", "1", "0.5",
    ]  # fmt: skip


def test_metrics_inside_metrics():
    line = {"a": {"b": [1, 2.5, None]}, "c": "x", "d": True, "e": None}
    assert value_at(line, "a.b.1") == 2.5 and value_at(line, "a.b.0") == 1.0
    assert {value_at(line, path) for path in ("a", "a.b", "a.b.2", "a.b.3", "a.b.x", "c", "d", "e", "f", "c.0")} == {
        None
    }
    assert Curve("split.1", "diagnosis").stem == "curves-split.1"


# --- accuracy over epsilon


def test_networks_are_shown_at_the_epsilon_that_they_were_trained_with(tmp_path):
    rows = [{"name": "A", "sweep": {"perturbation.epsilon": ["4/255", "8/255"]}}, {"name": "B"}]
    study = read_study(written(tmp_path, rows=rows))
    planted = {"A epsilon=4/255": (0.5, 0.7), "A epsilon=8/255": (0.2, 0.2), "B": (0.9, 0.9)}
    results = []
    for trial in study.trials(tmp_path / "out"):
        own = float(trial.config.perturbation.epsilon)
        found = {("last", "pgd-2", own): planted[trial.row.label][trial.seed], ("last", "pgd-2", 0.5): 0.0}
        results.append(TrialResult(trial, found, {}, None, {}, {}, ""))
    found = trained_at(study, results)
    assert set(found) == {"A"}
    (first, mean, deviation), (second, other, none) = found["A"]
    assert (first, second) == (4 / 255, 8 / 255) and none == 0
    assert (mean, other) == (pytest.approx(60), pytest.approx(20)) and deviation == pytest.approx(100 * 0.02**0.5)
    image = against_epsilon(study, results)
    assert image is not None and image.startswith(b"\x89PNG") and against_epsilon(study, results[2:3]) is None


def test_certified_accuracy_may_be_what_the_figure_shows(tmp_path):
    assert read_study(written(tmp_path, robustness="certified", base=BASE | {"certify": {"images": 5}})).rows
    with pytest.raises(InputError, match=r"robustness: found 'certified'; accepted: one of evaluate.attacks: pgd-2"):
        read_study(written(tmp_path, robustness="certified"))
