"""Sweeps: nothing lost, nothing repeated, whatever stops them; limits of time and memory."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import start
from torch import nn

import certtrain
from certtrain.attacks import default_attack
from certtrain.bounds import LinfBall
from certtrain.command_line import main
from certtrain.config import unstructure
from certtrain.data import Split
from certtrain.errors import InputError
from certtrain.ledger import Ledger, images_of
from certtrain.run_folder import JsonLines
from certtrain.verifiers import Certify, EmbeddedQuestion, cascade
from certtrain.verifiers.records import by_stage, certified, reasons, worth_another_try

ROOT = Path(__file__).parents[1]
CHEAP = Certify(stages=("attack", "ibp"), batch_size=8)


def small_question(settings: Certify = CHEAP, count: int = 40, epsilon: float = 0.03) -> EmbeddedQuestion:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    images = torch.rand(count, 1, 4, 4)
    with torch.no_grad():
        labels = network(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return EmbeddedQuestion(network, Split(images, labels, 1), 4, LinfBall(epsilon), settings, 0, {"weights": "w"})


@pytest.fixture
def files(tmp_path) -> tuple[JsonLines, JsonLines]:
    return JsonLines(tmp_path / "verdicts.jsonl"), JsonLines(tmp_path / "verdicts" / "settings.jsonl")


MEASURED = ("seconds", "spent", "search_seconds", "peak_memory")


def timeless(records):
    return [{key: value for key, value in r.items() if key not in MEASURED} for r in records]


def refuse_to_work(*_):
    raise AssertionError("a verdict was asked for again")


class TestResume:
    @pytest.mark.parametrize("keep", [0.0, 0.01, 0.2, 0.5, 0.77, 0.999])
    def test_cut_at_any_byte_it_ends_as_if_never_cut(self, keep, files, monkeypatch):
        file, settings = files
        question = small_question()
        whole = Ledger(file, settings).ask(question, range(40), quiet=True)
        assert [record["index"] for record in whole] == list(range(40)) == [r["index"] for r in file]
        bytes_ = file.path.read_bytes()
        cut = bytes_[: int(keep * len(bytes_))]
        file.path.write_bytes(cut)
        asked, answer = [], cascade._answer
        monkeypatch.setattr(cascade, "_answer", lambda *a: asked.extend(a[1].index.tolist()) or answer(*a))
        again = Ledger(file, settings).ask(question, range(40), quiet=True)
        assert file.path.read_bytes().startswith(cut[: cut.rfind(b"\n") + 1])  # no verdict was lost
        assert not set(asked) & set(range(cut.count(b"\n")))  # nor repeated
        for one, two in zip(timeless(whole), timeless(again), strict=True):
            assert one["lower_bound"] == pytest.approx(two["lower_bound"], abs=1e-5)
            assert {**one, "lower_bound": 0} == {**two, "lower_bound": 0}

    def test_a_finished_sweep_is_not_touched(self, files, monkeypatch):
        file, settings = files
        question = small_question()
        expected = Ledger(file, settings).ask(question, range(40), quiet=True)
        with file.path.open("ab") as half:
            half.write(b'{"index": 3')
        Ledger(file, settings).ask(question, range(40), quiet=True)
        before = [(f.path.read_bytes(), f.path.stat().st_mtime_ns) for f in files]
        assert before[0][0].endswith(b"}\n")
        monkeypatch.setattr(cascade, "_answer", refuse_to_work)
        assert Ledger(file, settings).ask(question, range(40), quiet=True) == expected
        assert Ledger(file, settings).ask(question, range(5, 9), quiet=True) == expected[5:9]
        assert [(f.path.read_bytes(), f.path.stat().st_mtime_ns) for f in files] == before

    def test_parts_in_any_order_make_the_whole(self, files, tmp_path):
        file, settings = files
        for part in (range(30, 40), range(3, 20), range(40)):
            found = Ledger(file, settings).ask(small_question(), part, quiet=True)
            assert [record["index"] for record in found] == list(part)
        assert [record["index"] for record in file] == list(range(40))
        other = JsonLines(tmp_path / "other.jsonl")
        whole = Ledger(other, settings).ask(small_question(), range(40), quiet=True)
        assert [r["status"] for r in file] == [r["status"] for r in whole]
        assert len(list(settings)) == 1

    def test_really_killed(self, run):
        """SIGKILL at moments that nobody chose; a line that was whole once stays as it is."""
        words = ["--epsilon", "0.04", "--certify.batch_size", "8", "--stages", "attack,ibp,crown"]
        file, kills, kept = run / "verdicts" / "embedded-0.04-nearest.jsonl", 0, b""
        for patience in (0.05, 0.15):
            lines = file.read_bytes().count(b"\n") if file.exists() else 0
            process = start(ROOT / "scripts" / "verify.py", run, *words)
            while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") <= lines):
                time.sleep(0.01)
            time.sleep(patience)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            assert file.read_bytes().startswith(kept)
            kept = file.read_bytes()[: file.read_bytes().rfind(b"\n") + 1]
        assert kills and 0 < kept.count(b"\n") < 359
        assert main(["verify", str(run), *words]) == 0
        assert file.read_bytes().startswith(kept)
        assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == list(range(359))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_at_once_and_the_same_call_goes_on(self, number, run, monkeypatch, capsys):
        answer, calls = cascade._answer, []

        def signalled(*arguments):
            calls.append(1)
            if len(calls) == 10:
                os.kill(os.getpid(), number)
                time.sleep(5)
                refuse_to_work()
            return answer(*arguments)

        monkeypatch.setattr(cascade, "_answer", signalled)
        words = ["verify", str(run), "--epsilon", "0.01", "--certify.batch_size", "25", "--images", ":75"]
        assert main(words) == 128 + number
        assert "the same call" in capsys.readouterr().err
        assert main(words) == 0
        assert "75 test images" in capsys.readouterr().out


class TestBetterSettings:
    def test_more_seconds_retry_what_ran_out_of_time_and_nothing_else(self, files, monkeypatch):
        file, settings = files
        attack = dataclasses.replace(default_attack(LinfBall(), "falsify"), steps=1)
        full = Certify(batch_size=16, attack=attack)
        less = small_question(dataclasses.replace(full, timeout=1e-9))
        hasty = Ledger(file, settings).ask(less, range(40), quiet=True)
        left = {r["index"] for r in hasty if r["status"] == "timeout"}
        assert len(left) > 10 and {r["reason"] for r in hasty if r["index"] in left} == {"timeout"}
        asked, answer = set(), cascade._answer
        monkeypatch.setattr(cascade, "_answer", lambda *a: asked.update(a[1].index.tolist()) or answer(*a))
        done = Ledger(file, settings).ask(small_question(full), range(40), quiet=True)
        assert asked == left and not any(r["status"] == "timeout" for r in done)
        assert [r for r in done if r["index"] not in left] == [r for r in hasty if r["index"] not in left]
        assert [r["index"] for r in file] == list(range(40)) and list(file) == done  # one line an image again
        assert len({r["settings"] for r in done}) == 2 == len(list(settings))  # each says what it rests on
        assert Ledger(file, settings).ask(less, range(40)) == done

    def test_what_is_worth_another_try(self):
        section = unstructure(Certify(stages=("ibp", "crown"), timeout=5.0))
        late, open_ = {"status": "timeout", "reason": "timeout"}, {"status": "unknown", "reason": None}
        had = Certify(stages=("ibp", "crown"), timeout=5.0)

        def worth(record, **changes):
            return worth_another_try(record, dataclasses.replace(had, **changes), section)

        assert not worth(late) and not worth(open_) and not worth(late, timeout=4.0, stages=("ibp",))
        assert worth(late, timeout=6.0) and not worth(open_, timeout=6.0)  # time was not what was missing
        assert worth(open_, stages=("crown", "alpha")) and not worth(open_, alpha_steps=99, batch_size=7)
        assert worth({"status": "unknown", "reason": "out of memory"})
        assert worth_another_try(open_, had, {"stages": ["of the future"]})

    def test_the_better_bound_of_two_is_kept(self, files):
        file, settings = files
        question = small_question(Certify(stages=("crown",)), epsilon=0.1)
        first = Ledger(file, settings).ask(question, range(40), quiet=True)
        other = dataclasses.replace(question, settings=Certify(stages=("ibp",)))
        second = Ledger(file, settings).ask(other, range(40))
        assert any(r["settings"] != s["settings"] for r, s in zip(first, second, strict=True))
        for one, two in zip(first, second, strict=True):
            assert one["lower_bound"] is None or two["lower_bound"] >= one["lower_bound"]


class TestTime:
    def test_a_total_timeout_ends_the_sweep_and_the_next_goes_on(self, files, monkeypatch):
        file, settings = files
        answer = cascade._answer
        monkeypatch.setattr(cascade, "_answer", lambda *a: time.sleep(0.05) or answer(*a))
        found = Ledger(file, settings).ask(small_question(), range(40), total_timeout=0.35, quiet=True)
        assert 0 < len(found) < 40 and list(file) == found
        assert not any(r["status"] == "timeout" for r in found)  # time that nobody had is no verdict
        monkeypatch.setattr(cascade, "_answer", answer)
        rest = Ledger(file, settings).ask(small_question(), range(40), total_timeout=60, quiet=True)
        assert len(rest) == 40 and [r for r in rest if r in found] == found


class TestMemory:
    def test_the_sweep_goes_on_and_a_later_one_tries_again(self, files, monkeypatch):
        file, settings = files
        answer = cascade._answer

        def full(stage, problem, known):
            if stage.name == "ibp" and (len(problem) > 2 or 7 in problem.index):
                raise MemoryError
            return answer(stage, problem, known)

        monkeypatch.setattr(cascade, "_answer", full)
        found = Ledger(file, settings).ask(small_question(), range(40), quiet=True)
        assert len(found) == 40 and [r["index"] for r in found if r["reason"] == "out of memory"] == [7]
        assert reasons(found)["out of memory"] == 1
        monkeypatch.setattr(cascade, "_answer", answer)
        found = Ledger(file, settings).ask(small_question(), range(40), quiet=True)
        assert not [r for r in found if r["reason"] == "out of memory"]


class TestWhatARunAnswers:
    def test_its_own_question_and_another(self, run, capsys):
        own = (run / "verdicts.jsonl").read_bytes()
        assert main(["verify", str(run), "--epsilon", "1/51", "--stages", "ibp", "--images", ":20"]) == 0
        said = capsys.readouterr().out
        other = run / "verdicts" / f"embedded-{1 / 51!r}-nearest.jsonl"
        assert str(other) in said and "20 test images" in said and "ibp" in said
        assert (run / "verdicts.jsonl").read_bytes() == own and len(other.read_text().splitlines()) == 20
        assert main(["verify", str(run), "--epsilon", "0.02"]) == 0  # the run's own, so that its file grows
        assert (run / "verdicts.jsonl").read_bytes().startswith(own)
        assert len((run / "verdicts.jsonl").read_text().splitlines()) == 359

    def test_from_python(self, run):
        found = certtrain.verify(run, images=range(10, 30), epsilon=0.5, certify=Certify(stages=("ibp",)), quiet=True)
        assert [r["index"] for r in found.records] == list(range(10, 30)) and found.epsilon == 0.5
        assert list(JsonLines(found.file)) == found.records
        low, high = certified(found.records)
        assert 0 <= low <= high <= 1 and high - low == sum(reasons(found.records).values()) / 20
        table = by_stage(found.records)
        assert list(table) == ["clean", "ibp"] and table["clean"]["images"] == 20
        assert table["ibp"]["images"] == 20 - table["clean"].get("misclassified", 0)

    def test_other_arithmetics_have_files_of_their_own_and_are_counted_together(self, run, capsys):
        own = (run / "verdicts.jsonl").read_bytes()
        asked = ["verify", str(run), "--images", ":12", "--stages", "ibp,crown", "--arithmetic"]
        assert main([*asked, "nearest"]) == 0 and "by arithmetic" not in capsys.readouterr().out
        for arithmetic in ("real", "float32"):
            assert main([*asked, arithmetic]) == 0
            file = run / "verdicts" / f"embedded-0.02-{arithmetic}.jsonl"
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(lines) == 12 and {line["arithmetic"] for line in lines} == {arithmetic}
        said = " ".join(capsys.readouterr().out.split())
        assert "certificates by arithmetic: nearest " in said and " of 12, float32 " in said
        assert (run / "verdicts.jsonl").read_bytes() == own

    def test_an_arithmetic_that_does_not_exist(self, run, capsys):
        assert main(["verify", str(run), "--arithmetic", "exact"]) == 2
        said = capsys.readouterr().err
        assert "certify.arithmetic: found 'exact'; accepted: nearest, real, float32" in said and said.count("\n") == 1
        assert not list((run / "verdicts").glob("embedded-*"))

    def test_two_at_a_time_are_refused(self, run):
        with JsonLines(run / "verdicts.jsonl").exclusive(), pytest.raises(InputError, match="another process"):
            certtrain.verify(run, quiet=True)

    def test_the_summary_adds_up(self, smoke):
        final = json.loads((smoke / "metrics.jsonl").read_text().splitlines()[-1])
        decided = sum(n for row in final["decided"].values() for n in row.values())
        assert decided + sum(final["undecided"].values()) == final["images"] == 100
        proved = sum(row.get("verified", 0) for row in final["decided"].values())
        assert final["certified_accuracy"] == proved / 100 >= final["ibp_certified_accuracy"]

    @pytest.mark.parametrize(
        ("asked", "expected"),
        [(None, range(9)), (":", range(9)), ("2:", range(2, 9)), (":3", range(3)), ("0:9", range(9)),
         (range(1, 2), range(1, 2))],
    )  # fmt: skip
    def test_images(self, asked, expected):
        assert images_of(asked, 9) == expected

    @pytest.mark.parametrize(
        "asked", ["", "3", 3, "a:b", "-1:3", "3:3", "5:2", "0:10", "9:", "1:2:3", "0x1:3", range(0, 9, 2), range(9, 12)]
    )
    def test_no_images(self, asked):
        with pytest.raises(InputError, match=r"^images: found .*accepted: start:stop .* <= 9"):
            images_of(asked, 9)
