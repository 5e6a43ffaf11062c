"""``diagnose``: measure the loss of a finished run around its images and weights."""

from __future__ import annotations

import argparse

from .words import add_plugins, number, one_word_and_pairs

SHOWN = {
    "gradient_alignment": "gradient alignment", "fgsm_pgd_cosine": "cosine of FGSM and PGD-10",
    "boundary_distortion": "boundary distortion", "qub_gap": "QUB - CE", "qub_centred_gap": "centred QUB - CE",
    "qub_distance": "|a - z|", "qub_curvature": "largest eigenvalue of CE's Hessian in z",
    "divergence": "R, TRADES' divergence", "overlap": "shared pixels of one-step and strong sPGD, of k",
    "overlap_chance": "the same of random pixels", "overlap_rs": "shared pixels of one-step sPGD and Sparse-RS, of k",
    "overlap_rs_chance": "the same of random pixels (Sparse-RS)", "gradient_gap": "gradients' gap, one step to many",
}  # fmt: skip


def add(commands) -> None:
    diagnose = commands.add_parser(
        "diagnose",
        help="measure and draw the loss of a finished run's network",
        usage="certtrain diagnose RUN_DIR [options]",
        epilog="Another perturbation set than the recipe's is given as --perturbation.field value, for example "
        "--perturbation.type SparseBall --perturbation.k 1.",
        description="Diagnose the network of a run whose training is finished, on training images, and write "
        "RUN_DIR/diagnostics.json and RUN_DIR/figures/*.png in place of what an earlier call left there. "
        "docs/diagnostics.md says what each number means.",
        allow_abbrev=False,
    )
    diagnose.add_argument("--checkpoint", metavar="WHICH", default="last", help="last or best")
    diagnose.add_argument("--images", metavar="N", default="1000", help="so many of the training images")
    diagnose.add_argument("--what", metavar="A,B,…", help="some of alignment, cosine, distortion, qub, split, "
                          "landscape, hessian, interpolation, overlap, adversarial_hessian, weight_landscape, "
                          "gradient_gap (default: all that know the perturbation set)")  # fmt: skip
    diagnose.add_argument("--top", metavar="N", default="10", help="eigenvalues of the weights' Hessian")
    diagnose.add_argument("--device", metavar="WHERE", help="auto, cpu, cuda")
    add_plugins(diagnose)
    diagnose.add_argument("--debug", action="store_true", help="show the traceback of an error")
    diagnose.set_defaults(run=_diagnose, parser=diagnose)


def _diagnose(options: argparse.Namespace, rest: list[str]) -> int:
    from ..bounds import sized
    from ..components import load_plugins
    from ..config import override, structure, unstructure
    from ..errors import InputError
    from ..progress import console
    from ..recipe import Config
    from ..workflows.diagnose import diagnose
    from ..workflows.run import Run

    options.go_on = "the same call"
    path, fields = one_word_and_pairs("diagnose", rest)
    for name in fields:
        if not name.startswith("perturbation."):
            raise InputError(f"--{name}: cannot be changed here; accepted: --perturbation.field value, see --help")
    load_plugins(options.plugins)
    run, perturbation = Run.open(path), None
    if fields:
        perturbation = structure(Config, override(unstructure(run.config), fields)).perturbation
    what = None if options.what is None else [word.strip() for word in options.what.split(",")]
    diagnosis = diagnose(
        run, checkpoint=options.checkpoint, images=_whole("--images", options.images), what=what,
        top=_whole("--top", options.top), perturbation=perturbation, device=options.device,
    )  # fmt: skip
    size = sized(diagnosis.content["perturbation"]["type"], diagnosis.content["epsilon"])
    _show(f"{path}: {diagnosis.content['images']} training images, {size}", diagnosis.content)
    console.print(f"all numbers: {diagnosis.file}")
    for figure in diagnosis.figures:
        console.print(f"figure: {figure}")
    return 0


def _whole(option: str, text: str) -> int:
    from ..errors import InputError

    accepted = "a whole number >= 1"
    value = number(option, text, accepted)
    if value != int(value) or value < 1:
        raise InputError(f"{option}: found {text!r}; accepted: {accepted}")
    return int(value)


def _show(title: str, content: dict) -> None:
    from rich.table import Table

    from ..progress import console

    table = Table(title=title)
    table.add_column("diagnostic")
    table.add_column("mean", justify="right")
    rows = [(words, content[name]) for name, words in SHOWN.items() if name in content]
    split, values = content.get("divergence_split", [None, None]), content.get("hessian_values", [])
    rows += [("R', split at I = 2, FAIT's", split[min(1, len(split) - 1)])] if "divergence_split" in content else []
    rows += [("largest eigenvalue of the weights' Hessian", values[0])] if values else []
    if values := content.get("adversarial_hessian_values", []):
        rows.append(("largest eigenvalue of the adversarial loss' Hessian", values[0]))
    shares, accuracies = content.get("interpolation_shares", []), content.get("interpolation_accuracies", [])
    rows += [(f"accuracy at {share:g} of one step's change", value) for share, value in zip(shares, accuracies)]
    for words, value in rows:
        table.add_row(words, "-" if value is None else f"{value:.4g}")
    if rows:
        console.print(table)
