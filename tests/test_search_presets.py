"""The search's presets, and settings of a property: through the recipe's own machinery, for runs and files alike."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from test_vnncomp import IDENTITY, box, save_network, save_property

from certtrain.command_line import main
from certtrain.config import override, structure, unstructure
from certtrain.errors import InputError
from certtrain.recipe import Config, load_config
from certtrain.verifiers import BabStage, Certify, FalsifyStage, InputSplitStage, Search
from certtrain.verifiers.instances import run_instances
from certtrain.verifiers.search import PRESETS
from certtrain.verifiers.vnncomp import PROPERTY, Answer, answer

DOCS = Path(__file__).parents[1] / "docs" / "verification.md"
THOROUGH = Search.preset("thorough")
OWN = Config(certify=Certify(search=Search(rate=0.3, batch=7)))


def search_of(config: Config, **words: str) -> Search:
    """The search of a run's recipe under words of the command line."""
    named = {f"certify.{name.replace('__', '.')}": word for name, word in words.items()}
    return structure(Config, override(unstructure(config), named)).certify.search


class TestPresets:
    def test_the_default_is_the_default(self):
        assert Search.preset("default") == Search() and list(PRESETS) == ["fast", "default", "thorough"]
        assert len({Search.preset(name) for name in PRESETS}) == len(PRESETS)

    @pytest.mark.parametrize("name", PRESETS)
    def test_a_preset_changes_what_it_says(self, name):
        changed = {field.name: getattr(Search.preset(name), field.name) for field in dataclasses.fields(Search)}
        assert changed == vars(Search()) | dict(PRESETS[name])

    def test_the_documentation_says_so_too(self):
        for name, changes in PRESETS.items():
            said = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in changes.items()) or "nothing"
            assert f"| `{name}` | {said} |" in DOCS.read_text()

    def test_on_the_command_line(self):
        assert search_of(OWN, search="thorough") == search_of(OWN, search__preset="thorough") == THOROUGH
        assert search_of(OWN, search="{preset: thorough, rate: 0.2}") == dataclasses.replace(THOROUGH, rate=0.2)
        mixed = dataclasses.replace(THOROUGH, candidates=4)
        assert search_of(OWN, search="thorough", search__candidates="4") == mixed
        assert search_of(OWN, search__candidates="4", search="thorough") == mixed
        assert search_of(OWN, search__candidates="4", search__preset="thorough") == mixed
        assert search_of(OWN, search__candidates="4") == dataclasses.replace(OWN.certify.search, candidates=4)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("thorough", THOROUGH),
            ("{preset: thorough}", THOROUGH),
            ("{preset: thorough, candidates: 4}", dataclasses.replace(THOROUGH, candidates=4)),
            ("{candidates: 4}", Search(candidates=4)),
        ],
    )
    def test_in_a_recipe(self, tmp_path, text, expected):
        (tmp_path / "a.yaml").write_text(f"certify: {{search: {text}}}\n")
        config = load_config(tmp_path / "a.yaml")
        assert config.certify.search == expected
        assert structure(Config, unstructure(config)) == config  # as run.json has it: without the preset's name
        more = load_config(tmp_path / "a.yaml", {"certify.search.most": "9"})
        assert more.certify.search == dataclasses.replace(expected, most=9)
        assert load_config(tmp_path / "a.yaml", {"certify.search": "fast"}).certify.search == Search.preset("fast")

    def test_in_a_stage_of_the_list(self, tmp_path):
        (tmp_path / "a.yaml").write_text("certify: {stages: [ibp, {type: BabStage, search: thorough, timeout: 5}]}\n")
        stage = load_config(tmp_path / "a.yaml").certify.stages[1]
        assert isinstance(stage, BabStage) and stage.search == THOROUGH and stage.timeout == 5

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ({"search": "quick"}, "certify.search: found 'quick'; accepted: fast, default, thorough"),
            ({"search__preset": "quick"}, "certify.search.preset: found 'quick'; accepted: fast, default, thorough"),
            ({"search__preset": "3"}, "certify.search.preset: found 3; accepted: fast, default, thorough"),
            ({"search": "3"}, "certify.search: found 3; accepted: fast, default, thorough or a mapping of preset"),
            ({"search": ""}, "certify.search: found None; accepted: fast, default, thorough or a mapping of preset"),
            ({"search__speed": "3"}, "certify.search.speed: no such field; accepted: preset, batch"),
            ({"search": "{preset: fast, batch: 0}"}, "certify.search.batch: found 0"),
        ],
    )
    def test_bad_words(self, words, said):
        with pytest.raises(InputError) as error:
            search_of(OWN, **words)
        assert str(error.value).startswith(said)

    def test_preset_is_a_field_like_others_in_a_component(self):
        """A class of a user's own may have a field of that name."""
        changed = override({"loss": {"type": "a:Mine", "preset": "x", "alpha": 1}}, {"loss.preset": "y"})
        assert changed == {"loss": {"type": "a:Mine", "preset": "y", "alpha": 1}}


