"""``export``: write a finished run's files for other verifiers."""

from __future__ import annotations

import argparse

from .words import add_plugins, number, one_word_and_pairs


def add(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a finished run's files for other verifiers",
        usage="certtrain export RUN_DIR [options]",
        description="Write model.onnx, specs/NNNN.vnnlib, instances.csv, abcrown.yaml and SHA256SUMS into the folder "
        "of a run whose training is finished. onnxruntime compares the network with torch's; what an earlier export "
        "left is replaced.",
        allow_abbrev=False,
    )
    export.add_argument("--images", metavar="START:STOP", help="of which test images (default: as the recipe says)")
    export.add_argument("--epsilon", metavar="E", help="another radius, in pixel units of [0, 1], such as 2/255")
    export.add_argument("--timeout", metavar="SECONDS", help="that instances.csv asks for (default: the recipe's)")
    export.add_argument("--vnnlib-version", metavar="V", help="of the properties: 1.0, which α-β-CROWN reads, or 2.0 "
                        "(default: the recipe's)")  # fmt: skip
    add_plugins(export)
    export.add_argument("--debug", action="store_true", help="show the traceback of an error")
    export.set_defaults(run=_export, parser=export)


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..errors import InputError
    from ..progress import console
    from ..verifiers.vnnlib import VERSIONS
    from ..workflows.export import export
    from ..workflows.run import Run

    path, refused = one_word_and_pairs("export", rest)
    if refused:
        raise InputError(f"--{next(iter(refused))}: cannot be changed here; accepted: see --help")
    epsilon = None if options.epsilon is None else number("--epsilon", options.epsilon, "a radius >= 0")
    timeout = None if options.timeout is None else number("--timeout", options.timeout, "seconds > 0")
    version = options.vnnlib_version
    version = None if version is None else number("--vnnlib-version", version, "1.0 or 2.0")
    load_plugins(options.plugins)
    run = Run.open(path)
    found = export(run, images=options.images, epsilon=epsilon, timeout=timeout, vnnlib_version=version)
    folder = run.folder
    if not found["properties"]:
        console.print(f"checksums: {folder.sums}")
        return 0
    console.print(f"properties: {folder.instances}; checksums: {folder.sums}")
    if found["vnnlib_version"] != VERSIONS[0]:
        return 0  # α-β-CROWN reads the first version only
    console.print(f"α-β-CROWN: python abcrown.py --config {folder.abcrown.absolute()}, in its complete_verifier")
    return 0
