"""Two processes at one run: what conflicts is refused, what does not is done, and no lock outlives its process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import start

import certtrain
from certtrain.command_line import main
from certtrain.config import structure, unstructure
from certtrain.errors import InputError, Unwritable
from certtrain.export import run as exported
from certtrain.export.onnx_file import OnnxFile
from certtrain.locking import exclusive, lock_of
from certtrain.recipe import Config, load_config
from certtrain.run_folder import JsonLines, RunFolder
from certtrain.verifiers import Certify
from certtrain.workflows.export import export
from certtrain.workflows.train import resume, train

ROOT = Path(__file__).parents[1]
HOLD = """
import os, sys, time
from pathlib import Path
from certtrain.locking import exclusive
with exclusive(Path(sys.argv[1]), "it"):
    child = os.fork() if len(sys.argv) > 2 else 1
    if child:
        print(child, flush=True)  # the child says nothing: its line could come first
    time.sleep(600)
"""
"""Holds a lock until it is killed; with a second word a forked child lives on, that inherited all descriptors."""


def holding(*words: str | Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HOLD, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def unfinished(run, smoke, monkeypatch) -> Path:
    """Trained, and stopped before its final line; an export copies the network's file, as writing it takes seconds."""
    recorded = RunFolder.open(smoke)[1]["export"]["network"]

    def copied(model, path, images):
        shutil.copy(smoke / "model.onnx", path)
        return OnnxFile(**{**recorded, "path": path})

    monkeypatch.setattr(exported, "export_onnx", copied)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:-1]))
    return run


class TestLock:
    def test_who_is_inside_is_said_and_nothing_stays(self, tmp_path):
        with exclusive(tmp_path / ".lock", "the run") as locked:
            assert locked
            with pytest.raises(InputError) as error, exclusive(tmp_path / ".lock", "the run"):
                pass
        assert str(error.value).startswith(f"the run: found another process ({os.getpid()} on ")
        assert "that writes it; accepted: one at a time" in str(error.value)
        assert not list(tmp_path.iterdir())
        with exclusive(tmp_path / ".lock", "it") as locked:
            assert locked

    @pytest.mark.parametrize("words", [(), ("with a child",)])
    def test_it_ends_with_its_process(self, words, tmp_path):
        """By SIGKILL, and with a forked child that inherited its descriptors and lives on."""
        lock = tmp_path / ".lock"
        holder = holding(lock, *words)
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(InputError, match=rf"another process \({holder.pid} on "), exclusive(lock, "it"):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert lock.exists()  # a stale one
            with exclusive(lock, "it") as locked:
                assert locked and json.loads(lock.read_text())["process"] == os.getpid()
        finally:
            holder.kill()
            holder.stdout.close()
            if child > 1:
                os.kill(child, signal.SIGKILL)
        assert not lock.exists()

    def test_one_of_many_at_a_time(self, tmp_path):
        """Also while lock files come and go under the hands of those that wait."""
        inside, most, rounds = [], [], []

        def work():
            for _ in range(8):
                with exclusive(tmp_path / ".lock", "it", wait=True) as locked:
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
                    rounds.append(locked)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 32 and all(rounds) and not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": 1}', b"\xff"])
    def test_a_lock_file_that_says_nothing(self, content, tmp_path):
        with exclusive(tmp_path / ".lock", "it"):
            (tmp_path / ".lock").write_bytes(content)
            with (
                pytest.raises(InputError, match="found another process that writes it"),
                exclusive(tmp_path / ".lock", "it"),
            ):
                pass

    def test_where_no_lock_can_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        for name in ("none", "file"):
            with (
                pytest.raises(Unwritable, match=r"\.lock: cannot be written"),
                exclusive(tmp_path / name / ".lock", "it"),
            ):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("number", [37, 38, 95])  # ENOLCK, ENOSYS, EOPNOTSUPP
    def test_where_no_locks_are_known(self, number, tmp_path, monkeypatch):
        monkeypatch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(OSError(number, "none")))
        with exclusive(tmp_path / ".lock", "it") as locked:
            assert not locked


