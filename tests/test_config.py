"""Dataclasses ⇄ mappings ⇄ YAML ⇄ command-line words: one path, one set of checks."""

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
import yaml
from walking import walk

from certtrain.attacks import Attack, Pgd, default_attack
from certtrain.bounds import L2Ball, LinfBall, PerturbationSet
from certtrain.command_line import main
from certtrain.config import Component, flatten, override, parse_number, read_yaml, structure, unstructure
from certtrain.data import Arrays, Digits, Source
from certtrain.errors import FieldError, InputError, check
from certtrain.losses import CcIbp, Ibp, Loss, MtlIbp, Ramp
from certtrain.models import Architecture, Mlp, SmallCnn
from certtrain.recipe import Config, load_config
from certtrain.training import Adam, EpsilonSchedule, Linear, Optimiser, Sgd, Smoothed, Training, UpdateRule
from certtrain.verifiers import Certify

FAMILIES = (Loss, Attack, Source, Architecture, PerturbationSet, EpsilonSchedule, Optimiser, UpdateRule)
MEMBERS = [
    (family, kind)
    for family in FAMILIES
    for kind in family.members().values()
    if kind.__module__.startswith("certtrain.")
]

every_member = walk(("family", "kind"), MEMBERS, ids=[kind.__name__ for _, kind in MEMBERS])


@dataclass(frozen=True)
class Plain:
    """A section with a field of each kind."""

    number: float
    count: int = 1
    flag: bool = False
    text: str = "a"
    path: Path = Path("here")
    choice: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = (1, 2)
    shares: tuple[float, ...] = ()
    maybe: float | None = None

    def __post_init__(self) -> None:
        check(self.count >= 0, "count", self.count, "a whole number >= 0")


class Family(Component):
    """A family of the test's own."""


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: int = 2


@dataclass(frozen=True)
class First(Family):
    inner: Inner = Inner(a=3)
    value: float = 0.5


@dataclass(frozen=True)
class Second(Family):
    value: float = 1.5


@dataclass(frozen=True)
class Holder:
    part: Family = First(value=0.25)
    loss: Loss = CcIbp()


def through_yaml(value):
    return yaml.safe_load(yaml.safe_dump(unstructure(value)))


def refused(mapping, *mentions: str, cls: type = Config) -> str:
    with pytest.raises(InputError) as caught:
        structure(cls, mapping)
    message = str(caught.value)
    assert "\n" not in message
    for mention in mentions:
        assert mention in message
    return message


def test_every_family_has_members():
    assert {family for family, _ in MEMBERS} == set(FAMILIES)
    names = {kind.__name__ for _, kind in MEMBERS}
    assert {"CcIbp", "Pgd", "Digits", "Mnist", "Cifar10", "Cnn7", "LinfBall", "L2Ball", "Smoothed", "Sgd"} <= names


@every_member
def test_defaults_survive_the_round_trip_through_yaml_text(family, kind):
    default = kind()
    assert through_yaml(default)["type"] == kind.__name__
    assert structure(family, through_yaml(default)) == default
    assert structure(family, {"type": kind.__name__}) == default


@every_member
def test_an_unknown_field_is_named_with_those_accepted(family, kind):
    with pytest.raises(InputError) as caught:
        structure(family, {"type": kind.__name__, "epsilno": 1}, "place")
    assert str(caught.value).startswith("place.epsilno: ")
    assert all(field.name in str(caught.value) for field in dataclasses.fields(kind))


@every_member
def test_no_field_takes_a_value_of_the_wrong_kind(family, kind):
    for field in dataclasses.fields(kind):
        for wrong in ({"a": 1}, [[1]], float("nan")):
            with pytest.raises(InputError, match=rf"^place\.{field.name}"):
                structure(family, {"type": kind.__name__, field.name: wrong}, "place")


@pytest.mark.parametrize("name", ["Unknown", "", None, 3, True, ["CcIbp"], {"a": 1}], ids=str)
def test_an_unknown_type_lists_the_members(name):
    for family in FAMILIES:
        with pytest.raises(InputError) as caught:
            structure(family, {"type": name}, "place")
        assert str(caught.value).startswith("place.type: found ")
        assert all(member in str(caught.value) for member in family.members())


