"""A run's exported files: what binds them together, what interrupts them, and what our own reader makes of them."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

import certtrain
from certtrain.bounds import LinfBall
from certtrain.command_line import main
from certtrain.config import override, unstructure
from certtrain.data import Digits
from certtrain.export import current_network, onnx_file, run
from certtrain.recipe import load_config
from certtrain.run_folder import RunFolder
from certtrain.verifiers import Certify
from certtrain.verifiers.abcrown import configuration
from certtrain.verifiers.cascade import robustness, run_cascade
from certtrain.verifiers.onnx_network import read_onnx
from certtrain.verifiers.problem import Specification
from certtrain.verifiers.vnncomp import answer
from certtrain.verifiers.vnnlib_reader import read_property
from certtrain.workflows import export as exporting
from certtrain.workflows import verify as verifying
from certtrain.workflows.run import load_model
from certtrain.workflows.train import resume, train

ROOT = Path(__file__).parents[1]

COUNT = 30
TRAINED = {"export.images": str(COUNT), "certify.images": "40", "model.mean": "[0.3]", "model.std": "[0.35]"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    config = load_config(ROOT / "configs" / "smoke.yaml", TRAINED)
    return train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).path


@pytest.fixture
def here(trained, tmp_path, monkeypatch) -> RunFolder:
    """A finished and exported run, in the working directory."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def known(trained, monkeypatch) -> None:
    """The network is not exported anew, which takes a second: its file is copied."""
    recorded = description(RunFolder(trained))["export"]["network"]

    def copied(model, path, images):
        shutil.copy(trained / "model.onnx", path)
        return onnx_file.OnnxFile(**{**recorded, "path": path})

    monkeypatch.setattr(run, "export_onnx", copied)


def description(folder: RunFolder) -> dict:
    return json.loads(folder.run.read_text())


def edit(folder: RunFolder, changes: dict[str, str]) -> None:
    found = description(folder)
    folder.run.write_text(json.dumps({**found, "config": override(found["config"], changes)}))


def without_export(folder: RunFolder) -> RunFolder:
    """As if it had been interrupted before its export."""
    found = description(folder)
    del found["export"]
    folder.run.write_text(json.dumps(found))
    shutil.rmtree(folder.specs)
    for path in (folder.onnx, folder.instances, folder.abcrown, folder.sums):
        path.unlink()
    return folder


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def sums(folder: RunFolder) -> dict[str, str]:
    lines = folder.sums.read_text().splitlines()
    return {line[66:]: line[:64] for line in lines if line[64:66] == "  "}


def assert_bound_together(folder: RunFolder, images: range, epsilon: float, timeout: float, boxes: bool = True) -> None:
    """What the run's files say of each other, and of the weights."""
    names = [f"{number:04d}.vnnlib" for number in images] if boxes else []
    assert sorted(path.name for path in folder.specs.iterdir()) == names
    rows = list(csv.reader(folder.instances.open()))
    assert rows == [["model.onnx", f"specs/{name}", f"{timeout:g}"] for name in names]
    files = ["model.onnx", *(f"specs/{name}" for name in names), "instances.csv", "abcrown.yaml"]
    assert sums(folder).keys() == set(files) and len(folder.sums.read_text().splitlines()) == len(files)
    for name, expected in sums(folder).items():
        assert hashlib.sha256((folder.path / name).read_bytes()).hexdigest() == expected
    found = description(folder)["export"]
    assert found["weights"] == hashlib.sha256(folder.model.read_bytes()).hexdigest()
    assert found["network"]["path"] == "model.onnx" and found["network"]["sha256"] == sums(folder)["model.onnx"]
    assert found["sums"] == {"path": "SHA256SUMS", "sha256": hashlib.sha256(folder.sums.read_bytes()).hexdigest()}
    assert found["network"]["folded"] and found["network"]["images"] == 359 and found["network"]["agreement"] == 1
    assert 0 <= found["network"]["difference"] <= 1e-5 * found["network"]["magnitude"]
    assert (found["epsilon"], found["timeout"]) == (epsilon, timeout)
    assert (found["properties"], found["first_image"]) == (len(names), images.start)
    assert yaml.safe_load(folder.abcrown.read_text()) == configuration(timeout, "cpu")
    assert current_network(folder, description(folder)) == folder.onnx
    ball, test = LinfBall(epsilon), Digits().load().test
    for name, number in zip(names, images, strict=boxes):
        (case,) = read_property(folder.specs / name, 64, 10).cases
        lower, upper = ball.ends(test.pixels(torch.tensor([number]))[0].flatten())
        assert torch.equal(case.lower.float(), lower) and torch.equal(case.upper.float(), upper)