CALLS = {
    "resume": lambda run: resume(run, quiet=True),
    "export": lambda run: export(run, quiet=True),
    "diagnose": lambda run: certtrain.diagnose(run, images=8, what=["cosine"], quiet=True),
    "verify": lambda run: certtrain.verify(run, images=":2", certify=Certify(stages=("ibp",)), quiet=True),
    "verify elsewhere": lambda run: certtrain.verify(run, images=":2", epsilon=0.5, certify=Certify(stages=("ibp",)),
                                                     quiet=True),
    "evaluate": lambda run: certtrain.evaluate(run, attacks=["pgd-1"], images=4, quiet=True),
}  # fmt: skip
LOCKS = {
    "the run": lambda run: run / ".lock",
    "its verdicts": lambda run: lock_of(run / "verdicts.jsonl"),
    "its diagnostics": lambda run: lock_of(run / "diagnostics.json"),
    "its evaluation": lambda run: lock_of(RunFolder(run).evaluated("last", "clean", 0.0).path),
}
CONFLICTS = {
    "the run": {"resume", "export"}, "its verdicts": {"resume", "verify"}, "its diagnostics": {"diagnose"},
    "its evaluation": {"evaluate"},
}  # fmt: skip


@pytest.mark.parametrize("held", LOCKS)
@pytest.mark.parametrize("call", CALLS)
def test_what_conflicts_is_refused_and_what_does_not_is_done(call, held, unfinished):
    lock = LOCKS[held](unfinished)
    lock.parent.mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in unfinished.rglob("*") if path.is_file()}
    with exclusive(lock, "it"):
        if call in CONFLICTS[held]:
            with pytest.raises(
                InputError, match=rf"found another process \({os.getpid()} on .*; accepted: one at a time"
            ):
                CALLS[call](unfinished)
            if held == "the run":
                assert before == {path: path.read_bytes() for path in before}
        else:
            CALLS[call](unfinished)
    CALLS[call](unfinished)
    assert not list(unfinished.rglob(".*"))


def test_two_that_resume_one_run(tmp_path):
    """The second is refused with one line; the first, killed, is gone on with, and no epoch is there twice."""
    run, words = tmp_path / "run", ["--training.epochs", "400", "--training.checkpoint_seconds", "0.1"]
    script = ROOT / "scripts" / "train.py"
    config = ["--config", ROOT / "configs" / "smoke.yaml", "--certify.enabled", "false", "--export.enabled", "false"]
    first = start(script, *config, *words, "--out", run)
    while first.poll() is None and not (run / "resume.pt").exists():
        time.sleep(0.02)
    second = subprocess.run([sys.executable, script, "--resume", run], cwd=ROOT, capture_output=True, text=True)
    assert first.poll() is None, "it was to be running still"
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"error: {run}: found another process ({first.pid} on " in second.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = start(script, "--resume", run)
    before = len(list(JsonLines(run / "metrics.jsonl")))
    while third.poll() is None and len(list(JsonLines(run / "metrics.jsonl"))) <= before + 2:
        time.sleep(0.02)
    third.send_signal(signal.SIGTERM)
    assert third.wait() == 128 + signal.SIGTERM
    epochs = [line["epoch"] for line in JsonLines(run / "metrics.jsonl")]
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > before


def test_two_that_begin_in_one_folder(smoke, tmp_path):
    """The second finds the run of the first, whenever it looks."""
    description = RunFolder.open(smoke)[1]
    with exclusive(tmp_path / ".lock", str(tmp_path)), pytest.raises(InputError, match="found another process"):
        RunFolder.create(tmp_path, description)
    (tmp_path / ".lock").write_text("of a process that was killed before it had begun")
    assert RunFolder.create(tmp_path, description).run.exists()
    with pytest.raises(InputError, match=r"found a run; accepted: .*--resume"):
        RunFolder.create(tmp_path, description)


def test_reading_takes_no_lock(run, capsys):
    with exclusive(run / ".lock", "it"), exclusive(lock_of(run / "verdicts.jsonl"), "it"):
        certtrain.load_model(run)
        assert RunFolder(run).final() and list(RunFolder(run).verdicts)
        assert resume(run, quiet=True).path == run  # finished: nothing is written
        assert main(["train", "--resume", str(run)]) == 0
    assert "certified" in capsys.readouterr().out


def test_a_whole_run_takes_its_locks_once(tmp_path):
    """Train, certify, evaluate and export nest; none waits for itself, and none is left."""
    recipe = unstructure(load_config(ROOT / "configs" / "smoke.yaml"))
    recipe["evaluate"] |= {"enabled": True, "attacks": ["pgd-2"], "images": 8}
    recipe["certify"]["images"] = 4
    run = train(structure(Config, recipe), tmp_path / "run", quiet=True).path
    assert (run / "model.onnx").exists() and (run / "evaluation.json").exists() and not list(run.rglob(".*"))