def test_a_config_far_from_the_default_survives_the_round_trip():
    config = Config(
        name="other", seed=-3, device="cpu", threads=2, data=Arrays(path=Path("x/y.npz"), validation=1 / 3),
        model=Mlp(hidden=(7, 5), mean=(0.1,), std=(1 / 3,)), perturbation=L2Ball(0.1 + 0.2),
        loss=MtlIbp(alpha=Ramp(0.1, 0.7), l1=3e-6, attack=Pgd(steps=3, attack_mode="batch"), bn_mode="clean"),
        training=Training(epochs=7, milestones=(), clip=None, optimiser=Sgd(momentum=0.0), schedule=Linear(2, 3)),
        certify=Certify(stages=("ibp",), images=4),
    )  # fmt: skip
    assert structure(Config, through_yaml(config)) == config
    assert structure(Config, through_yaml(Config())) == Config()


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("2/255", float(Fraction(2, 255))),
        (" 8 / 255 ", float(Fraction(8, 255))),
        ("5e-4", 5e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("-1/2", -0.5),
        ("0", 0.0),
        (3, 3.0),
        (0.1, 0.1),
    ],
)
def test_numbers(written, number):
    found = parse_number(written)
    assert type(found) is float and found == number


@walk(
    "written",
    ["1/0", "0/0", "nan", "inf", "-inf", "1e999", "", " ", "a", "1/2/3", "0x10", "2/255 px", "1 2", "1 2/255", True,
     False, None, math.nan, math.inf, -math.inf, 10**400, [1], {"a": 1}, 1j],
    ids=repr,
)  # fmt: skip
def test_not_numbers(written):
    with pytest.raises(ValueError):
        parse_number(written)


def test_yaml_reads_5e_4_as_text_and_we_as_a_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {optimiser: {type: Adam, lr: 5e-4}}\nperturbation: {type: LinfBall, epsilon: 2/255}\n")
    assert read_yaml(path)["training"]["optimiser"]["lr"] == "5e-4"
    config = load_config(path)
    assert config.training.optimiser == Adam(lr=5e-4) and config.perturbation == LinfBall(float(Fraction(2, 255)))


