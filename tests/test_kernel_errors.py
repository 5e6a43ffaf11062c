"""Every error names the argument, what was found and what was expected."""

import pytest
import torch
from op_table import NAMES, table
from walking import walk

from certtrain import kernels


def _calls():
    c, r, image = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3, 4, 4)
    w, kernel, v, labels = torch.zeros(5, 3), torch.zeros(5, 3, 2, 2), torch.zeros(5), torch.tensor([0, 1])
    forms, constants, line = torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(2, 3)
    cut = {"forms": w, "constants": v, "cuts": c, "offsets": v[:2], "rows": torch.tensor([[0, 4, -1]] * 2)}
    scores, mask = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    k = kernels

    def step(**changed):
        given = {"gradient": image, "p": image, "m": scores, "x": image, "mask": mask, "k": 1} | changed
        return k.spgd_step(**given, alpha=1, beta=1, projected=True)

    def minima(**changed):
        return k.cut_box_minima(**(cut | changed))

    shapes = [
        ("radius", lambda: k.ibp_relu(c, r[:1])),
        ("radius", lambda: k.ibp_linear(c, r[:, :1], w)),
        ("radius", lambda: k.ibp_affine(c, r[:1], r[0], r[0])),
        ("radius", lambda: k.ibp_conv2d(image, image[:1], kernel)),
        ("radius", lambda: k.ibp_margins(c, r[:1], w, v, labels)),
        ("scale", lambda: k.ibp_affine(c, r, v, r[0])),
        ("shift", lambda: k.ibp_affine(c, r, r[0], v)),
        ("weight", lambda: k.ibp_linear(c, r, w.T)),
        ("bias", lambda: k.ibp_linear(c, r, w, v[:1])),
        ("scale", lambda: k.ibp_linear(c, r, w, scale=v[:1])),
        ("shift", lambda: k.ibp_linear(c, r, w, shift=v[None])),
        ("center", lambda: k.ibp_conv2d(image[0], image[0], kernel)),
        ("weight", lambda: k.ibp_conv2d(image, image, kernel, groups=3)),
        ("weight", lambda: k.ibp_conv2d(image, image, w)),
        ("weight", lambda: k.ibp_conv2d(image, image, kernel, dilation=4)),
        ("bias", lambda: k.ibp_conv2d(image, image, kernel, v[:1])),
        ("scale", lambda: k.ibp_conv2d(image, image, kernel, scale=v[:1])),
        ("shift", lambda: k.ibp_conv2d(image, image, kernel, shift=v[:1])),
        ("weight", lambda: k.ibp_margins(c, r, w.T, v, labels)),
        ("bias", lambda: k.ibp_margins(c, r, w, v[:1], labels)),
        ("labels", lambda: k.ibp_margins(c, r, w, v, labels[:1])),
        ("weight", lambda: k.batch_statistics_norm(c, v, None, 0.1)),
        ("bias", lambda: k.batch_statistics_norm(c, None, v, 0.1)),
        ("x", lambda: k.batch_statistics_norm(c[:1], None, None, 0.1)),
        ("x", lambda: k.batch_statistics_norm(c[:, :0], None, None, 0.1)),
        ("x", lambda: k.batch_statistics_norm(v, None, None, 0.1)),
        ("center", lambda: k.ibp_affine(v, v, v, v)),
        ("stride", lambda: k.ibp_conv2d(image, image, kernel, stride=0)),
        ("stride", lambda: k.ibp_conv2d(image, image, kernel, stride=(1, 1, 1))),
        ("padding", lambda: k.ibp_conv2d(image, image, kernel, padding=-1)),
        ("padding", lambda: k.ibp_conv2d(image, image, kernel, padding="half")),
        ("padding", lambda: k.ibp_conv2d(image, image, kernel, padding="same", stride=2)),
        ("dilation", lambda: k.ibp_conv2d(image, image, kernel, dilation=(1, 0))),
        ("coefficients", lambda: k.crown_relu_step(c, c, c, c, c)),
        ("bias", lambda: k.crown_relu_step(forms, c, line, line, line)),
        ("lower_slope", lambda: k.crown_relu_step(forms, constants, line[:1], line, line)),
        ("upper_slope", lambda: k.crown_relu_step(forms, constants, line, line[:, :2], line)),
        ("upper_intercept", lambda: k.crown_relu_step(forms, constants, line, line, forms[:, :1])),
        ("forms", lambda: minima(forms=v)),
        ("constants", lambda: minima(constants=v[:1])),
        ("cuts", lambda: minima(cuts=v)),
        ("cuts", lambda: minima(cuts=c[:, :2])),
        ("offsets", lambda: minima(offsets=v)),
        ("rows", lambda: minima(rows=cut["rows"][:1])),
        ("rows", lambda: minima(rows=cut["rows"][0])),
        ("rows", lambda: minima(rows=cut["rows"].to("meta"))),
        ("scores", lambda: k.topk_mask(v.sum(), 1)),
        ("x", lambda: k.sparse_apply(v, v, v, 1)),
        ("p", lambda: k.sparse_apply(image, image[:1], scores, 1)),
        ("scores", lambda: k.sparse_apply(image, image, image, 1)),
        ("gradient", lambda: step(gradient=image[:1])),
        ("p", lambda: step(p=image[:, :1])),
        ("m", lambda: step(m=scores[0])),
        ("mask", lambda: step(mask=mask[:1])),
    ]
    d = torch.float64
    dtypes = [
        ("radius", lambda: k.ibp_relu(c, r.to(d))),
        ("scale", lambda: k.ibp_affine(c, r, r[0].to(d), r[0])),
        ("shift", lambda: k.ibp_affine(c, r, r[0], r[0].to(d))),
        ("weight", lambda: k.ibp_linear(c, r, w.to(d))),
        ("bias", lambda: k.ibp_linear(c, r, w, v.to(d))),
        ("scale", lambda: k.ibp_linear(c, r, w, scale=v.to(d))),
        ("shift", lambda: k.ibp_linear(c, r, w, shift=v.to(d))),
        ("weight", lambda: k.ibp_conv2d(image, image, kernel.to(d))),
        ("bias", lambda: k.ibp_conv2d(image, image, kernel, v.to(d))),
        ("weight", lambda: k.ibp_margins(c, r, w.to(d), v, labels)),
        ("bias", lambda: k.ibp_margins(c, r, w, v.to(d), labels)),
        ("labels", lambda: k.ibp_margins(c, r, w, v, labels.float())),
        ("labels", lambda: k.ibp_margins(c, r, w, v, labels.int())),
        ("center", lambda: k.ibp_relu(labels, labels)),
        ("x", lambda: k.batch_statistics_norm(image.long(), None, None, 0.1)),
        ("coefficients", lambda: k.crown_relu_step(forms.int(), constants, line, line, line)),
        ("bias", lambda: k.crown_relu_step(forms, constants.to(d), line, line, line)),
        ("upper_slope", lambda: k.crown_relu_step(forms, constants, line, line.to(d), line)),
        ("forms", lambda: minima(forms=w.int())),
        ("constants", lambda: minima(constants=v.to(d))),
        ("cuts", lambda: minima(cuts=c.to(d))),
        ("offsets", lambda: minima(offsets=v[:2].to(d))),
        ("rows", lambda: minima(rows=cut["rows"].int())),
        ("scores", lambda: k.topk_mask(labels[None], 1)),
        ("p", lambda: k.sparse_apply(image, image.to(d), scores, 1)),
        ("scores", lambda: k.sparse_apply(image, image, scores.to(d), 1)),
        ("gradient", lambda: step(gradient=image.to(d))),
        ("m", lambda: step(m=scores.half())),
        ("mask", lambda: step(mask=mask.bool())),
    ]
    cases = [(ValueError, *case) for case in shapes] + [(TypeError, *case) for case in dtypes]
    return [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{i}") for i, case in enumerate(cases)]


@walk("kind, name, call", _calls())
def test_errors_name_the_argument(kind, name, call):
    with pytest.raises(kind, match=f"^{name}: "):
        call()


X, SCORES = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)
SPARSE = {
    "topk_mask": lambda k: kernels.topk_mask(SCORES, k),
    "sparse_apply": lambda k: kernels.sparse_apply(X, X, SCORES, k),
    "spgd_step": lambda k: kernels.spgd_step(X, X, SCORES, X, SCORES.byte(), k, alpha=1, beta=1, projected=False),
}


