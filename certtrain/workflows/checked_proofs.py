"""Checks of several proofs in one process, which loads the checker alone."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checker import VERSION
from ..checker.check import check


def checked(model: Path, proofs: Sequence[Path], single: bool) -> list[dict[str, Any]]:
    """For each proof: ``status`` (``proved`` or ``rejected``), ``margin`` or ``reason``, ``sha256`` of its file,
    ``seconds``, and the ``checker``'s version.

    Args:
        model: the network's ONNX file.
        single: whether the claims must hold in float32 too.
    """
    found: list[dict[str, Any]] = []
    for proof in proofs:
        started, margin, reason = time.perf_counter(), None, None
        try:
            content = proof.read_bytes()
            margin = float(check(model, proof, single=single))
        except Exception as why:  # one proof's fault is no reason to stop
            content, reason = b"", str(why)
        found.append({
            "status": "rejected" if margin is None else "proved", "margin": margin, "reason": reason,
            "sha256": hashlib.sha256(content).hexdigest(), "seconds": round(time.perf_counter() - started, 6),
            "checker": VERSION,
        })  # fmt: skip
    return found
