"""A run is opened once and handed on; what is asked of it does not change it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import certtrain
from certtrain.bounds import L1Ball, LinfBall
from certtrain.command_line import main
from certtrain.errors import InputError
from certtrain.models import Mlp
from certtrain.verifiers import Certify
from certtrain.workflows import run as run_module
from certtrain.workflows.export import export
from certtrain.workflows.run import Run
from certtrain.workflows.train import resume
from certtrain.workflows.verify import verify

FAST = Certify(stages=("ibp",))


@pytest.fixture
def recipes_read(monkeypatch) -> list[Path]:
    """The folders whose recipe was read, one entry each time."""
    read, seen = run_module.recorded_config, []

    def counted(folder, description):
        seen.append(folder.path)
        return read(folder, description)

    monkeypatch.setattr(run_module, "recorded_config", counted)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "--images", "0:3", "--stages", "ibp"], ["evaluate", "--images", "3", "--attacks", "pgd-1"],
        ["diagnose", "--images", "4", "--what", "alignment", "--perturbation.epsilon", "0.02"],
        ["export", "--images", "0:2"], ["train"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_every_command_opens_its_run_once(run, words, recipes_read, capsys):
    command, *options = words
    assert main([command, str(run), *options] if options else [command, "--resume", str(run)]) == 0
    assert recipes_read == [run]


def test_an_open_run_is_handed_on(run, recipes_read):
    opened = Run.open(run)
    assert Run.open(opened) is opened
    verify(opened, images="0:2", certify=FAST, quiet=True)
    certtrain.evaluate(opened, images=2, attacks=["pgd-1"], quiet=True)
    export(opened, images="0:1", quiet=True)
    assert len(recipes_read) == 1


def test_weights_are_read_when_they_are_asked_for(run):
    (run / "model.safetensors").unlink()
    opened = Run.open(run)
    with pytest.raises(
        InputError, match=r"model\.safetensors: found no weights; accepted: a run whose training is fin"
    ):
        opened.model()


def test_images_other_than_those_it_was_started_with_are_refused(run):
    description = json.loads((run / "run.json").read_text())
    description["dataset"]["sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="data: found images with sha256"):
        Run.open(run).dataset()


def test_other_settings_leave_the_recorded_recipe(run):
    opened = Run.open(run)
    changed = opened.with_config(perturbation=LinfBall(0.25), seed=4, certify={"timeout": 3})
    assert (changed.config.perturbation, changed.config.seed) == (LinfBall(0.25), 4)
    assert changed.config.certify.timeout == 3
    assert changed.recorded == opened.config == opened.recorded and opened.config.perturbation != LinfBall(0.25)
    assert changed.with_config(device="cpu").recorded == opened.recorded
    with pytest.raises(InputError, match="threads: found -1; accepted: 0 to 1024"):
        opened.with_config(threads=-1)
    with pytest.raises(InputError, match="timeot"):
        opened.with_config(certify={"timeot": 3})


def test_verdicts_on_another_perturbation_do_not_stand_beside_the_runs_own(run):
    """However the other perturbation is given."""
    before = (run / "verdicts.jsonl").read_bytes()
    opened = Run.open(run)
    for found in (
        verify(opened, epsilon=0.0625, images="0:2", certify=FAST, quiet=True),
        verify(opened.with_config(perturbation=LinfBall(0.0625)), images="0:2", certify=FAST, quiet=True),
    ):
        assert found.file == run / "verdicts" / "embedded-0.0625-nearest.jsonl"
    assert (run / "verdicts.jsonl").read_bytes() == before


def test_an_export_is_seen_by_a_run_that_was_open_before(run):
    opened = Run.open(run)
    (run / "model.onnx").unlink(missing_ok=True)
    assert opened.exported_network() is None
    export(run, images="0:1", quiet=True)
    assert opened.exported_network() == run / "model.onnx"


def test_a_finished_run_is_left_as_it_is(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert resume(run, quiet=True).path == run
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", certtrain.__all__)
def test_every_public_name_has_its_home(name):
    assert getattr(certtrain, name).__name__ == name


def test_verdicts_about_another_kind_of_set_are_never_taken_for_the_runs(smoke, tmp_path):
    """A file of verdicts is named by its epsilon: an L1 ball's certificates must not stand for the box's."""
    run = Run.open(shutil.copytree(smoke, tmp_path / "run"))
    with pytest.raises(InputError, match="perturbation: found L1Ball"):
        verify(run.with_config(perturbation=L1Ball(0.1)), images="0:4", quiet=True)
    assert not list(run.folder.path.glob("verdicts/embedded-*"))
    other = run.with_config(perturbation=run.config.perturbation.with_epsilon(0.01))
    assert verify(other, images="0:4", quiet=True).file.name == "embedded-0.01-nearest.jsonl"
    with pytest.raises(InputError, match="model: found"):
        run.with_config(model=Mlp())
