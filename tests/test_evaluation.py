"""Evaluation of a run: clean, attacked and certified accuracy, image by image, resumed, and never contradicting."""

import json
import shutil
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import certtrain
from certtrain.attacks import in_mode
from certtrain.bounds import L2Ball, LinfBall
from certtrain.command_line import main
from certtrain.data import Split
from certtrain.errors import InputError
from certtrain.evaluation import (
    Adversary,
    AdversaryQuestion,
    Checkpoint,
    Clean,
    Evaluate,
    Evaluation,
    Intervals,
    Outcome,
    RestartedPgd,
    unanswered,
)
from certtrain.evaluation.adversary import is_right, lead
from certtrain.ledger import Ledger
from certtrain.noise import Noise
from certtrain.recipe import load_config
from certtrain.run_folder import JsonLines, RunFolder, sha256
from certtrain.step import Batch, Step
from certtrain.workflows.run import load_model
from certtrain.workflows.train import resume

ROOT = Path(__file__).parents[1]
TINY = {"model.type": "Mlp", "model.hidden": "[16]", "certify.images": "4", "export.enabled": "false",
        "training.epochs": "8", "perturbation.epsilon": "0.05", "training.schedule.length": "4"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    config = load_config(ROOT / "configs" / "smoke.yaml", TINY)
    return certtrain.train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).path


@pytest.fixture
def run(trained, tmp_path, monkeypatch) -> RunFolder:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return RunFolder(Path("run"))


def batch_of(images: Tensor, labels: Tensor, first: int = 0) -> Batch:
    return Batch(images, labels, torch.arange(first, first + len(labels)))


def lost_to(adversary: Adversary, model: nn.Module, batch: Batch, ball, seed: int = 0) -> list[str | None]:
    step = Step.evaluation(ball, Noise(seed, batch.index))
    with in_mode(model, training=False):
        return [lost.lost_to for lost in adversary(model, batch, ball, step)]


# what is right


def test_ties_and_values_that_are_no_numbers_are_wrong():
    logits = torch.tensor([[2.0, 1], [1, 1], [torch.nan, 0], [0, torch.nan], [torch.inf, torch.inf], [1, 2]])
    labels = torch.zeros(6, dtype=torch.int64)
    assert is_right(nn.Identity(), logits, labels).tolist() == [True, False, False, False, False, False]
    assert is_right(nn.Identity(), logits[:0], labels[:0]).tolist() == []
    three = torch.tensor([[1.0, 3, 2], [1, 3, 3.5]])
    assert lead(three, torch.tensor([1, 1])).tolist() == [1, -0.5]


# PGD


class Valley(nn.Module):
    """One pixel. Class 1 wins at the right end of the ball around grey, and only there; left of grey its logit
    grows to the left without ever winning: a start on the left stays on the left."""

    def forward(self, x: Tensor) -> Tensor:
        change = x.flatten(1)[:, 0] - 0.5
        other = torch.where(change > 0, change - 0.04, -change - 0.2)
        return torch.stack([torch.zeros_like(other), other], 1)


def test_one_start_of_many_is_enough():
    count, ball = 400, LinfBall(0.05)
    batch = batch_of(torch.full((count, 1, 1, 1), 0.5), torch.zeros(count, dtype=torch.int64))
    found = {n: lost_to(RestartedPgd("", 5, n), Valley(), batch, ball) for n in (1, 3, 12)}
    broken = {n: sum(name is not None for name in names) for n, names in found.items()}
    assert 150 < broken[1] < 250 and 320 < broken[3] < 380 and broken[12] >= 398
    # restart r of a sample is the same however many there are: those lost to the first three of twelve, no others
    for n in (1, 3):
        early = {f"restart {number}" for number in range(1, n + 1)}
        assert [name if name in early else None for name in found[12]] == found[n]
    apart = [lost_to(RestartedPgd("", 5, 3), Valley(), batch.part(slice(row, row + 1)), ball)[0] for row in range(20)]
    assert apart == found[3][:20]


class Flat(nn.Module):
    """The label 0 leads by what the pixel has above 0.48; below that, both logits are 0 and argmax still says 0."""

    def forward(self, x: Tensor) -> Tensor:
        lead = torch.relu(x.flatten(1)[:, 0] - 0.48)
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def test_a_tie_under_attack_is_lost():
    batch = batch_of(torch.full((20, 1, 1, 1), 0.5), torch.zeros(20, dtype=torch.int64))
    assert lost_to(RestartedPgd("", 10), Flat(), batch, LinfBall(0.05)) == ["restart 1"] * 20
    assert lost_to(RestartedPgd("", 10), Flat(), batch, LinfBall(0.01)) == [None] * 20


