"""The file of a proof: arrays in safetensors, and a header in JSON in its metadata."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from .arithmetic import Rejected, demand

FORMAT, VERSION = "certtrain-proof", 1
LARGEST = 1 << 32
"""Most bytes of a file."""


@dataclass(frozen=True)
class ProofFile:
    """Args: header: the JSON; arrays: by name, finite."""

    header: dict[str, Any]
    arrays: dict[str, Any]

    def entry(self, name, kind, of=None) -> Any:
        """An entry of the header, or of an object in it."""
        found = (self.header if of is None else of).get(name)
        demand(type(found) is kind, f"the proof's header: {name} is {str(found)[:60]!r}")
        return found

    def objects(self, name, of: Any = None, optional=False) -> Any:
        """A list of objects in the header."""
        found: Any = [] if optional and name not in of else self.entry(name, list, of)
        every = all(isinstance(one, dict) for one in found)
        demand(every, f"the proof's header: {name} holds what is no object")
        return found

    def array(self, name, kinds, shape) -> Any:
        """An array of one of the ``kinds`` of numbers, and of a shape (None: any size)."""
        known = name in self.arrays and self.arrays[name].dtype.kind in kinds
        demand(known, f"the proof: no array {name!r} of such numbers")
        found = self.arrays[name]
        fits = found.ndim == len(shape) and all(w in (None, s) for s, w in zip(found.shape, shape))
        demand(fits, f"the proof: {name} has the shape {found.shape}, not {shape}")
        return found


def read_proof(path: Path) -> ProofFile:
    """
    Raises:
        Rejected: the file is damaged, or of another format.
    """
    demand(path.stat().st_size <= LARGEST, f"{path.name}: larger than {LARGEST} bytes")
    try:
        with safe_open(path, framework="np") as file:  # checks the sizes in its header
            header = json.loads((file.metadata() or {})["proof"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors and json raise types of their own
        raise Rejected(f"{path.name}: no proof ({type(error).__name__}: {error})") from error
    known = isinstance(header, dict) and header.get("format") == FORMAT
    demand(known, f"{path.name}: no proof of the format {FORMAT}")
    version = header.get("version")
    demand(version == VERSION, f"{path.name}: version {str(version)[:20]}, not {VERSION}")
    for name, array in arrays.items():
        finite = array.dtype.kind in "iuf" and np.isfinite(array).all()
        demand(finite, f"the proof: {name} has numbers that are not finite, or no numbers")
    return ProofFile(header, arrays)