@walk("op", SPARSE)
@walk(
    "kind, k, found",
    [
        (ValueError, -1, "-1; expected k >= 0"),
        (TypeError, True, "bool; expected an int or an int64 tensor"),
        (TypeError, 2.0, "float; expected an int or an int64 tensor"),
        (TypeError, None, "NoneType; expected an int or an int64 tensor"),
        (TypeError, torch.tensor([1, 2], dtype=torch.int32), "torch.int32; expected an int or torch.int64"),
        (TypeError, torch.tensor([1.0, 2.0]), "torch.float32; expected an int or torch.int64"),
        (ValueError, torch.tensor([1, 2, 3]), r"shape \(3,\); expected \(2,\)"),
        (ValueError, torch.tensor(1), r"shape \(\); expected \(2,\)"),
        (ValueError, torch.zeros(2, dtype=torch.int64, device="meta"), "device meta; expected that of .*, cpu"),
    ],
    ids=str,
)  # fmt: skip
def test_budget(op, kind, k, found):
    with pytest.raises(kind, match=f"^k: found {found}"):
        SPARSE[op](k)


@pytest.mark.parametrize("label", [-1, 5, 1 << 40])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_labels_that_are_no_classes(backend, label):
    center, labels = torch.zeros(3, 4), torch.tensor([0, label, 4])
    with kernels.use_backend(backend), pytest.raises(ValueError, match=f"^labels: found {label}; expected 0 to 4"):
        kernels.ibp_margins(center, center, torch.zeros(5, 4), None, labels)


