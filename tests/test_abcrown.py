"""The adapter to α-β-CROWN, on a stand-in that speaks as the real one does."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

from certtrain.errors import InputError
from certtrain.verifiers import abcrown
from certtrain.verifiers.abcrown import HOME, PYTHON, Abcrown, ResultLine, configuration, parse

FAKE = '''
import csv, json, os, pickle, signal, subprocess, sys, time
from pathlib import Path

import yaml

if os.environ.get("FAKE") == "library":
    import no_such_library
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
general, attack, model = config["general"], config["attack"], config["model"]
assert Path(model["onnx_path"]).read_text() == "network" and model["input_shape"] == [-1, 1, 1, 2]
assert os.getcwd() == os.path.dirname(os.path.abspath(__file__))
print("Result: safe in 0.0 seconds")  # as a hostile network's names could
if os.environ.get("FAKE") == "silent":
    sys.exit(0)
if os.environ.get("FAKE") == "stuck":
    time.sleep(600)


class arguments:
    Globals = {}


def default_adv_saver(x, y, path):
    Path(path).write_text("(" + "".join(f"(X_{i}  {v})\\n" for i, v in enumerate(x)) + "(Y_0  1.0)\\n(Y_1  -0.5))")


def offspring(path):
    """A sleeper that SIGTERM does not end."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()
    Path(path).write_text(json.dumps([os.getpid(), child.pid]))


root = Path(general["root_path"])
for place, (name,) in enumerate(list(csv.reader((root / general["csv_name"]).open()))):
    arguments.Globals["example_idx"] = place
    print(f'\\n {"%" * 35} idx: {place}, vnnlib ID: {place} {"%" * 35}')
    compiled = Path(f"{root / name}.compiled")
    if compiled.exists():
        pickle.loads(compiled.read_bytes())
    compiled.write_bytes(pickle.dumps(0))
    what, *rest = (root / name).read_text().split()
    word = {"verified": "safe-incomplete", "falsified": "unsafe-pgd", "late": "safe (timed out)",
            "late-point": "unsafe-pgd (timed out)"}.get(what, "unknown")
    if what in ("falsified", "late-point"):
        eval(attack["adv_saver"])([float(rest[0]), 0.1], None, attack["cex_path"])
    if what == "environment":
        print("ENVIRONMENT " + json.dumps(dict(os.environ)))
    if what == "crash":
        offspring(rest[0]) if rest else None
        raise ValueError(f"of {place}")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "silent":
        sys.exit(0)
    if what == "hang":
        offspring(rest[0])
        time.sleep(600)
    sys.stderr.write("\\x1b[31m 50%|#####     |\\x1b[0m\\r")
    print(f"Result: {word} in {99.5 if what == 'late-unknown' else 0.125:.4f} seconds")
