"""Command-line words outside argparse: fields of the recipe, plug-ins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from ..errors import InputError

        raise InputError(f"{message}; accepted: see {self.prog} --help")


def add_plugins(parser: argparse.ArgumentParser) -> None:
    help = "import classes of your own from a module or file (repeatable; docs/plugins.md)"
    parser.add_argument("--plugin", dest="plugins", action="append", default=[], metavar="MODULE", help=help)


def plugin_words(plugins: list[str]) -> list[str]:
    """Plug-ins as words of a call: ``["--plugin", "a", "--plugin", "b"]``."""
    return [word for plugin in plugins for word in ("--plugin", plugin)]


def one_word_and_pairs(
    command: str, words: list[str], what: str = "run folder", usage: str = "RUN_DIR, the folder of a finished run"
) -> tuple[Path, dict[str, str]]:
    """The only word that is neither an option nor its value, called ``what`` in messages, and the options."""
    from ..errors import InputError

    place = 0
    while place < len(words) and words[place].startswith("--"):
        place += 1 if "=" in words[place] else 2
    if place >= len(words):
        raise InputError(f"{command}: found no {what}; accepted: {command} {usage}")
    return Path(words[place]), pairs([*words[:place], *words[place + 1 :]])


def number(option: str, text: str, accepted: str) -> float:
    from ..config import parse_number
    from ..errors import InputError

    try:
        return parse_number(text)
    except ValueError as error:
        raise InputError(f"{option}: found {text!r}; accepted: {accepted}") from error


def pairs(words: list[str]) -> dict[str, str]:
    """Options as a mapping: ``["--loss.alpha", "0.02", "--seed=1"]`` → ``{"loss.alpha": "0.02", "seed": "1"}``."""
    from ..errors import InputError

    options: dict[str, str] = {}
    queue = list(words)
    while queue:
        name, joined, value = queue.pop(0).partition("=")
        if not name.startswith("--") or not name[2:]:
            raise InputError(f"{name!r}: found a stray word; accepted: --section.field value, see --help")
        if not joined:
            if not queue:
                raise InputError(f"{name}: found no value; accepted: {name} VALUE")
            value = queue.pop(0)
        options[name[2:]] = value
    return options
