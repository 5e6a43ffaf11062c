"""Export of an nn.Module as an ONNX file that other verifiers load, checked with onnxruntime."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..bounds import UnsupportedOperation, check_one_image
from ..bounds.folding import fold
from ..bounds.tracing import forget
from ..bounds.wrappers import inner
from ..errors import InputError
from ..labels import classes_of
from ..precision import full_float32
from ..run_folder import write_atomically
from .plain import PlainNetwork

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-5
"""Largest accepted difference between onnxruntime and torch, relative to the logits' magnitude."""
OPSET = 18
"""The opset that torch exports without conversion and alpha-beta-CROWN loads."""
BATCH = 256


@dataclass(frozen=True)
class OnnxFile:
    """A written file and the results of its checks.

    Args:
        sha256: checksum of its content. opset: version of its operators; operators: number of operators of each kind.
        folded: whether it is the folded network that is certified; else the module itself, because one of its layers
            has no bound rule.
        images: number of images on which onnxruntime was compared with the module.
        difference: largest difference of any logit; magnitude: largest |logit|.
        agreement: share of the images with the same predicted class.
    """

    path: Path
    sha256: str
    opset: int
    operators: dict[str, int]
    folded: bool
    images: int
    difference: float
    magnitude: float
    agreement: float


@torch.no_grad()
@full_float32()
def export_onnx(model: nn.Module, path: str | Path, images: Tensor) -> OnnxFile:
    """Write a model as ONNX: dynamic batch size, weights included, input ``images``, output ``logits``.

    Batch norms are folded into the layers before them and a leading normalisation becomes two 1×1 convolutions, one for
    x - mean and one for the division, so that the file holds the network that ``certify`` certifies. Before it is put
    in place the file is checked by ONNX's checker and compared with the model on ``images`` by onnxruntime: in batches,
    in another order, and for one image alone. Wrappers (DataParallel, ``torch.compile``) are removed.

    Args:
        model: any ``nn.Module`` that maps (B, *shape) float32 to (B, K) logits; exported in evaluation mode. Its mode
            and device are restored.
        path: path of the file.
        images: (N, *shape) float32, N >= 1, typical inputs, preferably real images.
    Raises:
        InputError: the model's outputs are not logits of two classes or more; torch cannot export it; the file is not
            valid ONNX; onnxruntime's logits differ by more than 1e-5 of their magnitude; or the logits of an image
            depend on other images. Nothing on disk was changed.
    """
    if images.dtype != torch.float32 or images.ndim < 2 or not len(images):
        found = f"{images.dtype} {tuple(images.shape)}"
        raise InputError(f"images: found {found}; accepted: (N, *shape) of torch.float32, one image or more")
    path, images = Path(path), images.cpu()
    modes = {module: module.training for module in model.modules()}
    devices = {t.device for t in (*model.parameters(), *model.buffers())} or {torch.device("cpu")}
    try:
        model.eval().cpu()
        classes_of(model(images[:1]))
        forget(model)
        plain = _plain(model, images.shape[1:])
        logits = torch.cat([check_one_image(model, part) for part in images.split(BATCH)])
        proto = _exported(inner(model) if plain is None else plain, images[:1])
    finally:
        model.to(devices.pop())
        for module, mode in modes.items():
            module.training = mode
    content = proto.SerializeToString()
    difference, magnitude, agreement = _parity(path, content, images, logits)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return OnnxFile(
        path, hashlib.sha256(content).hexdigest(), proto.opset_import[0].version,
        dict(Counter(node.op_type for node in proto.graph.node).most_common()), plain is not None,
        len(images), difference, magnitude, agreement,
    )  # fmt: skip


def _plain(model: nn.Module, shape: torch.Size) -> PlainNetwork | None:
    try:
        return PlainNetwork(fold(model, shape, whole_pools=True))
    except UnsupportedOperation:
        return None


def _exported(module: nn.Module, image: Tensor) -> onnx.ModelProto:
    """Export with torch's exporter. The example has a batch of 2, because a 1 would become a constant dimension."""
    batch = torch.export.Dim("batch")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # from torch's own code, not about the model
            program: Any = torch.onnx.export(
                module, (image.repeat(2, *[1] * (image.ndim - 1)),), dynamo=True, external_data=False,
                dynamic_shapes=({0: batch},), input_names=["images"], output_names=["logits"], opset_version=OPSET,
                verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch raises many types for a model that it cannot export
        first: BaseException = error
        while first.__cause__:  # torch's own message is a page of advice
            first = first.__cause__
        lines = str(first).strip().splitlines() or [type(first).__name__]
        raise InputError(f"model: torch cannot export it ({lines[0]}); accepted: a model for torch.onnx") from error
    proto = program.model_proto
    if len(proto.graph.output) != 1 or len(proto.graph.input) != 1:
        found = f"{len(proto.graph.input)} inputs and {len(proto.graph.output)} outputs"
        raise InputError(f"model: found {found}; accepted: one of each, images and logits")
    for item in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output,
                 *proto.graph.value_info, *proto.graph.initializer):  # fmt: skip
        del item.metadata_props[:]  # stack traces, with this machine's paths
        item.ClearField("doc_string")
    return proto


def _parity(path: Path, content: bytes, images: Tensor, logits: Tensor) -> tuple[float, float, float]:
    """(largest difference, largest |logit|, agreement) of onnxruntime and torch."""
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(content, full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"images": part.numpy()})[0] for part in (*images.split(BATCH), images[:1])]
    except Exception as error:  # both libraries raise types of their own
        raise InputError(f"{path}: what was made is not valid ({error}); accepted: valid ONNX") from error
    other, logits = torch.cat([torch.from_numpy(part) for part in found]), torch.cat([logits, logits[:1]])
    difference, magnitude = float((other - logits).abs().max()), float(logits.abs().max())
    agree = (other.argmax(1) == logits.argmax(1))[: len(images)]  # without the image that ran alone
    agreement = float(agree.float().mean())
    if not difference <= TOLERANCE * magnitude:
        raise InputError(
            f"{path}: not written: onnxruntime's logits differ from torch's by {difference:.3g}, predictions agree on "
            f"{100 * agreement:.2f} % of {len(images)} images; accepted: {TOLERANCE:g} of the largest, {magnitude:.3g}"
        )
    return difference, magnitude, agreement
