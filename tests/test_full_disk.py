"""No room, no permission, a read-only disk: the file is named, nothing half-written stays, the run goes on later."""

import contextlib
import errno
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import certtrain
from certtrain.command_line import main
from certtrain.data.download import fetch
from certtrain.errors import InputError, Unwritable
from certtrain.export.onnx_file import export_onnx
from certtrain.run_folder import JsonLines, write_atomically
from certtrain.training import checkpoint
from certtrain.verifiers import Certify
from certtrain.verifiers.vnnlib import write_property
from certtrain.workflows.run import save_weights
from certtrain.workflows.train import resume

ROOT = Path(__file__).parents[1]
SMOKE = str(ROOT / "configs" / "smoke.yaml")
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from certtrain.command_line import main
sys.exit(main(sys.argv[2:]))
"""
"""The command line, where no file may be longer than so many bytes: a write fails half-way, as on a full disk."""


def big() -> torch.Tensor:
    return torch.rand(300, 300)


WRITERS = {
    "text": lambda path: write_atomically(path, lambda temporary: temporary.write_text("x" * 100_000)),
    "lines": lambda path: JsonLines(path).append(*({"text": "x" * 1000} for _ in range(100))),
    "lines anew": lambda path: JsonLines(path).rewrite({"text": "x" * 1000} for _ in range(100)),
    "weights": lambda path: save_weights(path, {"weight": big()}),
    "a checkpoint": lambda path: checkpoint.save(path, {"weight": big(), "more": [big()] * 3}),
    "a network": lambda path: export_onnx(nn.Sequential(nn.Linear(300, 90)), path, torch.rand(2, 300)),
    "a property": lambda path: write_property(path, torch.zeros(3000), torch.ones(3000), 0, 10),
}  # fmt: skip


@contextlib.contextmanager
def no_file_longer_than(size: int):
    """No file of this process may be longer than so many bytes: the same within it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])


@pytest.fixture
def little_room():
    with no_file_longer_than(20_000):
        yield


def assert_refused(run: Path, code: int, said: str) -> None:
    assert code == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: {run}/") and "cannot be written (File too large); " in said
    assert not list(run.rglob(".*"))


