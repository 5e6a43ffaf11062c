"""``import-checkpoint``: import a network trained elsewhere as a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .words import add_plugins, one_word_and_pairs

SECTIONS = ("data", "model", "perturbation", "certify", "export")
FIELDS = ("name", "seed", "device", "threads")
USAGE = "FILE --architecture NAME --data SET --epsilon E"


def add(commands) -> None:
    parser = commands.add_parser(
        "import-checkpoint",
        help="make a network that somebody else trained a run",
        usage=f"certtrain import-checkpoint {USAGE} [options]",
        description="Read the state dict of a network that other people's code trained, without running code of "
        "theirs, and write a run folder that verify and export take. Layers are matched by kind, order and shape; "
        "run.json says under `imported` what was found and how closely the logits agree.",
        epilog="Fields of the recipe are given as --section.field value, for example --model.width 128, "
        "--model.batch_norm false, --data.root data, --certify.timeout 60.",
        allow_abbrev=False,
    )
    parser.add_argument("--architecture", metavar="NAME", help="cnn7, cnn5, cnn3, gowal, smallcnn or mlp")
    parser.add_argument("--data", metavar="SET", help="the images that it was trained for, such as Cifar10")
    parser.add_argument("--epsilon", metavar="E", help="that it was trained for, in pixel units, such as 2/255")
    parser.add_argument("--mean", metavar="A,B,C", help="of a normalisation outside the network (default: published)")
    parser.add_argument("--std", metavar="A,B,C", help="likewise; --mean 0 --std 1 is none")
    parser.add_argument("--class-order", metavar="ORDER", default="numbers", choices=("numbers", "text"),
                        help="of outputs; text: 0, 1, 10, 100, … (expressive-losses on ImageNet64)")  # fmt: skip
    parser.add_argument("--order", metavar="A,B,C", default="",
                        help="the file's layers in the order of use, where names and shapes leave it open")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: a new one under runs/)")
    add_plugins(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=_import, parser=parser)


def _import(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..config import override, structure
    from ..data import Source
    from ..errors import InputError
    from ..importing.matching import KNOWN, known_architecture
    from ..recipe import Config
    from ..workflows.import_checkpoint import import_checkpoint

    file, overrides = one_word_and_pairs("import-checkpoint", rest, "file", USAGE)
    for name in overrides:
        section, _, field = name.partition(".")
        if (section not in SECTIONS if field else name not in FIELDS) or name in ("data.type", "model.type"):
            raise InputError(f"--{name}: cannot be given here; accepted: see import-checkpoint --help")
    load_plugins(options.plugins)
    sets = {name.lower(): name for name in Source.members()}
    names = ", ".join(kind.__name__ for kind in KNOWN.values())
    required = (("architecture", names), ("data", ", ".join(sets.values())), ("epsilon", "a radius, such as 2/255"))
    for name, accepted in required:
        if getattr(options, name) is None:
            raise InputError(f"--{name}: must be given; accepted: {accepted}")
    if options.data.lower() not in sets:
        raise InputError(f"--data: found {options.data!r}; accepted: {', '.join(sets.values())}")
    kind, data = known_architecture(options.architecture).__name__, sets[options.data.lower()]
    given = {"model.type": kind, "data.type": data, "perturbation.epsilon": options.epsilon,
             "name": f"imported_{kind.lower()}_{data.lower()}"}  # fmt: skip
    for name in ("mean", "std"):
        if getattr(options, name) is not None:
            given[f"model.{name}"] = f"[{getattr(options, name).strip('[]')}]"
    config = structure(Config, override({}, {**given, **overrides}))
    order = options.order.split(",") if options.order else ()
    import_checkpoint(file, config, options.out, class_order=options.class_order, order=order)
    return 0
