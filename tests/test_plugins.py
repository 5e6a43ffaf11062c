"""Classes of users: named by module, found by every command where the user named the module, imported nowhere else."""

import contextlib
import dataclasses
import gc
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import safetensors.torch
import torch
import yaml
from own_packages import forgotten

import certtrain
from certtrain import plugins
from certtrain.attacks import Attack, Pgd
from certtrain.bounds import PerturbationSet
from certtrain.command_line import main
from certtrain.components import load_plugins
from certtrain.config import structure, unstructure
from certtrain.data import Source
from certtrain.errors import InputError
from certtrain.losses import CcIbp, Loss
from certtrain.models import Architecture
from certtrain.recipe import Config
from certtrain.workflows.train import resume

ROOT = Path(__file__).parents[1]

PARTS = '''
from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from certtrain.attacks import Pgd
from certtrain.bounds import LinfBall
from certtrain.data import Digits, Source, Split
from certtrain.losses import CcIbp
from certtrain.models import Architecture

if mark := os.environ.get("PLUGIN_MARK"):
    Path(mark).write_text(__name__)

STOP = []


@dataclass(frozen=True)
class OwnLoss(CcIbp):
    """CC-IBP times a number; stops its process where ``STOP`` says after how many calls."""

    factor: float = 1.0

    def __call__(self, model, batch, step):
        if STOP:
            STOP[0] -= 1
            if STOP[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        found = super().__call__(model, batch, step)
        return type(found)(self.factor * found.total, found.parts)


@dataclass(frozen=True)
class OwnAttack(Pgd):
    """PGD under another name."""


@dataclass(frozen=True)
class OwnNet(Architecture):
    """Two linear layers."""

    width: int = 16

    def layers(self, shape, classes):
        size = shape[0] * shape[1] * shape[2]
        return [nn.Flatten(), nn.Linear(size, self.width), nn.ReLU(), nn.Linear(self.width, classes)]


@dataclass(frozen=True)
class OwnBall(LinfBall):
    """The ball under another name."""


@dataclass(frozen=True)
class Few(Source):
    """Some of the digits."""

    count: int = 200

    def read(self) -> tuple[Split, Split, int]:
        train, test, classes = Digits().read()
        keep = torch.arange(self.count)
        return train.subset(keep), test.subset(keep[:40]), classes
'''
RECIPE: dict[str, Any] = {
    "name": "own",
    "data": {"type": "own.parts:Few"},
    "model": {"type": "own.parts:OwnNet", "width": 12},
    "perturbation": {"type": "own.parts:OwnBall", "epsilon": 0.02},
    "loss": {"type": "own.parts:OwnLoss", "factor": 2, "attack": {"type": "own.parts:OwnAttack", "steps": 2}},
    "training": {
        "epochs": 2, "batch_size": 100, "milestones": [], "checkpoint_seconds": 0,
        "schedule": {"type": "Smoothed", "start": 1, "length": 1},
    },
    "certify": {"images": 4, "timeout": 2},
    "export": {"images": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package ``own`` and a recipe of its classes."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "own").mkdir()
    (folder / "own" / "__init__.py").write_text("from .parts import *\n")
    (folder / "own" / "parts.py").write_text(PARTS)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> Path:
    with forgotten(), in_folder(work):
        assert main(["train", "--plugin", "own", "--config", "recipe.yaml", "--out", "run"]) == 0
    return work / "run"


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    with forgotten():
        yield


class in_folder:
    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        self.before = Path.cwd()
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


def refused(call, *mentions: str) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "; accepted: " in message
    for mention in mentions:
        assert mention in message, message
    return message


def module(folder: Path, name: str, text: str) -> str:
    """A file of this name, as --plugin takes it."""
    file = folder / f"{name}.py"
    file.write_text(textwrap.dedent(text))
    return str(file)


LOSS = """
from dataclasses import dataclass
from certtrain.losses import CcIbp, Loss

@dataclass(frozen=True)
class {name}(CcIbp):
    weight: float = 1.0
"""


# --- every command


def test_run_json_names_classes_files_and_checksums(finished, work):
    description = json.loads((finished / "run.json").read_text())
    config = description["config"]
    assert [config[s]["type"] for s in ("data", "model", "perturbation", "loss")] == [
        "own.parts:Few", "own.parts:OwnNet", "own.parts:OwnBall", "own.parts:OwnLoss",
    ]  # fmt: skip
    assert (
        config["loss"]["attack"]["type"] == "own.parts:OwnAttack" and config["training"]["update"]["type"] == "Descend"
    )
    assert set(description["plugins"]) == {
        f"own.parts:{name}" for name in ("Few", "OwnNet", "OwnBall", "OwnLoss", "OwnAttack")
    }
    for source in description["plugins"].values():
        assert Path(source["file"]) == work / "own" / "parts.py" and re.fullmatch("[0-9a-f]{64}", source["sha256"])


def test_a_run_of_certtrains_own_classes_says_nothing_of_plugins(smoke):
    assert "plugins" not in json.loads((smoke / "run.json").read_text())


@pytest.mark.parametrize("named", ["own", "own.parts", "own/parts.py", "own/", "own/__init__.py"])
def test_each_name_of_the_module_opens_the_run(finished, work, named):
    with in_folder(work):
        model, config = certtrain.load_model("run", plugins=[named])
    assert type(config.loss).__name__ == "OwnLoss" and config.loss.factor == 2.0
    assert unstructure(config)["loss"]["type"] == "own.parts:OwnLoss"
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_every_command_finds_the_classes_again(finished, work, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    named = ["--plugin", str(work / "own")]
    assert main(["verify", str(run), *named, "--images", "0:6"]) == 0
    assert main(["evaluate", str(run), *named, "--attacks", "pgd-2", "--images", "10"]) == 0
    assert main(["diagnose", str(run), *named, "--images", "10", "--what", "alignment"]) == 0
    assert main(["export", str(run), *named, "--images", "0:3"]) == 0
    assert main(["train", "--resume", str(run), *named]) == 0
    assert len((run / "verdicts.jsonl").read_text().splitlines()) == 6
    assert json.loads((run / "diagnostics.json").read_text())["perturbation"]["type"] == "own.parts:OwnBall"


def test_python_does_the_same(finished, work, tmp_path):
    sys.path.append(str(work))
    from own.parts import Few, OwnAttack, OwnBall, OwnLoss, OwnNet  # type: ignore[import-not-found]

    config = structure(Config, {**RECIPE, "data": {}, "model": {}, "perturbation": {}, "loss": {"type": "CcIbp"}})
    config = dataclasses.replace(
        config, data=Few(), model=OwnNet(width=12), perturbation=OwnBall(0.02),
        loss=OwnLoss(factor=2, attack=OwnAttack(steps=2)),
    )  # fmt: skip
    folder = certtrain.train(config, tmp_path / "run", quiet=True)
    found, wanted = (safetensors.torch.load_file(p / "model.safetensors") for p in (folder.path, finished))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert isinstance(certtrain.load_model(folder.path)[1].loss, OwnLoss)
    assert certtrain.verify(folder.path, images="0:5", quiet=True).records
    assert resume(folder.path, quiet=True).final() == folder.final()


def test_a_killed_training_is_resumed_to_the_bit(finished, work, tmp_path, capsys):
    run, named = tmp_path / "run", ["--plugin", str(work / "own")]
    load_plugins(named[1:])
    sys.modules["own.parts"].STOP.append(3)  # type: ignore[attr-defined]
    assert main(["train", *named, "--config", str(work / "recipe.yaml"), "--out", str(run)]) == 128 + 15
    assert f"--resume {run} --plugin {named[1]}" in capsys.readouterr().err
    sys.modules["own.parts"].STOP.clear()  # type: ignore[attr-defined]
    assert main(["train", "--resume", str(run), *named]) == 0
    found, wanted = (safetensors.torch.load_file(p / "model.safetensors") for p in (run, finished))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_import_takes_data_of_ones_own(work, tmp_path):
    from certtrain.models import Mlp

    torch.manual_seed(0)
    torch.save(Mlp(hidden=(12,)).build((1, 8, 8), 10).state_dict(), tmp_path / "net.pt")
    words = ["--architecture", "mlp", "--model.hidden", "[12]", "--data", "own.parts:Few", "--epsilon", "0.02"]
    given = ["import-checkpoint", str(tmp_path / "net.pt"), *words, "--mean", "0", "--std", "1", "--out"]
    assert main([*given, str(tmp_path / "without")]) == 2
    assert main([*given, str(tmp_path / "run"), "--plugin", str(work / "own")]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["data"]["type"] == "own.parts:Few"


def test_a_study_hands_its_plugins_to_its_processes(work, tmp_path):
    study = {
        "name": "two", "base": {**RECIPE, "certify": {"enabled": False}, "export": {"enabled": False}}, "seeds": [0],
        "evaluate": {"attacks": ["pgd-2"], "images": 10},
        "rows": [{"name": "three", "changes": {"loss": {"factor": 3}}}],
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    words = ["compare", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main(words) == 2
    assert main([*words, "--plugin", str(work / "own")]) == 0
    assert (tmp_path / "out" / "three-seed0" / "evaluation.json").exists()
    assert "--plugin" in (tmp_path / "out" / "calls.jsonl").read_text()


# --- nothing else is imported


COMMANDS = """
import sys
from certtrain.command_line import main
for words in (["train", "--resume", "run"], ["verify", "run"], ["evaluate", "run"], ["diagnose", "run"],
              ["export", "run"], ["train", "--config", "recipe.yaml", "--out", "other"]):
    print(main(words), flush=True)
import certtrain
try:
    certtrain.load_model("run")
except certtrain.errors.InputError:
    print("refused")
print([name for name in sys.modules if name.partition(".")[0] == "own"])
"""


def test_a_run_folder_imports_nothing_by_itself(finished, work, tmp_path):
    """Not where the module can be found, and not where the folder brings a distribution with an entry point along."""
    shutil.copytree(work, tmp_path / "here")
    before = (tmp_path / "here" / "run" / "run.json").read_bytes()
    entry_point(tmp_path / "here")
    said = processes.run(COMMANDS, tmp_path / "here", PLUGIN_MARK=str(tmp_path / "mark"))
    assert said.stdout.split() == ["2"] * 6 + ["refused", "[]"], said.stderr
    lines = said.stderr.splitlines()
    assert len(lines) == 6
    named = f"--plugin own.parts or --plugin {work / 'own' / 'parts.py'} (in Python plugins=['own.parts'], or its"
    for line in lines[:5]:
        assert "run.json: data.type: found 'own.parts:Few', a class of a module that was not named; accepted: " in line
        assert named in line
    assert lines[5].startswith("error: recipe.yaml: data.type: found 'own.parts:Few', ")
    assert not (tmp_path / "mark").exists() and not (tmp_path / "here" / "other").exists()
    assert (tmp_path / "here" / "run" / "run.json").read_bytes() == before


def entry_point(folder: Path) -> None:
    """As a distribution with a plug-in is installed."""
    info = folder / "own_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[certtrain.plugins]\nown = own\nother = not_there\n")


def test_an_installed_plugin_is_imported_when_it_is_named(finished, work, tmp_path):
    shutil.copytree(work / "own", tmp_path / "site" / "own")
    entry_point(tmp_path / "site")
    code = f"""
import sys, certtrain
from certtrain.losses import Loss
from certtrain.config import structure
structure(Loss, {{"type": "CcIbp"}})
assert "own" not in sys.modules
print(type(certtrain.load_model({str(finished)!r})[1].loss).__module__)
try:
    structure(Loss, {{"type": "not_there:Own"}})
except certtrain.errors.InputError as error:
    print(error)
"""
    said = processes.run(code, tmp_path, tmp_path / "site", PLUGIN_MARK=str(tmp_path / "mark"))
    assert said.returncode == 0, said.stderr
    first, second = said.stdout.splitlines()
    assert first == "own.parts" and (tmp_path / "mark").read_text() == "own.parts"
    assert "plug-in not_there (an entry point of certtrain.plugins): its import fails" in second


# --- scripts and sessions


SCRIPT = """
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import certtrain
from certtrain.config import structure
from certtrain.losses import CcIbp
from certtrain.recipe import Config

@dataclass(frozen=True)
class Scripted(CcIbp):
    weight: float = 1.0

TINY = {training}

if {condition}:
    config = replace(structure(Config, dict(training=TINY, certify=dict(enabled=False), export=dict(enabled=False))),
                     loss=Scripted(weight=3.0))
    folder = certtrain.train(config, sys.argv[1])
    assert isinstance(certtrain.load_model(folder.path)[1].loss, Scripted)
"""


def script(folder: Path, name: str, condition: str = '__name__ == "__main__"') -> Path:
    training = {**RECIPE["training"], "epochs": 1, "schedule": {"type": "Smoothed", "start": 1, "length": 0}}
    file = folder / f"{name}.py"
    file.write_text(SCRIPT.format(training=training, condition=condition))
    return file


def test_a_scripts_own_classes_are_found_by_its_name(tmp_path):
    file = script(tmp_path, "my-script")
    as_script = "import runpy, sys; sys.argv = ['my-script.py', 'run']; runpy.run_path(sys.argv[0], None, '__main__')"
    said = processes.run(as_script, tmp_path)
    assert said.returncode == 0 and "find it only where" not in said.stdout, said.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["loss"]["type"] == "my-script:Scripted"
    run = tmp_path / "run"
    refused(lambda: certtrain.load_model(run), "found 'my-script:Scripted'", f"--plugin {file} ")
    assert certtrain.load_model(run, plugins=[str(file)])[1].loss.weight == 3.0  # type: ignore[attr-defined]


def test_a_script_that_trains_on_import_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "run")])
    file = script(tmp_path, "trains", "True")
    message = refused(lambda: load_plugins([str(file)]), "trains.py: its import uses certtrain")
    assert message.endswith('below if __name__ == "__main__":')


def test_a_script_named_as_a_module_of_pythons_own_says_that_it_is_lost(tmp_path, capsys, monkeypatch):
    file = script(tmp_path, "this")
    monkeypatch.setattr(sys, "argv", [str(file), str(tmp_path / "run")])
    runpy.run_path(str(file), run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert "this:Scripted is defined in a script that has the name of Python's own this: resume, verify" in said
    refused(lambda: certtrain.load_model(tmp_path / "run", plugins=[str(file)]), "this is already a module, ", "name")


def test_a_sessions_classes_train_and_are_found_in_it_alone(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as session:
        session.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        session.setattr(sys, "argv", ["", str(tmp_path / "run")])
        exec(script(tmp_path, "typed").read_text(), vars(sys.modules["__main__"]))
    gc.collect()  # the session's classes refer to themselves
    said = " ".join(capsys.readouterr().out.split())
    assert "__main__:Scripted is defined in an interactive session: resume, verify and load_model find it only" in said
    message = refused(lambda: certtrain.load_model(tmp_path / "run"), "found '__main__:Scripted'", "a session that")
    assert "FILE" not in message


def test_a_class_inside_a_function_trains_where_it_is_defined():
    @dataclass(frozen=True)
    class Local(CcIbp):
        weight: float = 1.0

    name = plugins.type_name(Local)
    assert name.endswith(".<locals>.Local") and "function" in plugins.why_lost(Local)
    assert structure(Loss, unstructure(Local(weight=2.0))) == Local(weight=2.0)
    lost = "some_module:f.<locals>.Lost"
    refused(lambda: structure(Loss, {"type": lost}), "defined inside a function", "at the top of a module")


def test_a_cell_that_runs_again_replaces_its_class(tmp_path):
    for _ in range(3):
        namespace = sys.modules["__main__"].__dict__
        code = LOSS.format(name="Cell").replace("@dataclass", "import dataclasses\n@dataclass")
        exec(compile(code, "cell", "exec"), namespace)
        latest = namespace["Cell"]
        assert type(structure(Loss, unstructure(latest()))) is latest
    del namespace["Cell"]


# --- names


def test_names_are_full_ones_bare_ones_of_one_class_or_where_another_module_imports_it(tmp_path):
    mine = module(tmp_path, "name_a", LOSS.format(name="Mine"))
    load_plugins([mine, module(tmp_path, "name_b", "from name_a import *")])
    kinds = [structure(Loss, {"type": name}) for name in ("name_a:Mine", "Mine", "name_b:Mine")]
    assert {plugins.type_name(type(kind)) for kind in kinds} == {"name_a:Mine"}
    assert "name_a:Mine" in Loss.members() and "CcIbp" in Loss.members()
    refused(lambda: structure(Loss, {"type": "Nobody"}), "name_a:Mine", "CcIbp")


def test_a_bare_name_of_two_classes_is_refused_with_both(tmp_path):
    load_plugins([module(tmp_path, name, LOSS.format(name="Twin")) for name in ("twin_a", "twin_b")])
    message = refused(lambda: structure(Loss, {"type": "Twin"}, "loss"))
    assert message == "loss.type: found 'Twin'; accepted: twin_a:Twin, twin_b:Twin"
    assert plugins.type_name(type(structure(Loss, {"type": "twin_b:Twin"}))) == "twin_b:Twin"


def test_a_name_of_certtrains_own_is_refused_with_both(tmp_path):
    file = module(tmp_path, "clashes", LOSS.format(name="Ibp"))
    both = "found clashes:Ibp, which has the name of certtrain's own certtrain.losses.ibp:Ibp; accepted: "
    refused(lambda: load_plugins([file]), f"plug-in {file}: {both}")
    kind = sys.modules["clashes"].Ibp  # type: ignore[attr-defined]
    refused(lambda: structure(Loss, unstructure(kind()), "loss"), f"loss.type: {both}")
    assert type(structure(Loss, {"type": "Ibp"})).__module__ == "certtrain.losses.ibp"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kinds:Net", "found 'kinds:Net', which is no Loss; accepted: a class that extends Loss"),
        ("kinds:Anything", "which is no Loss"),
        ("kinds:function", "which is no Loss"),
        ("kinds:Unfinished", "which is abstract: it lacks __call__"),
        ("kinds:Plain", "a plain class; accepted: @dataclass(frozen=True)"),
        ("kinds:Absent", "but kinds defines no such class; accepted: "),
        ("kinds:", "but kinds defines no such class"),
        ("kinds:Mine.Absent", "but kinds defines no such class"),
        ("os:system", "which is no Loss"),
        ("certtrain:train", "certtrain defines no such class"),
        (":Mine", "a class of a module that was not named"),
        ("not a module:Mine", "a class of a module that was not named"),
        ("kinds.Mine", "found 'kinds.Mine'; accepted: "),
    ],
)
def test_a_class_of_another_kind_is_refused(tmp_path, name, said):
    text = LOSS.format(name="Mine") + textwrap.dedent(
        """
        from certtrain.models import Mlp

        class Net(Mlp): ...
        class Anything: ...
        class Plain(CcIbp):
            weight: float = 1.0
        @dataclass(frozen=True)
        class Unfinished(Loss): ...
        def function(): ...
        def __getattr__(name):
            raise AssertionError(name)
        """
    )
    load_plugins([module(tmp_path, "kinds", text)])
    refused(lambda: structure(Loss, {"type": name}, "loss"), "loss.type: ", said)


@pytest.mark.parametrize("family", [Loss, Attack, Source, Architecture, PerturbationSet])
def test_a_name_of_no_loaded_module_says_which_option_would_allow_it(family):
    message = refused(lambda: structure(family, {"type": "some.module:Mine"}, "place"))
    assert message == (
        "place.type: found 'some.module:Mine', a class of a module that was not named; accepted: --plugin some.module "
        "or --plugin FILE.py (in Python plugins=['some.module'], or its import first)"
    )


def test_what_a_stranger_wrote_into_run_json_stays_one_line(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / "run")
    description = json.loads((smoke / "run.json").read_text())
    for name, source in (
        ("a\nb:Loss", {}), ("a\x1b[2J:Loss", {}), ("a; rm -r b:Loss", {}), ("mine:Loss", {"file": "a\nb", "sha256": 3}),
        ("mine:Loss", {"file": "a b; c.py"}), ("mine:Loss", [1]), ("mine:Loss", None), ("mine:Loss\n", {}),
    ):  # fmt: skip
        description["config"]["loss"], description["plugins"] = {"type": name}, {name: source}
        (tmp_path / "run" / "run.json").write_text(json.dumps(description))
        message = refused(lambda: certtrain.load_model(tmp_path / "run"), f"found {name!r}")
        assert message.isprintable()
        assert "a; rm" not in message.replace(repr(name), "").replace("'a; rm -r b'", "")
        assert "a b; c.py" not in message or "--plugin 'a b; c.py'" in message
    description["plugins"] = 3
    (tmp_path / "run" / "run.json").write_text(json.dumps(description))
    refused(lambda: certtrain.load_model(tmp_path / "run"), "--plugin FILE.py")


def test_plugins_are_a_list_of_words_or_paths(finished, work):
    refused(lambda: certtrain.load_model(finished, plugins="own"), "plugins: found 'own'; accepted: a list of ")
    certtrain.load_model(finished, plugins=[work / "own"])


# --- fields


FIELDS = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from certtrain.losses import CcIbp
if TYPE_CHECKING:
    from elsewhere import Thing

@dataclass(frozen=True)
class Inner:
    size: int = 1

@dataclass(frozen=True)
class Rich(CcIbp):
    inner: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)
    names: list[str] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    made: int = field(default=0, init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.inner.size > 9:
            raise ValueError("size is\\ntoo large")
        object.__setattr__(self, "made", self.inner.size + 1)

@dataclass(frozen=True)
class Unread(CcIbp):
    thing: Thing | None = None
"""


def test_fields_of_every_plain_kind_are_recorded_and_come_back(tmp_path):
    load_plugins([module(tmp_path, "fields", FIELDS)])
    fields: Any = sys.modules["fields"]
    rich = fields.Rich(inner=fields.Inner(3), sizes=(4,), names=["a"], table={"b": 0.5}, anything=[1, {"c": None}])
    mapping = json.loads(json.dumps(unstructure(rich)))
    assert structure(Loss, mapping) == rich and rich.made == 4 and "made" not in mapping
    for value in (torch.zeros(1), {1: 2}, object, fields.Inner):
        config = Config(loss=fields.Rich(anything=value))
        message = refused(lambda config=config: certtrain.train(config, tmp_path / "run"))
        found = f"found a {type(value).__name__}, which no recipe can hold"
        assert message == f"loss.anything: {found}; accepted: numbers, text, lists of them"
    assert not (tmp_path / "run").exists()


def test_what_a_class_refuses_is_one_line_with_its_place(tmp_path):
    load_plugins([module(tmp_path, "fields", FIELDS)])
    with pytest.raises(InputError) as caught:
        structure(Loss, {"type": "fields:Rich", "inner": {"size": 10}}, "loss")
    assert str(caught.value) == "loss: refused by fields:Rich: size is too large"
    refused(lambda: structure(Loss, {"type": "fields:Unread"}, "loss"), "loss.type: fields:Unread: ", "'Thing'")


# --- what cannot be imported


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1 +", "SyntaxError: invalid syntax (fails.py, line 1)"),
        ("\nimport not_a_module", "(fails.py, line 2: ModuleNotFoundError: No module named 'not_a_module')"),
        ("raise ValueError('two\\nlines')", "(fails.py, line 1: ValueError: two lines)"),
        ("import sys\nsys.exit(3)", "(fails.py, line 2: SystemExit: 3)"),
        ("from dataclasses import dataclass\nfrom certtrain.losses import CcIbp\n@dataclass\nclass A(CcIbp): ...\n",
         "cannot inherit non-frozen dataclass"),
        ("from certtrain.losses import nothing", "cannot import name 'nothing'"),
    ],
)  # fmt: skip
def test_an_import_that_fails_is_one_line(tmp_path, capsys, text, said):
    file, path = module(tmp_path, "fails", text), list(sys.path)
    message = refused(lambda: load_plugins([file]), f"plug-in {file}: its import fails", said)
    assert sys.path == path and "fails" not in sys.modules
    assert main(["train", "--plugin", file, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {message}\n" and not (tmp_path / "run").exists()


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "a folder").mkdir()
    with in_folder(tmp_path):
        for name in ("absent", "absent.py", "a/absent.py", "a folder/", "not-a-module", "a..b", "", "text.txt"):
            refused(lambda name=name: load_plugins([name]), "plug-in ", "a module such as my_package.my_loss, or a")
    assert str(tmp_path) not in sys.path


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path):
    for name in ("json", "this", "torch", "certtrain"):
        refused(lambda name=name: load_plugins([module(tmp_path, name, "")]), f"{name} is already a module, ")
    refused(lambda: load_plugins([module(tmp_path, "two.dots", "")]), "found a dot in its name", "two_dots.py")


def test_a_file_that_changed_since_its_import_is_refused(tmp_path):
    load_plugins([module(tmp_path, "changes", LOSS.format(name="Mine"))])
    load_plugins([str(tmp_path / "changes.py")])
    file = module(tmp_path, "changes", LOSS.format(name="Mine") + "    more: int = 0\n")
    refused(lambda: load_plugins([file]), "has changed since this process imported it; accepted: a new process")


# --- classes that change


def changed(work: Path, folder: Path, old: str, new: str) -> list[str]:
    """The package with other text, as an option names it."""
    shutil.copytree(work / "own", folder / "own", dirs_exist_ok=True)
    text = PARTS.replace(old, new)
    assert text != PARTS
    (folder / "own" / "parts.py").write_text(text)
    return ["--plugin", str(folder / "own")]


def test_another_text_of_the_network_or_the_set_opens_no_run(finished, work, tmp_path, capsys):
    for old, new in (("nn.ReLU()", "nn.LeakyReLU()"), ("The ball under", "A ball under")):
        with forgotten():
            named = changed(work, tmp_path, old, new)
            for command in ("verify", "evaluate", "export", "diagnose"):
                assert main([command, str(finished), *named]) == 2
                said = capsys.readouterr().err
                assert ": found a class that has changed since the run was started, in " in said
                assert str(tmp_path) in said and said.count("\n") == 1


def test_another_text_of_the_loss_verifies_a_finished_run_and_resumes_none(finished, work, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    named = changed(work, tmp_path, "self.factor * found.total", "found.total")
    assert main(["verify", str(tmp_path / "run"), *named, "--images", "0:5"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if it had been killed in certification
    assert main(["train", "--resume", str(tmp_path / "run"), *named]) == 2
    assert "own.parts:OwnLoss: found a class that has changed" in capsys.readouterr().err


def test_text_elsewhere_in_the_file_may_change(finished, work, tmp_path):
    certtrain.load_model(finished, plugins=changed(work, tmp_path, "STOP = []", "STOP = []\nMORE = 1")[1:])


# --- the page


def test_the_pages_example_works_by_paste(tmp_path, capsys):
    page = (ROOT / "docs" / "plugins.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, flags=re.S)
    (parts, recipe, commands, code) = (text for kind, text in blocks if kind != "toml")
    (tmp_path / "my_parts.py").write_text(parts)
    (tmp_path / "recipe.yaml").write_text(recipe)
    with in_folder(tmp_path):
        for line in commands.splitlines():
            assert main(shlex.split(line)[1:]) == 0, line
        exec(code, {})
    assert "Scaled(base=CcIbp(" in capsys.readouterr().out


def test_every_command_has_the_option(capsys):
    for command in ("train", "verify", "evaluate", "diagnose", "export", "import-checkpoint", "compare"):
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        assert "--plugin MODULE  " in capsys.readouterr().out


def test_pgd_is_still_pgd():
    assert unstructure(Pgd())["type"] == "Pgd" and unstructure(CcIbp(attack=Pgd()))["attack"]["type"] == "Pgd"
