"""``certtrain.certify``: the cascade for people who write Python."""

import pytest
import torch
from problems import mostly_right, random_images, random_model

from certtrain.bounds import L2Ball, LinfBall
from certtrain.errors import InputError
from certtrain.verifiers import Certify, certify


class TestCertify:
    def test_no_images(self):
        assert certify(random_model(), torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64), 0.1) == []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_both_precisions(self, dtype):
        model, images = random_model().to(dtype), random_images(10).to(dtype)
        labels = mostly_right(model, images)
        verdicts = certify(model, images, labels, 0.001)
        assert {verdict.status for verdict in verdicts} == {"verified", "misclassified"}
        assert {verdict.arithmetic for verdict in verdicts} == {f"nearest {str(dtype).removeprefix('torch.')}"}

    @pytest.mark.parametrize(
        "bad",
        [1.1, -0.1, float("nan"), float("inf")],
    )
    def test_pixels_out_of_range(self, bad):
        images = random_images(3)
        images[1, 0, 2, 2] = bad
        with pytest.raises(InputError, match=r"^x: found .*accepted"):
            certify(random_model(), images, torch.zeros(3, dtype=torch.int64), 0.1)

    @pytest.mark.parametrize("labels", [[0, 4, 0], [0, -1, 0], [0, 1], [0, 1, 2, 3], []])
    def test_labels_out_of_range_or_of_another_number(self, labels):
        with pytest.raises(
            InputError, match=r"^y: found (label -?\d at image 1; accepted: 0 to 3$|shape \(\d,\); accepted: \(3,\), )"
        ):
            certify(random_model(), random_images(3), torch.tensor(labels, dtype=torch.int64), 0.1)

    @pytest.mark.parametrize("epsilon", [-0.1, float("nan"), float("inf")])
    def test_a_bad_radius(self, epsilon):
        with pytest.raises(InputError, match=r"^epsilon: found .*accepted"):
            certify(random_model(), random_images(1), torch.tensor([0]), epsilon)

    def test_epsilon_may_be_any_set(self):
        model, images = random_model(), random_images(20)
        labels = mostly_right(model, images)
        as_number, as_ball = (certify(model, images, labels, e) for e in (0.02, LinfBall(0.02)))
        assert [v.status for v in as_number] == [v.status for v in as_ball]
        smaller = certify(model, images, labels, L2Ball(0.02))  # lies inside the box
        proved = [v.index for v in as_number if v.status == "verified"]
        assert proved and all(smaller[number].status == "verified" for number in proved)

    def test_epsilon_zero_is_the_clean_prediction(self):
        model, images = random_model(), random_images(20)
        labels = mostly_right(model, images)
        right = (model(images).argmax(1) == labels).tolist()
        found = [verdict.status for verdict in certify(model, images, labels, 0.0)]
        assert found == ["verified" if ok else "misclassified" for ok in right]

    def test_every_mode_and_number_of_the_model_comes_back(self):
        model = random_model()
        model.train()
        model[1].eval()
        modes = [module.training for module in model.modules()]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        images = random_images(4)
        certify(model, images, torch.tensor([0, 1, 2, 3]), 0.05)
        with pytest.raises(InputError):
            certify(model, images, torch.tensor([0, 1, 2, 9]), 0.05)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_a_model_in_training_mode_is_judged_in_evaluation_mode(self):
        images = random_images(20)
        labels = mostly_right(random_model(), images)
        expected = certify(random_model(), images, labels, 0.02)
        found = certify(random_model().train(), images, labels, 0.02)
        assert [(v.status, v.lower_bound) for v in found] == [(v.status, v.lower_bound) for v in expected]

    @pytest.mark.parametrize(
        "stages",
        [
            (), ("attack",), ("ibp",), ("ibp", "attack"), ("attack", "ibp"), ("crown_ibp",), ("crown", "ibp"),
            ("alpha",),
            ("alpha", "crown_ibp"), ("bab",), ("bab", "attack", "alpha"), ("attack", "alpha", "bab"),
        ],
        ids=" ".join,
    )  # fmt: skip
    def test_any_stages_in_any_order(self, stages):
        model, images = random_model(), random_images(30)
        labels = mostly_right(model, images)
        verdicts = certify(model, images, labels, 0.02, Certify(stages=stages))
        words = {v.status for v in verdicts}
        assert ("verified" in words) is bool(set(stages) - {"attack"})
        assert {v.stage for v in verdicts if v.status == "unknown"} <= {(*("clean",), *stages)[-1]}
        full = certify(model, images, labels, 0.02)
        assert "unknown" not in {v.status for v in full}
        for one, other in zip(verdicts, full, strict=True):  # an image can be proved or refuted, never both
            assert one.status in (other.status, "unknown")
        if "bab" in stages or set(stages) == {"attack", "ibp"}:
            assert [v.status for v in verdicts] == [v.status for v in full]
