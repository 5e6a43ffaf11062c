"""What is printed never ends the work: encodings without our letters, readers that left, closed and full outputs."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import yaml
from processes import start

from certtrain.command_line import main
from certtrain.progress import console
from certtrain.streams import TolerantStream, tolerant_streams

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
COMMANDS = ("train", "verify", "evaluate", "diagnose", "export", "import-checkpoint", "compare")
ENCODINGS = {
    "latin-1, strict": {"PYTHONIOENCODING": "latin-1:strict"},
    "locale C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}  # fmt: skip
SMALL = [
    "--config", str(ROOT / "configs" / "smoke.yaml"), "--model.type", "Mlp", "--model.hidden", "[8]",
    "--training.epochs", "2", "--training.schedule.length", "1", "--certify.images", "4", "--export.enabled", "false",
]  # fmt: skip


@contextlib.contextmanager
def standard(stdout, stderr=None):
    """Streams of this process, as a terminal of another kind would have them."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = stdout, stdout if stderr is None else stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "koi8-r", "utf-8"])
class TestLetters:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_help(self, command, encoding):
        stream = terminal(encoding)
        with standard(stream), contextlib.suppress(SystemExit):
            assert main([command, "--help"]) == 0
        said = stream.buffer.getvalue().decode(encoding)
        assert f"certtrain {command}" in said or "usage:" in said
        if command == "verify":
            assert ("?-?-CROWN" in said) == (encoding in ("ascii", "cp1252", "koi8-r"))

    def test_tables_progress_and_errors(self, encoding, run):
        stream = terminal(encoding)
        with standard(stream):
            assert main(["verify", str(run), "--images", ":20", "--epsilon", "0.03", "--stages", "ibp"]) == 0
            assert main(["evaluate", str(run), "--images", "4", "--attacks", "pgd-1"]) == 0
            assert main(["verify", str(run), "--verifier", "abcrown", "--abcrown-python", "ε\udcff"]) == 2
            assert main(["verify", str(run / "α"), "--epsilon", "ε"]) == 2
        said = stream.buffer.getvalue().decode(encoding)
        assert "certified accuracy" in said and "pgd-1" in said and said.count("error: ") == 2

    def test_our_console_without_the_command_line(self, encoding):
        stream = terminal(encoding)
        with standard(stream):
            console.print("± α ∣ …")
        assert len(stream.buffer.getvalue().decode(encoding).strip()) == 7


@pytest.mark.parametrize("environment", ENCODINGS.values(), ids=ENCODINGS)
def test_a_process_with_another_encoding(environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "PYTHONUTF8")}
    code = """
import sys
from certtrain.command_line import main
try:
    main(["verify", "--help"])
except SystemExit as end:
    assert not end.code
sys.exit(main(["verify", *sys.argv[1:]]))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, "α\u2223"], env={**kept, **environment}, cwd=ROOT, capture_output=True
    )
    assert b"-CROWN" in found.stdout
    assert found.returncode == 2 and found.stderr.startswith(b"error: ") and found.stderr.count(b"\n") == 1


def real(*words: str | Path, **streams: int) -> subprocess.Popen:
    """An interpreter of its own, for what its start or its end does; elsewhere ``processes.start`` is enough."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, **streams)


def left_after(*words: str | Path, lines: int, begin: Callable = start) -> tuple[int, bytes]:
    """Exit code and stderr of a process whose reader leaves after some lines, as ``head`` does."""
    (read, write), (errors, stderr) = os.pipe(), os.pipe()
    with open(read, "rb", buffering=0) as stdout:
        if not lines:
            stdout.close()
        process = begin(*words, stdout=write, stderr=stderr)
        os.close(write)
        os.close(stderr)
        for _ in range(lines):
            assert stdout.readline()
    with open(errors, "rb") as said:
        text = said.read()
    return process.wait(), text


def whole(run: Path, exported: bool = False) -> bool:
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    names = ["model.safetensors", "resume.pt", *(["model.onnx", "SHA256SUMS"] if exported else [])]
    return final["kind"] == "final" and all((run / name).exists() for name in names)