class TestRun:
    def test_its_files(self, here):
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
    def test_sha256sum_reads_the_sums(self, here):
        command = ["sha256sum", "--strict", "-c", here.sums.name]
        assert subprocess.run(command, cwd=here.path, capture_output=True).returncode == 0
        (here.specs / "0003.vnnlib").write_bytes((here.specs / "0003.vnnlib").read_bytes() + b" ")
        assert subprocess.run(command, cwd=here.path, capture_output=True).returncode == 1

    def test_properties_say_what_certificates_say(self, here):
        test = Digits().load().test
        model, _ = load_model(here.path)
        with torch.no_grad():
            wrong = model(test.pixels(torch.arange(COUNT))).argmax(1) != test.labels[:COUNT]
        assert 0 < wrong.sum() < COUNT  # such images have a property like any other
        logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).double()
        logits[0] = 0.0  # a tie is unsafe
        for number in range(COUNT):
            (case,) = read_property(here.specs / f"{number:04d}.vnnlib", 64, 10).cases
            assert case.lower.min() >= 0 and case.upper.max() <= 1 and (case.lower < case.upper).all()
            expected = Specification.robust(test.labels[number : number + 1], 10)
            found = Specification(case.rows[None], case.offsets[None], case.clauses)
            assert torch.equal(case.clauses, expected.clauses)
            assert torch.equal(found.values(logits), expected.values(logits))
            assert torch.equal(found.worst(found.values(logits)), expected.worst(expected.values(logits)))

    @pytest.mark.usefixtures("known")
    def test_again_with_other_words(self, here):
        before, old = everything_in(here.path), description(here)
        for stale in ("0007.vnnlib.compiled", ".0008.vnnlib.77.tmp"):
            (here.specs / stale).write_text("stale")
        (here.specs / ".ipynb_checkpoints").mkdir()  # somebody else's
        found = exporting.export(here.path, images="3:6", epsilon=0.05, timeout=1234567.5, quiet=True)
        assert found == description(here)["export"] and found["timeout"] == 1234567.5
        assert [row[2] for row in csv.reader(here.instances.open())] == 3 * ["1234567.5"]
        exporting.export(here.path, images=range(3, 6), epsilon=0.05, timeout=7, quiet=True)
        (here.specs / ".ipynb_checkpoints").rmdir()
        assert_bound_together(here, range(3, 6), 0.05, 7.0)
        new = description(here)
        assert list(new) == list(old) and {**new, "export": 0} == {**old, "export": 0}
        after = everything_in(here.path)
        assert before["model.onnx"] == after["model.onnx"] and before["specs/0003.vnnlib"] != after["specs/0003.vnnlib"]
        changed = {name for name in before if before[name] != after.get(name)} - {
            f"specs/{n:04d}.vnnlib" for n in range(30)
        }
        assert changed == {"run.json", "instances.csv", "abcrown.yaml", "SHA256SUMS"}
        exporting.export(here.path, quiet=True)
        assert everything_in(here.path) == before

    def test_in_another_process_the_same_bytes(self, here):
        before = everything_in(here.path)
        command = [sys.executable, str(ROOT / "scripts" / "export.py"), "run"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and "30 properties at epsilon 0.02" in done.stdout
        assert everything_in(here.path) == before

    @pytest.mark.parametrize("enabled", [True, False])
    def test_a_finished_run_that_lacks_its_export_is_resumed(self, enabled, here, trained):
        edit(without_export(here), {"export.enabled": str(enabled).lower()})
        verdicts = here.verdicts.path.read_bytes()
        assert resume(here.path, quiet=True).final()
        assert here.verdicts.path.read_bytes() == verdicts
        if enabled:
            assert_bound_together(here, range(COUNT), 0.02, 60.0)
            assert here.onnx.read_bytes() == (trained / "model.onnx").read_bytes()
            before = everything_in(here.path), here.onnx.stat().st_mtime_ns
            resume(here.path, quiet=True)
            assert (everything_in(here.path), here.onnx.stat().st_mtime_ns) == before
        else:
            assert not here.onnx.exists() and not here.specs.exists() and "export" not in description(here)

    def test_a_recipe_without_an_export_ends_without_one(self, here):
        edit(without_export(here), {"export.enabled": "false"})
        *lines, final = here.metrics
        here.metrics.rewrite(lines)  # as if it had been stopped before its last line
        again = resume(here.path, quiet=True).final()
        assert again and again["certified_accuracy"] == final["certified_accuracy"]
        assert not here.onnx.exists() and not here.specs.exists() and "export" not in description(here)

    def interrupted(self, monkeypatch, call) -> None:
        write, written = run.write_property, []

        def failing(path, *arguments):
            if len(written) == 3:
                raise KeyboardInterrupt
            written.append(path)
            write(path, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run, "write_property", failing)
            call()

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize("go_on", [resume, exporting.export])
    def test_interrupted_it_is_finished(self, go_on, here, monkeypatch):
        without_export(here)
        self.interrupted(monkeypatch, lambda: resume(here.path, quiet=True))
        assert current_network(here, description(here)) is None
        go_on(here.path, quiet=True)
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize("go_on", [resume, exporting.export])
    def test_interrupted_when_it_replaces_another(self, go_on, here, monkeypatch):
        self.interrupted(monkeypatch, lambda: exporting.export(here.path, images="0:9", epsilon=0.5, quiet=True))
        assert not description(here)["export"]  # nothing is said of files that are half old, half new
        assert current_network(here, description(here)) is None
        go_on(here.path, quiet=True)
        assert_bound_together(here, range(COUNT), 0.02, 60.0)

    @pytest.mark.usefixtures("known")
    def test_a_ball_that_is_no_box_has_no_properties(self, here):
        edit(here, {"perturbation.type": "L2Ball", "perturbation.epsilon": "0.02"})
        found = exporting.export(here.path, timeout=5.0, quiet=True)
        assert found["properties"] == 0
        assert_bound_together(here, range(COUNT), 0.02, 5.0, boxes=False)

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize(("asked", "count"), [("0", 0), ("7", 7), ("null", 359), ("100000", 359)])
    def test_as_many_images_as_the_recipe_says(self, asked, count, here, monkeypatch):
        monkeypatch.setattr(run, "write_property", lambda path, *_: path.write_text("a property"))
        edit(here, {"export.images": asked, "export.timeout": "2.5"})
        found = exporting.export(here.path, quiet=True)
        assert (found["properties"], found["timeout"]) == (count, 2.5) and len(list(here.specs.iterdir())) == count

    def test_a_network_that_is_not_current(self, here):
        assert current_network(here, description(here)) == here.onnx
        for path in (here.model, here.onnx):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert current_network(here, description(here)) is None
            path.write_bytes(content)
            assert current_network(here, description(here)) == here.onnx
        here.onnx.unlink()
        assert current_network(here, description(here)) is None
        assert current_network(here, {}) is None

    def test_parity_fails_and_the_older_export_stays(self, here, monkeypatch, capsys):
        before = everything_in(here.path)
        monkeypatch.setattr(onnx_file, "TOLERANCE", 0.0)
        assert main(["export", "run", "--epsilon", "0.3"]) == 2
        assert "run/model.onnx: not written" in capsys.readouterr().err and everything_in(here.path) == before


class TestSecondReader:
    """Our verifier on the files, against our verifier on the module."""

    @pytest.mark.usefixtures("known")
    @pytest.mark.parametrize("epsilon", [0.02, 0.04])
    def test_the_front_door_answers_as_certify_does(self, epsilon, here):
        exporting.export(here.path, epsilon=epsilon, quiet=True)
        model, _ = load_model(here.path)
        test = Digits().load().test
        verdicts = certtrain.certify(model, test.pixels(torch.arange(COUNT)), test.labels[:COUNT], epsilon)
        words = {"verified": "holds", "falsified": "violated", "misclassified": "violated"}
        found = [answer(here.onnx, here.specs / f"{number:04d}.vnnlib").word for number in range(COUNT)]
        assert found == [words[verdict.status] for verdict in verdicts]
        assert {verdict.status for verdict in verdicts} == words.keys()

    def test_the_same_bounds_come_out_of_the_file(self, here):
        test = Digits().load().test
        model, _ = load_model(here.path)
        images, labels = test.pixels(torch.arange(COUNT)), test.labels[:COUNT]
        found = []
        for stages in (("ibp",), ("crown_ibp",), ("crown",), ("attack", "alpha")):
            for network in (model, read_onnx(here.onnx).module):
                problem = robustness(network, images, labels, torch.arange(COUNT), 10, LinfBall(0.03))
                found.append(run_cascade(problem, Certify(stages=stages).build(0)))
            own, read = found[-2:]
            assert [verdict.status for verdict in own] == [verdict.status for verdict in read]
            tolerance = 1e-5 if "alpha" not in stages else 1e-3  # an ascent goes its own way
            for one, two in zip(own, read, strict=True):
                assert one.lower_bound == pytest.approx(two.lower_bound, abs=tolerance)
        assert len({tuple(verdict.status for verdict in verdicts) for verdicts in found}) > 1

    def test_counterexamples_have_to_fool_the_file_too(self, here, monkeypatch):
        asked = {"epsilon": 0.1, "images": range(COUNT), "certify": Certify(stages=("attack",)), "quiet": True}
        test = Digits().load().test
        all_images = test.pixels(torch.arange(COUNT)).flatten(1)
        seen = []

        def stubborn(proto):
            def replay(image: Tensor) -> Tensor:
                """Right about whatever image this one came from."""
                seen.append(image)
                nearest = (all_images - image.flatten()).abs().amax(1).argmin()
                return F.one_hot(test.labels[nearest], 10).float()[None]

            return replay

        shutil.copytree(here.path, "other")
        monkeypatch.setattr(verifying, "replay_session", stubborn)
        held = certtrain.verify("run", **asked).records
        assert seen and {record["status"] for record in held} == {"misclassified", "unknown"}
        Path("other/model.onnx").unlink()  # nothing to replay in
        assert "falsified" in {record["status"] for record in certtrain.verify("other", **asked).records}

    def test_it_is_onnxruntime_that_they_are_replayed_in(self, here, monkeypatch):
        ran, real = [], verifying.replay_session

        def watched(proto):
            replay = real(proto)
            return lambda image: ran.append(replay(image)) or ran[-1]

        monkeypatch.setattr(verifying, "replay_session", watched)
        found = certtrain.verify(
            "run", epsilon=0.1, images=range(COUNT), certify=Certify(stages=("attack",)), quiet=True
        ).records
        falsified = [record["status"] for record in found].count("falsified")
        assert 0 < falsified <= len(ran) and all(logits.shape == (2, 10) for logits in ran)


RUNS = {
    "no folder": ([], ["found no run folder", "export RUN_DIR"]),
    "not a folder": (["nowhere"], ["nowhere: found no run.json"]),
    "a file": (["run/run.json"], ["run/run.json"]),
    "two folders": (["run", "run"], ["'run'"]),
    "one image": (["run", "--images", "7"], ["images: found '7'", "start:stop", "359"]),
    "no images": (["run", "--images", "7:7"], ["images: found '7:7'"]),
    "images outside": (["run", "--images", "0:360"], ["images: found '0:360'", "<= 359"]),
    "images are missing": (["run", "--images"], ["--images"]),
    "negative epsilon": (["run", "--epsilon", "-0.1"], ["epsilon: found -0.1", ">= 0"]),
    "epsilon is NaN": (["run", "--epsilon", "nan"], ["--epsilon: found 'nan'", "a radius >= 0"]),
    "epsilon over 0": (["run", "--epsilon", "1/0"], ["--epsilon: found '1/0'"]),
    "no time": (["run", "--timeout", "0"], ["timeout: found 0", "seconds > 0"]),
    "endless": (["run", "--timeout", "inf"], ["--timeout: found 'inf'", "seconds > 0"]),
    "another device": (["run", "--device", "cpu"], ["--device: cannot be changed"]),
    "an abbreviation": (["run", "--eps", "0.1"], ["--eps: cannot be changed"]),
}  # fmt: skip


def assert_refused(folder: Path, capsys, words: list[str], mentions: list[str]) -> None:
    before = everything_in(folder)
    assert main(["export", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.endswith("\n") and said.err.count("\n") == 1 and not said.out
    for mention in [*mentions, "accepted"]:
        assert mention in said.err
    assert everything_in(folder) == before
    assert main(["export", *words, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.endswith(said.err)


class TestCommandLine:
    @pytest.mark.usefixtures("known")
    def test_options(self, here, capsys):
        assert main(["export", "run", "--images", "5:9", "--epsilon", "2/255", "--timeout", "3/2"]) == 0
        said = capsys.readouterr()
        assert_bound_together(here, range(5, 9), 2 / 255, 1.5)
        assert "4 properties at epsilon 0.00784314" in said.out and not said.err
        assert str(here.abcrown) in said.out and "run/instances.csv" in said.out and "run/SHA256SUMS" in said.out

    @pytest.mark.parametrize(("words", "mentions"), RUNS.values(), ids=RUNS)
    def test_bad_words(self, words, mentions, here, capsys):
        assert_refused(here.path.parent, capsys, words, mentions)

    def test_a_run_that_is_not_finished(self, here, capsys):
        without_export(here).model.unlink()
        assert_refused(here.path.parent, capsys, ["run"], ["model.safetensors", "found no weights", "--resume run"])

    def test_other_data(self, here, capsys):
        found = description(here)
        found["dataset"]["sha256"] = "0" * 64
        here.run.write_text(json.dumps(found))
        assert_refused(here.path.parent, capsys, ["run"], ["data: found images", "000000"])

    def test_training_ends_with_an_export(self, trained, here):
        """And the recipe in ``run.json`` says which."""
        assert description(here)["config"] == unstructure(load_config(ROOT / "configs" / "smoke.yaml", TRAINED))
        written = {"enabled": True, "images": COUNT, "timeout": 60.0, "vnnlib_version": 1.0}
        assert description(here)["config"]["export"] == written
