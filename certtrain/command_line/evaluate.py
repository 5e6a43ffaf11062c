"""``evaluate``: measure the accuracy of a finished run under attack."""

from __future__ import annotations

import argparse

from .tables import accuracies
from .words import add_plugins, one_word_and_pairs


def add(commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="attack the test images of a finished run",
        usage="certtrain evaluate RUN_DIR [options]",
        description="Clean accuracy, accuracy under attack and certified accuracy on the test images of a run "
        "whose training is finished, in one table: RUN_DIR/evaluation.json. What became of each image is written to "
        "RUN_DIR/evaluation/ the moment its batch is known; killed at any moment, the same call goes on.",
        epilog="Fields of the recipe's evaluate section are given as --evaluate.field value, for example "
        "--evaluate.batch_size 64; what is not given is as the run's recipe says.",
        allow_abbrev=False,
    )
    evaluate.add_argument("--attacks", metavar="A,B,…", help="pgd-STEPS, pgd-STEPS-RESTARTS, autoattack, "
                          "autoattack-cheap, such as pgd-50-10,autoattack; of a SparseBall sparse-autoattack, "
                          "sparse-autoattack-STEPS-QUERIES, spgd-u-STEPS, sparse-rs-QUERIES, …; of any set crown: what "
                          "linear relaxations prove (docs/evaluation.md)")  # fmt: skip
    evaluate.add_argument("--epsilons", metavar="E,F,…", help="radii in pixel units of [0, 1], such as 8/255,16/255; "
                          "of a SparseBall numbers k of units that may change, such as 10,20")  # fmt: skip
    evaluate.add_argument("--images", metavar="N or START:STOP", help="the first N test images, or some (default: all)")
    evaluate.add_argument("--checkpoints", metavar="A,B", help="last, best (default: those that there are)")
    evaluate.add_argument("--device", metavar="WHERE", help="auto, cpu, cuda")
    add_plugins(evaluate)
    evaluate.add_argument("--debug", action="store_true", help="show the traceback of an error")
    evaluate.set_defaults(run=_evaluate, parser=evaluate)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..config import override, structure, unstructure
    from ..errors import InputError
    from ..recipe import Config
    from ..workflows.evaluate import evaluate
    from ..workflows.run import Run

    options.go_on = "the same call"
    path, overrides = one_word_and_pairs("evaluate", rest)
    for name in overrides:
        if not name.startswith("evaluate.") or name == "evaluate.enabled":
            raise InputError(f"--{name}: cannot be changed here; accepted: --evaluate.field value, see --help")
    for name in ("attacks", "epsilons", "checkpoints"):
        if (words := getattr(options, name)) is not None:
            overrides[f"evaluate.{name}"] = f"[{words}]"
    load_plugins(options.plugins)
    run = Run.open(path)
    config = structure(Config, override(unstructure(run.config), overrides))
    images = options.images
    if images is not None and ":" not in images:
        if not (images.isascii() and images.isdigit()):
            raise InputError(f"--images: found {images!r}; accepted: N or START:STOP, such as 1000 or 0:1000")
        images = int(images)
    evaluate(run, settings=config.evaluate, images=images, device=options.device)
    accuracies(run.folder)
    return 0
