"""A run's images verified by α-β-CROWN: by a stand-in that says what it is told, and by the real one where it is."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import torch
from fake_abcrown import FakeAbcrown
from torch import Tensor
from walking import walk

import certtrain
from certtrain.command_line import main
from certtrain.config import override
from certtrain.data import Digits, Split
from certtrain.errors import InputError
from certtrain.ledger import Ledger
from certtrain.recipe import load_config
from certtrain.run_folder import JsonLines, RunFolder
from certtrain.verifiers.abcrown import HOME, PYTHON, Abcrown, configuration
from certtrain.verifiers.embedded_question import EmbeddedQuestion
from certtrain.verifiers.problem import Status
from certtrain.workflows import verify_with_abcrown as second_opinion
from certtrain.workflows.run import load_model
from certtrain.workflows.train import train
from certtrain.workflows.verify_with_abcrown import Agreement, agreement_between, verify_with_abcrown

ROOT = Path(__file__).parents[1]
COUNT = 30
VERDICTS = Path("run/verdicts/abcrown-0.02-nearest.jsonl")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    changes = {"export.images": "12", "certify.images": str(COUNT), "model.mean": "[0.3]", "model.std": "[0.35]"}
    config = load_config(ROOT / "configs" / "smoke.yaml", changes)
    return train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).path


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunFolder:
    """A finished and exported run in the working directory, under the name ``run``."""
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for name in (PYTHON, HOME):
        monkeypatch.delenv(name, raising=False)
    return RunFolder(tmp_path / "run")


@pytest.fixture
def fake(tmp_path) -> FakeAbcrown:
    return FakeAbcrown.install(tmp_path / "fake")


@pytest.fixture(scope="module")
def test_split() -> Split:
    return Digits().load().test


@pytest.fixture(scope="module")
def truth(trained) -> dict[str, list[int]]:
    """The images by what the embedded verifier says of them."""
    found: dict[str, list[int]] = {}
    for line in RunFolder(trained).verdicts:
        found.setdefault(line["status"], []).append(line["index"])
    assert found.keys() == {"verified", "falsified", "misclassified"} and all(len(some) > 1 for some in found.values())
    return found


@pytest.fixture(scope="module")
def points(trained, test_split) -> dict[int, Tensor]:
    """Counterexamples to what is false."""
    model, config = load_model(trained)
    images, labels = test_split.pixels(torch.arange(COUNT)), test_split.labels[:COUNT]
    verdicts = certtrain.certify(model, images, labels, config.perturbation, config.certify)
    return {verdict.index: verdict.counterexample for verdict in verdicts if verdict.counterexample is not None}


def verify(fake: FakeAbcrown, *words: str, verifier: str = "abcrown") -> int:
    return main(["verify", "run", "--verifier", verifier, *fake.options, *words])


def lines(path: Path = VERDICTS) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["index"] for line in found] == sorted({line["index"] for line in found})  # one line an image, in order
    return {line["index"]: line for line in found}


def statuses(path: Path = VERDICTS) -> dict[int, str]:
    return {number: line["status"] for number, line in lines(path).items()}


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def description(folder: RunFolder) -> dict:
    return json.loads(folder.run.read_text())


def edit(folder: RunFolder, changes: dict[str, str]) -> None:
    found = description(folder)
    folder.run.write_text(json.dumps({**found, "config": override(found["config"], changes)}))


class TestVerdicts:
    def test_they_have_the_form_of_our_own(self, run, fake, truth, points, test_split, capsys):
        safe = truth["verified"]
        fake.says({
            **{number: ("unsafe-pgd", point) for number, point in points.items()},
            safe[0]: "unknown", safe[1]: "safe (timed out)", safe[2]: "crash", safe[3]: "unsafe",
        })  # fmt: skip
        before = run.verdicts.path.read_bytes(), run.sums.read_bytes()
        assert verify(fake, "--images", f":{COUNT}") == 0
        said = capsys.readouterr()
        assert "30 test images by α-β-CROWN, epsilon 0.02" in said.out and str(VERDICTS) in said.out and not said.err
        expected = {number: status for status, numbers in truth.items() for number in numbers}
        expected |= {safe[0]: "unknown", safe[1]: "timeout", safe[2]: "error", safe[3]: "unknown"}
        assert statuses() == dict(sorted(expected.items()))

        known = {line["settings"]: line for line in run.settings}
        weights = run.weights_sha256()
        model, config = load_model(run.path)
        own_question = EmbeddedQuestion(
            model, test_split, 10, config.perturbation, config.certify, 0, {"weights": weights}
        )  # fmt: skip
        found = Ledger(JsonLines(VERDICTS), run.settings).read(own_question)
        assert list(found.values()) == list(lines().values())
        (own,) = list(run.verdicts)[:1]
        with torch.no_grad():
            predictions = model(test_split.pixels(torch.arange(COUNT))).argmax(1).tolist()
        for number, record in found.items():
            assert record.keys() | {"search", "search_seconds", "peak_memory"} == own.keys() | {"said"}
            assert record["prediction"] == predictions[number] and record["label"] == test_split.labels[number]
            assert (record["stage"], record["arithmetic"]) == ("abcrown", "nearest float32")
            assert record["lower_bound"] is None and record["spent"] == {"abcrown": record["seconds"]}
            assert (record["reason"] is None) == (record["status"] in truth)
        assert found[safe[0]]["reason"] == "unknown" and found[safe[1]]["reason"] == "timeout"
        assert f"ValueError: image {safe[2]}" in found[safe[2]]["reason"] and found[safe[2]]["said"] is None
        assert found[safe[3]]["reason"] == "its counterexample does not replay" and found[safe[3]]["said"] == "unsafe"
        assert all(record["seconds"] == 0.125 for number, record in found.items() if number != safe[2])
        settings = known[found[0]["settings"]]
        assert settings["verifier"] == "abcrown" and settings["weights"] == weights and settings["timeout"] == 2.0
        assert settings["configuration"] == configuration(2.0, "cuda" if torch.cuda.is_available() else "cpu")
        assert settings["abcrown"] == {"python": "3.11.0", "torch": "2.8.0"} and "certtrain" in settings["versions"]
        assert (run.verdicts.path.read_bytes(), run.sums.read_bytes()) == before
        logs = list((run.path / "verdicts" / "abcrown").iterdir())
        assert len(logs) == 2 and any("ValueError" in log.read_text() for log in logs)  # it crashed once

    def test_what_it_is_asked_is_what_was_exported(self, run, fake):
        assert verify(fake, "--images", ":12", "--timeout", "7", "--device", "cpu") == 0
        asked = fake.asked()
        assert [one["image"] for one in asked] == list(range(12))
        for one in asked:
            assert one["property"] == digest(run.specs / f"{one['image']:04d}.vnnlib")
            assert one["network"] == digest(run.onnx) == description(run)["export"]["network"]["sha256"]
            assert (one["shape"], one["timeout"], one["device"]) == ([-1, 1, 8, 8], 7.0, "cpu")

    def test_another_epsilon_is_another_question(self, run, fake):
        assert verify(fake, "--images", "3:5", "--epsilon", "1/51") == 0
        assert verify(fake, "--images", "3:5") == 0
        first, second = fake.asked()[::2]
        assert first["property"] != second["property"] == digest(run.specs / "0003.vnnlib")
        assert statuses(Path(f"run/verdicts/abcrown-{1 / 51!r}-nearest.jsonl")) == {3: "verified", 4: "verified"}

    def test_decided_images_are_not_asked_again(self, run, fake):
        fake.says({2: "crash", 4: "safe (timed out)", 5: "unknown"})
        assert verify(fake, "--images", ":8") == 0 and fake.images() == [0, 1, 2, 3, 4, 5, 6, 7]
        kept = {number: line for number, line in lines().items() if number not in (2, 4, 5)}
        fake.says({2: "crash"})
        assert verify(fake, "--images", ":8") == 0 and fake.images() == [2]  # a crash may be the machine's
        assert verify(fake, "--images", ":8", "--timeout", "1.5") == 0 and fake.images() == [2]
        assert verify(fake, "--images", "3:10", "--timeout", "2.5") == 0 and fake.images() == [8, 9, 4, 5]
        fake.says({})
        assert verify(fake, "--images", ":8") == 0 and fake.images() == [2]
        before = everything_in(run.path)
        assert verify(fake, "--images", ":10", "--timeout", "99") == 0 and fake.images() == []
        assert {k: v for k, v in everything_in(run.path).items() if "/abcrown/" not in k} == {
            k: v for k, v in before.items() if "/abcrown/" not in k
        }
        assert set(statuses().values()) == {"verified"} and list(lines()) == list(range(10))
        assert {number: lines()[number] for number in kept} == kept
        assert [line["timeout"] for line in run.settings if line.get("verifier")] == [2.0, 1.5, 2.5]

    def test_a_total_timeout_ends_it_and_the_next_call_goes_on(self, run, fake, capsys):
        assert verify(fake, "--images", ":6", "--total-timeout", "0.01") == 0
        assert "5 images to go; the same call goes on" in capsys.readouterr().out and list(lines()) == [0]
        fake.asked()
        assert verify(fake, "--images", ":6") == 0
        assert fake.images() == [1, 2, 3, 4, 5] and list(lines()) == list(range(6))

    def test_a_signal_stops_it_and_the_same_call_goes_on(self, run, fake, capsys):
        program = (fake.home / "abcrown.py").read_text()
        stop = 'if number == "3": import signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)'
        changed = program.replace('    print(f"Result', f'    {stop}\n    print(f"Result')
        assert changed != program
        (fake.home / "abcrown.py").write_text(changed)
        assert verify(fake, "--images", ":6") == 128 + 15
        assert "go on with: the same call" in capsys.readouterr().err
        (fake.home / "abcrown.py").write_text(program)
        done = list(lines())
        assert done == list(range(len(done))) and fake.images() == [0, 1, 2, 3]
        assert verify(fake, "--images", ":6") == 0
        assert fake.images() == list(range(len(done), 6)) and list(lines()) == list(range(6))


class TestReplay:
    def test_what_does_not_fool_is_unknown(self, run, fake, truth, points, test_split):
        """Nor a point that fools, but lies outside the ball."""
        wrong, far, late, good = *truth["verified"][:2], *truth["falsified"][:2]
        image = test_split.pixels(torch.tensor([wrong]))[0]
        fake.says({
            wrong: ("unsafe-pgd", image),
            far: ("unsafe-pgd", next(test_split.pixels(torch.tensor([n]))[0] for n in truth["verified"]
                                     if test_split.labels[n] != test_split.labels[far])),
            late: ("unsafe-bab (timed out)", points[late]),
            good: ("unsafe-bab", (points[good] + 5e-5 * (points[good] - 0.5).sign()))  # it tolerates that much outside
        })  # fmt: skip
        for number in (wrong, far, late, good):
            assert verify(fake, "--images", f"{number}:{number + 1}") == 0
        found = lines()
        for number in (wrong, far):
            assert (found[number]["status"], found[number]["said"]) == ("unknown", "unsafe-pgd")
            assert found[number]["reason"] == "its counterexample does not replay"
        for number in (late, good):
            assert (found[number]["status"], found[number]["reason"]) == ("falsified", None)

    def test_it_is_replayed_in_onnxruntime_on_the_exported_file(self, run, fake, truth, points, monkeypatch):
        number = truth["falsified"][0]
        fake.says({number: ("unsafe-pgd", points[number])})
        asked = ["--images", f"{number}:{number + 1}"]
        real, ran = second_opinion.replay_session, []

        def stubborn(proto):
            label = list(run.verdicts)[number]["label"]
            assert proto.SerializeToString() == run.onnx.read_bytes()
            return lambda image: ran.append(real(proto)(image)) or torch.eye(10)[[label]]

        with monkeypatch.context() as patch:
            patch.setattr(second_opinion, "replay_session", stubborn)
            assert verify(fake, *asked) == 0
        clean, fooled = ran
        label = list(run.verdicts)[number]["label"]
        assert (clean.argmax(1) == label).all() and (fooled.argmax(1) != label).all()
        assert statuses() == {number: "unknown"}
        assert verify(fake, *asked, "--timeout", "3") == 0 and statuses() == {number: "falsified"}

    def test_misclassified_images(self, run, fake, truth, points, test_split):
        """By a counterexample in the ball, whichever; said safe, it stays said: that is a contradiction."""
        first, second = truth["misclassified"][:2]
        fake.says({first: ("unsafe-pgd", test_split.pixels(torch.tensor([first]))[0]), second: "safe"})
        assert verify(fake, "--images", f":{COUNT}") == 0
        found = lines()
        assert found[first]["status"] == "misclassified" and found[first]["prediction"] != found[first]["label"]
        assert found[second]["status"] == "verified"


class TestBoth:
    def honest(self, fake, points, **others) -> None:
        fake.says({**{number: ("unsafe-pgd", point) for number, point in points.items()}, **others.get("but", {})})

    def test_they_agree(self, run, fake, truth, points, capsys):
        self.honest(fake, points, but={truth["verified"][0]: "unknown"})
        assert verify(fake, "--images", f":{COUNT}", verifier="both") == 0
        said = capsys.readouterr()
        assert not said.err and "contradictions: 0" in said.out
        assert "30 images, embedded and α-β-CROWN" in said.out
        rows = re.findall(r"^│ (\w+) +│ (\w+) +│ +(\d+) │ (\w*) +│$", said.out, re.MULTILINE)
        counts = {status: str(len(numbers)) for status, numbers in truth.items()}
        counts["verified"] = str(len(truth["verified"]) - 1)
        expected = {(status, status, count, "") for status, count in counts.items()}
        assert set(rows) == expected | {("verified", "unknown", "1", "differ")}
        assert str(VERDICTS) in said.out and "run/verdicts.jsonl" in said.out
        assert list(statuses(run.verdicts.path)) == list(range(COUNT))

    @pytest.mark.parametrize("status", ["falsified", "misclassified"])
    def test_it_proves_what_we_refute(self, status, run, fake, truth, points, capsys):
        number = truth[status][1]
        self.honest(fake, points, but={number: "safe-incomplete"})
        assert verify(fake, "--images", f":{COUNT}", verifier="both") == 1
        said = capsys.readouterr()
        assert said.err.startswith(f"CONTRADICTION: on the images [{number}] ") and said.err.count("\n") == 1
        assert str(VERDICTS) in said.err and "run/verdicts.jsonl" in said.err and "contradictions: 1" in said.out
        assert verify(fake, "--images", f"{number + 1}:{COUNT}", verifier="both") == 0  # the others agree

    def test_it_refutes_what_we_prove(self, run, fake, truth, points, capsys):
        number = truth["falsified"][0]
        doctored = [{**line, **({"status": "verified"} if line["index"] == number else {})} for line in run.verdicts]
        run.verdicts.rewrite(doctored)
        self.honest(fake, points)
        assert verify(fake, "--images", f":{COUNT}", verifier="both") == 1
        said = capsys.readouterr().err
        assert said.startswith(f"CONTRADICTION: on the images [{number}] ") and said.count("\n") == 1

    def test_each_has_its_own_verdicts(self, run, fake, points, capsys):
        self.honest(fake, points)
        words = ["--images", "0:9", "--epsilon", "0.01", "--stages", "ibp"]
        assert verify(fake, *words, verifier="embedded") == 0 and fake.images() == []
        assert verify(fake, *words, verifier="both") == 0 and fake.images() == list(range(9))
        own = statuses(Path("run/verdicts/embedded-0.01-nearest.jsonl"))
        other = statuses(Path("run/verdicts/abcrown-0.01-nearest.jsonl"))
        assert own.keys() == other.keys() == set(range(9)) and "9 images" in capsys.readouterr().out


def assert_refused(capsys, words: list[str], mentions: list[str]) -> None:
    """One line on stderr, ``error`` on stdout, nothing written."""
    before = everything_in(Path())
    assert main(["verify", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "error\n" and said.err.startswith("error: ") and said.err.count("\n") == 1
    for mention in [*mentions, "accepted"]:
        assert mention in said.err
    assert everything_in(Path()) == before


class TestBadInput:
    @pytest.mark.parametrize("verifier", ["abcrown", "both"])
    def test_an_interpreter_that_is_not_there(self, verifier, run, fake, capsys):
        words = ["run", "--verifier", verifier, "--abcrown-python", "nowhere/python", "--abcrown-home", "fake"]
        assert_refused(capsys, words, ["nowhere/python: found no such program", "--abcrown-python"])
        assert_refused(capsys, ["run", "--verifier", verifier], [PYTHON, "found nothing"])

    def test_a_checkout_that_is_none(self, run, fake, capsys):
        words = ["run", "--verifier", "abcrown", "--abcrown-python", str(fake.python)]
        assert_refused(capsys, [*words, "--abcrown-home", "run"], ["run: found no complete_verifier/abcrown.py"])
        assert_refused(capsys, words, [HOME, "found nothing"])

    @pytest.mark.parametrize("exported", [True, False])
    @pytest.mark.parametrize(
        ("words", "mentions"),
        [(["--images", "0:360"], ["images: found '0:360'"]),
         (["--stages", "ibp"], ["--stages", "both"]), (["--certify.batch_size", "3"], ["--certify.batch_size"]),
         pytest.param(["--device", "cuda"], ["device: found 'cuda'"], marks=NO_CUDA)],
    )  # fmt: skip
    def test_bad_words(self, exported, words, mentions, run, fake, capsys):
        """Also of a run that would be exported first."""
        if not exported:
            run.onnx.unlink()
        assert_refused(capsys, ["run", "--verifier", "abcrown", *fake.options, *words], mentions)
        assert fake.images() == []

    @pytest.mark.parametrize(("name", "value"), [("timeout", -1.0), ("timeout", float("nan")), ("total_timeout", 0.0)])
    def test_bad_numbers_from_python(self, name, value, run, fake):
        before = everything_in(Path())
        with pytest.raises(InputError, match=name):
            verify_with_abcrown("run", Abcrown.find(fake.python, fake.home), **{name: value}, quiet=True)
        assert everything_in(Path()) == before

    def test_a_ball_that_is_no_box(self, run, fake, capsys):
        edit(run, {"perturbation.type": "L2Ball"})
        words = ["run", "--verifier", "abcrown", *fake.options]
        assert_refused(capsys, words, ["perturbation: found L2Ball", "LinfBall"])

    def test_a_checkout_that_does_not_start(self, run, fake, capsys):
        (fake.home / "plan.json").write_text("{")
        assert verify(fake, "--images", ":3") == 2
        said = capsys.readouterr()
        assert said.out == "error\n" and said.err.count("\n") == 1 and "JSONDecodeError" in said.err
        assert str(run.path / "verdicts" / "abcrown") in said.err and VERDICTS.read_bytes() == b""

    def test_a_word_that_is_no_verifier(self, run, capsys):
        assert main(["verify", "run", "--verifier", "gurobi"]) == 2
        assert capsys.readouterr().err.startswith("error: argument --verifier: invalid choice: 'gurobi'")

    def test_verdicts_on_other_weights(self, run, fake, capsys):
        assert verify(fake, "--images", ":2") == 0
        changed = [{**line, "weights": "0" * 64} if line.get("verifier") else line for line in run.settings]
        run.settings.rewrite(changed)
        capsys.readouterr()
        assert verify(fake, "--images", ":3") == 2
        assert "line 1: found a verdict on other weights" in capsys.readouterr().err and len(fake.images()) == 2


class TestCheck:
    def test_ready(self, run, fake, capsys):
        before = everything_in(Path())
        assert main(["verify", "--check-abcrown", *fake.options]) == 0
        said = capsys.readouterr()
        assert said.out == f"α-β-CROWN is ready: {fake.home.absolute()} (python 3.11.0, torch 2.8.0)\n" and not said.err
        assert everything_in(Path()) == before

    def test_found_by_the_environment(self, run, fake, monkeypatch, capsys):
        monkeypatch.setenv(PYTHON, str(fake.python))
        monkeypatch.setenv(HOME, str(fake.folder))
        assert main(["verify", "--check-abcrown"]) == 0 and "is ready" in capsys.readouterr().out
        assert main(["verify", "run", "--verifier", "abcrown", "--images", ":2"]) == 0 and fake.images() == [0, 1]

    def test_what_is_missing_is_said(self, run, tmp_path, capsys):
        fake = FakeAbcrown.install(tmp_path / "bare", {"yaml": "", "torch": "ImportError: libcuda"})
        assert main(["verify", "--check-abcrown", *fake.options]) == 2
        said = capsys.readouterr()
        first, second = said.err.splitlines()
        assert said.out == "error\n" and first == "missing: torch: ImportError: libcuda"
        assert second.startswith("error: missing: yaml: not installed; ") and "pip install pyyaml" in second
        assert_refused(capsys, ["--check-abcrown", "--abcrown-python", "nowhere"], ["nowhere: found no such program"])


class TestExportedFirst:
    def test_where_there_is_no_export(self, run, fake, trained, capsys):
        before = everything_in(run.path)
        found = description(run)
        del found["export"]
        run.run.write_text(json.dumps(found))
        shutil.rmtree(run.specs)
        for path in (run.onnx, run.instances, run.abcrown, run.sums):
            path.unlink()
        assert verify(fake, "--images", ":2") == 0
        assert "exported: run/model.onnx" in capsys.readouterr().out and fake.images() == [0, 1]
        after = everything_in(run.path)
        assert {name: after[name] for name in before if name != "verdicts/settings.jsonl"} == {
            name: content for name, content in before.items() if name != "verdicts/settings.jsonl"
        }

    def test_where_it_is_not_of_these_weights(self, run, fake, capsys):
        run.onnx.write_bytes(b"another")
        assert verify(fake, "--images", ":1") == 0 and "exported: " in capsys.readouterr().out
        assert fake.asked()[0]["network"] == digest(run.onnx) == description(run)["export"]["network"]["sha256"]
        assert verify(fake, "--images", ":2") == 0 and "exported: " not in capsys.readouterr().out


def records(**statuses: str) -> list[dict]:
    return [{"index": int(name[1:]), "status": status} for name, status in statuses.items()]


class TestCompare:
    @walk(("one", "two"), list(itertools.product(get_args(Status), repeat=2)))
    def test_a_proof_against_a_refutation_is_a_contradiction(self, one, two):
        found = agreement_between(records(_7=one), records(_7=two))
        refuted = {"falsified", "misclassified"}
        wrong = "verified" in (one, two) and bool(refuted & {one, two})
        assert found == Agreement({(one, two): 1}, [7] if wrong else [])

    def test_it_is_symmetric(self):
        one = records(_4="verified", _2="falsified", _9="unknown", _1="verified", _3="verified", _8="timeout")
        two = records(_1="misclassified", _2="verified", _4="falsified", _3="verified", _8="verified", _6="error")
        found, other = agreement_between(one, two), agreement_between(two, one)
        assert found.contradictions == other.contradictions == [1, 2, 4]
        assert found.counts == {(first, second): count for (second, first), count in other.counts.items()}
        assert sum(found.counts.values()) == 5  # what only one has seen does not count
        assert found.counts["verified", "verified"] == 1 == found.counts["timeout", "verified"]

    def test_nothing_in_common(self):
        assert agreement_between(records(_1="verified"), records(_2="falsified")) == Agreement({}, [])
        assert agreement_between([], []) == Agreement({}, [])


@pytest.mark.abcrown
@pytest.mark.skipif(not (os.environ.get(PYTHON) and os.environ.get(HOME)), reason=f"needs α-β-CROWN: {PYTHON}, {HOME}")
class TestTheRealOne:
    @pytest.fixture
    def real(self, trained, tmp_path, monkeypatch) -> Path:
        assert Abcrown.find().missing() == []
        shutil.copytree(trained, tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        return tmp_path / "run"

    def test_it_contradicts_nothing(self, real, capsys):
        found: list[str] = []
        for epsilon in ("0.02", "0.05"):
            words = ["--verifier", "both", "--images", f":{COUNT}", "--epsilon", epsilon, "--timeout", "20"]
            assert main(["verify", "run", *words, "--device", "cpu"]) == 0, capsys.readouterr()
            said = capsys.readouterr().out
            assert "30 images, embedded and α-β-CROWN" in said and "contradictions: 0" in said
            found += statuses(Path(f"run/verdicts/abcrown-{epsilon}-nearest.jsonl")).values()
        assert len(found) == 2 * COUNT and {"verified", "falsified"} <= set(found) and "error" not in found

    def test_it_takes_the_files_as_they_are(self, real):
        """As the last line of ``certtrain export`` says."""
        abcrown = Abcrown.find()
        command = [str(abcrown.python), "abcrown.py", "--config", str(real / "abcrown.yaml")]
        kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
        done = subprocess.run(command, cwd=abcrown.home, env=kept, capture_output=True, text=True, timeout=500)
        words = re.findall(r"^Result: (\S+) in ", done.stdout, re.MULTILINE)
        own = [line["status"] for line in RunFolder(real).verdicts][:12]
        expected = ["safe" if status == "verified" else "unsafe" for status in own]
        assert [word.partition("-")[0] for word in words] == expected and len(set(words)) > 1, done.stderr[-2000:]