@pytest.mark.parametrize("ball", [LinfBall(0.05), L2Ball(0.12)])
def test_linear_networks_are_broken_exactly_where_they_can_be(ball):
    torch.manual_seed(0)
    model, dimensions = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 1 if isinstance(ball, LinfBall) else 2
    model[1].bias.data = -model[1].weight.data.sum(1) / 2
    weight = model[1].weight.detach()
    images = 0.5 + 0.15 * (2 * torch.rand(300, 1, 4, 4) - 1)
    with torch.no_grad():
        labels, logits = model(images).argmax(1), model(images)
    taken = ball.epsilon * (weight[1] - weight[0]).norm(dimensions)
    relative = (logits[:, 1] - logits[:, 0]).abs() / taken
    clear = (relative - 1).abs() > 0.02
    batch = batch_of(images[clear], labels[clear])
    found = lost_to(RestartedPgd("", 20), model, batch, ball)
    assert [name is None for name in found] == (relative[clear] > 1).tolist()
    assert 20 < sum(name is None for name in found) < len(found) - 20


def test_at_epsilon_0_and_on_no_images_nothing_is_lost():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    images = torch.rand(5, 1, 4, 4)
    batch = batch_of(images, model(images).argmax(1))
    assert lost_to(RestartedPgd("", 3, 2), model, batch, LinfBall(0.0)) == [None] * 5
    assert lost_to(RestartedPgd("", 3, 2), model, batch.part(slice(0, 0)), LinfBall(0.1)) == []


def test_the_network_comes_back_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)
    ).train()  # fmt: skip
    model[0].weight.requires_grad_(False)
    model[3].eval()
    images, labels = torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    flags = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split, basis = Split(images, labels, 1), {"weights": "a", "data": "b"}
    for adversary in (Clean(), Intervals(), RestartedPgd("", 3, 2)):
        question = AdversaryQuestion(model, split, LinfBall(0.1), adversary, 0, 4, basis, {})
        assert [len(lines) for lines in question.answer(range(6))] == [6]
        assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == flags
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


# files


@dataclass(frozen=True)
class Spy(Adversary):
    """Breaks the images with an odd number; remembers whom it saw; is killed when it has seen enough."""

    seen: list[int] = field(default_factory=list)
    patience: int = 1000

    @property
    def name(self) -> str:
        return "spy"

    def __call__(self, model, batch, ball, step) -> list[Outcome]:
        if len(self.seen) >= self.patience:
            raise KeyboardInterrupt
        self.seen.extend(batch.index.tolist())
        return [Outcome("oddity" if number % 2 else None) for number in batch.index.tolist()]


def question(adversary: Adversary, weights: str = "a", size: int = 4, clean=None, seed: int = 0) -> AdversaryQuestion:
    images = torch.linspace(0, 1, 30).reshape(30, 1, 1, 1)
    labels = (images.flatten() < 0.81).long()  # the last five are wrong
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model[1].weight.data, model[1].bias.data = torch.tensor([[0.0], [0.0]]), torch.tensor([0.0, 1.0])
    basis = {"weights": weights, "data": "b"}
    split, versions = Split(images, labels, 1), {"torch": "1"}
    return AdversaryQuestion(model, split, LinfBall(0.1), adversary, seed, size, basis, versions, clean)


def without_times(file: JsonLines) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in file]