print("############# Summary #############")
'''

REAL = """\
Internal results will be saved to /tmp/certtrain-abcrown-gbmtyhzf/results.

 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%% idx: 0, vnnlib ID: 0 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%
784 inputs and 10 outputs in vnnlib
Verified with initial CROWN!
verified with init bound!
Result: safe-incomplete (timed out) in 1.9293 seconds

 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%% idx: 1, vnnlib ID: 1 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%
Time: pickout 0.0185    decision 0.8425    set_bounds 0.0006    solve 1.3923    add 0.0511
Time out!!!!!!!!
Result: unknown in 25.5733 seconds

 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%% idx: 2, vnnlib ID: 2 %%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%%
Saving counterexample to /tmp/certtrain-abcrown-gbmtyhzf/point

verified_status unsafe-pgd
verified_success True
Result: unsafe-pgd in 3.5906 seconds
############# Summary #############
Problem instances count: 5 , total verified (safe/unsat): 1 , total falsified (unsafe/sat): 2 , timeout: 2
mean time for ALL instances (total 5):9.423669564373519, max time: 25.573342084884644
Traceback (most recent call last):
  File "abcrown.py", line 394, in <module>
    abcrown.main()
             ^^^^^^
  File "read_vnnlib.py", line 261, in read_vnnlib
    assert groups, f"failed parsing line: {line}"
AssertionError: failed parsing line: (assert (<=
"""
"""Lines that the real one printed (8250d5f), in order."""


class Setting:
    """A stand-in for α-β-CROWN, and properties that say what it should do."""

    def __init__(self, folder: Path, **limits):
        self.folder, self.logs, self.specs = folder, folder / "logs", folder / "specs"
        for path in (self.specs, folder / "home" / "complete_verifier"):
            path.mkdir(parents=True)
        (folder / "home" / "complete_verifier" / "abcrown.py").write_text(FAKE)
        (folder / "model.onnx").write_text("network")
        self.abcrown = Abcrown(Path(sys.executable), folder / "home" / "complete_verifier", **limits)

    def run(self, *contents: str, timeout: float = 60.0):
        paths = [self.specs / f"{number:04d}.vnnlib" for number in range(len(contents))]
        for path, content in zip(paths, contents):
            path.write_text(content)
        settings = configuration(timeout, "cpu")
        network = self.folder / "model.onnx"
        return self.abcrown.run(network, paths, shape=(1, 1, 2), settings=settings, logs=self.logs)

    def logged(self) -> int:
        return len(list(self.logs.iterdir()))


@pytest.fixture
def setting(tmp_path, monkeypatch) -> Setting:
    monkeypatch.delenv("FAKE", raising=False)
    return Setting(tmp_path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def family(path: Path) -> list[int]:
    until = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return json.loads(path.read_text())


def gone(path: Path) -> bool:
    """Whether the process and its child are: the kernel takes a moment."""
    until = time.monotonic() + 5
    pids = family(path)
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_answers_come_in_order_from_one_process(setting):
    contents = ("verified", "falsified 0.25", "late", "late-unknown", "unknown", "falsified 0.5", "late-point 0.75")
    answers = list(setting.run(*contents))
    words = ["verified", "falsified", "timeout", "timeout", "unknown", "falsified", "timeout"]
    assert [answer.status for answer in answers] == words
    assert [answer.number for answer in answers] == list(range(7)) and setting.logged() == 1
    said = ["safe-incomplete", "unsafe-pgd", "safe", "unknown", "unknown", "unsafe-pgd", "unsafe-pgd"]
    assert [answer.said for answer in answers] == said and answers[3].seconds == 99.5
    points = {answer.number: answer.counterexample for answer in answers if answer.counterexample is not None}
    assert points.keys() == {1, 5, 6} and points[1].dtype == torch.float32
    for number, value in ((1, 0.25), (5, 0.5), (6, 0.75)):  # each its own, though it may have gone on long ago
        assert torch.equal(points[number], torch.tensor([value, 0.1]))
    assert "Summary" not in answers[0].log.name and "50%" in answers[0].log.read_text()


def test_batches_share_a_process(tmp_path):
    setting = Setting(tmp_path, batch=2)
    answers = list(setting.run("verified", "falsified 0.25", "verified", "unknown", "verified"))
    assert [answer.status for answer in answers] == ["verified", "falsified", "verified", "unknown", "verified"]
    assert [answer.number for answer in answers] == list(range(5)) and setting.logged() == 3


def test_it_goes_on_behind_a_crash(setting, tmp_path):
    contents = ("verified", f"crash {tmp_path / 'family'}", "verified", "killed", "silent", "falsified 0.5")
    answers = list(setting.run(*contents))
    words = ["verified", "error", "verified", "error", "error", "falsified"]
    assert [answer.status for answer in answers] == words
    crash, killed, silent = (answers[number].reason or "" for number in (1, 3, 4))
    assert crash.startswith("ValueError: of 1, see ") and str(answers[1].log) in crash
    assert "SIGKILL" in killed and "without a result, exit code 0" in silent
    assert gone(tmp_path / "family")
    assert setting.logged() == 4 and "Traceback" in answers[1].log.read_text()


def test_it_gives_up_where_nothing_works(setting):
    answers = list(setting.run("verified", *6 * ["crash"], "verified"))
    assert [answer.status for answer in answers] == ["verified", *7 * ["error"]]
    assert setting.logged() == 4  # the first answered something
    assert "not tried" not in (answers[4].reason or "") and (answers[5].reason or "").startswith("not tried: 3")
    assert "ValueError" in (answers[7].reason or "")


@pytest.mark.parametrize(
    ("fault", "found"),
    [("library", "ModuleNotFoundError: No module named 'no_such_library'"), ("silent", "exit code 0")],
)
def test_a_process_that_cannot_start_is_the_users_affair(setting, monkeypatch, fault, found):
    monkeypatch.setenv("FAKE", fault)
    with pytest.raises(InputError, match=found) as error:
        list(setting.run("verified", "verified"))
    assert "\n" not in str(error.value) and setting.logged() == 1


def test_hanging_is_ended_with_all_descendants(tmp_path):
    setting = Setting(tmp_path, grace=2.0)
    started = time.monotonic()
    answers = list(setting.run("verified", f"hang {tmp_path / 'family'}", "verified", timeout=1.0))
    assert [answer.status for answer in answers] == ["verified", "timeout", "verified"]
    assert "no end after 4 s" in (answers[1].reason or "") and 4 <= answers[1].seconds < 30
    assert gone(tmp_path / "family") and time.monotonic() - started < 30


def test_hanging_at_the_start_is_the_users_affair(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "stuck")
    with pytest.raises(InputError, match="no end after 2 s"):
        list(Setting(tmp_path, grace=1.0).run("verified", timeout=0.5))


@pytest.mark.parametrize("end", ["close", "interrupt"])
def test_leaving_early_ends_everything(setting, tmp_path, end):
    answers = setting.run("verified", f"hang {tmp_path / 'family'}")
    assert next(answers).status == "verified"
    assert all(map(alive, family(tmp_path / "family")))
    if end == "close":
        answers.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            answers.throw(KeyboardInterrupt)
    assert gone(tmp_path / "family")


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_beside_properties_are_neither_read_nor_left(setting, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    planted = setting.specs / "0000.vnnlib.compiled"
    planted.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert [answer.status for answer in setting.run("verified", "crash", "verified")] == [
        "verified",
        "error",
        "verified",
    ]
    assert not (tmp_path / "sprung").exists()
    names = {path.name for path in setting.specs.iterdir()}
    assert names == {planted.name, *(f"{number:04d}.vnnlib" for number in range(3))}
    assert not any((tmp_path / "temporary").iterdir())


def test_our_interpreter_does_not_leak(setting, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    (answer,) = setting.run("environment")
    line = next(line for line in answer.log.read_text().splitlines() if line.startswith("ENVIRONMENT "))
    environment = json.loads(line.removeprefix("ENVIRONMENT "))
    assert "VIRTUAL_ENV" not in environment and environment["PYTHONPATH"] == "/theirs"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert not Path(environment["TMPDIR"]).exists()


def test_files_that_are_not_there(setting):
    (setting.folder / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: found no such file"):
        list(setting.run("verified"))
    assert not setting.logs.exists()


def test_nothing_is_asked(setting):
    assert list(setting.run()) == [] and setting.logged() == 0


def test_parsing_what_the_real_one_prints():
    said = [parse(line) for line in REAL.splitlines()]
    assert [item for item in said if item is not None] == [
        0, ResultLine("safe-incomplete", True, 1.9293), 1, ResultLine("unknown", False, 25.5733), 2,
        ResultLine("unsafe-pgd", False, 3.5906),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("Result: safe in 1.0 seconds", "verified"),
        ("Result: safe-mip in 1.0 seconds", "verified"),
        ("Result: unsafe in 1.0 seconds", "falsified"),
        ("Result: unsafe-bab in 1.0 seconds", "falsified"),
        ("Result: unsafe (timed out) in 90.0 seconds", "timeout"),
        ("Result: safe (timed out) in 90.0 seconds", "timeout"),
        ("Result: unknown in 1.0 seconds", "unknown"),
        ("Result: unknown-mip in 90.0 seconds", "timeout"),
        ("Result: safer-than-safe in 1.0 seconds", "unknown"),
        (" 50%|###  |\x1b[0m\rResult: \x1b[32;1msafe\x1b[0m in 1.0 seconds 12 domains", "verified"),
    ],
)
def test_status_words(line, status):
    result = parse(line)
    assert isinstance(result, ResultLine) and result.status(60.0) == status


@pytest.mark.parametrize("line", ["", "Result: safe", "Result:  in 1 seconds", "verified_status unsafe-pgd", "idx: 3"])
def test_noise_is_no_result(line):
    assert parse(line) is None


def test_how_it_ended(tmp_path):
    log = tmp_path / "log"
    log.write_text(REAL)
    assert abcrown.exit_reason(1, log) == "AssertionError: failed parsing line: (assert (<="
    assert abcrown.exit_reason(0, log) == "ended without a result, exit code 0"
    assert abcrown.exit_reason(-9, log) == "ended by SIGKILL"
    log.write_bytes(b"\xff\xfe no traceback")
    assert abcrown.exit_reason(2, log) == "ended without a result, exit code 2"


@pytest.mark.parametrize(
    "text",
    ["", "sat", "((X_0  0.5)\n(Y_0  1.0))", "((X_1  0.5)\n(X_0  0.5))", "((X_0  nan)\n(X_1  0.5))",
     "((X_0  0.5)\n(X_1  0.5)\n(X_2  0.5))", "((X_0  0.5)\n(X_0  0.5)\n(X_1  0.5))"],
)  # fmt: skip
def test_incomplete_counterexamples_are_none(tmp_path, text):
    (tmp_path / "point").write_text(text)
    assert abcrown.read_counterexample(tmp_path / "point", 2) is None


def test_counterexamples_are_exact(tmp_path):
    values = torch.tensor([0.1, -3e-9, 1.0])
    lines = "".join(f"(X_{i}  {value})\n" for i, value in enumerate(values.tolist()))
    (tmp_path / "point").write_text(f"({lines}(Y_0  1e-3))")
    assert torch.equal(abcrown.read_counterexample(tmp_path / "point", 3), values)
    assert abcrown.read_counterexample(tmp_path / "absent", 3) is None


def test_configuration_is_plain_yaml():
    values = configuration(30.0, "cuda")
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert values["bab"]["timeout"] == 30.0 and values["general"]["root_path"] == "$CONFIG_PATH"


def test_finding_it(setting, tmp_path, monkeypatch):
    home, program = setting.abcrown.home, tmp_path / "python"
    program.symlink_to(sys.executable)
    for name in (PYTHON, HOME):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=PYTHON):
        Abcrown.find(home=home)
    with pytest.raises(InputError, match=HOME):
        Abcrown.find(python=program)
    assert Abcrown.find(program, home) == Abcrown.find(str(program), str(home.parent)) == Abcrown(program, home)
    monkeypatch.setenv(PYTHON, str(program))
    monkeypatch.setenv(HOME, str(home.parent))
    assert Abcrown.find() == Abcrown(program, home)
    (tmp_path / "text").write_text("")
    for python, found in ((tmp_path / "absent", "no such program"), (tmp_path / "text", "not executable")):
        with pytest.raises(InputError, match=found):
            Abcrown.find(python=python)
    with pytest.raises(InputError, match=r"no complete_verifier/abcrown\.py"):
        Abcrown.find(home=tmp_path)


def interpreter(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def test_what_is_missing_comes_with_its_remedy(setting, tmp_path):
    bare = interpreter(tmp_path / "bare", f'exec {sys.executable} -I -S "$@"')  # without installed packages
    missing = Abcrown(bare, setting.abcrown.home).missing()
    assert all("not installed" in line for line in missing)
    lines = {line.partition(":")[0]: line for line in missing}
    assert "submodule update --init" in lines["auto_LiRPA"] and f"{bare} -m pip install pyyaml" in lines["yaml"]
    assert "git+https://github.com/Verified-Intelligence/onnx2pytorch" in lines["onnx2pytorch"]
    broken = Abcrown(interpreter(tmp_path / "broken", "echo no luck >&2; exit 3"), setting.abcrown.home)
    assert broken.missing() == [f"{broken.python}: exit code 3: no luck"] and broken.versions() == {}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_versions_name_the_commit(setting, tmp_path):
    found = '[{"python": "3.11.0", "torch": "2.8.0", "pandas": "2"}, {}]'
    abcrown = Abcrown(interpreter(tmp_path / "python", f"echo 'FOUND {found}'"), setting.abcrown.home)
    assert abcrown.versions() == {"python": "3.11.0", "torch": "2.8.0"} and abcrown.missing() == []
    git = ["git", "-C", str(abcrown.home.parent), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "--no-gpg-sign", "-m", "-"]):
        subprocess.run([*git, *command], check=True)
    assert len(abcrown.versions()["commit"]) == 40


@pytest.mark.abcrown
@pytest.mark.skipif(not (os.environ.get(PYTHON) and os.environ.get(HOME)), reason=f"needs α-β-CROWN: {PYTHON}, {HOME}")
def test_the_real_one():
    assert Abcrown.find().missing() == []
