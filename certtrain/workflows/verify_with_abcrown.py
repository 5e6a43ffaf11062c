"""Verification of a run's test images by α-β-CROWN, and comparison of two verifiers on the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..components import load_plugins
from ..environment import device_name, versions
from ..errors import InputError
from ..ledger import Ledger, Line, images_of
from ..training import StopRequest
from ..verifiers.abcrown import Abcrown
from ..verifiers.abcrown_question import VERIFIER, AbcrownQuestion
from ..verifiers.onnx_network import load_onnx, replay_session
from ..verifiers.problem import Status
from .export import export_run
from .run import Run
from .verify import Verification


def verify_with_abcrown(
    path: str | Path | Run,
    abcrown: Abcrown,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    timeout: float | None = None,
    total_timeout: float | None = None,
    device: str | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> Verification:
    """Verify a run's test images with α-β-CROWN, or continue where an earlier call stopped.

    Verdicts are in ``verdicts/abcrown-<epsilon>-nearest.jsonl``, the verifier's output in ``verdicts/abcrown/``. The
    network is the run's ``model.onnx``, which is exported first unless it holds the current weights.

    Args:
        path: the run's folder, or the run opened.
        abcrown: the installation to use.
        timeout: seconds per image; None for the recipe's.
        device: cpu or cuda; None for the recipe's. Others as for ``certtrain.verify``.
    Raises:
        InputError: an argument cannot be used, or α-β-CROWN cannot be run.
        Interrupted: SIGINT or SIGTERM; the same call continues.
    """
    load_plugins(plugins)
    run = Run.open(path)
    folder, config = run.folder, run.config
    run.model()  # checks the weights before the export
    ball = config.perturbation if epsilon is None else config.perturbation.with_epsilon(float(epsilon))
    if not ball.is_box:
        raise InputError(f"perturbation: found {ball.kind}; accepted for α-β-CROWN: a box (LinfBall)")
    dataset = run.dataset()
    chosen = images_of(images, len(dataset.test))
    certify = config.certify if timeout is None else replace(config.certify, timeout=timeout)
    where = run.with_config(device=device or config.device).config.resolved_device()
    network = run.exported_network()
    if network is None:
        with folder.exclusive():
            export_run(run, dataset, config.perturbation, None, config.export, quiet)
        network = folder.onnx
    weights = folder.weights_sha256()
    question = AbcrownQuestion(
        abcrown, network, replay_session(load_onnx(network)), dataset.test, dataset.classes, ball,
        certify.timeout, where.type, folder.path / "verdicts" / VERIFIER,
        {"weights": weights, "versions": versions(), "device": device_name(where)},
    )  # fmt: skip
    ledger = Ledger(folder.other_verdicts(VERIFIER, float(ball.epsilon), "nearest"), folder.settings)
    with StopRequest(at_once=True):
        records = ledger.ask(question, chosen, total_timeout=total_timeout, quiet=quiet)
    return Verification(ledger.file.path, float(ball.epsilon), chosen, records, {})


@dataclass(frozen=True)
class Agreement:
    """The verdicts of two verifiers on the same images.

    Args:
        counts: number of images by pair of statuses.
        contradictions: numbers of the images that one verifier proves safe and the other refutes.
    """

    counts: dict[tuple[Status, Status], int]
    contradictions: list[int]


def agreement_between(first: Sequence[Line], second: Sequence[Line]) -> Agreement:
    """Compare the verdicts on the images that both have. A wrong certificate shows as a contradiction."""
    other = {record["index"]: record["status"] for record in second}
    pairs = {r["index"]: (r["status"], other[r["index"]]) for r in first if r["index"] in other}
    refuted = {"falsified", "misclassified"}
    wrong = [index for index, (one, two) in sorted(pairs.items())
             if (one == "verified" and two in refuted) or (two == "verified" and one in refuted)]  # fmt: skip
    return Agreement(dict(Counter(pairs.values())), wrong)