@pytest.fixture
def files(tmp_path) -> Path:
    save_network(tmp_path / "network.onnx", IDENTITY)
    save_property(tmp_path / "safe.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -1.0)))")
    save_property(tmp_path / "unsafe.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 0.5)))")
    (tmp_path / "table.csv").write_text("network.onnx,safe.vnnlib,20\nnetwork.onnx,unsafe.vnnlib,20\n")
    return tmp_path


@pytest.fixture
def asked(monkeypatch) -> list[Certify]:
    """The settings with which properties are decided."""
    seen: list[Certify] = []

    def check(network, property, deadline, settings, proofs=None):
        seen.append(settings)
        return Answer("holds", 0.0, settings.arithmetic)

    monkeypatch.setattr("certtrain.verifiers.vnncomp.check_property", check)
    monkeypatch.setattr("certtrain.verifiers.instances.check_property", check)
    return seen


WORDS = ["--certify.search", "thorough", "--certify.search.candidates", "4", "--certify.alpha_steps", "3",
         "--certify.batch_size", "5", "--certify.falsifying_share", "1/2", "--certify.timeout", "7",
         "--certify.arithmetic", "real"]  # fmt: skip
EXPECTED = dataclasses.replace(
    PROPERTY, search=dataclasses.replace(THOROUGH, candidates=4), alpha_steps=3, batch_size=5, falsifying_share=0.5,
    timeout=7.0, arithmetic="real",
)  # fmt: skip


