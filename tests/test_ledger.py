"""The ledger alone: whatever stops a call, no line is lost, none is repeated, and none of another question counts."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from certtrain import ledger
from certtrain.errors import InputError, Unwritable
from certtrain.ledger import Ledger, Line, Question, add_once, in_fixed_batches, mistyped
from certtrain.locking import lock_of
from certtrain.run_folder import JsonLines, LineFile

ROOT = Path(__file__).parents[1]
COUNT = 20


@dataclass(frozen=True)
class Squares(Question):
    """What is the square of each number? Quick arithmetic is wrong about the odd ones, and may be asked again."""

    power: int = 2
    slow: bool = True
    version: str = "1"
    size: int = 4
    count: int = COUNT
    patience: float = math.inf
    lots: int = 4
    asked: list[int] = field(default_factory=list)
    title = "squaring"

    @property
    def labels(self) -> list[int]:
        return [number % 3 for number in range(self.count)]

    @property
    def basis(self) -> dict:
        return {"power": self.power, "slow": self.slow, "versions": {"python": self.version}}

    def refuses_basis(self, basis: Line) -> str:
        return "" if basis.get("power") == self.power else "found another power; accepted: this one"

    def refuses_line(self, line: Line) -> str:
        return mistyped(line, {"value": int})

    def may_improve(self, line: Line, basis: Line) -> bool:
        return line["value"] < 0 and self.slow and not basis["slow"]

    def merge(self, line: Line, before: Line | None) -> Line:
        return {**line, "tries": 1 + (0 if before is None else before["tries"])}

    def batches(self, fresh: Sequence[int], again: Sequence[int]) -> list[list[int]]:
        return [*in_fixed_batches(fresh, self.size), *([list(again)] if again else [])]

    def answer(self, images, deadline=math.inf, report=lambda text: None) -> Iterator[list[Line]]:
        for first in range(0, len(images), self.lots):
            lot = images[first : first + self.lots]
            if len(self.asked) >= self.patience:
                raise KeyboardInterrupt
            self.asked.extend(lot)
            yield [
                {"index": n, "label": n % 3, "value": n**self.power if self.slow or n % 2 == 0 else -1,
                 "settings": self.name} for n in lot
            ]  # fmt: skip

    def figures(self, lines: Sequence[Line]) -> str:
        return f"{sum(line['value'] >= 0 for line in lines)} squares"

    def conclusion(self, lines: Sequence[Line]) -> str:
        return f"{len(lines)} numbers, {self.figures(lines)}"


@pytest.fixture(params=["its own bases", "shared bases"])
def book(request, tmp_path) -> Ledger:
    shared = JsonLines(tmp_path / "book" / "settings.jsonl") if request.param == "shared bases" else None
    return Ledger(JsonLines(tmp_path / "book" / "squares.jsonl"), shared)


def values(book: Ledger) -> dict[int, int]:
    """By index, where every index stands once, in order."""
    found = [(line["index"], line["value"]) for line in book.file if "index" in line]
    assert [index for index, _ in found] == sorted(dict(found))
    return dict(found)


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


WHOLE = {number: number**2 for number in range(COUNT)}


class TestResume:
    def test_a_finished_ledger_is_not_touched(self, book, tmp_path):
        found = book.ask(Squares(), range(COUNT), quiet=True)
        assert values(book) == WHOLE and [line["index"] for line in found] == list(range(COUNT))
        before, again = everything_in(tmp_path), Squares()
        assert book.ask(again, range(COUNT), quiet=True) == found and not again.asked
        assert everything_in(tmp_path) == before

    @pytest.mark.parametrize("lots", [1, 4])
    def test_interrupted_after_each_append(self, book, lots):
        for patience in range(0, COUNT + 1, lots):
            Path(book.file.path).unlink(missing_ok=True)
            first, second = Squares(patience=patience, lots=lots), Squares(lots=lots)
            if patience < COUNT:
                with pytest.raises(KeyboardInterrupt):
                    book.ask(first, range(COUNT), quiet=True)
            kept = book.file.path.read_bytes() if book.file.path.exists() else b""
            assert sorted(book.read(second)) == first.asked == list(range(len(first.asked)))
            book.ask(second, range(COUNT), quiet=True)
            assert book.file.path.read_bytes().startswith(kept) and values(book) == WHOLE
            assert first.asked + second.asked == list(range(COUNT))

    def test_cut_at_any_byte(self, book):
        book.ask(Squares(), range(6), quiet=True)
        whole = book.file.path.read_bytes()
        for keep in (*range(0, len(whole), 7), len(whole) - 1):
            book.file.path.write_bytes(whole[:keep])
            question = Squares()
            book.ask(question, range(6), quiet=True)
            assert book.file.path.read_bytes() == whole
            lines = whole[:keep].count(b"\n") - (book.shared is None and b"\n" in whole[:keep])
            assert question.asked == list(range(lines, 6))

    def test_killed_at_moments_that_nobody_chose(self, book):
        code = """
import sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from certtrain.ledger import Ledger
from certtrain.run_folder import JsonLines
from test_ledger import Squares
shared = JsonLines(Path(sys.argv[2])) if len(sys.argv) > 2 else None
Ledger(JsonLines(Path(sys.argv[1])), shared).ask(Squares(lots=1), range(20), quiet=True)
"""
        paths = [book.file.path, *([book.shared.path] if book.shared else [])]
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], cwd=ROOT)
        while process.poll() is None and (not book.file.path.exists() or not book.file.path.stat().st_size):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = book.file.path.read_bytes()
        question = Squares()
        book.ask(question, range(COUNT), quiet=True)
        assert book.file.path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]) and values(book) == WHOLE
        assert not lock_of(book.file.path).exists()

    def test_parts_in_any_order_make_the_whole(self, book):
        asked = [[7, 3, 3, 12], range(5), [19], range(COUNT)]
        questions = [Squares() for _ in asked]
        for question, images in zip(questions, asked, strict=True):
            found = book.ask(question, images, quiet=True)
            assert [line["index"] for line in found] == sorted(set(images))
        assert sorted(n for question in questions for n in question.asked) == list(range(COUNT))
        assert values(book) == WHOLE

    def test_batches_are_those_of_the_first_call(self):
        assert in_fixed_batches(range(2, 9), 4) == [[2, 3], [4, 5, 6, 7], [8]]
        assert in_fixed_batches([3, 5, 9], 4) == [[3], [5], [9]] and in_fixed_batches([], 4) == []


class TestBetterAnswers:
    def test_only_what_may_improve_is_asked_again(self, book):
        book.ask(Squares(slow=False), range(8), quiet=True)
        question = Squares()
        found = book.ask(question, range(10), quiet=True)
        assert question.asked == [8, 9, 1, 3, 5, 7] and values(book) == {n: n**2 for n in range(10)}
        assert [line["tries"] for line in found] == [1, 2, 1, 2, 1, 2, 1, 2, 1, 1]
        assert len({line["settings"] for line in found}) == 2 == len(book.bases())

    def test_the_last_of_several_lines_counts_also_after_a_kill(self, book):
        book.ask(Squares(slow=False), range(4), quiet=True)
        with pytest.raises(KeyboardInterrupt):
            book.ask(Squares(patience=1, lots=1), range(4), quiet=True)
        assert [line["index"] for line in book.file if "index" in line] == [0, 1, 2, 3, 1]
        question = Squares()
        assert book.read(question)[1]["value"] == 1
        book.ask(question, range(4), quiet=True)
        assert question.asked == [3] and values(book) == {n: n**2 for n in range(4)}

    def test_other_versions_go_on_under_their_own_name(self, book):
        for version, images in (("1", range(3)), ("2", range(6))):
            book.ask(Squares(version=version), images, quiet=True)
        names = [line["settings"] for line in book.file if "index" in line]
        assert [book.bases()[name]["versions"]["python"] for name in names] == ["1"] * 3 + ["2"] * 3


class TestAnotherQuestion:
    def test_a_ledger_of_its_own_is_begun_anew_and_one_with_shared_bases_refuses(self, book, capsys, tmp_path):
        book.ask(Squares(), range(5), quiet=True)
        before, other = everything_in(tmp_path), Squares(power=3)
        if book.shared:
            with pytest.raises(InputError, match=r"squares\.jsonl, line 1: found another power; accepted: this one"):
                book.ask(other, range(3), quiet=True)
            assert everything_in(tmp_path) == before and not other.asked
        else:
            book.ask(other, range(3))
            assert "squares.jsonl: rests on other weights or settings, begun anew" in capsys.readouterr().out
            assert values(book) == {0: 0, 1: 1, 2: 8} and len(book.bases()) == 1

    def test_two_ledgers_share_bases(self, tmp_path):
        shared = JsonLines(tmp_path / "settings.jsonl")
        one, two = (Ledger(JsonLines(tmp_path / f"{name}.jsonl"), shared) for name in "ab")
        one.ask(Squares(), range(3), quiet=True)
        two.ask(Squares(power=3), range(3), quiet=True)
        one.ask(Squares(), range(6), quiet=True)
        assert list(values(one).values()) == [0, 1, 4, 9, 16, 25] and list(values(two).values()) == [0, 1, 8]
        assert [line["power"] for line in shared] == [2, 3]

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            ({"index": COUNT}, "found index 20; accepted: 0 to 19"), ({"index": -1}, "found index -1; accepted: 0 to"),
            ({"index": True}, "found index True"), ({"index": "3"}, "found index '3'"),
            ({"label": 7}, "found label 7; accepted: label "), ({"value": 1.5}, "found value 1.5"),
            ({"settings": "?"}, "found settings '?'; accepted: what "), ({"settings": None}, "found settings None"),
        ],
    )  # fmt: skip
    def test_a_file_that_was_tampered_with_is_left_as_it_was(self, spoil, said, book, tmp_path):
        book.ask(Squares(), range(6), quiet=True)
        *lines, last = list(book.file)
        book.file.rewrite([*lines, {**last, **spoil}])
        before, question = everything_in(tmp_path), Squares()
        with pytest.raises(InputError) as error:
            book.ask(question, range(COUNT), quiet=True)
        assert str(error.value).startswith(f"{book.file.path}, line {len(lines) + 1}: {said}")
        assert everything_in(tmp_path) == before and not question.asked

    @pytest.mark.parametrize("content", [b"hello\n", b"[1]\n", b"3\n", b"\xff\n", b"null\n", b'{"index": 0}\n'])
    def test_another_file(self, content, book):
        book.file.path.parent.mkdir()
        book.file.path.write_bytes(content)
        with pytest.raises(InputError, match=r"squares\.jsonl, line 1: .*accepted: the file as written"):
            book.ask(Squares(), range(3), quiet=True)
        assert book.file.path.read_bytes() == content

    def test_bases_that_are_lost(self, tmp_path):
        book = Ledger(JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "verdicts" / "settings.jsonl"))
        book.ask(Squares(), range(3), quiet=True)
        book.shared.path.write_bytes(b'{"settings": [1]}\n{"other": 1}\n')
        with pytest.raises(InputError, match=r"line 1: found settings .*; accepted: what verdicts/settings.jsonl desc"):
            book.ask(Squares(), range(3), quiet=True)

    @pytest.mark.parametrize("images", [[COUNT], [-1], [0, 1, 99]])
    def test_images_that_there_are_not(self, images, book, tmp_path):
        with pytest.raises(InputError, match=r"^images: found -?\d+; accepted: 0 to 19$"):
            book.ask(Squares(), images, quiet=True)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
    def test_no_seconds(self, seconds, book, tmp_path):
        with pytest.raises(InputError, match=r"^total_timeout: found "):
            book.ask(Squares(), range(3), total_timeout=seconds, quiet=True)
        assert not list(tmp_path.iterdir())


class TestTime:
    def test_it_stops_between_batches_and_the_next_call_goes_on(self, book, capsys):
        """One batch is asked about, however short the time: calls that are cut again and again come to an end."""
        for done in range(4, COUNT, 4):
            found = book.ask(Squares(), range(COUNT), total_timeout=1e-9)
            assert [line["index"] for line in found] == list(range(done))
            assert f"stopped after 1e-09 s with {COUNT - done} images to go; the same" in capsys.readouterr().out
        assert book.ask(Squares(), range(COUNT), total_timeout=1e-9) and values(book) == WHOLE
        assert "stopped" not in capsys.readouterr().out

    def test_progress_says_how_far_it_is(self, book, capsys, monkeypatch):
        monkeypatch.setattr(ledger, "LINE_INTERVAL", 0.0)
        book.ask(Squares(), range(8))
        first, second, end = capsys.readouterr().out.splitlines()
        assert first.startswith("squaring: 4/8  4 squares  ") and second.startswith("squaring: 8/8  8 squares  ")
        assert end == "8 numbers, 8 squares"
        book.ask(Squares(), range(8), quiet=True)
        assert not capsys.readouterr().out


class TestRoom:
    def test_a_full_disk_keeps_what_was_written(self, book, monkeypatch):
        append, calls = LineFile.append_text, []

        def full(self, lines):
            if self == book.file and lines and '"index"' in lines:
                calls.append(lines)
            if len(calls) == 3:
                monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
            append(self, lines)

        monkeypatch.setattr(LineFile, "append_text", full)
        with pytest.raises(Unwritable, match=r"squares\.jsonl: cannot be written \(No space\)"):
            book.ask(Squares(), range(COUNT), quiet=True)
        monkeypatch.undo()
        assert book.file.path.read_bytes().endswith(b"}\n") and list(values(book)) == list(range(8))
        question = Squares()
        book.ask(question, range(COUNT), quiet=True)
        assert question.asked == list(range(8, COUNT)) and values(book) == WHOLE

    def test_no_room_from_the_start_is_known_before_anything_is_asked(self, book, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        question = Squares()
        with pytest.raises(Unwritable, match=r"squares\.jsonl: cannot be written \(Read-only\)"):
            book.ask(question, range(COUNT), quiet=True)
        assert not question.asked


HOLD = """
import sys, time
from pathlib import Path
from certtrain.run_folder import JsonLines
with JsonLines(Path(sys.argv[1])).exclusive():
    print("in", flush=True)
    time.sleep(600)