def test_what_is_wrong_anyway_is_not_attacked_and_never_robust(tmp_path):
    spy = Spy()
    wrong = [number for number, label in enumerate(question(spy).split.labels.tolist()) if label == 0]
    lines = Ledger(JsonLines(tmp_path / "spy.jsonl")).ask(question(spy), range(30), quiet=True)
    assert sorted([*spy.seen, *wrong]) == list(range(30)) and len(wrong) == 6
    assert [line["index"] for line in lines] == list(range(30))
    assert [n for n, line in enumerate(lines) if line["lost_to"] == "clean"] == wrong
    assert all(line["robust"] == (line["lost_to"] is None) for line in lines)
    assert all(line["prediction"] == 1 and line["label"] == int(n not in wrong) for n, line in enumerate(lines))


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path):
    whole, file = JsonLines(tmp_path / "whole.jsonl"), JsonLines(tmp_path / "file.jsonl")
    Ledger(whole).ask(question(Spy()), range(3, 30), quiet=True)
    with pytest.raises(KeyboardInterrupt):
        Ledger(file).ask(question(Spy(patience=8)), range(3, 30), quiet=True)
    kept = without_times(file)
    assert [line["index"] for line in kept[1:]] == list(range(3, 12))  # one batch up to 4, then of four
    with file.path.open("ab") as half:
        half.write(b'{"index": 12, "lab')
    spy = Spy()
    Ledger(file).ask(question(spy), range(3, 30), quiet=True)
    assert min(spy.seen) == 12 and len(spy.seen) == len(set(spy.seen))
    assert without_times(file) == without_times(whole)
    again = Spy()
    Ledger(file).ask(question(again), range(3, 30), quiet=True)
    assert not again.seen


def test_more_images_later_end_in_one_ordered_file(tmp_path):
    file = JsonLines(tmp_path / "spy.jsonl")
    Ledger(file).ask(question(Spy()), range(10, 20), quiet=True)
    found = Ledger(file).ask(question(Spy()), range(2, 12), quiet=True)
    assert [line["index"] for line in found] == list(range(2, 12))
    lines = list(file)
    assert lines[0]["kind"] == "settings" and lines[0]["weights"] == "a"
    assert [line["index"] for line in lines[1:]] == list(range(2, 20))


@pytest.mark.parametrize("change", [{"weights": "other"}, {"seed": 1}])
def test_answers_about_another_network_are_not_mixed_in(change, tmp_path, capsys):
    file = JsonLines(tmp_path / "spy.jsonl")
    Ledger(file).ask(question(Spy()), range(20), quiet=True)
    spy = Spy()
    Ledger(file).ask(question(spy, **change), range(10), quiet=False)
    assert "begun anew" in capsys.readouterr().out
    assert sorted(spy.seen) == list(range(10)) and len(list(file)) == 11
    fresh = JsonLines(tmp_path / "fresh.jsonl")
    Ledger(fresh).ask(question(Spy(), **change), range(10), quiet=True)
    assert without_times(file) == without_times(fresh)


def test_other_versions_go_on_and_say_so(tmp_path):
    file = JsonLines(tmp_path / "spy.jsonl")
    Ledger(file).ask(question(Spy()), range(4), quiet=True)
    later = question(Spy())
    later = AdversaryQuestion(**{**vars(later), "versions": {"torch": "2"}})
    Ledger(file).ask(later, range(8), quiet=True)
    first, second, *lines = file
    assert (first["versions"], second["versions"]) == ({"torch": "1"}, {"torch": "2"})
    assert [line["settings"] for line in lines] == [first["settings"]] * 4 + [second["settings"]] * 4


@pytest.mark.parametrize(
    "spoil",
    [{"index": 99}, {"label": 0}, {"robust": 1}, {"robust": None}, {"settings": "elsewhere"}, {"prediction": "1"}],
)
def test_a_file_that_was_tampered_with_is_refused(spoil, tmp_path):
    file = JsonLines(tmp_path / "spy.jsonl")
    Ledger(file).ask(question(Spy()), range(8), quiet=True)
    lines = list(file)
    file.rewrite([*lines[:3], {**lines[3], **spoil}, *lines[4:]])
    before = file.path.read_bytes()
    with pytest.raises(InputError, match=r"spy\.jsonl, line 4: found .*; accepted: "):
        Ledger(file).ask(question(Spy()), range(8), quiet=True)
    assert file.path.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path):
    file = JsonLines(tmp_path / "spy.jsonl")
    with file.exclusive(), pytest.raises(InputError, match="one at a time"):
        Ledger(file).ask(question(Spy()), range(8), quiet=True)


def test_the_batch_size_changes_no_answer(run, tmp_path):
    model, config = load_model("run")
    split, basis = config.data.load().test, {"weights": "a", "data": "b"}
    found = []
    for size in (7, 64):
        asked = AdversaryQuestion(model, split, LinfBall(0.05), RestartedPgd("pgd", 5, 3), 0, size, basis, {})
        lines = Ledger(JsonLines(tmp_path / f"{size}.jsonl")).ask(asked, range(5, 105), quiet=True)
        found.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
    assert found[0] == found[1]
    assert len({line["lost_to"] for line in found[0]}) >= 3  # clean, a restart, None


