"""Studies whose swept values are chosen on held-out training images."""

from pathlib import Path
from types import SimpleNamespace

import compare_tuned
import pytest
import yaml
from test_comparison import everything_in

from certtrain.comparison import read_study
from certtrain.config import unstructure
from certtrain.data import Digits, HeldOut
from certtrain.errors import InputError
from certtrain.run_folder import RunFolder

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
BASE = {
    "threads": 1,
    "model": {"type": "SmallCnn", "width": 2, "hidden": 8},
    "perturbation": {"type": "LinfBall", "epsilon": 0.05},
    "loss": {"type": "CcIbp"},
    "training": {"epochs": 2, "batch_size": 400, "milestones": [], "schedule": {"type": "Linear", "length": 1}},
    "certify": {"stages": ["ibp"], "images": 20},
    "export": {"enabled": False},
}  # fmt: skip
SWEPT = {"name": "CC", "sweep": {"loss.alpha": [0.25, 0.5, 1.0]}}


def written(folder: Path, **changes) -> Path:
    study = {"name": "tiny", "seeds": [3, 4], "base": BASE, "rows": [{"name": "plain"}, SWEPT],
             "evaluate": {"attacks": ["pgd-2"], "images": 30}} | changes  # fmt: skip
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def with_accuracies(folder: Path, accuracies: dict[float, tuple[float, float]]) -> dict:
    """The tuned study where the tuning gave these (certified, clean) accuracies by alpha."""
    file = written(folder)
    compare_tuned.put(folder / "tuning.yaml", yaml.safe_dump(compare_tuned.tuning_of(file, 0.2)).encode())
    tuning = read_study(folder / "tuning.yaml")
    trials = {trial.row.swept[0]: trial for trial in tuning.trials(folder)}
    results = [
        SimpleNamespace(
            trial=trials[alpha], accuracies={("last", "certified", 0.05): certified, ("last", "clean", None): clean}
        )
        for alpha, (certified, clean) in accuracies.items()
    ]
    return compare_tuned.tuned(file, tuning, results)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({0.25: (0.5, 0.9), 0.5: (0.6, 0.7), 1.0: (0.4, 0.95)}, 0.5),
        ({0.25: (0.5, 0.7), 0.5: (0.5, 0.8), 1.0: (0.5, 0.75)}, 0.5),  # equal: the clean accuracy
        ({1.0: (0.5, 0.7), 0.5: (0.5, 0.7), 0.25: (0.5, 0.7)}, 0.25),  # equal again: the first of the file
        ({1.0: (0.1, 0.7)}, 1.0),  # the others did not train
    ],
)
def test_the_best_value_is_chosen(accuracies, chosen, tmp_path):
    found = with_accuracies(tmp_path, accuracies)
    assert found["rows"] == [{"name": "plain"}, {**SWEPT, "sweep": {"loss.alpha": [chosen]}}]
    assert (found["name"], found["seeds"], found["base"]) == ("tiny", [3, 4], BASE)


def test_a_sweep_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="row CC: found 'no value that trains'; accepted: one or more"):
        with_accuracies(tmp_path, {})


def test_a_study_is_tuned_and_run_and_the_same_call_changes_nothing(tmp_path, capsys):
    file, out = written(tmp_path, seeds=[3]), tmp_path / "out"
    assert compare_tuned.main([str(file), "--share", "0.25", "--out", str(out)]) == 0
    tuning, final = read_study(out / "tiny-tuning" / "study.yaml"), read_study(out / "tiny" / "study.yaml")
    assert [row.label for row in tuning.rows] == ["CC alpha=0.25", "CC alpha=0.5", "CC alpha=1.0"]
    assert {row.config.data for row in tuning.rows} == {HeldOut(source=Digits(), share=0.25)}
    assert {row.config.data for row in final.rows} == {Digits()} and len(final.rows) == 2
    tested = {}
    for study, folder in ((tuning, out / "tiny-tuning"), (final, out / "tiny")):
        for trial in study.trials(folder):
            description = RunFolder.open(trial.path)[1]
            assert description["config"]["data"] == unstructure(trial.config.data)
            tested[study.name] = description["dataset"]["test"]
    assert tested == {"tiny-tuning": len(Digits(validation=0.25).load().validation), "tiny": 359}
    before = everything_in(out)
    assert compare_tuned.main([str(file), "--share", "0.25", "--out", str(out)]) == 0
    assert everything_in(out) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [{"name": "plain"}]}, "rows: found 'none with a sweep'; accepted: one or more"),
        ({"base": {**BASE, "certify": {"enabled": False}}}, "certify.enabled: found False; accepted: true"),
        ({"reference": "CC alpha=0.5"}, "reference: found 'CC alpha=0.5'; accepted: a row without a sweep"),
        ({"base": {**BASE, "data": {"type": "Digits", "validation": 0.1}}}, "validation: found 0.1; accepted: 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused_at_once(changes, words, tmp_path, capsys):
    file = written(tmp_path, **changes)
    assert compare_tuned.main([str(file), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out/*/*/run.json"))


def test_the_architectures_are_of_similar_size_and_tuned_alike(tmp_path):
    for name, shape in (("architectures_digits", (1, 8, 8)), ("architectures_mnist", (1, 28, 28))):
        rows = read_study(STUDIES / f"{name}.yaml").rows
        networks = [model.build(shape, 10) for model in {row.config.model for row in rows}]
        sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
        assert len(sizes) == 3 and max(sizes) <= 1.11 * min(sizes)
        groups = [row.group for row in rows]
        assert len(set(groups)) == 12 and {groups.count(group) for group in groups} == {3}
        assert len({(row.config.training, row.config.certify, row.config.perturbation) for row in rows}) == 1
        assert len(compare_tuned.tuning_of(STUDIES / f"{name}.yaml", 0.2)["rows"]) == 12


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan"])
def test_a_share_is_refused_before_anything_is_written(share, tmp_path, capsys):
    assert compare_tuned.main([str(written(tmp_path)), f"--share={share}", "--out", str(tmp_path / "out")]) == 2
    assert "--share: found" in capsys.readouterr().err and not (tmp_path / "out").exists()
