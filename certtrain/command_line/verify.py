"""``verify``: verify a run's test images, or a VNN-LIB property of an ONNX network."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .query import answer_query, named_files
from .tables import agreement, say_where, stages
from .words import add_plugins, number, one_word_and_pairs, pairs

if TYPE_CHECKING:
    from ..recipe import Config
    from ..verifiers import Certify
    from ..workflows.run import Run
    from ..workflows.verify import Verification

SECONDS = "seconds > 0"
RUNS_ALONE = ("certify.enabled", "certify.images", "certify.attack", "certify.proofs")
"""Fields that say nothing to a property."""


def add(commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="certify the test images of a finished run, or answer VNN-LIB queries",
        usage="certtrain verify RUN_DIR [options]\n       certtrain verify QUERY.vnnlib --network NAME=FILE … "
        "[--timeout SECONDS] [options]\n       certtrain verify --onnx FILE --vnnlib FILE [--results FILE] "
        "[--json FILE] [options]\n       certtrain verify --instances CSV --results CSV [--json FILE] [options]\n"
        "       certtrain verify --check-abcrown",
        description="Certify the test images of a run whose training is finished. Verdicts are written the moment "
        "their batch is known; killed at any moment, the same call goes on. Decided images stay decided; undecided "
        "ones are tried again where the call offers more: another stage, more seconds. The run's own epsilon writes "
        "RUN_DIR/verdicts.jsonl, another one RUN_DIR/verdicts/embedded-EPSILON-ARITHMETIC.jsonl.",
        epilog="Fields of the recipe's certify section are given as --certify.field value, for example "
        "--certify.batch_size 64 --certify.search thorough --certify.search.candidates 4, for a run and for a "
        "property; what is not given is as the run's recipe says, or for a property as listed here.",
        allow_abbrev=False,
        add_help=False,
    )
    verify.add_argument("-h", "--help", action="store_true", help="show this, the presets, and a property's settings")
    verify.add_argument("--images", metavar="START:STOP", help="some of the test images (default: all)")
    verify.add_argument("--epsilon", metavar="E", help="another radius, in pixel units of [0, 1], such as 2/255; of "
                        "a sparse set another k")  # fmt: skip
    verify.add_argument("--timeout", metavar="SECONDS", help="of an image: its share of its batches' time")
    verify.add_argument("--total-timeout", metavar="SECONDS", help="stop after so long, whatever is left")
    verify.add_argument("--stages", metavar="A,B,…", help="some of ibp, crown_ibp, attack, crown, alpha, lirpa, "
                        "input_split, location, bab")  # fmt: skip
    verify.add_argument("--arithmetic", metavar="HOW", help="in which proofs hold: nearest, real or float32")
    verify.add_argument("--proofs", action="store_true", help="write a proof of each verified image, for certtrain "
                        "check; implies --arithmetic real unless float32 is asked for")  # fmt: skip
    verify.add_argument("--memory", metavar="SIZE", help="limit of the process' memory, such as 2GiB (default: what is "
                        "free)")  # fmt: skip
    verify.add_argument("--device", metavar="WHERE", help="auto, cpu, cuda")
    add_plugins(verify)
    verify.add_argument("--debug", action="store_true", help="show the traceback of an error")
    other = verify.add_argument_group("α-β-CROWN, which is installed apart (docs/abcrown.md)")
    other.add_argument("--verifier", default="embedded", choices=("embedded", "abcrown", "both"),
                       help="who verifies; both are compared, and a contradiction exits with code 1")  # fmt: skip
    other.add_argument("--abcrown-python", metavar="PATH", help="its interpreter (or CERTTRAIN_ABCROWN_PYTHON)")
    other.add_argument("--abcrown-home", metavar="DIR", help="its checkout (or CERTTRAIN_ABCROWN_HOME)")
    other.add_argument("--check-abcrown", action="store_true", help="say what is missing, and do nothing else")
    files = verify.add_argument_group("VNN-COMP: any network and property, in the network's own units")
    files.add_argument("--onnx", metavar="FILE", help="the network")
    files.add_argument("--vnnlib", metavar="FILE", help="the property; holds, violated, timeout, unknown is printed")
    files.add_argument("--instances", metavar="CSV", help="instead, a table of onnx,vnnlib,seconds")
    files.add_argument("--results", metavar="FILE", help="where answers are written, in VNN-COMP's form")
    files.add_argument(
        "--proof", metavar="FILE", help="where the proof that a property holds is written (docs/proofs.md)"
    )
    files.add_argument("--json", metavar="FILE", help="where answers are written with their times and counts, as JSON; "
                       "with --instances a line for each")  # fmt: skip
    query = verify.add_argument_group("a VNN-LIB query, as the standard's command line has it")
    query.add_argument("--network", dest="networks", metavar="NAME=FILE", action="append", default=[],
                       help="the ONNX file of a network that the query declares (repeatable); of a query about one "
                       "network FILE alone will do; sat, unsat, unknown or timed-out is printed")  # fmt: skip
    query.add_argument("--serialise-assignments", metavar="DIR", help="write the assignment behind sat there, a file "
                       "NAME.pb for each tensor, and not to stdout")  # fmt: skip
    verify.set_defaults(run=_verify, parser=verify)


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    started = perf_counter()
    options.go_on = "the same call"
    if options.help:
        return _help(options)
    if options.check_abcrown:
        return _check(options)
    if options.instances:
        return _instances(options, rest)
    if options.onnx or options.vnnlib:
        return _property(options, rest)
    if options.networks or options.serialise_assignments or _names_query(rest):
        return _query(options, rest, started)
    return _run(options, rest)


@contextlib.contextmanager
def _says_error() -> Iterator[None]:
    """Print ``error`` on stdout when an exception is raised: scripts read the answer there."""
    from ..errors import InputError

    try:
        yield
    except InputError:
        print("error")
        raise


def _help(options: argparse.Namespace) -> int:
    from ..config import flatten, unstructure
    from ..verifiers.search import PRESETS
    from ..verifiers.vnncomp import PROPERTY

    options.parser.print_help()
    print("\npresets of the search, and what they change; fields beside a preset win over it:")
    for name, changes in PRESETS.items():
        print(f"  --certify.search {name:10s} {', '.join(f'{key} {value}' for key, value in changes.items())}".rstrip())
    print("\nfields for --onnx and --instances, with their values:")
    for path, value in flatten({"certify": unstructure(PROPERTY)}).items():
        if _is_for_properties(path):
            print(f"  --{path} {value}")
    return 0


def _is_for_properties(path: str) -> bool:
    return path.startswith("certify.") and ".".join(path.split(".")[:2]) not in RUNS_ALONE


def _property_settings(options: argparse.Namespace, given: Mapping[str, str]) -> tuple[Certify, float | None]:
    """(settings, seconds): the settings of a property, and its timeout where one is given.

    Args:
        given: the options that argparse does not know.
    Raises:
        InputError: options about a run's images, which do not apply to a property; a bad value.
    """
    from ..components import load_plugins
    from ..config import override, structure, unstructure
    from ..errors import InputError
    from ..verifiers.settings import ROUNDINGS, Certify
    from ..verifiers.vnncomp import PROPERTY

    overrides = dict(given)
    about_runs = ("images", "epsilon", "total_timeout", "device", "abcrown_python", "abcrown_home")
    refused = [f"--{name.replace('_', '-')}" for name in about_runs if getattr(options, name) is not None]
    refused += ["--verifier"] if options.verifier != "embedded" else []
    refused += ["--proofs"] if options.proofs else []
    refused += ["--proof"] if options.proof is not None and options.instances else []
    refused += [f"--{name}" for name in overrides if not _is_for_properties(name)]
    if refused:
        accepted = "--timeout, --results, --json, --arithmetic, --stages, --memory, --plugin, --certify.field value"
        raise InputError(f"{refused[0]}: cannot be given here; accepted: {accepted}")
    if options.arithmetic not in (None, "nearest", *ROUNDINGS):
        raise InputError(f"--arithmetic: found {options.arithmetic!r}; accepted: nearest, real, float32")
    if options.arithmetic is not None:
        overrides["certify.arithmetic"] = options.arithmetic
    overrides |= _stages_and_memory(options)
    if options.timeout is not None:
        overrides["certify.timeout"] = str(number("--timeout", options.timeout, SECONDS))
    load_plugins(options.plugins)
    settings = structure(Certify, override({"certify": unstructure(PROPERTY)}, overrides)["certify"], "certify")
    return settings, settings.timeout if "certify.timeout" in overrides else None


def _stages_and_memory(options: argparse.Namespace) -> dict[str, str]:
    """``--stages`` and ``--memory``, where given, as fields of the recipe.

    Raises:
        InputError: no stage, or what is no size.
    """
    from ..bounds.memory import size_of
    from ..errors import InputError

    fields: dict[str, str] = {}
    if options.stages is not None:
        first, *more = options.stages.split(",")
        if not all(name.strip() for name in (first, *more[:-1])):  # a comma may end the list, as in YAML
            raise InputError(f"--stages: found {options.stages!r}; accepted: names of stages, such as ibp,crown,bab")
        fields["certify.stages"] = f"[{options.stages}]"
    if options.memory is not None:
        fields["certify.memory"] = str(size_of(options.memory, "--memory"))
    return fields


def _property(options: argparse.Namespace, rest: list[str]) -> int:
    with _says_error():
        from ..errors import InputError
        from ..verifiers.network_list import named_networks
        from ..verifiers.solving import solve

        _refuse_options_of_queries(options)
        settings, _ = _property_settings(options, pairs(rest))
        if not (options.onnx and options.vnnlib):
            raise InputError("found one file; accepted: --onnx FILE and --vnnlib FILE together")
        networks = named_networks(options.onnx, "--onnx")
        found = solve(
            options.vnnlib,
            networks,
            results=options.results,
            record=options.json,
            certify=settings,
            proof=options.proof,
        )
    if found.remark is not None:
        print(f"remark: {found.remark}", file=sys.stderr)
    if found.no_proof is not None:
        print(f"no proof: {found.no_proof}", file=sys.stderr)
    print(found)
    return 0


def _refuse_options_of_queries(options: argparse.Namespace) -> None:
    from ..errors import InputError

    for name, given in (("network", options.networks), ("serialise-assignments", options.serialise_assignments)):
        if given:
            raise InputError(f"--{name}: cannot be given here; accepted: with QUERY.vnnlib as a word of its own")


def _names_query(rest: list[str]) -> bool:
    """Whether the word that is no option is a query's file, and not a run's folder."""
    from ..errors import InputError

    try:
        path, _ = one_word_and_pairs("verify", rest)
    except InputError:
        return False
    return not path.is_dir() and (path.is_file() or path.name.endswith((".vnnlib", ".vnnlib.gz")))


def _query(options: argparse.Namespace, rest: list[str], started: float) -> int:
    from ..errors import InputError

    path, overrides = one_word_and_pairs("verify", rest, "query", "QUERY.vnnlib --network NAME=FILE")
    if path.is_dir():
        name = "network" if options.networks else "serialise-assignments"
        raise InputError(f"--{name}: found with {path}, a folder; accepted: with a query, a VNN-LIB file")
    networks = named_files(path, options.networks)
    with contextlib.redirect_stdout(sys.stderr):  # for the imports' own words, and plug-ins'
        settings, _ = _property_settings(options, overrides)
    return answer_query(
        path, networks, settings, started,
        results=options.results, record=options.json, assignments=options.serialise_assignments,
    )  # fmt: skip


def _instances(options: argparse.Namespace, rest: list[str]) -> int:
    with _says_error():
        from ..errors import InputError
        from ..training import StopRequest
        from ..verifiers.instances import run_instances

        _refuse_options_of_queries(options)
        settings, seconds = _property_settings(options, pairs(rest))
        if not options.results or options.onnx or options.vnnlib:
            raise InputError("--instances: accepted: --instances CSV and --results CSV, without --onnx and --vnnlib")
        with StopRequest(at_once=True):
            run_instances(
                options.instances, options.results, timeout=seconds, records=options.json, certify=settings,
                watch=lambda place, count, line: print(f"{place}/{count} {line}", flush=True),
            )  # fmt: skip
    return 0


def _check(options: argparse.Namespace) -> int:
    with _says_error():
        from ..errors import InputError
        from ..verifiers.abcrown import Abcrown

        abcrown = Abcrown.find(options.abcrown_python, options.abcrown_home)
        if missing := abcrown.missing():
            for line in missing[1:]:
                print(f"missing: {line}", file=sys.stderr)
            raise InputError(f"missing: {missing[0]}; accepted: what docs/abcrown.md installs")
    found = ", ".join(f"{name} {version}" for name, version in abcrown.versions().items())
    print(f"α-β-CROWN is ready: {abcrown.home} ({found})")
    return 0


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..config import override, structure, unstructure
    from ..errors import InputError
    from ..recipe import Config
    from ..workflows.run import Run

    path, overrides = one_word_and_pairs("verify", rest)
    for name in overrides:
        if not name.startswith("certify.") or name == "certify.images":
            raise InputError(f"--{name}: cannot be changed here; accepted: --certify.field value, see --help")
    if options.results or options.json:
        name = "results" if options.results else "json"
        raise InputError(f"--{name}: accepted with --onnx or --instances; a run's verdicts stand in its folder")
    if options.proof is not None:
        raise InputError("--proof: accepted with --onnx; a run's proofs are written with --proofs")
    ours = [*overrides, *(name for name in ("stages", "arithmetic", "memory") if getattr(options, name) is not None)]
    ours += ["proofs"] if options.proofs else []
    if options.verifier == "abcrown" and ours:
        with _says_error():
            raise InputError(f"--{ours[0]}: says nothing to α-β-CROWN; accepted: with --verifier embedded or both")
    load_plugins(options.plugins)
    run = Run.open(path)
    size = run.config.perturbation.size
    given = {
        f"perturbation.{size}": options.epsilon, "certify.timeout": options.timeout, "device": options.device,
        "certify.arithmetic": options.arithmetic,
    }  # fmt: skip
    overrides |= {name: value for name, value in given.items() if value is not None} | _stages_and_memory(options)
    if options.proofs:
        if options.arithmetic == "nearest":
            raise InputError(
                "--proofs: found --arithmetic nearest; accepted: real or float32, in which there are proofs"
            )
        overrides["certify.proofs"] = "true"
    config = structure(Config, override(unstructure(run.config), overrides))
    seconds = options.total_timeout
    limits = {
        "images": options.images, "epsilon": config.perturbation.epsilon, "device": config.device,
        "total_timeout": None if seconds is None else number("--total-timeout", seconds, SECONDS),
    }  # fmt: skip
    found = {}
    if options.verifier != "embedded":
        with _says_error():
            found["α-β-CROWN"] = _abcrown(options, run, config, limits)
    if options.verifier != "abcrown":
        found["embedded"] = _embedded(run, config, limits)
    return _compared(found["embedded"], found["α-β-CROWN"]) if len(found) > 1 else 0


def _embedded(run: Run, config: Config, limits: dict[str, Any]) -> Verification:
    from ..progress import console
    from ..workflows.verify import verify

    found = verify(run, certify=config.certify, **limits)
    size = config.perturbation.sized(found.epsilon)
    stages(found.records, f"{run.folder.path}: {len(found.records)} test images, {size}")
    if len(found.certificates) > 1:
        counts = (f"{arithmetic} {proved} of {total}" for arithmetic, (proved, total) in found.certificates.items())
        console.print(f"certificates by arithmetic: {', '.join(counts)}")
    say_where(found.file)
    return found


def _abcrown(options: argparse.Namespace, run: Run, config: Config, limits: dict[str, Any]) -> Verification:
    from ..verifiers.abcrown import Abcrown
    from ..workflows.verify_with_abcrown import verify_with_abcrown

    abcrown = Abcrown.find(options.abcrown_python, options.abcrown_home)
    found = verify_with_abcrown(run, abcrown, timeout=config.certify.timeout, **limits)
    images = f"{len(found.records)} test images by α-β-CROWN, epsilon {found.epsilon:.6g}"
    stages(found.records, f"{run.folder.path}: {images}")
    say_where(found.file)
    return found


def _compared(own: Verification, other: Verification) -> int:
    from ..workflows.verify_with_abcrown import agreement_between

    found = agreement_between(own.records, other.records)
    agreement(found, "embedded", "α-β-CROWN")
    if found.contradictions:
        print(
            f"CONTRADICTION: on the images {found.contradictions} one verifier proves what the other refutes; one of "
            f"them is wrong. Verdicts: {own.file}, {other.file}",
            file=sys.stderr,
        )
    return 1 if found.contradictions else 0