# a run


def rows(found) -> dict[tuple[str, str, float], dict]:
    return {(row["checkpoint"], row["attack"], row["epsilon"]): row for row in found["rows"]}


def test_a_run_gets_one_table(run):
    asked = {"attacks": ("pgd-5", "pgd-5-3", "autoattack-cheap"), "epsilons": (0.02, 0.1), "images": 40}
    found = certtrain.evaluate("run", **asked, quiet=True)
    assert found == json.loads(run.evaluation.read_text())
    table = rows(found)
    assert next(iter(table)) == ("last", "clean", 0.0) and len(table) == 9
    lines = {key: [line for line in run.evaluated(*key) if "index" in line] for key in table}
    robust = {key: {line["index"] for line in found if line["robust"]} for key, found in lines.items()}
    for key, row in table.items():
        assert row["images"] == len(lines[key]) == 40
        assert row["correct"] == len(robust[key]) and row["accuracy"] == row["correct"] / 40
        assert sum(row["lost_to"].values()) == 40 - row["correct"]
        assert row["weights_sha256"] == sha256(run.model)
    model, config = load_model("run")
    test = config.data.load().test
    images, labels = test.pixels(torch.arange(40)), test.labels[:40]
    right = (model(images).argmax(1) == labels).nonzero()[:, 0].tolist()
    assert robust["last", "clean", 0.0] == set(right) and 5 < len(right)
    for epsilon in (0.02, 0.1):
        ibp, pgd, more, auto = (
            robust["last", name, epsilon] for name in ("ibp", "pgd-5", "pgd-5-3", "autoattack-cheap")
        )
        assert ibp <= auto and ibp <= more <= pgd <= set(right)
        bounds = certtrain.compute_bounds(model, certtrain.LinfBall(epsilon).hull(images))
        certain = [
            n for n in range(40) if bounds.lower[n, labels[n]] > bounds.upper[n][torch.arange(10) != labels[n]].max()
        ]
        assert set(certain) <= ibp  # without the merged last layer bounds are looser, never tighter
    assert robust["last", "ibp", 0.02] and len(robust["last", "pgd-5", 0.1]) < len(right)


def test_a_second_call_adds_to_the_table_and_computes_nothing_twice(run, monkeypatch):
    first = certtrain.evaluate("run", attacks=["pgd-3"], images=20, quiet=True)
    calls = []
    answer = AdversaryQuestion.answer

    def spy(self, images, *rest):
        calls.append((self.adversary.name, tuple(images)))
        return answer(self, images, *rest)

    monkeypatch.setattr(AdversaryQuestion, "answer", spy)
    second = certtrain.evaluate("run", attacks=["pgd-4"], images=20, quiet=True)
    assert calls == [("pgd-4", tuple(range(20)))]
    assert set(rows(second)) == set(rows(first)) | {("last", "pgd-4", 0.05)}
    assert all(rows(second)[key] == row for key, row in rows(first).items())
    third = certtrain.evaluate("run", attacks=["pgd-4"], images="10:25", quiet=True)
    assert rows(third)["last", "pgd-4", 0.05]["first_image"] == 10
    assert rows(third)["last", "pgd-4", 0.05]["images"] == 15
    assert [numbers for _, numbers in calls[1:]] == [tuple(range(20, 25))] * 3


def test_rows_say_how_and_by_what_they_were_computed(run, monkeypatch):
    first = certtrain.evaluate("run", attacks=["pgd-3-2", "autoattack-cheap"], images=10, quiet=True)
    table = rows(first)
    assert table["last", "clean", 0.0]["settings"] == table["last", "ibp", 0.05]["settings"] == {"seed": 0}
    pgd = {"seed": 0, "steps": 3, "restarts": 2, "step_size": 0.25}
    assert table["last", "pgd-3-2", 0.05]["settings"] == pgd
    (versions,) = table["last", "autoattack-cheap", 0.05]["versions"]
    assert versions["pyautoattack"] and versions["torch"] == torch.__version__ and versions["device"]
    assert "pyautoattack" not in table["last", "pgd-3-2", 0.05]["versions"][0]
    assert first["versions"]["pyautoattack"] == [versions["pyautoattack"]]

    monkeypatch.setattr("certtrain.workflows.evaluate.device_name", lambda device: "another")
    settings = Evaluate(attacks=("pgd-3-2",), step_size=0.5)
    second = certtrain.evaluate("run", settings=settings, images=15, quiet=True)
    table = rows(second)
    assert table["last", "pgd-3-2", 0.05]["settings"] == {**pgd, "step_size": 0.5}
    assert [some["device"] for some in table["last", "pgd-3-2", 0.05]["versions"]] == ["another"]
    assert [some["device"] for some in table["last", "clean", 0.0]["versions"]] == [versions["device"], "another"]
    assert table["last", "autoattack-cheap", 0.05]["images"] == 10  # kept
    assert second["versions"]["device"] == sorted([versions["device"], "another"])