@pytest.mark.parametrize("before", [None, b'{"old": 1}\n'], ids=["new", "there"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_file(writer, before, tmp_path, little_room):
    path = tmp_path / "the file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(Unwritable) as error:
        WRITERS[writer](path)
    assert str(error.value).startswith(f"{path}: cannot be written (File too large); accepted: ")
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert {file.name for file in tmp_path.iterdir()} <= {"the file"}  # no temporary file stays
    assert (path.read_bytes() if path.exists() else b"") == (before or b"")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EIO], ids=errno.errorcode.get
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_every_reason_at_every_step(step, number, tmp_path, monkeypatch):
    path, system = tmp_path / "file", getattr(os, step)
    path.write_bytes(b"old\n")
    monkeypatch.setattr(os, step, lambda *a: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(Unwritable, match=rf"file: cannot be written \({os.strerror(number)}\)"):
        write_atomically(path, lambda temporary: temporary.write_bytes(b"new\n"))
    if step == "fsync":
        with pytest.raises(Unwritable, match=rf"file: cannot be written \({os.strerror(number)}\)"):
            JsonLines(path).append({"a": 1})
    monkeypatch.setattr(os, step, system)
    assert path.read_bytes() == b"old\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("room", [2_000, 5_000, 8_000, 20_000])
def test_a_run_without_room_names_its_file_and_goes_on_later(room, tmp_path, capfd):
    """Whichever file is the first that is too long; nothing else is said, by a library neither."""
    run = tmp_path / "run"
    less = ["--certify.images", "4", "--export.enabled", "false"]
    with no_file_longer_than(room):
        code = main(["train", "--config", SMOKE, "--out", str(run), *less])
    assert_refused(run, code, capfd.readouterr().err)
    if (run / "run.json").exists():
        assert resume(run, quiet=True).final()
        assert [line["epoch"] for line in JsonLines(run / "metrics.jsonl") if line["kind"] == "epoch"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_process_without_room(tmp_path):
    """As within one."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", LIMITED, "5000", "train", "--config", SMOKE, "--out", str(run)]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert_refused(run, found.returncode, found.stderr)


KERNEL = """
from certtrain.kernels.cpu.threads import jit

@jit
def kernel(x):
    return x + {number}
"""


@pytest.mark.parametrize("room", [100, 1500])
def test_a_kernel_is_compiled_without_room_for_its_cache(room, tmp_path, monkeypatch):
    """And never taken from the cache of an older version, whose file it was about to replace."""
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    path = tmp_path / "kernels.py"

    def compiled(number: int) -> int:
        path.write_text(KERNEL.format(number=number))
        os.utime(path, (number, number))
        return runpy.run_path(str(path))["kernel"](1)

    with no_file_longer_than(room):
        assert compiled(1) == 2
    assert not list(tmp_path.rglob("*.nb*"))
    assert compiled(2) == 3 and list(tmp_path.rglob("*.nbc"))
    with no_file_longer_than(room):
        assert compiled(3) == 4
    assert compiled(3) == 4


@pytest.mark.parametrize("call", ["verify", "evaluate", "diagnose", "export"])
def test_the_commands(call, run, capsys):
    more = {
        "verify": ["--epsilon", "0.03", "--stages", "ibp"], "evaluate": ["--attacks", "pgd-1"],
        "diagnose": ["--what", "cosine,landscape", "--images", "8"], "export": [],
    }[call]  # fmt: skip
    before = (run / "SHA256SUMS").read_bytes()
    with no_file_longer_than(1200):
        code = main([call, str(run), *more])
    assert_refused(run, code, capsys.readouterr().err)
    assert (run / "SHA256SUMS").read_bytes() == before
    assert main([call, str(run), *more]) == 0


@pytest.mark.parametrize("torn", [b"{", b'{"kind": "epoch", "epo', b"\xff"])
def test_a_torn_last_line_is_mended(torn, run):
    """Of every file of lines, by the call that adds to it."""
    description = json.loads((run / "run.json").read_text())
    description["config"]["export"]["enabled"] = False  # it takes a second, and has no such file
    (run / "run.json").write_text(json.dumps(description))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-1]) + torn)
    for path in (run / "verdicts.jsonl", run / "verdicts" / "settings.jsonl"):
        with path.open("ab") as file:
            file.write(torn)
    assert resume(run, quiet=True).final()
    certtrain.verify(run, images=":4", epsilon=0.4, certify=Certify(stages=("ibp",)), quiet=True)
    for path in run.rglob("*.jsonl"):
        assert path.read_bytes().endswith(b"}\n") and list(JsonLines(path))


def test_a_download_without_room_blames_no_mirror(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 100)
    asked, opened = [], Path.open

    def full(path, mode="r", *more, **others):
        if path.name.endswith(".part") and "r" not in mode:
            asked.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *more, **others)

    monkeypatch.setattr(Path, "open", full)
    target = tmp_path / "in" / "target"
    with pytest.raises(InputError, match=r"target\.part: cannot be written \(No space left on device\)"):
        fetch([source.as_uri(), source.as_uri()], target, "0" * 32)
    assert len(asked) == 1


# --- modes

UMASKS = (0o027, 0o002)  # neither 0600, 0644 nor 0755 is right under either


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
def test_every_file_of_a_run_follows_the_umask(umask, tmp_path):
    run = tmp_path / "run"
    words = ["--model.type", "Mlp", "--model.hidden", "[8]", "--certify.images", "10", "--export.images", "2",
             "--evaluate.enabled", "true", "--evaluate.attacks", "[pgd-1]", "--evaluate.images", "4"]  # fmt: skip
    before = os.umask(umask)
    try:
        assert main(["train", "--config", SMOKE, "--out", str(run), *words]) == 0
        assert main(["verify", str(run), "--images", ":3", "--stages", "ibp", "--epsilon", "0.5"]) == 0
        assert main(["diagnose", str(run), "--images", "8", "--what", "cosine,landscape"]) == 0
    finally:
        os.umask(before)
    modes = {str(path.relative_to(run)): path.stat().st_mode & 0o777 for path in run.rglob("*")}
    assert {"model.safetensors", "resume.pt", "figures", "specs", "evaluation.json", "model.onnx"} <= set(modes)
    expected = {name: (0o777 if (run / name).is_dir() else 0o666) & ~umask for name in modes}
    assert modes == expected


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_written_again_keeps_its_mode(mode, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    path.chmod(mode)
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"


def test_the_weights_are_what_the_library_writes(tmp_path):
    weights = {"b": big(), "a.weight": big().t()}
    save_weights(tmp_path / "ours", weights)
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unwritable, match="pipe: cannot be written"):
        write_atomically(tmp_path / "pipe", lambda temporary: temporary.write_text("new"))
    assert (tmp_path / "pipe").is_fifo() and [file.name for file in tmp_path.iterdir()] == ["pipe"]