@pytest.mark.parametrize("row", [-2, 5, 1 << 40])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_that_are_no_forms(backend, row):
    forms, cuts, rows = torch.zeros(5, 3), torch.zeros(2, 3), torch.tensor([[0, -1], [4, row]])
    with kernels.use_backend(backend), pytest.raises(ValueError, match=f"^rows: found {row}; expected -1 to 4"):
        kernels.cut_box_minima(forms, forms[:, 0], cuts, cuts[:, 0], rows)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_two_devices(name):
    call = table()[name]
    for position in range(len(call.leaves)) if len(call.leaves) > 1 else ():
        leaves = [leaf.to("meta") if i == position else leaf for i, leaf in enumerate(call.leaves)]
        with pytest.raises(ValueError, match=r"^\w+: found device (meta|cpu); expected that of \w+, (cpu|meta)$"):
            call.run(*leaves)


@pytest.mark.parametrize("name", ["labels", "mask"])
def test_integers_on_another_device(name):
    center, labels, mask = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), SCORES.byte()
    with pytest.raises(ValueError, match=f"^{name}: found device meta; expected that of (center|x), cpu$"):
        if name == "labels":
            kernels.ibp_margins(center, center, torch.zeros(5, 3), None, labels.to("meta"))
        else:
            kernels.spgd_step(X, X, SCORES, X, mask.to("meta"), 1, alpha=1, beta=1, projected=True)


@pytest.mark.parametrize("name", ["linear", "conv", "affine", "relu", "margins"])
def test_a_negative_radius_raises_where_values_are_checked(name):
    call = table()[name]
    center, radius, *others = call.leaves
    negative = radius.clone()
    negative.flatten()[-1] = -0.25
    with kernels.check_values():
        call.run(center, radius, *others)
        with pytest.raises(ValueError, match=r"^radius: found -0\.25; expected radius >= 0$"), kernels.check_values():
            call.run(center, negative, *others)
        with pytest.raises(ValueError, match=r"^radius"):
            call.run(center, negative, *others)
    call.run(center, negative, *others)