def test_two_calls_at_once_lose_no_row(run, monkeypatch):
    """While one attacks, another one writes the table."""
    call = RestartedPgd.__call__

    def meanwhile(self, *rest):
        if self.name == "pgd-3":
            monkeypatch.setattr(RestartedPgd, "__call__", call)
            certtrain.evaluate("run", attacks=["pgd-5"], images=10, quiet=True)
        return call(self, *rest)

    monkeypatch.setattr(RestartedPgd, "__call__", meanwhile)
    found = certtrain.evaluate("run", attacks=["pgd-3"], images=10, quiet=True)
    assert {row["attack"] for row in found["rows"]} == {"clean", "ibp", "pgd-3", "pgd-5"}


ASKED = Evaluate(enabled=True, attacks=("pgd-2",), epsilons=(0.02,), images=10)


@pytest.mark.parametrize(
    "other",
    [
        {"images": "10:20"}, {"images": 9}, {"settings": replace(ASKED, step_size=0.5)}, {"epsilons": [0.03]},
        {"attacks": ["pgd-3"]}, {"checkpoints": ["best"]},
    ],
)  # fmt: skip
def test_a_run_is_evaluated_when_its_own_rows_are_there(other, run):
    """Rows of other images, settings, epsilons, attacks or weights are not those that were asked for."""
    shutil.copy(run.model, run.best)
    wanted = [
        (name, attack, epsilon) for name in ("last", "best") for attack, epsilon in (("clean", 0.0), ("pgd-2", 0.02))
    ]

    def missing() -> list[tuple[str, str, float]]:
        return list(unanswered(run, ASKED, LinfBall(0.05), 0, 10))

    assert missing() == wanted
    certtrain.evaluate("run", settings=ASKED, quiet=True)
    assert not missing()
    assert list(unanswered(run, ASKED, LinfBall(0.05), 1, 10)) == wanted
    run.evaluation.unlink()
    certtrain.evaluate("run", **({"settings": ASKED} | other), quiet=True)  # type: ignore[arg-type]
    assert missing() and set(missing()) <= set(wanted)


def test_resume_does_the_recipes_own_evaluation_whatever_another_call_asked(tmp_path):
    config = load_config(ROOT / "configs" / "smoke.yaml", {**TINY, "evaluate.enabled": "true", "evaluate.images": "10",
                                                           "evaluate.attacks": "[pgd-2]"})  # fmt: skip
    folder = certtrain.train(config, tmp_path / "run", quiet=True)
    whole = rows(json.loads(folder.evaluation.read_text()))
    written = folder.evaluation.stat().st_mtime_ns
    resume(folder.path, quiet=True)
    assert folder.evaluation.stat().st_mtime_ns == written
    folder.evaluation.unlink()
    certtrain.evaluate(folder.path, attacks=["pgd-1"], images=4, quiet=True)
    resume(folder.path, quiet=True)
    assert rows(json.loads(folder.evaluation.read_text())).items() >= whole.items()


def test_small_images_are_refused_in_l2_before_training(tmp_path):
    archive = tmp_path / "small.npz"
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 3, 40)
    np.savez(archive, **arrays)
    fields = {"data": f"{{type: Arrays, path: {archive}}}", "perturbation": "{type: L2Ball, epsilon: 0.1}",
              "certify.enabled": "false", "evaluate.enabled": "true", "evaluate.attacks": "[autoattack]",
              "loss": "{type: FgsmRs}"}  # fmt: skip
    config = load_config(ROOT / "configs" / "smoke.yaml", TINY | fields)
    with pytest.raises(InputError, match=r"autoattack: found images of 4×4; accepted: 5×5"):
        certtrain.train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_rows_on_other_weights_leave_the_table(run):
    shutil.copy(run.model, run.best)
    both = certtrain.evaluate("run", attacks=["pgd-3"], images=10, quiet=True)
    last, best = ({k[1:]: v for k, v in rows(both).items() if k[0] == name} for name in ("last", "best"))
    assert list(last) == list(best) == [("clean", 0.0), ("ibp", 0.05), ("pgd-3", 0.05)]
    assert all(last[key]["correct"] == best[key]["correct"] for key in last)
    run.best.unlink()
    assert {row["checkpoint"] for row in certtrain.evaluate("run", attacks=[], images=10, quiet=True)["rows"]} == {
        "last"
    }


