"""``check``: check the proofs of a run with the independent checker."""

from __future__ import annotations

import argparse

from .tables import proofs
from .words import add_plugins, number, one_word_and_pairs


def add(commands) -> None:
    check = commands.add_parser(
        "check",
        help="check the proofs of a run's certificates with a program that shares nothing with the verifier",
        usage="certtrain check RUN_DIR [options]",
        description="Check every proof that certtrain verify RUN_DIR --proofs wrote, with certtrain.checker (numpy, "
        "onnx and safetensors alone; docs/proofs.md), against the images' own boxes and labels. What became of each is "
        "in checked.jsonl beside the proofs; killed at any moment, the same call goes on. Exit code 1: a rejection.",
        allow_abbrev=False,
    )
    check.add_argument("--images", metavar="START:STOP", help="some of the test images (default: all)")
    check.add_argument("--epsilon", metavar="E", help="another radius than the run's, such as 2/255")
    check.add_argument("--arithmetic", metavar="HOW", help="real or float32 (default: the recipe's, or real)")
    check.add_argument("--processes", metavar="N", help="at the same time (default: one for each processor)")
    add_plugins(check)
    check.add_argument("--debug", action="store_true", help="show the traceback of an error")
    check.set_defaults(run=_check, parser=check)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..config import override, structure, unstructure
    from ..errors import InputError
    from ..recipe import Config
    from ..workflows.check import check
    from ..workflows.run import Run

    options.go_on = "the same call"
    path, overrides = one_word_and_pairs("check", rest)
    if overrides:
        raise InputError(f"--{next(iter(overrides))}: cannot be changed here; accepted: what --help lists")
    load_plugins(options.plugins)
    run = Run.open(path)
    if options.epsilon is not None:
        given = {f"perturbation.{run.config.perturbation.size}": options.epsilon}
        epsilon = structure(Config, override(unstructure(run.config), given)).perturbation.epsilon
    else:
        epsilon = None
    count = None if options.processes is None else number("--processes", options.processes, "a whole number >= 1")
    found = check(
        run, images=options.images, epsilon=None if epsilon is None else float(epsilon),
        arithmetic=options.arithmetic, processes=None if count is None else int(count),
    )  # fmt: skip
    proofs(found)
    return 1 if found.rejected else 0