class TestProperties:
    def test_one_property(self, files, asked, capsys):
        words = ["verify", "--onnx", str(files / "network.onnx"), "--vnnlib", str(files / "safe.vnnlib")]
        assert main([*words, *WORDS]) == 0 and capsys.readouterr().out == "holds\n"
        assert main(words) == 0
        assert main([*words, "--stages", "ibp,bab", "--timeout", "3", "--arithmetic", "float32"]) == 0
        other = dataclasses.replace(PROPERTY, stages=("ibp", "bab"), timeout=3.0, arithmetic="float32")
        assert asked == [EXPECTED, PROPERTY, other]

    def test_a_table(self, files, asked, capsys):
        words = ["verify", "--instances", str(files / "table.csv"), "--results"]
        assert main([*words, str(files / "a.csv"), *WORDS]) == 0
        assert main([*words, str(files / "b.csv"), "--certify.search", "fast"]) == 0
        assert asked[:2] == [EXPECTED] * 2  # 7 s are less than the table's 20
        fast = dataclasses.replace(PROPERTY, search=Search.preset("fast"), timeout=20.0)
        assert asked[2:] == [fast] * 2  # the table's own, not the 60 s of a single property

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--certify.search", "quick"], "certify.search: found 'quick'"),
            (["--certify.images", "3"], "--certify.images: cannot be given here"),
            (["--certify.attack.steps", "3"], "--certify.attack.steps: cannot be given here"),
            (["--loss.alpha", "3"], "--loss.alpha: cannot be given here"),
            (["--certify.timeout", "0"], "certify.timeout: found 0"),
            (["--certify.falsifying_share", "2"], "certify.falsifying_share: found 2"),
            (["--stages", "ibp,none"], "certify.stages: found 'none'"),
            (["--stages", " "], "--stages: found ' '; accepted: names of stages"),
            (["--stages", ","], "--stages: found ','; accepted: names of stages"),
            (["--stages", "ibp,,bab"], "--stages: found 'ibp,,bab'; accepted: names of stages"),
            (["--stages", " ,bab"], "--stages: found ' ,bab'; accepted: names of stages"),
            (["--certify.stages", "[]"], "certify.stages: found (); accepted: one stage or more"),
            (["--memory", ""], "--memory: found ''; accepted: a size of 256MiB or more"),
            (["--certify.stages", "[ibp, {type: FalsifyStage, starts: 0}]"], "certify.stages[1].starts: found 0"),
            (["--json", "none/a.json"], "none/a.json: cannot be written"),
        ],
    )
    def test_bad_words(self, files, capsys, words, said):
        safe = str(files / "safe.vnnlib")
        assert main(["verify", "--onnx", str(files / "network.onnx"), "--vnnlib", safe, *words]) == 2
        out = capsys.readouterr()
        assert out.out == "error\n" and out.err.startswith(f"error: {said}")

    def test_the_stages_that_are_asked_for_run(self, files):
        def stage_of(**settings) -> str:
            return answer(files / "network.onnx", files / "safe.vnnlib", certify=Certify(**settings)).stage

        assert stage_of(stages=("crown",)) == "crown" and stage_of(stages=("input_split",)) == "input_split"
        assert stage_of(stages=(InputSplitStage(5.0, batch=1),)) == "input_split"
        with pytest.raises(InputError, match="batch"):
            InputSplitStage(batch=0)

    def test_the_share_of_descents(self):
        assert FalsifyStage(share=0.25).within(8.0)[0].seconds == 2.0
        assert FalsifyStage(seconds=1.0).within(8.0)[0].seconds == 1.0
        stages = {stage.name: stage for stage in PROPERTY.build(0)}
        falsify = stages["falsify"]
        assert isinstance(falsify, FalsifyStage) and falsify.share == PROPERTY.falsifying_share == 0.2
        assert Certify(stages=("falsify",)).build(0)[1] == FalsifyStage()  # in a run as it ever was

    def test_help_lists_presets_and_settings(self, capsys):
        assert main(["verify", "--help"]) == 0
        out = capsys.readouterr().out
        assert "--certify.search thorough" in out and "--certify.falsifying_share 0.2" in out
        assert "certify.images" not in out

    @pytest.mark.parametrize("words", [["--stages", ""], ["--memory", ""], ["--memory", "null"]])
    def test_words_that_name_nothing_are_refused_of_runs_too(self, run, capsys, words):
        before = (run / "verdicts.jsonl").read_bytes()
        assert main(["verify", str(run), *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {words[0]}: found {words[1]!r}; accepted: ")
        assert (run / "verdicts.jsonl").read_bytes() == before

    def test_a_run_has_no_json(self, tmp_path, capsys):
        assert main(["verify", str(tmp_path), "--json", "a.json"]) == 2
        assert "--json: accepted with --onnx or --instances" in capsys.readouterr().err


class TestRecords:
    def test_of_one_property(self, files, capsys):
        words = ["verify", "--onnx", str(files / "network.onnx"), "--vnnlib", str(files / "safe.vnnlib")]
        assert main([*words, "--json", str(files / "a.json")]) == 0 and capsys.readouterr().out == "holds\n"
        record = json.loads((files / "a.json").read_text())
        assert record["answer"] == "holds" and record["stage"] == "ibp" and [*record["spent"]] == ["ibp"]
        assert record["search"] is None and record["search_seconds"] == {}
        assert record["peak_memory"] is None or record["peak_memory"] > 1 << 20

    def test_of_a_table(self, files):
        table, results, records = files / "table.csv", files / "out.csv", files / "out.jsonl"
        run_instances(table, results, records=records)
        lines = [json.loads(line) for line in records.read_text().splitlines()]
        assert [(line["vnnlib"], line["answer"]) for line in lines] == [
            ("safe.vnnlib", "holds"), ("unsafe.vnnlib", "violated"),
        ]  # fmt: skip
        results.write_text(results.read_text().splitlines(keepends=True)[0])
        records.write_text(records.read_text().splitlines(keepends=True)[0] + '{"onnx"')
        run_instances(table, results, records=records)
        assert [json.loads(line)["vnnlib"] for line in records.read_text().splitlines()] == [
            "safe.vnnlib", "unsafe.vnnlib",
        ]  # fmt: skip
        run_instances(table, files / "none.csv")  # and none are written where none are asked for
        assert len(records.read_text().splitlines()) == 2

    @pytest.mark.parametrize(
        "content", ["notes\n", '{"index": 1}\n', "[]\n", "notes", '{"index": 1}', '{"onnx": "a"}\nnotes']
    )
    def test_another_file_is_left_as_it_was(self, files, content):
        (files / "notes.txt").write_text(content)
        with pytest.raises(InputError, match=r"notes\.txt, (last )?line"):
            run_instances(files / "table.csv", files / "out.csv", records=files / "notes.txt")
        assert (files / "notes.txt").read_text() == content
        with pytest.raises(InputError, match="folder"):
            run_instances(files / "table.csv", files / "out.csv", records=files)
        with pytest.raises(InputError):
            run_instances(files / "table.csv", files / "out.csv", records=files / "out.csv")

    @pytest.mark.parametrize("option", ["--results", "--json"])
    @pytest.mark.parametrize("way", ["property", "table"])
    def test_a_pipe_stays_a_pipe(self, files, capsys, way, option):
        os.mkfifo(files / "pipe")
        words = ["--onnx", str(files / "network.onnx"), "--vnnlib", str(files / "safe.vnnlib")]
        if way == "table":
            words = ["--instances", str(files / "table.csv")]
            words += ["--results", str(files / "out.csv")] if option == "--json" else []
        assert main(["verify", *words, option, str(files / "pipe")]) == 2
        assert "pipe: cannot be written" in capsys.readouterr().err and (files / "pipe").is_fifo()

    def test_one_file_holds_one_thing(self, files, capsys):
        one = str(files / "one")
        words = ["--onnx", str(files / "network.onnx"), "--vnnlib", str(files / "safe.vnnlib")]
        for question in (words, ["--instances", str(files / "table.csv")]):
            assert main(["verify", *question, "--results", one, "--json", f"{files}/../{files.name}/one"]) == 2
            assert "accepted: two files" in capsys.readouterr().err and not Path(one).exists()

    def test_a_link_stays_a_link(self, files):
        (files / "link").symlink_to(files / "target")
        answer(files / "network.onnx", files / "safe.vnnlib", record=files / "link")
        assert (files / "link").is_symlink() and json.loads((files / "target").read_text())["answer"] == "holds"