"""
ADD = """
import sys
from pathlib import Path
from certtrain.ledger import add_once
from certtrain.run_folder import JsonLines
for number in range(int(sys.argv[2])):
    add_once(JsonLines(Path(sys.argv[1])), {"settings": number}, "settings")
"""


class TestTwoProcesses:
    def test_the_second_is_refused_and_goes_on_when_the_first_is_gone(self, book):
        book.file.path.parent.mkdir()
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(book.file.path)], cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"in\n"
            question = Squares()
            with pytest.raises(InputError, match=rf"found another process \({holder.pid} on .*one at a time"):
                book.ask(question, range(3), quiet=True)
            assert not question.asked and not book.file.size()
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()
        assert len(book.ask(Squares(), range(3), quiet=True)) == 3

    def test_a_record_is_added_once_by_many(self, tmp_path):
        file = JsonLines(tmp_path / "new" / "settings.jsonl")
        words = [sys.executable, "-c", ADD, str(file.path), "30"]
        processes = [subprocess.Popen(words, cwd=ROOT) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert sorted(line["settings"] for line in file) == list(range(30))

    def test_a_torn_line_is_mended_before_the_next_is_added(self, tmp_path):
        file = JsonLines(tmp_path / "settings.jsonl")
        file.path.write_bytes(b'{"settings": 1}\n{"sett')
        for number in (1, 2, 2):
            add_once(file, {"settings": number}, "settings")
        assert [json.loads(line) for line in file.path.read_text().splitlines()] == [{"settings": 1}, {"settings": 2}]
