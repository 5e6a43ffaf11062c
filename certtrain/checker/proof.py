"""The file of a proof: arrays in safetensors, and a header in JSON in its metadata."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .arithmetic import Rejected

FORMAT, VERSION = "certtrain-proof", 1
LARGEST = 1 << 32
"""Most bytes of a file."""


@dataclass(frozen=True)
class ProofFile:
    """Args: header: the JSON; arrays: by name, finite."""

    header: dict[str, Any]
    arrays: dict[str, Any]

    def entry(self, name, kind, of=None):
        """An entry of the header, or of an object in it."""
        found = (self.header if of is None else of).get(name)
        if type(found) is not kind:
            raise Rejected(f"the proof's header: {name} is {str(found)[:60]!r}")
        return found

    def array(self, name, kinds, shape=None) -> Any:
        """An array of one of the ``kinds`` of numbers, and of a shape (None: any size)."""
        found = self.arrays.get(name)
        if found is None or found.dtype.kind not in kinds:
            raise Rejected(f"the proof: no array {name!r} of such numbers")
        if shape is not None and (
            found.ndim != len(shape)
            or any(want is not None and have != want for have, want in zip(found.shape, shape))
        ):
            raise Rejected(f"the proof: {name} has the shape {found.shape}, not {shape}")
        return found


def read_proof(path: Path) -> ProofFile:
    """
    Raises:
        Rejected: the file is damaged, or of another format.
    """
    if path.stat().st_size > LARGEST:
        raise Rejected(f"{path.name}: larger than {LARGEST} bytes")
    try:
        with safe_open(path, framework="np") as file:  # checks the sizes in its header
            header = json.loads((file.metadata() or {})["proof"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors and json raise types of their own
        raise Rejected(f"{path.name}: no proof ({type(error).__name__}: {error})") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Rejected(f"{path.name}: no proof of the format {FORMAT}")
    if header.get("version") != VERSION:
        raise Rejected(f"{path.name}: version {str(header.get('version'))[:20]}, not {VERSION}")
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
            raise Rejected(f"the proof: {name} has numbers that are not finite, or no numbers")
    if not re.fullmatch("[0-9a-f]{64}", str(header.get("network"))):
        raise Rejected("the proof's header: no checksum of the network")
    return ProofFile(header, arrays)
