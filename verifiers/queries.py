"""Reads a query and its networks, and checks that each fits the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from ..errors import InputError
from .joint_network import JointNetwork, joint_network
from .onnx_graphs import difference_between
from .onnx_network import HiddenTensorError, OnnxNetwork, read_onnx
from .vnnlib import Declarations, DeclaredNetwork, DeclaredTensor, Property, VnnlibQuery
from .vnnlib_reader import read_query
from .vnnlib_text import Token

Networks: TypeAlias = "str | Path | Mapping[str, str | Path]"
"""The ONNX file of the only network, or those of several by the names that the query declares."""

Reader: TypeAlias = Callable[[Path, Sequence[str], torch.dtype], OnnxNetwork]
"""Reads an ONNX file with the hidden tensors of these names, in a dtype or float64, as ``read_onnx`` does."""


def read_question(networks: Networks, property: str | Path, read: Reader = read_onnx) -> tuple[JointNetwork, Property]:
    """Read a query and its networks, which become one program. Files are plain or gzipped (``.gz`` may be left out).

    A network that is ``equal-to`` another one takes the other's file. So a path alone fits a query in which only one
    network has a file of its own.

    Args:
        read: reads a network's file.
    Raises:
        InputError: a file that cannot be read; networks without a file, or files of networks that are not declared;
            tensors that are not the networks'; networks declared isomorphic whose graphs differ; a query in VNN-LIB 2.0
            without a constraint on an output or hidden tensor.
    """
    query = read_query(present(property))
    joint = joint_network(_networks(query, networks, read))
    asked = query.property(joint.shape.numel(), joint.declared_outputs, joint.indices)
    query.check_outputs_asserted()
    return joint, asked


def _networks(query: VnnlibQuery, networks: Networks, read: Reader) -> list[OnnxNetwork]:
    """The networks in the order of declaration, all in float64 where one must be."""
    if query.declared is None:
        return [read(present(_only(query, networks)), (), torch.float32)]
    files = _files(query, query.declared, networks)
    found = _read(query, query.declared, files, read, torch.float32)
    if len({network.dtype for network in found}) > 1:
        found = _read(query, query.declared, files, read, torch.float64)
    for declared, network in zip(query.declared.networks, found, strict=True):
        _check_tensors(query, declared, network)
    _check_isomorphic(query, query.declared, found)
    return found


def _only(query: VnnlibQuery, networks: Networks) -> str | Path:
    """The file of the only network of a query that names none."""
    if not isinstance(networks, Mapping):
        return networks
    if len(networks) != 1:
        found = f"files of {len(networks)} networks ({', '.join(networks)})"
        raise InputError(f"{query.source.path}: found {found}; accepted: one network, as VNN-LIB 1.0 has")
    return next(iter(networks.values()))


def _files(query: VnnlibQuery, declared: Declarations, networks: Networks) -> dict[str, Path]:
    """The file of each declared network, by its name.

    Raises:
        InputError: a network without a file, or a file without a network; one of its own for a network that is equal to
            another.
    """
    own = [network for network in declared.networks if network.equal_to is None]
    accepted = f"a file for each of {', '.join(network.name for network in own)}"
    if not isinstance(networks, Mapping):
        if len(own) > 1:
            query.source.refuse(Token(f"declare-network {own[1].name} without a file", own[1].line), accepted)
        networks = {own[0].name: networks}
    names = {network.name for network in declared.networks}
    if unknown := [name for name in networks if name not in names]:
        found = f"found a file for {unknown[0]!r}, which is not declared"
        raise InputError(f"{query.source.path}: {found}; accepted: {accepted}")
    files = dict[str, Path]()
    for network in declared.networks:
        if network.equal_to is None and network.name not in networks:
            query.source.refuse(Token(f"declare-network {network.name} without a file", network.line), accepted)
        files[network.name] = present(networks[network.equal_to or network.name])
        if network.equal_to and network.name in networks:
            given = present(networks[network.name])
            if given.resolve() != files[network.name].resolve():  # tables of 2026 list the same file for both
                found = Token(f"{network.name} equal-to {network.equal_to} with a file of its own", network.line)
                query.source.refuse(found, accepted)
    return files


def _read(
    query: VnnlibQuery, declared: Declarations, files: Mapping[str, Path], read: Reader, dtype: torch.dtype
) -> list[OnnxNetwork]:
    """The networks in the order of declaration, each file with the same hidden tensors once."""
    known, networks = dict[tuple[Path, tuple[str, ...]], OnnxNetwork](), list[OnnxNetwork]()
    for network in declared.networks:
        file, hidden = files[network.name], tuple(tensor.source for tensor in network.hidden)
        if (file, hidden) not in known:
            try:
                known[file, hidden] = read(file, hidden, dtype)
            except HiddenTensorError as error:
                tensor = next(tensor for tensor in network.hidden if tensor.source == error.tensor)
                place = f"{query.source.path}, line {tensor.line}: declare-hidden {tensor.name}"
                raise InputError(f"{place}: {error}") from error
        networks.append(known[file, hidden])
    return networks


def _check_tensors(query: VnnlibQuery, declared: DeclaredNetwork, network: OnnxNetwork) -> None:
    """
    Raises:
        InputError: declared tensors that are not the network's, in its order.
    """
    kind, first = str(network.inputs[0].kind), len(network.computed) - len(network.hidden)
    of_network: list[tuple[str, tuple[DeclaredTensor, ...], Sequence[Sequence[int]]]] = [
        ("inputs", declared.inputs, [given.shape for given in network.inputs]),
        ("outputs", declared.outputs, network.computed[:first]),
        ("hidden tensors", declared.hidden, network.computed[first:]),
    ]
    for what, tensors, shapes in of_network:
        own = ", ".join(f"{kind} {list(shape)}" for shape in shapes)
        for number, tensor in enumerate(tensors):
            if len(tensors) != len(shapes) or not tensor.fits(kind, shapes[number]):
                accepted = f"the network's {what}, in their order, as they are or real: {own}"
                query.source.refuse(Token(str(tensor), tensor.line), accepted)


def _check_isomorphic(query: VnnlibQuery, declared: Declarations, networks: Sequence[OnnxNetwork]) -> None:
    """
    Raises:
        InputError: networks declared isomorphic whose graphs differ.
    """
    by_name = dict(zip((network.name for network in declared.networks), networks, strict=True))
    for network in declared.networks:
        if network.isomorphic_to is None:
            continue
        difference = difference_between(by_name[network.isomorphic_to], by_name[network.name])
        if difference is not None:
            found = Token(f"{network.name} isomorphic-to {network.isomorphic_to}", network.line)
            query.source.refuse(found, f"networks of the same graph, which differ in their weights alone: {difference}")


def present(path: str | Path) -> Path:
    """The path itself, or with ``.gz`` appended where only that file exists."""
    plain, zipped = Path(path), Path(f"{path}.gz")
    return zipped if zipped.exists() and not plain.exists() else plain
