"""A run's test images, verified by α-β-CROWN; and what two verifiers make of the same images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .bounds import LinfBall
from .components import load_plugins
from .config import structure, unstructure
from .errors import InputError
from .export import current_network
from .pipeline import export
from .recipe import Config
from .run_folder import RunFolder
from .runs import check_data, load_model
from .surroundings import device_name, versions
from .training import StopRequest
from .verification import Verification
from .verifiers.abcrown import Abcrown
from .verifiers.abcrown_question import VERIFIER, AbcrownQuestion
from .verifiers.onnx_network import load_onnx, replay_session
from .verifiers.problem import Status
from .verifiers.records import Record
from .verifiers.sweep import images_of, sweep


def verify_with_abcrown(
    path: str | Path,
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
    """Ask α-β-CROWN about a run's test images; go on where an earlier call stopped.

    Its verdicts stand in ``verdicts/abcrown-<epsilon>-nearest.jsonl``, what it printed in ``verdicts/abcrown/``. The
    network is the run's ``model.onnx``, exported first if there is none of the run's weights.

    Args:
        abcrown: where it is installed.
        timeout: seconds for an image; None for the recipe's.
        device: cpu or cuda; None for the recipe's. Others as for ``certtrain.verify``.
    Raises:
        InputError: something given cannot be used, or α-β-CROWN cannot be run.
        Interrupted: SIGINT or SIGTERM; the same call goes on.
    """
    load_plugins(plugins)
    folder, description = RunFolder.open(Path(path))
    _, config = load_model(path)
    ball = config.perturbation if epsilon is None else config.perturbation.with_epsilon(float(epsilon))
    if not isinstance(ball, LinfBall):
        raise InputError(f"perturbation: found {type(ball).__name__}; accepted for α-β-CROWN: LinfBall")
    dataset = config.data.load()
    check_data(dataset, description)
    chosen = images_of(images, len(dataset.test))
    given = {} if device is None else {"device": device}
    certify = config.certify if timeout is None else replace(config.certify, timeout=timeout)
    where = structure(Config, {**unstructure(config), **given}).resolved_device()
    network = current_network(folder, description)
    if network is None:
        export(path, quiet=quiet)
        network = folder.onnx
    weights = folder.weights_sha256()
    question = AbcrownQuestion(
        abcrown, network, replay_session(load_onnx(network)), dataset.test, dataset.classes, ball,
        certify.timeout, where.type, folder.path / "verdicts" / VERIFIER,
        {"weights": weights, "versions": versions(), "device": device_name(where)},
    )  # fmt: skip
    file = folder.other_verdicts(VERIFIER, float(ball.epsilon), "nearest")
    with StopRequest(at_once=True):
        records = sweep(question, file, folder.settings, chosen, total_timeout=total_timeout, quiet=quiet)
    return Verification(file.path, float(ball.epsilon), chosen, records, {})


@dataclass(frozen=True)
class Agreement:
    """What two verifiers say of the same images.

    Args:
        counts: how many images, by the two statuses.
        contradictions: the numbers of the images that one proves safe and the other refutes.
    """

    counts: dict[tuple[Status, Status], int]
    contradictions: list[int]


def compare(first: Sequence[Record], second: Sequence[Record]) -> Agreement:
    """Of the images that both have a verdict on. A wrong certificate shows as a contradiction."""
    other = {record["index"]: record["status"] for record in second}
    pairs = {r["index"]: (r["status"], other[r["index"]]) for r in first if r["index"] in other}
    refuted = {"falsified", "misclassified"}
    wrong = [index for index, (one, two) in sorted(pairs.items())
             if (one == "verified" and two in refuted) or (two == "verified" and one in refuted)]  # fmt: skip
    return Agreement(dict(Counter(pairs.values())), wrong)
