"""What a verdict records of its search: counts that repeat exactly, and seconds by part."""

import sys
import time
import types

import pytest
import torch
from planted import planted_pairs
from problems import alone, problem_of, random_images
from test_vnncomp import box, save_network, save_property
from torch import nn

from certtrain import certify, environment
from certtrain.bounds import LinfBall
from certtrain.verifiers import BabStage, Certify, InputSplitStage, Search
from certtrain.verifiers.search_statistics import SearchStatistics, gathered, measured, note, part
from certtrain.verifiers.vnncomp import answer

PARTS = {"bounding", "rebounding", "programs", "branching", "attack"}
TWO_PEAKS = [([[1.0], [-1.0], [1.0], [-1.0]], [-0.3, 0.3, -0.7, 0.7]), ([[-4.0, -4.0, 3.0, 3.0]], [1.0])]


class TestParts:
    def test_inner_parts_do_not_count_for_outer_ones(self):
        with measured("bounding") as spent:
            with part("attack"):
                time.sleep(0.02)
            with measured("branching") as inner, part("rebounding"):
                time.sleep(0.02)
        assert set(spent) <= PARTS and spent["attack"] >= 0.02 and spent["rebounding"] >= 0.02
        assert inner["rebounding"] == pytest.approx(spent["rebounding"]) and "attack" not in inner
        assert spent.get("bounding", 0) < spent["attack"] + spent["rebounding"] + 1

    def test_without_a_measurement_nothing_happens(self):
        with part("attack"):
            pass
        note([SearchStatistics(1)])
        with gathered() as found:
            note([SearchStatistics(1), SearchStatistics(2)])
        assert sum(found, SearchStatistics()) == SearchStatistics(3)

    def test_an_exception_leaves_nothing_open(self):
        with pytest.raises(KeyError), measured("bounding") as spent, part("attack"):
            raise KeyError
        assert "attack" in spent
        with measured("programs") as again:
            pass
        assert set(again) <= {"programs"}


class TestSearch:
    def statistics(self, problem, stage=None) -> list[SearchStatistics]:
        finding = alone(stage or BabStage(Search(most=4), timeout=1e6), problem)
        assert finding.search is not None
        return [*finding.search]

    def test_counts_of_each_image(self):
        torch.manual_seed(0)
        layers = [nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)]
        model, images = nn.Sequential(nn.Flatten(), *layers).eval(), random_images(6)
        with torch.no_grad():
            for weights in model.parameters():
                weights.mul_(3)
            labels = model(images).argmax(1)
        problem = problem_of(model, images, labels, LinfBall(0.1))
        found = self.statistics(problem)
        assert any(one.splits for one in found) and not all(one.splits for one in found)
        for one in found:
            assert one.children >= 2 * one.splits >= 2 * one.rounds and set(one.seconds) <= PARTS
            assert one.closed <= one.children + 3  # its three clauses are the roots
        assert [one.record() for one in self.statistics(problem)] == [one.record() for one in found]

    def test_a_proof_closes_every_leaf_of_the_tree(self):
        twins = [twin for _, twin in planted_pairs(6, seed=3001, kinds=("dense",))]
        for twin in twins:
            problem = problem_of(twin.model, twin.image[None], torch.tensor([twin.label]), LinfBall(twin.epsilon),
                                 classes=twin.model(twin.image[None]).shape[1])  # fmt: skip
            finding = alone(BabStage(timeout=1e6), problem)
            assert finding.search is not None and finding.statuses == ["verified"]
            (one,) = finding.search
            assert one.closed >= one.splits  # of a binary tree, leaves outnumber splits

    def test_halves_of_a_box(self, tmp_path):
        network = save_network(tmp_path / "n.onnx", TWO_PEAKS)
        asked = save_property(tmp_path / "p.vnnlib", f"(assert (and {box(('0', '1'))} (<= Y_0 -1.5)))")
        found = answer(network, asked, 30.0, certify=Certify(stages=(InputSplitStage(30.0),)))
        assert found.word in ("holds", "violated") and (found.word == "violated" or found.search is not None)
        if found.search is not None:
            assert found.search.children == 2 * found.search.splits and found.spent["input_split"] > 0
            assert found.record()["search"] == found.search.record()

    def test_a_verdict_has_them_and_its_line(self):
        (_, twin), *_ = planted_pairs(1, seed=3001, kinds=("dense",))
        settings = Certify(stages=("bab",))
        (verdict,) = certify(twin.model, twin.image[None], torch.tensor([twin.label]), twin.epsilon, settings)
        line = verdict.record()
        assert verdict.search is not None and line["search"] == verdict.search.record()
        assert set(line["search"]) == {"rounds", "splits", "children", "closed"}
        assert set(line["search_seconds"]) <= PARTS and sum(line["search_seconds"].values()) <= verdict.seconds + 1e-3
        assert line["peak_memory"] is None or line["peak_memory"] > 1 << 20
        (plain,) = certify(twin.model, twin.image[None], torch.tensor([twin.label]), twin.epsilon, Certify(stages=()))
        assert plain.record()["search"] is None and plain.record()["search_seconds"] == {}


class TestPeakMemory:
    def test_without_proc_by_the_system_or_not_at_all(self, monkeypatch, tmp_path):
        assert (environment.peak_memory() or 1 << 30) > 1 << 20
        monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "none")
        here = types.ModuleType("resource")
        here.RUSAGE_SELF = 0
        here.getrusage = lambda who: types.SimpleNamespace(ru_maxrss=7)
        monkeypatch.setitem(sys.modules, "resource", here)
        monkeypatch.setattr(environment.sys, "platform", "linux")
        assert environment.peak_memory() == 7 * 1024
        monkeypatch.setattr(environment.sys, "platform", "darwin")
        assert environment.peak_memory() == 7
        monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
        assert environment.peak_memory() is None
