"""Bad input: exit code 2, one line that says what, where and what would do, no traceback, and nothing lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from walking import walk

from certtrain.command_line import main

TINY = ["--model.type", "Mlp", "--model.hidden", "[8]", "--training.epochs", "2", "--training.milestones", "[]",
        "--training.schedule.length", "1", "--training.batch_size", "500", "--certify.images", "8"]  # fmt: skip
UNEXPORTED = ["--export.enabled", "false"]
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    assert main(["train", *TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture
def here(finished, tmp_path, monkeypatch) -> Path:
    """The working directory: it holds ``run``, a run that was cut short before its last line."""
    shutil.copytree(finished, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["kind"] == "final"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(here: Path, capsys, words: list[str], mentions: list[str], command: str = "train") -> None:
    before = everything_in(here)
    assert main([command, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith("\n") and said.count("\n") == 1
    assert "Traceback" not in said
    for mention in [*mentions, "accepted"]:
        assert mention in said
    assert everything_in(here) == before

    assert main([command, *words, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.endswith(said)
    assert everything_in(here) == before


WORDS = {
    "typo in a field": (["--loss.alhpa", "0.1"], ["loss.alhpa", "bn_mode, alpha"]),
    "unknown section": (["--los.alpha", "0.1"], ["los: ", "loss"]),
    "unknown option": (["--verbose", "true"], ["verbose", "seed"]),
    "alpha above 1": (["--loss.alpha", "1.5"], ["loss.alpha: found 1.5", "[0, 1]"]),
    "alpha is NaN": (["--loss.alpha", ".nan"], ["loss.alpha: found nan"]),
    "alpha is text": (["--loss.alpha", "much"], ["loss.alpha: found 'much'", "fraction"]),
    "negative epsilon": (["--perturbation.epsilon", "-0.1"], ["perturbation.epsilon: found -0.1", ">= 0"]),
    "negative fraction": (["--perturbation.epsilon", "-2/255"], ["perturbation.epsilon: found -0.0078"]),
    "zero denominator": (["--perturbation.epsilon", "2/0"], ["perturbation.epsilon: found '2/0'", "fraction"]),
    "infinite epsilon": (["--perturbation.epsilon", ".inf"], ["perturbation.epsilon: found inf"]),
    "fewer than no pixels": (["--perturbation", "{type: SparseBall, k: -1}"], ["perturbation.k: found -1"]),
    "half a pixel": (["--perturbation", "{type: SparseBall, k: 1.5}"],
                     ["perturbation.k: found 1.5; accepted: a whole number\n"]),
    "more pixels than numbers": (["--perturbation", f"{{type: SparseBall, k: {10**30}}}"], ["k: found 10", "at most"]),
    "patches that do not fit": (["--perturbation", "{type: SparseBall, k: 1, unit: patch, side: 3}"],
                                ["perturbation.side: found patches of 3×3 for images of 8×8"]),
    "a unit that is none": (["--perturbation", "{type: SparseBall, unit: pixl}"],
                            ["perturbation.unit: found 'pixl'; accepted: pixel, feature"]),
    "an attack of another set": (["--perturbation", "{type: SparseBall, k: 1}", "--loss.attack", "{type: Pgd}"],
                                 ["loss.attack.type: found Pgd for a SparseBall", "SparsePgd"]),
    "noise of another set": (["--training.noise.type", "SparseNoise"],
                             ["training.noise: found SparseNoise for a LinfBall"]),
    "noise that is a number": (["--training.noise", "5"],
                               ["training.noise: found 5; accepted: a mapping with type SparseNoise or null\n"]),
    "an arithmetic without bounds": (["--perturbation.type", "L2Ball", "--certify.arithmetic", "real"],
                                     ["certify.arithmetic: found real for a L2Ball", "nearest"]),
    "unknown loss": (["--loss.type", "CCIBP"], ["loss.type: found 'CCIBP'", "CcIbp", "ExpIbp", "MtlIbp"]),
    "a list for a type": (["--loss.type", "[CcIbp]"], ["loss.type: found ['CcIbp']", "CcIbp"]),
    "unknown choice": (["--loss.bn_mode", "both"], ["loss.bn_mode: found 'both'", "adv, clean"]),
    "unknown device": (["--device", "gpu"], ["device: found 'gpu'", "auto, cpu, cuda"]),
    "no section but a word": (["--loss", "CcIbp"], ["loss: found 'CcIbp'"]),
    "no whole number": (["--training.epochs", "1.5"], ["training.epochs: found 1.5", "whole number"]),
    "no epochs": (["--training.epochs", "0"], ["training.epochs: found 0"]),
    "a cut that TAPS cannot make": (["--loss.type", "Taps", "--loss.classifier_activations", "4"],
                                    ["leaves 4 activations", "accepted: 0, 1"]),
    "no teacher": (["--loss.type", "CcDist"], ["loss.teacher: found none", "safetensors"]),
    "a teacher that is not there": (["--loss.type", "CcDist", "--loss.teacher", "nobody"], ["nobody: cannot be read"]),
    "QUB over a method whose accuracy term is none": (["--loss.type", "Qub", "--loss.base.type", "Mart"],
                                                       ["loss.base: found 'Mart'", "cross-entropy of one example"]),
    "QUB over bounds alone": (["--loss.type", "Qub", "--loss.base.type", "Ibp"],
                              ["loss.base.type: found 'Ibp'", "NFgsm, NuAt, Pgd2At, PgdAt"]),
    "QUB deeper down": (["--loss.type", "MtlIbp", "--loss.adversarial", "{type: Qub, base: {type: Score}}"],
                        ["loss.adversarial.base: found 'Score'"]),
    "an unknown divergence": (["--loss.type", "Trades", "--loss.divergence.type", "JensenShannon"],
                              ["loss.divergence.type: found 'JensenShannon'", "KullbackLeibler, SquaredEuclidean"]),
    "FAIT at the start": (["--loss.type", "Fait", "--loss.index", "0"], ["loss.index: found 0", "1 to", "= 9"]),
    "FAIT at the end": (["--loss.type", "Fait", "--loss.index", "10"], ["loss.index: found 10", "1 to", "= 9"]),
    "FAIT beyond a shorter attack": (["--loss.type", "Fait", "--loss.attack.steps", "4", "--loss.index", "4"],
                                     ["loss.index: found 4", "= 3"]),
    "TRADES at a flat point": (["--loss.type", "Trades", "--loss.attack.start", "zero"],
                               ["loss.attack.start: found 'zero'", "flat"]),
    "Fast-BAT in another ball": (["--loss.type", "Qub", "--loss.base.type", "FastBat", "--perturbation.type", "L2Ball"],
                                 ["FastBat: found L2Ball", "LinfBall"]),
    "GradAlign's weight in another ball": (["--loss.type", "FgsmGa", "--perturbation.type", "L2Ball"],
                                           ["loss.weight: found null for L2Ball"]),
    "HAT without its network": (["--loss.type", "Hat"], ["loss.teacher: found none", "safetensors"]),
    "AWP of a certified loss": (["--training.update.type", "Awp"], ["training.update: found Awp for CcIbp"]),
    "LAP without a start": (["--loss.type", "FgsmPgi", "--training.update.type", "Lap"],
                            ["training.update: found Lap for FgsmPgi", "Ascent"]),
    "a geometric mean below 0": (["--loss.type", "ExpIbp", "--loss.adversarial.type", "Mart"],
                                 ["loss.adversarial: found 'Mart'", "never negative"]),
    "a ramp without its end": (["--loss.alpha", "{start: 0.1}"], ["loss.alpha.end: must be given"]),
    "measurements that never come": (["--training.measure", "{every: 900}"], ["training.measure", "900", "200"]),
    "averaging after the end": (["--training.averaging", "{start: 900}"], ["training.averaging", "900"]),
    "ramp longer than training": (["--training.epochs", "50"], ["training.schedule", "100", "50 epochs"]),
    "negative milestone": (["--training.milestones", "[-1, 5]"], ["training.milestones: found (-1.0, 5.0)"]),
    "milestones are no list": (["--training.milestones", "5"], ["training.milestones: found 5", "list"]),
    "negative momentum": (["--training.optimiser.type", "Sgd", "--training.optimiser.momentum", "-1"],
                          ["training.optimiser.momentum: found -1"]),
    "Nesterov alone": (["--training.optimiser.type", "Sgd", "--training.optimiser.momentum", "0",
                        "--training.optimiser.nesterov", "true"], ["training.optimiser.nesterov"]),
    "a batch of one": (["--training.batch_size", "479"], ["training.batch_size: found 479"]),
    "value is no YAML": (["--loss.alpha", "[1"], ["--loss.alpha: found '[1'"]),
    "value is no date": (["--name", "2024-13-45"], ["--name: found '2024-13-45'"]),
    "model does not fit": (["--model.type", "Cnn7"], ["Cnn7", "8×8", "28×28"]),
    "stray word": (["train"], ["'train'", "--section.field value"]),
    "stray word after a value": (["--loss.alpha", "0.1", "0.2"], ["'0.2'"]),
    "stray word before an option": (["extra", "--seed", "1"], ["'extra'"]),
    "option without value": (["--loss.alpha"], ["--loss.alpha: found no value"]),
    "--config without value": (["--config"], ["--config"]),
    "--out without value": (["--out"], ["--out"]),
    "missing recipe": (["--config", "none.yaml"], ["none.yaml"]),
    "recipe is a folder": (["--config", "run"], ["run"]),
    "missing MNIST": (["--data.type", "Mnist", "--data.root", "nowhere"],
                      ["nowhere/MNIST/raw/train-images-idx3-ubyte", "--data.download"]),
    "missing arrays": (["--data.type", "Arrays", "--data.path", "none.npz"], ["none.npz", "train_images"]),
    "output holds a run": (["--out", "run"], ["run: found a run", "--resume run"]),
    "output is a file": (["--out", "run/run.json"], ["run/run.json"]),
    "output below a file": (["--out", "run/run.json/new"], ["run/run.json"]),
    "resume nothing": (["--resume", "nowhere"], ["nowhere: found no run.json"]),
    "resume a file": (["--resume", "run/run.json"], ["run/run.json"]),
    "resume an overridden run": (["--resume", "run", "--loss.alpha", "0.1"], ["--loss.alpha: cannot be changed"]),
    "resume into another folder": (["--resume", "run", "--out", "new"], ["--out: cannot be changed"]),
    "resume by another recipe": (["--resume", "run", "--config", "x.yaml"], ["--config: cannot be changed"]),
    "resume on an unknown device": (["--resume", "run", "--device", "gpu"], ["device: found 'gpu'"]),
}  # fmt: skip


@walk(("words", "mentions"), WORDS.values(), ids=WORDS)
def test_bad_words(words, mentions, here, capsys):
    assert_refused(here, capsys, words, mentions)


@NO_CUDA
@pytest.mark.parametrize(
    "words", [["--device", "cuda"], ["--resume", "run", "--device", "cuda"]], ids=["new", "resume"]
)
def test_no_cuda(words, here, capsys):
    assert_refused(here, capsys, words, ["device: found 'cuda'", "cpu"])


RECIPES = {
    "typo in a key": ("loss: {type: CcIbp, alhpa: 0.1}\n", ["loss.alhpa", "alpha"]),
    "typo in a section": ("trainig: {epochs: 5}\n", ["trainig", "training"]),
    "alpha above 1": ("loss: {type: CcIbp, alpha: 1.5}\n", ["loss.alpha: found 1.5"]),
    "negative epsilon": ("perturbation: {type: LinfBall, epsilon: -1/255}\n", ["perturbation.epsilon: found -0.0039"]),
    "zero denominator": ("perturbation: {type: LinfBall, epsilon: 1/0}\n", ["perturbation.epsilon: found '1/0'"]),
    "unknown loss": ("loss: {type: TRADES}\n", ["loss.type: found 'TRADES'", "CcIbp"]),
    "unknown choice": ("loss: {attack: {objective: both}}\n", ["loss.attack.objective: found 'both'", "margin"]),
    "a boolean for a number": ("seed: true\n", ["seed: found True", "whole number"]),
    "invalid YAML": ("seed: 1\nloss: {alpha: 0.1\n", ["line 3"]),
    "a tab": ("loss:\n\talpha: 1\n", ["line 2"]),
    "no date": ("name: 2024-13-45\n", []),
    "a control character": ("name: \x00\n", []),
    "an object to construct": ("name: !!python/object/apply:os.mkdir [ran]\n", ["line 1"]),
    "empty": ("", ["mapping"]),
    "a list": ("- seed\n", ["found list"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "mentions"), RECIPES.values(), ids=RECIPES)
def test_bad_recipes(text, mentions, here, capsys):
    (here / "recipe.yaml").write_text(text)
    assert_refused(here, capsys, ["--config", "recipe.yaml"], ["recipe.yaml", *mentions])


def arrays(**changes) -> dict[str, np.ndarray]:
    grey = np.linspace(0, 1, 16).reshape(1, 1, 4, 4)
    good = {"train_images": np.repeat(grey, 6, 0), "train_labels": np.arange(6) % 3,
            "test_images": np.repeat(grey, 4, 0), "test_labels": np.arange(4) % 3}  # fmt: skip
    return good | changes


def with_pixel(name: str, value: float) -> dict[str, np.ndarray]:
    made = arrays()
    made[name] = made[name].copy()
    made[name][2, 0, 1, 1] = value
    return made


ARRAYS = {
    "labels above the range": (arrays(test_labels=np.array([0, 1, 2, 7])), ["test", "label 7 at image 3", "0 to 2"]),
    "negative labels": (arrays(train_labels=np.array([0, 1, 2, 0, -1, 2])), ["train", "label -1 at image 4"]),
    "pixels above 1": (with_pixel("train_images", 1.5), ["train", "1.5", "0 to 1"]),
    "pixels below 0": (with_pixel("test_images", -0.25), ["test", "-0.25"]),
    "pixels of 255": (arrays(train_images=255 * arrays()["train_images"]), ["train", "255"]),
    "NaN pixel": (with_pixel("train_images", np.nan), ["train", "NaN", "image 2"]),
    "infinite pixel": (with_pixel("test_images", np.inf), ["test", "inf"]),
    "fractions as labels": (
        arrays(train_labels=np.arange(6) / 2),
        ["found 0.5 at image 1", "whole"],
    ),
    "NaN as label": (arrays(test_labels=np.array([0, 1, np.nan, 1])), ["test_labels: found nan at image 2"]),
    "booleans as labels": (arrays(train_labels=np.arange(6) > 2), ["train_labels: found bool"]),
    "labels one-hot": (arrays(train_labels=np.eye(6, 3, dtype=int)), ["train_labels: found shape (6, 3)"]),
    "objects": (arrays(train_labels=np.array([None] * 6)), ["pickle"]),
    "missing array": ({k: v for k, v in arrays().items() if k != "test_images"}, ["test_images"]),
    "no images": (arrays(test_images=arrays()["test_images"][:0], test_labels=np.arange(0)), ["test", "0 labels"]),
}


@pytest.mark.parametrize(("content", "mentions"), ARRAYS.values(), ids=ARRAYS)
def test_bad_arrays(content, mentions, here, capsys):
    np.savez(here / "mine.npz", **content)
    words = ["--data.type", "Arrays", "--data.path", "mine.npz", *TINY, "--out", "new"]
    assert_refused(here, capsys, words, ["mine.npz", *mentions])


def test_truncated_arrays(here, capsys):
    np.savez(here / "mine.npz", **arrays())
    (here / "mine.npz").write_bytes((here / "mine.npz").read_bytes()[:-100])
    words = ["--data.type", "Arrays", "--data.path", "mine.npz", *TINY]
    assert_refused(here, capsys, words, ["mine.npz", "cannot be read"])


def test_corrupt_mnist(here, capsys):
    (here / "data" / "MNIST" / "raw").mkdir(parents=True)
    (here / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03")
    assert_refused(here, capsys, ["--data.type", "Mnist"], ["data/MNIST/raw/train-images-idx3-ubyte", "found md5"])


def test_an_output_folder_that_holds_something_else(here, capsys):
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").write_text("years of work")
    assert_refused(here, capsys, [*TINY, "--out", "thesis"], ["thesis: found other files", "--out"])


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def flip_a_weight(run: Path) -> None:
    path = run / "resume.pt"
    content = torch.load(path, weights_only=True)["content"]
    whole = bytearray(path.read_bytes())
    place = whole.find(content["model"]["1.weight"].numpy().tobytes())
    assert place > 0
    whole[place + 5] ^= 1
    path.write_bytes(bytes(whole))


def rewrite_checkpoint(change):
    def tamper(run: Path) -> None:
        whole = torch.load(run / "resume.pt", weights_only=True)
        torch.save(change(whole, run), run / "resume.pt")

    return tamper


def write(name: str, content: bytes):
    return lambda run: (run / name).write_bytes(content)


def cut(name: str, share: float):
    def truncate(run: Path) -> None:
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[: int(share * len(whole))])

    return truncate


def edit_run(change):
    def edit(run: Path) -> None:
        described = json.loads((run / "run.json").read_text())
        change(described)
        (run / "run.json").write_text(json.dumps(described))

    return edit


CHECKPOINT, RUN = "run/resume.pt", "run/run.json"
RUNS = {
    "no run.json": (lambda run: (run / "run.json").unlink(), ["run: found no run.json"]),
    "run.json is empty": (write("run.json", b""), [RUN]),
    "run.json is cut": (cut("run.json", 0.5), [RUN]),
    "run.json is binary": (write("run.json", b"\xff\xfe\x00"), [RUN]),
    "run.json is a list": (write("run.json", b"[1]"), [RUN]),
    "run.json without its recipe": (edit_run(lambda d: d.pop("config")), [RUN, "config"]),
    "run.json without its device": (edit_run(lambda d: d.pop("device")), [RUN, "device"]),
    "run.json without its threads": (edit_run(lambda d: d.pop("threads")), [RUN, "threads"]),
    "run.json without its data": (edit_run(lambda d: d.pop("dataset")), [RUN, "dataset"]),
    "run.json with a bad value": (edit_run(lambda d: d["config"]["loss"].update(alpha=2)), [RUN, "loss.alpha: found"]),
    "other data": (edit_run(lambda d: d["dataset"].update(sha256="0" * 64)), ["data: found", "sha256", "000000"]),
    "another architecture": (edit_run(lambda d: d["config"]["model"].update(hidden=[9])),
                             [CHECKPOINT, "1.weight: found (8, 64)", "(9, 64)"]),
    "more layers": (edit_run(lambda d: d["config"]["model"].update(hidden=[8, 8])), [CHECKPOINT, "3.weight"]),
    "a kind of network": (edit_run(lambda d: d["config"].update(model={"type": "SmallCnn"})), [CHECKPOINT, "0.weight"]),
    "another optimiser": (edit_run(lambda d: d["config"]["training"].update(epochs=3, optimiser={"type": "Sgd"})),
                          [CHECKPOINT]),
    "empty checkpoint": (write("resume.pt", b""), [CHECKPOINT]),
    "truncated checkpoint": (cut("resume.pt", 0.6), [CHECKPOINT]),
    "checkpoint cut by a byte": (cut("resume.pt", 0.9999), [CHECKPOINT]),
    "no checkpoint but text": (write("resume.pt", b"hello"), [CHECKPOINT]),
    "another file of torch": (rewrite_checkpoint(lambda whole, run: torch.zeros(3)), [CHECKPOINT]),
    "a flipped bit in a weight": (flip_a_weight, [CHECKPOINT, "fingerprint"]),
    "another format": (rewrite_checkpoint(lambda whole, run: {**whole, "format": 2}), [CHECKPOINT]),
    "a malicious checkpoint": (rewrite_checkpoint(lambda whole, run: {**whole, "content": Malicious(run / "ran")}),
                               [CHECKPOINT]),
    "metrics are no JSON": (write("metrics.jsonl", b"{}\nhello\n{}\n"), ["run/metrics.jsonl, line 2"]),
    "metrics are shorter than the checkpoint knows": (cut("metrics.jsonl", 0.3), ["run/metrics.jsonl"]),
    "verdicts are no JSON": (write("verdicts.jsonl", b"hello\n"), ["run/verdicts.jsonl, line 1"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "mentions"), RUNS.values(), ids=RUNS)
def test_resuming_a_damaged_run(damage, mentions, here, capsys):
    damage(here / "run")
    assert_refused(here, capsys, ["--resume", "run"], mentions)
    assert not (here / "run" / "ran").exists()


VERIFY = {
    "no folder": ([], ["found no run folder", "verify RUN_DIR"]),
    "not a folder": (["nowhere"], ["nowhere: found no run.json"]),
    "a file": (["run/run.json"], ["run/run.json"]),
    "two folders": (["run", "run"], ["'run'"]),
    "images are a word": (["run", "--images", "all"], ["images: found 'all'", "start:stop", "359"]),
    "one image": (["run", "--images", "7"], ["images: found '7'"]),
    "no images": (["run", "--images", "7:7"], ["images: found '7:7'"]),
    "images backwards": (["run", "--images", "9:7"], ["images: found '9:7'"]),
    "images outside": (["run", "--images", "0:360"], ["images: found '0:360'", "<= 359"]),
    "negative images": (["run", "--images=-5:3"], ["images: found '-5:3'"]),
    "unknown stage": (["run", "--stages", "attack,crow"], ["certify.stages: found 'crow'", "crown_ibp"]),
    "a stage twice": (["run", "--stages", "ibp,ibp"], ["certify.stages: found ('ibp', 'ibp')", "each stage once"]),
    "stages are no list": (["run", "--stages", "ibp]"], ["certify.stages"]),
    "negative epsilon": (["run", "--epsilon", "-0.1"], ["perturbation.epsilon: found -0.1", ">= 0"]),
    "negative fraction": (["run", "--epsilon=-2/255"], ["perturbation.epsilon: found -0.0078"]),
    "epsilon is NaN": (["run", "--epsilon", "nan"], ["perturbation.epsilon: found 'nan'", "2/255"]),
    "epsilon is YAML's NaN": (["run", "--epsilon", ".nan"], ["perturbation.epsilon: found nan"]),
    "epsilon over 0": (["run", "--epsilon", "1/0"], ["perturbation.epsilon: found '1/0'"]),
    "no time": (["run", "--timeout", "0"], ["certify.timeout: found 0", "seconds > 0"]),
    "negative time": (["run", "--timeout", "-3"], ["certify.timeout: found -3"]),
    "no time at all": (["run", "--total-timeout", "0"], ["total_timeout: found 0", "seconds > 0"]),
    "negative time for all": (["run", "--total-timeout", "-1"], ["total_timeout: found -1"]),
    "time is a word": (["run", "--total-timeout", "soon"], ["--total-timeout: found 'soon'", "seconds > 0"]),
    "unknown device": (["run", "--device", "gpu"], ["device: found 'gpu'", "auto, cpu, cuda"]),
    "another loss": (["run", "--loss.alpha", "0.1"], ["--loss.alpha: cannot be changed", "--certify.field"]),
    "images of the recipe": (["run", "--certify.images", "5"], ["--certify.images: cannot be changed"]),
    "typo in a field": (["run", "--certify.batchsize", "5"], ["certify.batchsize: no such field", "batch_size"]),
    "empty batches": (["--certify.batch_size", "0", "run"], ["certify.batch_size: found 0"]),
    "option without value": (["run", "--epsilon"], ["--epsilon"]),
}  # fmt: skip


@walk(("words", "mentions"), VERIFY.values(), ids=VERIFY)
def test_bad_words_for_verify(words, mentions, here, capsys):
    assert_refused(here, capsys, words, mentions, "verify")


def spoil_a_weight(value: float):
    def spoil(run: Path) -> None:
        weights = safetensors.torch.load_file(run / "model.safetensors")
        weights["1.weight"][3, 2] = value
        safetensors.torch.save_file(weights, run / "model.safetensors")

    return spoil


def edit_verdict(**changes):
    def edit(run: Path) -> None:
        lines = (run / "verdicts.jsonl").read_text().splitlines()
        lines[2] = json.dumps({**json.loads(lines[2]), **changes})
        (run / "verdicts.jsonl").write_text("\n".join(lines) + "\n")

    return edit


WEIGHTS, LINE = "run/model.safetensors", "run/verdicts.jsonl, line 3"
FINISHED = {
    "unfinished": (lambda run: (run / "model.safetensors").unlink(), [WEIGHTS, "found no weights", "--resume run"]),
    "no run": (lambda run: (run / "run.json").unlink(), ["run: found no run.json"]),
    "weights cut": (cut("model.safetensors", 0.7), [WEIGHTS]),
    "weights of another network": (edit_run(lambda d: d["config"]["model"].update(hidden=[9])), [WEIGHTS, "1.weight"]),
    "a weight is NaN": (spoil_a_weight(float("nan")), [WEIGHTS, "1.weight: found a value that is not finite"]),
    "a weight is infinite": (spoil_a_weight(float("inf")), [WEIGHTS, "1.weight: found a value that is not finite"]),
    "other weights": (spoil_a_weight(0.5), ["run/verdicts.jsonl, line 1: found a verdict on other weights"]),
    "other data": (edit_run(lambda d: d["dataset"].update(sha256="0" * 64)), ["data: found", "sha256"]),
    "verdicts are no JSON": (write("verdicts.jsonl", b"hello\n"), ["run/verdicts.jsonl, line 1"]),
    "a verdict is a list": (write("verdicts.jsonl", b"[1]\n"), ["run/verdicts.jsonl, line 1: found index None"]),
    "a verdict outside the data": (edit_verdict(index=359), [LINE, "index 359", "0 to 358"]),
    "a verdict on another label": (edit_verdict(label=11), [LINE, "label 11"]),
    "an unknown status": (edit_verdict(status="fine"), [LINE, "'fine'", "verified, falsified"]),
    "unknown settings": (edit_verdict(settings="?"), [LINE, "found settings '?'", "verdicts/settings.jsonl"]),
    "settings are lost": (lambda run: shutil.rmtree(run / "verdicts"), ["verdicts.jsonl, line 1: found settings"]),
    "settings are no JSON": (write("verdicts/settings.jsonl", b"{\n"), ["run/verdicts/settings.jsonl, line 1"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "mentions"), FINISHED.values(), ids=FINISHED)
def test_verifying_a_damaged_run(damage, mentions, here, capsys):
    damage(here / "run")
    assert_refused(here, capsys, ["run"], mentions, "verify")


def test_no_flipped_byte_of_a_checkpoint_goes_unnoticed(finished, tmp_path):
    """Every byte counts or is none of ours: refused in one line, or the very same content."""
    from certtrain.errors import InputError
    from certtrain.training import checkpoint

    whole = (finished / "resume.pt").read_bytes()
    expected = checkpoint.fingerprint(checkpoint.load(finished / "resume.pt", torch.device("cpu")))
    path, refused = tmp_path / "resume.pt", 0
    for place in range(0, len(whole), 61):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        path.write_bytes(bytes(broken))
        try:
            assert checkpoint.fingerprint(checkpoint.load(path, torch.device("cpu"))) == expected
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "accepted" in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize(
    ("loss", "name", "rows"),
    [("FgsmPgi", "prior", 1438), ("Atta", "transferred", 1438), ("FreeAt", "carried", 500)],
)
def test_buffers_of_another_length(loss, name, rows, tmp_path, monkeypatch, capsys):
    """A row too few: of another data set, or of another batch size."""
    from certtrain.training import checkpoint

    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, *UNEXPORTED, "--loss.type", loss, "--out", "run"]) == 0
    capsys.readouterr()
    metrics = tmp_path / "run" / "metrics.jsonl"  # cut short before its last line, as ``here``
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    path = tmp_path / "run" / "resume.pt"
    content = checkpoint.load(path, torch.device("cpu"))
    whole = content["state"][name]
    assert len(whole) == rows and whole.any()
    for state in ({**content["state"], name: whole[:-1]}, {}):
        checkpoint.save(path, {**content, "state": state})
        found = "nothing" if not state else f"({rows - 1}, 1, 8, 8)"
        mentions = [f"resume.pt: {name}: found {found}; accepted: ({rows}, 1, 8, 8)"]
        assert_refused(tmp_path, capsys, ["--resume", "run"], mentions)


def test_the_damaged_run_would_have_gone_on(here, capsys):
    """The control: undamaged, the same call ends the run."""
    assert main(["train", "--resume", "run"]) == 0
    assert json.loads((here / "run" / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "final"


EDGES = {
    "epsilon 0": ["--perturbation.epsilon", "0"],
    "alpha 0": ["--loss.alpha", "0"],
    "alpha 1": ["--loss.alpha", "1"],
    "no ramp": ["--training.schedule.length", "0"],
    "no stage": ["--certify.stages", "[]"],
    "a linear model": ["--model.hidden", "[]"],
    "batch larger than the data": ["--training.batch_size", "5000"],
    "more images than there are": ["--certify.images", "100000"],
}


@pytest.mark.parametrize("words", EDGES.values(), ids=EDGES)
def test_values_at_the_edge_of_their_range_are_not_bad(words, here, capsys):
    assert main(["train", *TINY, *UNEXPORTED, *words, "--out", "edge"]) == 0
    final = json.loads((here / "edge" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["clean_accuracy"] >= final["attacked_accuracy"] >= final["certified_accuracy"] >= 0
    if words[-2:] == ["--perturbation.epsilon", "0"]:
        assert final["certified_accuracy"] == final["clean_accuracy"]


def test_tiny_imagenet_without_its_validation_labels(here, capsys):
    root = here / "tiny"
    for folder in ("train/n01443537/images", "val/images"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(root / folder / "one.JPEG")
    (root / "wnids.txt").write_text("n01443537\n")
    words = ["--data.type", "TinyImageNet", "--data.root", "tiny", "--model.type", "Cnn7"]
    assert_refused(here, capsys, words, ["val_annotations.txt: no such file", "published layout"])


def test_imagenet_of_another_resolution(here, capsys):
    for name in (*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data"):
        np.savez(here / f"{name}.npz", data=np.zeros((2, 32 * 32 * 3), np.uint8), labels=np.array([1, 2]))
    words = ["--data.type", "ImageNet64", "--data.root", ".", "--model.type", "Cnn7"]
    assert_refused(here, capsys, words, ["train_data_batch_1.npz", "3072", "12288"])


def test_a_recipe_that_says_something_twice(here, capsys):
    (here / "twice.yaml").write_text("loss: {type: CcIbp}\nname: two\nloss: {type: MtlIbp}\n")
    assert_refused(here, capsys, ["--config", "twice.yaml"], ["twice.yaml, line 3", "loss is given twice"])
    (here / "twice.yaml").write_text("loss:\n  alpha: 0.1\n  alpha: 0.2\n")
    assert_refused(here, capsys, ["--config", "twice.yaml"], ["twice.yaml, line 3", "alpha is given twice"])


def test_images_of_one_class(here, capsys):
    images = {f"{name}_images": np.zeros((4, 1, 8, 8), np.uint8) for name in ("train", "test")}
    labels = {f"{name}_labels": np.zeros(4, np.int64) for name in ("train", "test")}
    np.savez(here / "one.npz", **images, **labels)
    assert_refused(here, capsys, ["--data.type", "Arrays", "--data.path", "one.npz"], ["one.npz: found 1 class"])
