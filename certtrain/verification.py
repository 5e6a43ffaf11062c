"""A finished run's test images, verified: its own question again, or another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from .components import load_plugins
from .config import structure, unstructure
from .errors import check
from .progress import console
from .recipe import Config
from .run_folder import JsonLines, RunFolder
from .runs import check_data, load_model, question_of
from .surroundings import surroundings
from .training import StopRequest
from .verifiers import Certify
from .verifiers.records import Record
from .verifiers.settings import Arithmetic
from .verifiers.sweep import VERIFIER, images_of, sweep


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found.

    Args:
        file: where the verdicts stand.
        epsilon: the radius that they are about.
        images: those that were asked about.
        records: their verdicts as in the file, in order; fewer than ``images`` after a total timeout.
        certificates: by arithmetic, how many of ``images`` the folder holds a certificate for at this epsilon, and how
            many verdicts; without those arithmetics that were not asked for yet.
    """

    file: Path
    epsilon: float
    images: range
    records: list[Record]
    certificates: dict[str, tuple[int, int]]


def verify(
    path: str | Path,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    certify: Certify | None = None,
    total_timeout: float | None = None,
    device: str | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> Verification:
    """Certify the test images of a run whose training is finished; go on where an earlier call stopped.

    The run's own epsilon and arithmetic write ``verdicts.jsonl``, others
    ``verdicts/embedded-<epsilon>-<arithmetic>.jsonl``. Verdicts that are there are kept; undecided images are tried
    again where the settings now offer more.

    Args:
        path: the run's folder.
        images: ``"start:stop"`` or a range; None for all.
        epsilon: radius in pixel units; None for the run's.
        certify: stages and limits; None for the recipe's. Its ``images`` is not looked at.
        total_timeout: seconds after which the call ends, whatever is left.
        device: instead of the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: something given cannot be used; nothing on disk was changed.
        Interrupted: SIGINT or SIGTERM; the same call goes on.
    """
    load_plugins(plugins)
    check(total_timeout is None or 0 < total_timeout < math.inf, "total_timeout", total_timeout, "seconds > 0")
    folder, description = RunFolder.open(Path(path))
    model, config = load_model(path)
    recorded = config
    ball = config.perturbation if epsilon is None else config.perturbation.with_epsilon(float(epsilon))
    changed = {"perturbation": ball, "certify": certify or config.certify, "device": device or config.device}
    config = structure(Config, unstructure(dataclasses.replace(config, **changed)))
    config.certify.check_ball(ball)
    where = config.resolved_device()

    def file_of(arithmetic: Arithmetic) -> JsonLines:
        if ball == recorded.perturbation and arithmetic == recorded.certify.arithmetic:
            return folder.verdicts
        return folder.other_verdicts(VERIFIER, float(ball.epsilon), arithmetic)

    file = file_of(config.certify.arithmetic)
    with surroundings(config.threads, where), StopRequest(at_once=True):
        dataset = config.data.load()
        check_data(dataset, description)
        if not quiet and (remark := ball.remark(dataset.shape)):
            console.print(remark)
        chosen = images_of(images, len(dataset.test))
        question = question_of(folder, config, dataset.to(where), model.to(where), where)
        records = sweep(question, file, folder.settings, chosen, total_timeout=total_timeout, quiet=quiet)
    certificates = {}
    for arithmetic in get_args(Arithmetic):
        verdicts = {line["index"]: line["status"] for line in file_of(arithmetic) if line["index"] in chosen}
        if verdicts:
            certificates[arithmetic] = list(verdicts.values()).count("verified"), len(verdicts)
    return Verification(file.path, float(ball.epsilon), chosen, records, certificates)
