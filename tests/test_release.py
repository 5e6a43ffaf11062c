"""The package, the changelog and the citation name one version and one day."""

import re
from datetime import date
from pathlib import Path

import yaml

import certtrain

ROOT = Path(__file__).parents[1]


def sections() -> list[tuple[str, str]]:
    """``(version, date)`` of each section of the changelog, newest first."""
    return re.findall(r"^## \[([^\]]+)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


def test_package_changelog_and_citation_agree():
    (head, nothing), (version, day), *_ = sections()
    assert (head, nothing) == ("Unreleased", "")
    assert version == certtrain.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert citation["date-released"] == date.fromisoformat(day)


def test_versions_and_days_descend():
    released = sections()[1:]
    assert len(re.findall(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)) == 1 + len(released)
    numbers = [tuple(map(int, version.split("."))) for version, _ in released]
    days = [date.fromisoformat(day) for _, day in released]
    assert numbers == sorted(set(numbers), reverse=True) and all(len(number) == 3 for number in numbers)
    assert days == sorted(days, reverse=True)


def test_the_citation_has_what_version_1_2_0_of_its_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == [{"name": "certtrain contributors"}]
    assert citation["type"] == "software" and citation["license"] == "MIT"