def test_the_best_checkpoint_is_its_own_network(run):
    model, _ = load_model("run")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    import safetensors.torch

    safetensors.torch.save_file(model.state_dict(), run.best)
    assert all((p == 0).all() for p in load_model("run", "best")[0].parameters())
    assert any((p != 0).any() for p in load_model("run")[0].parameters())
    found = certtrain.evaluate("run", attacks=["pgd-3"], images=10, checkpoints=["best"], quiet=True)
    assert {row["checkpoint"] for row in found["rows"]} == {"best"}
    assert all(row["correct"] == 0 for row in found["rows"])  # all logits tie
    assert found["rows"][0]["weights_sha256"] == sha256(run.best) != run.weights_sha256()


def test_l2_balls_get_l2_attacks(run):
    model, config = load_model("run")
    evaluation = Evaluation(
        run, config.data.load().test, L2Ball(0.3), Evaluate(attacks=("pgd-5", "autoattack-cheap")), 0, "data", {}
    )
    table = rows(evaluation.run([Checkpoint("last", model, run.weights_sha256())], range(16), quiet=True))
    assert all(row["unconfirmed"] == 0 for row in table.values())
    assert (
        table["last", "ibp", 0.3]["correct"]
        <= table["last", "autoattack-cheap", 0.3]["correct"]
        < table["last", "clean", 0.0]["correct"]
    )


