"""Verification of a finished run's test images, with the recipe's settings or others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from ..components import load_plugins
from ..data import Dataset
from ..environment import device_name, reproducible, versions
from ..errors import InputError, check
from ..ledger import Ledger, Line, images_of
from ..progress import console
from ..run_folder import JsonLines
from ..training import StopRequest
from ..verifiers import Certify
from ..verifiers.embedded_question import VERIFIER, EmbeddedQuestion
from ..verifiers.onnx_network import load_onnx, replay_session
from ..verifiers.proofs import ImageProofs, Prover
from ..verifiers.settings import Arithmetic
from .run import Run


@dataclass(frozen=True)
class Verification:
    """The results of ``verify``.

    Args:
        file: the file of the verdicts.
        epsilon: the radius.
        images: the requested images.
        records: their verdicts as in the file, in order; fewer than ``images`` after a total timeout.
        certificates: by arithmetic, the numbers of certificates and of verdicts about ``images`` that the folder holds
            at this epsilon; arithmetics without verdicts are omitted.
    """

    file: Path
    epsilon: float
    images: range
    records: list[Line]
    certificates: dict[str, tuple[int, int]]


def verify(
    path: str | Path | Run,
    *,
    images: str | range | None = None,
    epsilon: float | None = None,
    certify: Certify | None = None,
    total_timeout: float | None = None,
    device: str | None = None,
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> Verification:
    """Certify the test images of a run whose training is finished, or continue where an earlier call stopped.

    Verdicts for the run's own epsilon and arithmetic are in ``verdicts.jsonl``, others in
    ``verdicts/embedded-<epsilon>-<arithmetic>.jsonl``. Existing verdicts are kept; undecided images are tried again if
    the settings allow more.

    Args:
        path: the run's folder, or the run opened.
        images: ``"start:stop"`` or a range; None for all.
        epsilon: radius in pixel units; None for the run's.
        certify: stages and limits; None for the recipe's. Its ``images`` is ignored.
        total_timeout: seconds after which the call ends, even if images are left.
        device: device to compute on; None for the recipe's.
        plugins: modules or files whose classes the recipe may name, see docs/plugins.md.
    Raises:
        InputError: an argument cannot be used; nothing on disk was changed.
        Interrupted: SIGINT or SIGTERM; the same call continues.
    """
    load_plugins(plugins)
    check(total_timeout is None or 0 < total_timeout < math.inf, "total_timeout", total_timeout, "seconds > 0")
    run = Run.open(path)
    asked, own = run.config.perturbation, run.recorded.perturbation
    same = asked == own or (type(asked) is type(own) and asked == own.with_epsilon(float(asked.epsilon)))
    check(same, "perturbation", asked, f"{own}, the run's, or another size of it: a file of verdicts is about one kind")
    model = run.model()
    ball = run.config.perturbation if epsilon is None else run.config.perturbation.with_epsilon(float(epsilon))
    run = run.with_config(perturbation=ball, certify=certify or run.config.certify, device=device or run.config.device)
    run.config.certify.check_ball(ball)
    where = run.config.resolved_device()
    file = verdicts_of(run, run.config.certify.arithmetic)
    with reproducible(run.config.threads, where), StopRequest(at_once=True):
        dataset = run.dataset()
        if not quiet and (remark := ball.remark(dataset.shape)):
            console.print(remark)
        chosen = images_of(images, len(dataset.test))
        question = question_of(run, dataset.to(where), model.to(where), where)
        ledger = Ledger(file, run.folder.settings)
        records = ledger.ask(question, chosen, total_timeout=total_timeout, quiet=quiet)
    certificates = {}
    for arithmetic in get_args(Arithmetic):
        verdicts = {line["index"]: line["status"] for line in verdicts_of(run, arithmetic) if line["index"] in chosen}
        if verdicts:
            certificates[arithmetic] = list(verdicts.values()).count("verified"), len(verdicts)
    return Verification(file.path, float(ball.epsilon), chosen, records, certificates)


def verdicts_of(run: Run, arithmetic: Arithmetic) -> JsonLines:
    """The file of the verdicts for ``run.config``'s perturbation set; ``verdicts.jsonl`` for the recorded settings."""
    ball = run.config.perturbation
    if ball == run.recorded.perturbation and arithmetic == run.recorded.certify.arithmetic:
        return run.folder.verdicts
    return run.folder.other_verdicts(VERIFIER, float(ball.epsilon), arithmetic)


def question_of(run: Run, dataset: Dataset, model: nn.Module, device: torch.device) -> EmbeddedQuestion:
    """The question of ``run.config`` about the test split, for ``model`` with the weights in the folder. If these are
    exported, counterexamples must also be misclassified by onnxruntime.

    Raises:
        InputError: proofs are wanted, but the run is not exported, or the checker does not know its network.
    """
    config, network = run.config, run.exported_network()
    rests_on = {"weights": run.folder.weights_sha256(), "versions": versions(), "device": device_name(device)}
    replay = None if network is None else replay_session(load_onnx(network))
    proofs, certify = None, config.certify
    if certify.proofs:
        if network is None:
            path = run.folder.path
            raise InputError(
                f"certify.proofs: found no model.onnx of these weights; accepted: after certtrain export {path}"
            )
        folder = run.folder.proofs(float(config.perturbation.epsilon), certify.arithmetic)
        proofs = ImageProofs(Prover(network, certify.arithmetic), folder, dataset.checksum)
    return EmbeddedQuestion(
        model.eval(), dataset.test, dataset.classes, config.perturbation, certify, config.seed, rests_on, replay, proofs
    )