class TestAReaderThatLeft:
    @pytest.mark.parametrize("lines", [0, 2])
    def test_training_goes_on_to_its_end(self, lines, tmp_path):
        assert left_after(SCRIPTS / "train.py", *SMALL, "--out", tmp_path / "run", lines=lines) == (0, b"")
        assert whole(tmp_path / "run")

    def test_verify_and_evaluate(self, run):
        words = [str(run), "--images", ":30", "--stages", "ibp", "--epsilon", "0.04"]
        assert left_after(SCRIPTS / "verify.py", *words, lines=0) == (0, b"")
        assert len((run / "verdicts" / "embedded-0.04-nearest.jsonl").read_text().splitlines()) == 30
        assert left_after(SCRIPTS / "evaluate.py", run, "--images", "8", "--attacks", "pgd-1", lines=0) == (0, b"")
        assert (run / "evaluation.json").exists()

    def test_compare_and_what_it_starts(self, tmp_path):
        base = {
            "data": {"type": "Digits"}, "model": {"type": "Mlp", "hidden": [4]}, "loss": {"type": "FgsmRs"},
            "perturbation": {"type": "LinfBall", "epsilon": 0.1}, "certify": {"enabled": False},
            "training": {"epochs": 2, "batch_size": 512, "milestones": [], "epsilon_multiplier": 1.0,
                         "schedule": {"type": "Linear", "start": 1, "length": 0}, "initialisation": "default"},
            "export": {"enabled": False}, "threads": 1,
        }  # fmt: skip
        rows = [{"name": "A"}, {"name": "B", "changes": {"loss": {"type": "NFgsm"}}}]
        evaluate = {"attacks": ["pgd-1"], "images": 8}
        study = {"name": "pair", "seeds": [0], "base": base, "rows": rows, "evaluate": evaluate}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        words = [str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]
        assert left_after(SCRIPTS / "compare.py", *words, lines=0) == (0, b"")
        assert "2 of 2 runs are trained" in (tmp_path / "out" / "table.md").read_text()

    @pytest.mark.parametrize(
        ("begin", "words"),
        [(real, ["train", "--help"]), (start, ["verify", "--help"]), (start, ["--help"]), (start, ["--version"])],
    )
    def test_short_commands_end_quietly(self, begin, words):
        code = "import sys; from certtrain.command_line import main; sys.exit(main(sys.argv[1:]))"
        assert left_after("-c", code, *words, lines=0, begin=begin) == (0, b"")

    def test_a_caller_from_python(self, tmp_path):
        """No command line is there to help."""
        smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
        recipe = {**smoke, "model": {"type": "Mlp", "hidden": [8]}, "certify": {"images": 4}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        code = "import certtrain, sys; certtrain.train(sys.argv[1], out=sys.argv[2])"
        words = ["-c", code, tmp_path / "recipe.yaml", tmp_path / "run"]
        assert left_after(*words, lines=0, begin=real) == (0, b"") and whole(tmp_path / "run", exported=True)


REDIRECTIONS = {">&-": {"stdout": None}, "2>&-": {"stderr": None}, "2>/dev/full": {"stderr": "/dev/full"}}


def redirected(redirections: str, *words: str | Path) -> tuple[int, bytes, bytes]:
    """The exit code of a process, and what its stdout and stderr say where they lead anywhere."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(tempfile.TemporaryFile("w+b")) for name in ("stdout", "stderr")}
        for name, place in REDIRECTIONS[redirections].items():
            files[name] = place and stack.enter_context(open(place, "r+b", buffering=0))
        code = start(*words, **{name: file and file.fileno() for name, file in files.items()}).wait()
        said = [b"" if name in REDIRECTIONS[redirections] else _whole(files[name]) for name in ("stdout", "stderr")]
    return code, *said


def _whole(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()


# what was to be read is lost: somebody has to hear of it
LOST = (
    b"error: standard output: cannot be written (No space left on device); accepted: a place with room; "
    b"files are written as ever\n"
)


class TestClosedAndFull:
    @pytest.mark.parametrize("redirections", [">&-", "2>&-", "2>/dev/full"])
    def test_training(self, redirections, tmp_path):
        code, _, said = redirected(redirections, SCRIPTS / "train.py", *SMALL, "--out", tmp_path / "run")
        assert (code, said) == (0, b"") and whole(tmp_path / "run")

    @pytest.mark.parametrize(("redirections", "code", "said"), [(">&- 2>&- <&-", 0, b""), (">/dev/full", 2, LOST)])
    def test_training_in_an_interpreter_of_its_own(self, redirections, code, said, tmp_path):
        words = [sys.executable, SCRIPTS / "train.py", *SMALL, "--out", tmp_path / "run"]
        found = subprocess.run(["bash", "-c", f'"$0" "$@" {redirections}', *words], cwd=ROOT, capture_output=True)
        assert (found.returncode, found.stderr) == (code, said) and whole(tmp_path / "run")

    @pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", ">&-"])
    def test_an_error_keeps_its_exit_code_and_its_stream(self, redirections, tmp_path):
        code, out, said = redirected(redirections, SCRIPTS / "verify.py", tmp_path / "none")
        assert code == 2 and not out  # an error is no answer
        assert said.startswith(b"error: ") == (redirections == ">&-")

    def test_files_do_not_get_the_numbers_of_closed_streams(self, tmp_path):
        """Or a library's warning is written into them."""
        code = f"""
import os
from certtrain.streams import tolerant_streams
with tolerant_streams():
    with open({str(tmp_path / "file")!r}, "w") as file:
        number = file.fileno()
        os.write(2, b"a warning")
        file.write(str(number))
"""
        subprocess.run(["bash", "-c", '"$0" -c "$1" >&- 2>&- <&-', sys.executable, code], cwd=ROOT, check=True)
        assert int((tmp_path / "file").read_text()) > 2


def test_a_terminal_that_is_gone(tmp_path):
    """As under nohup, or after disown."""
    words = [sys.executable, str(SCRIPTS / "train.py"), *SMALL, "--out", str(tmp_path / "run")]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.chdir(ROOT)
        os.execv(words[0], words)
    os.read(terminal, 1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and whole(tmp_path / "run")


class Failing(io.StringIO):
    def __init__(self, error: Exception):
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text: str) -> int:
        self.calls += 1
        raise self.error


class TestLasting:
    @pytest.mark.parametrize(
        "error", [BrokenPipeError(32, "b"), OSError(28, "f"), OSError(5, "io"), ValueError("closed")]
    )
    def test_it_asks_once(self, error):
        stream = Failing(error)
        lasting = TolerantStream(stream)
        for _ in range(3):
            assert lasting.write("text") == 4
            lasting.flush()
        lasting.writelines(["a", "b"])
        assert stream.calls == 1 and lasting.lost is error

    def test_streams_are_put_back(self):
        before = sys.stdout, sys.stderr
        with pytest.raises(KeyError), tolerant_streams() as out:
            assert isinstance(sys.stdout, TolerantStream) and sys.stdout is out and sys.stdout.stream is before[0]
            raise KeyError
        assert (sys.stdout, sys.stderr) == before
