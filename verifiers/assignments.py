"""Assignments that satisfy a query, as the VNN-LIB standard serialises them: a folder of ONNX TensorProtos."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from onnx import TensorProto, numpy_helper

from ..errors import InputError, writing
from ..run_folder import write_atomically
from ..typed import as_floats
from .vnncomp import Answer

KINDS = {"float32": np.float32, "real": np.float64}


def check_folder(folder: str | Path) -> None:
    """
    Raises:
        InputError: a file, or a place where no folder can be made.
    """
    path = Path(folder).resolve()
    if not (path.is_dir() or (path.parent.is_dir() and not path.exists())):
        raise InputError(f"{folder}: cannot be written; accepted: a folder, or a new one in a folder that is there")


def write_assignment(folder: str | Path, answer: Answer) -> None:
    """Write ``NAME.pb`` for each variable of a counterexample; without one, nothing. The folder is made where there is
    none; in one that is there, files of these names are replaced, and others stay.

    Elements are float32 where the query says so, float64 where it says ``real``: in VNN-LIB 1.0 each variable is such
    a number.

    Raises:
        InputError: the folder cannot be made, or a file not be written.
    """
    for tensor in _tensors(answer):
        content, path = tensor.SerializeToString(), Path(folder) / f"{tensor.name}.pb"
        with writing(Path(folder)):
            Path(folder).mkdir(exist_ok=True)
        write_atomically(path, lambda file, content=content: file.write_bytes(content))


def _tensors(answer: Answer) -> Iterator[TensorProto]:
    if answer.inputs is None or answer.outputs is None:
        return
    if answer.declared is None:
        for letter, values in (("X", map(float, answer.inputs)), ("Y", as_floats(answer.outputs))):
            for number, value in enumerate(values):
                yield numpy_helper.from_array(np.array(value), f"{letter}_{number}")
        return
    lines = iter(answer.assigned())
    for network in answer.declared.networks:
        for tensor in (*network.inputs, *network.hidden, *network.outputs):
            next(lines)  # the header
            values = np.array([float(line) for line in islice(lines, tensor.size)], KINDS[tensor.kind])
            yield numpy_helper.from_array(values.reshape(tensor.shape), tensor.name)