@walk(
    ("field", "value"),
    [
        ("number", True), ("number", "many"), ("number", float("nan")), ("number", float("inf")), ("number", "1/0"),
        ("number", None), ("number", [1]),
        ("count", "3"), ("count", 3.0), ("count", True), ("count", None), ("count", "1/1"), ("count", -1),
        ("flag", 1), ("flag", "true"), ("flag", None),
        ("text", 3), ("text", None), ("text", True),
        ("path", 3), ("path", None),
        ("choice", "three"), ("choice", None), ("choice", ["one"]), ("choice", {"one": 1}),
        ("sizes", 3), ("sizes", [1, "2"]), ("sizes", [1.5]), ("sizes", [True]), ("sizes", None), ("sizes", {1: 2}),
        ("sizes", ""), ("sizes", "12"),
        ("shares", "12"), ("shares", "1/2"), ("shares", [float("nan")]), ("shares", ["1/0"]), ("shares", {}),
        ("maybe", "none"), ("maybe", float("nan")), ("maybe", True),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_by_path(field, value):
    with pytest.raises(InputError, match=rf"^place\.{field}: found .*; accepted: ") as caught:
        structure(Plain, {"number": 1, field: value}, "place")
    assert "\n" not in str(caught.value)


def test_values_of_the_right_kind():
    found = structure(
        Plain,
        {"number": "1/3", "count": 0, "flag": True, "text": "", "path": "a/b", "choice": "two", "sizes": [],
         "shares": ["1/2", 1], "maybe": 3},
    )  # fmt: skip
    assert found == Plain(1 / 3, 0, True, "", Path("a/b"), "two", (), (0.5, 1.0), 3.0)
    assert structure(Plain, {"number": 1, "maybe": None}).maybe is None


def test_a_missing_field_is_named():
    refused({}, "number: must be given; accepted: ", cls=Plain)


def test_a_typo_names_its_path_and_the_accepted_fields():
    refused({"lss": {}}, "lss: ", "accepted: ", "loss", "training", "perturbation")
    refused({"loss": {"alhpa": 0.1}}, "loss.alhpa: ", "alpha", "attack_epsilon_factor")
    refused({"loss": {"attack": {"step": 1}}}, "loss.attack.step: ", "step_size")
    refused({"training": {"optimiser": {"type": "Adam", "momentum": 0.9}}}, "training.optimiser.momentum: ", "lr")
    refused({"training": {"augment": {"pad": -1}}}, "training.augment.pad: found -1; accepted: ")
    refused({3: {}}, "3: ")


@walk(
    ("mapping", "start"),
    [
        ({"loss": {"type": "CcIbp", "alpha": 1.5}}, "loss.alpha: found 1.5"),
        ({"loss": {"alpha": {"start": 0, "end": 1.5}}}, "loss.alpha: found Ramp"),
        ({"loss": {"alpha": {"start": 0, "ende": 1}}}, "loss.alpha.ende: "),
        ({"perturbation": {"epsilon": -0.1}}, "perturbation.epsilon: found -0.1"),
        ({"perturbation": {"epsilon": "-1/255"}}, "perturbation.epsilon: found -0.0039"),
        ({"perturbation": {"epsilon": "1/0"}}, "perturbation.epsilon: found '1/0'"),
        ({"perturbation": {"epsilon": math.nan}}, "perturbation.epsilon: found nan"),
        ({"data": {"validation": 1}}, "data.validation: found 1"),
        ({"training": {"optimiser": {"lr": 0}}}, "training.optimiser.lr: found 0"),
        ({"training": {"optimiser": {"type": "Sgd", "momentum": -1}}}, "training.optimiser.momentum: found -1"),
        ({"training": {"optimiser": {"type": "Sgd", "momentum": 0, "nesterov": True}}}, "training.optimiser.nesterov"),
        ({"training": {"milestones": [-1]}}, "training.milestones: found (-1.0,)"),
        ({"training": {"schedule": {"length": 201}}}, "training.schedule: found "),
        ({"certify": {"stages": ["ibp", "ibp"]}}, "certify.stages: found "),
        ({"certify": {"stages": ["crow"]}}, "certify.stages: found 'crow'; accepted: alpha, attack, bab, "),
        ({"certify": {"timeout": 0}}, "certify.timeout: found 0"),
        ({"threads": -1}, "threads: found -1"),
        ({"name": "a/b"}, "name: found 'a/b'"),
        ({"loss": "CcIbp"}, "loss: found 'CcIbp'"),
        ({"loss": None}, "loss: found None"),
        ({"training": [1]}, "training: found [1]"),
        ([], "recipe: found []"),
        (None, "recipe: found None"),
    ],
)
def test_values_out_of_range_are_refused_by_path(mapping, start):
    assert refused(mapping, "accepted: ").startswith(start)


def test_checks_name_field_found_and_accepted():
    with pytest.raises(FieldError) as caught:
        check(False, "alpha", 1.5, "a number in [0, 1]")
    assert str(caught.value) == "alpha: found 1.5; accepted: a number in [0, 1]"
    assert isinstance(caught.value, InputError) and isinstance(caught.value, ValueError)
    check(True, "alpha", 1, "anything")


class TestSections:
    """A section that is left out keeps its default; one without a type changes it in the fields it names."""

    def test_partial_sections_keep_the_defaults_other_fields(self):
        config = structure(Config, {"certify": {"attack": {"steps": 3}}, "training": {"schedule": {"length": 7}}})
        assert config.certify.attack == dataclasses.replace(default_attack(LinfBall(), "falsify"), steps=3)
        assert config.training == dataclasses.replace(Training(), schedule=Smoothed(start=1, length=7))

    def test_nested_sections_are_merged_in_depth(self):
        assert structure(Holder, {"part": {"inner": {"b": 9}}}).part == First(Inner(a=3, b=9), 0.25)
        assert structure(Holder, {"part": {}}).part == First(Inner(a=3), 0.25)

    def test_with_a_type_a_section_stands_on_its_own(self):
        assert structure(Holder, {"part": {"type": "First"}}).part == First()
        assert structure(Holder, {"part": {"type": "Second", "value": 2}}).part == Second(2.0)

    def test_the_callers_mapping_is_left_alone(self):
        mapping = {"type": "CcIbp", "attack": {"steps": 3}}
        structure(Loss, mapping)
        assert mapping == {"type": "CcIbp", "attack": {"steps": 3}}


class TestOverride:
    def test_writes_in_and_leaves_the_original_alone(self):
        mapping = {"loss": {"type": "CcIbp", "alpha": 0.1}, "seed": 1}
        found = override(mapping, {"loss.alpha": "0.02", "training.epochs": "5", "data.root": "here"})
        assert found == {"loss": {"type": "CcIbp", "alpha": 0.02}, "seed": 1, "training": {"epochs": 5},
                         "data": {"root": "here"}}  # fmt: skip
        assert mapping == {"loss": {"type": "CcIbp", "alpha": 0.1}, "seed": 1}

    def test_values_are_yaml(self):
        words = {"training.milestones": "[1, 2]", "training.clip": "null", "training.augment.flip": "true"}
        training = load_config(None, words).training
        assert training.milestones == (1, 2) and training.clip is None and training.augment.flip is True

    @pytest.mark.parametrize("order", [1, -1])
    def test_a_new_type_drops_the_old_fields_in_whichever_order(self, order):
        mapping = {"loss": {"type": "CcIbp", "alpha": 0.1, "bn_mode": "clean"}}
        words = [("loss.l1", "1.0e-6"), ("loss.type", "Ibp")][::order]
        assert structure(Config, override(mapping, dict(words))).loss == Ibp(l1=1e-6)

    @pytest.mark.parametrize("order", [1, -1])
    def test_types_within_types_in_whichever_order(self, order):
        mapping = {"loss": {"type": "CcIbp", "alpha": 0.1}}
        words = [("loss.type", "MtlIbp"), ("loss.attack.type", "Pgd"), ("loss.attack.steps", "3")][::order]
        expected = {"loss": {"type": "MtlIbp", "attack": {"type": "Pgd", "steps": 3}}}
        assert override(mapping, dict(words)) == expected

    def test_the_same_type_keeps_the_other_fields(self):
        mapping = {"loss": {"type": "CcIbp", "alpha": 0.1}}
        assert structure(Config, override(mapping, {"loss.type": "CcIbp"})).loss == CcIbp(alpha=0.1)

    def test_a_field_whose_name_ends_with_type_is_no_type(self):
        mapping = {"part": {"prototype": 1, "other": 2}}
        assert override(mapping, {"part.prototype": "3"}) == {"part": {"prototype": 3, "other": 2}}

    @pytest.mark.parametrize(
        ("path", "text", "start"),
        [
            ("loss.alpha", "1.5", "loss.alpha: found 1.5"),
            ("loss.alpha", "[", "--loss.alpha: found '['"),
            ("loss.alpha", "a: b: c", "--loss.alpha: found 'a: b: c'"),
            ("loss.alpha", "", "loss.alpha: found None"),
            ("seed.x", "1", "seed: found {'x': 1}"),
            ("loss.type.x", "1", "loss.type: found {'x': 1}"),
            ("loss.type", "[CcIbp]", "loss.type: found ['CcIbp']"),
            ("loss.", "1", "loss.: no such field"),
            ("los.alpha", "1", "los: no such field"),
            ("name", "2024-13-45", "--name: found '2024-13-45'"),  # YAML's dates raise a bare ValueError
        ],
    )
    def test_bad_words_are_refused(self, path, text, start):
        with pytest.raises(InputError) as caught:
            load_config(None, {path: text})
        assert str(caught.value).startswith(start) and "accepted: " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_field_that_the_help_lists_is_accepted():
    rows = flatten(unstructure(Config()))
    assert rows["loss.alpha"] == 0.5 and rows["loss.attack"] is rows["certify.attack"] is None and rows["seed"] == 0
    words = {path: yaml.safe_dump(value, default_flow_style=True) for path, value in rows.items()}
    assert load_config(None, words) == Config()


def test_flatten():
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}) == {"a": 1, "b.c": [1, 2], "b.d.e": None}