class Sorted(nn.Module):
    """No bound rule knows it."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1).sort(1).values)


def test_a_network_without_bounds_has_no_ibp_row_and_the_table_says_why(run):
    split = Split(torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64), 1)
    evaluation = Evaluation(run, split, LinfBall(0.01), Evaluate(attacks=("pgd-3",)), 0, "data", {})
    found = evaluation.run([Checkpoint("last", Sorted(), run.weights_sha256())], range(6), quiet=True)
    assert [row["attack"] for row in found["rows"]] == ["clean", "pgd-3"]
    (skipped,) = found["skipped"]
    assert (skipped["attack"], skipped["epsilon"]) == ("ibp", 0.01) and "no bound rule" in skipped["reason"]
    assert not run.evaluated("last", "ibp", 0.01).path.exists()


def test_a_certificate_that_an_attack_refutes_is_never_silent(run, monkeypatch):
    monkeypatch.setattr(Intervals, "__call__", lambda self, model, batch, ball, step: [Outcome()] * len(batch))
    with pytest.raises(RuntimeError, match=r"last, pgd-5, epsilon 0.3: IBP certifies the test images \[\d+[\d, ]*\]"):
        certtrain.evaluate("run", attacks=["pgd-5"], epsilons=[0.3], images=20, quiet=True)
    assert not run.evaluation.exists()


# the command line


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


WORDS = {
    "unknown attack": (["run", "--attacks", "pgd-10,cw"], ["evaluate.attacks", "'cw'", "pgd-STEPS", "autoattack"]),
    "no steps": (["run", "--attacks", "pgd-0"], ["'pgd-0'"]),
    "no restarts": (["run", "--attacks", "pgd-10-0"], ["'pgd-10-0'"]),
    "attack in capitals": (["run", "--attacks", "PGD-10"], ["'PGD-10'"]),
    "negative radius": (["run", "--epsilons", "8/255,-0.1"], ["evaluate.epsilons", "-0.1"]),
    "radius that is none": (["run", "--epsilons", "much"], ["evaluate.epsilons", "much"]),
    "infinite radius": (["run", "--epsilons", ".inf"], ["evaluate.epsilons"]),
    "no images": (["run", "--images", "0"], ["images", ":0"]),
    "too many images": (["run", "--images", "100000"], ["images", "100000"]),
    "images of text": (["run", "--images", "1e2"], ["--images: found '1e2'", "N or START:STOP"]),
    "images backwards": (["run", "--images", "9:3"], ["images", "9:3"]),
    "unknown checkpoint": (["run", "--checkpoints", "first"], ["evaluate.checkpoints", "first", "last, best"]),
    "no best checkpoint": (["run", "--checkpoints", "last,best"], ["best.safetensors", "training.select"]),
    "another section": (["run", "--loss.alpha", "1"], ["--loss.alpha"]),
    "enabled": (["run", "--evaluate.enabled", "true"], ["--evaluate.enabled"]),
    "unknown field": (["run", "--evaluate.steps", "3"], ["evaluate.steps", "step_size"]),
    "step of 0": (["run", "--evaluate.step_size", "0"], ["evaluate.step_size"]),
    "batch of 0": (["run", "--evaluate.batch_size", "0"], ["evaluate.batch_size"]),
    "device": (["run", "--device", "tpu"], ["device", "'tpu'"]),
    "no run": (["elsewhere"], ["elsewhere", "run.json"]),
    "no folder": ([], ["RUN_DIR"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_bad_input_is_one_line(name, run, capsys):
    words, mentions = WORDS[name]
    before = everything_in(run.path)
    assert main(["evaluate", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "accepted" in said
    for mention in mentions:
        assert mention in said
    assert everything_in(run.path) == before


def test_without_the_package_the_line_names_the_extra(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = everything_in(run.path)
    assert main(["evaluate", "run", "--attacks", "autoattack"]) == 2
    assert "certtrain[autoattack]" in capsys.readouterr().err
    assert everything_in(run.path) == before


def test_files_that_are_not_ours_are_refused(run, capsys):
    run.evaluation.write_text('{"rows": [{}]}')
    assert main(["evaluate", "run", "--images", "5"]) == 2
    assert "evaluation.json" in capsys.readouterr().err
    assert run.evaluation.read_text() == '{"rows": [{}]}'


def test_the_command_shows_the_table_and_takes_fields(run, capsys):
    words = ["evaluate", "run", "--attacks", "pgd-3-2,pgd-4", "--epsilons", "2/255", "--images", "5:17",
             "--checkpoints", "last", "--evaluate.batch_size", "5"]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    for word in ("pgd-3-2", "pgd-4", "0.007843", "ibp", "clean", "evaluation.json"):
        assert word in said
    assert sorted(path.name for path in (run.path / "evaluation").iterdir()) == [
        f"last-{name}.jsonl" for name in
        ("clean-0.0", f"ibp-{2 / 255!r}", f"pgd-3-2-{2 / 255!r}", f"pgd-4-{2 / 255!r}")
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_nothing(number, run, capsys, monkeypatch):
    words = ["evaluate", "run", "--attacks", "pgd-3", "--images", "60", "--evaluate.batch_size", "10"]
    call, seen = RestartedPgd.__call__, []

    def stopped(self, model, batch, ball, step):
        seen.extend(batch.index.tolist())
        if batch.index[0] >= 30:
            signal.raise_signal(number)
        return call(self, model, batch, ball, step)

    with monkeypatch.context() as patch:
        patch.setattr(RestartedPgd, "__call__", stopped)
        assert main(words) == 128 + number
    assert "go on with: the same call" in capsys.readouterr().err
    assert not run.evaluation.exists()
    file = run.evaluated("last", "pgd-3", 0.05)
    kept = file.path.read_bytes()
    assert len(list(file)) == 1 + 30
    assert main(words) == 0
    assert file.path.read_bytes().startswith(kept) and len(list(file)) == 1 + 60


def test_the_recipe_has_a_section_for_it():
    config = load_config(None, {"evaluate.attacks": "[pgd-50-10, autoattack]", "evaluate.epsilons": "[8/255, 0.1]"})
    assert config.evaluate == Evaluate(attacks=("pgd-50-10", "autoattack"), epsilons=(8 / 255, 0.1))
    first, second = config.evaluate.adversaries()
    assert first == RestartedPgd("pgd-50-10", 50, 10, 0.25) and second.name == "autoattack"
    assert [a.name for a in Evaluate(attacks=("pgd-9", "pgd-9")).adversaries()] == ["pgd-9"]
    config.evaluate.check_ball(LinfBall(0.1))
    with pytest.raises(InputError, match=r"checkpoints: found .*; accepted: a list of last, best"):
        Evaluate(checkpoints=("first",))  # type: ignore[arg-type]