class TestReadYaml:
    @pytest.mark.parametrize(
        ("text", "mention"),
        [
            ("seed: 1\nloss: {alpha: 0.1\n", "line 3"),
            ("seed: 1\n\tloss: 2\n", "line 2"),
            ("seed: 1\n  loss: 2\n", "line 2"),
            ("a: &x 1\nb: *y\n", "line 2"),
            ("x: !!python/object/apply:os.getcwd []\n", "line 1"),
            ("name: 2024-13-45\n", "not valid YAML"),
            ("name: \x00\n", "not valid YAML"),
            ("", "found NoneType"),
            ("- 1\n", "found list"),
            ("CcIbp", "found str"),
        ],
    )
    def test_what_is_no_mapping_is_refused_in_one_line_with_file_and_line(self, text, mention, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_yaml(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and mention in message and "accepted: " in message
        assert "\n" not in message

    def test_missing_binary_and_folders(self, tmp_path):
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
        for name in ("missing.yaml", "binary", "."):
            with pytest.raises(InputError) as caught:
                read_yaml(tmp_path / name)
            message = str(caught.value)
            assert message.startswith(str(tmp_path / name)) and "accepted: " in message and "\n" not in message


def test_load_config_names_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("loss: {type: CcIbp, alpha: 1.5}\n")
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: loss.alpha: found 1.5; accepted: ")
    assert load_config(path, {"loss.alpha": "0.25"}).loss == CcIbp(alpha=0.25)
    assert load_config() == Config()


def test_device_is_checked_when_it_is_needed(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Config(device="auto").resolved_device().type == "cpu" == Config(device="cpu").resolved_device().type
    with pytest.raises(InputError, match=r"^device: found 'cuda'.*accepted"):
        Config(device="cuda").resolved_device()
    refused({"device": "gpu"}, "device: found 'gpu'; accepted: auto, cpu, cuda")
    refused({"data": {"type": "Digits", "path": "x"}}, "data.path", "validation")
    assert structure(Config, {"data": {"type": "Digits"}, "model": {"width": 4}}).model == SmallCnn(width=4)
    assert Digits() == Config().data


def test_help_tells_what_an_empty_section_could_hold(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--training.averaging null  # or a mapping of start, every" in shown
    assert "--certify.images null\n" in shown
