"""What README.md and docs/ show works by paste, and what they name exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from certtrain.command_line import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def section(title: str) -> str:
    """The text under one of the README's headings."""
    return re.split(r"^## ", (ROOT / "README.md").read_text().split(f"## {title}\n")[1], flags=re.M)[0]


def execute(code: list[str], folder: Path) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    result = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_python_examples_run(tmp_path):
    """One after the other: the pages go on with what the README's block has made."""
    (first,) = blocks("README.md")
    pages = [block for name in ("python", "verification", "sparse") for block in blocks(f"docs/{name}.md")]
    assert len(pages) == 3
    execute([first, *pages], tmp_path)
    assert (tmp_path / "runs" / "smoke" / "verdicts.jsonl").exists()


def test_the_kernels_examples_run(tmp_path):
    plain = [block for block in blocks("docs/kernels.md") if "auto_LiRPA" not in block]
    assert len(plain) == 3
    execute(plain, tmp_path)


@pytest.mark.lirpa
def test_the_kernels_run_inside_auto_lirpa(tmp_path):
    pytest.importorskip("auto_LiRPA", reason="needs auto_LiRPA 0.7 or later (from its git)")
    plain = [block for block in blocks("docs/kernels.md") if "auto_LiRPA" not in block]
    (rival,) = [block for block in blocks("docs/kernels.md") if "auto_LiRPA" in block]
    check = """
ours = lower, upper
from auto_LiRPA import unregister_custom_op
unregister_custom_op("onnx::Conv")
register_custom_op("onnx::Conv", BoundConv)
bounded = BoundedModule(model, images)
assert not any(isinstance(node, KernelConv) for node in bounded.nodes())
torch.testing.assert_close(ours, bounded.compute_bounds(x=(box,), method="IBP"))
"""
    execute([*plain, rival, "assert any(isinstance(node, KernelConv) for node in bounded.nodes())", check], tmp_path)


def test_the_commands_run(run, tmp_path, monkeypatch, capsys):
    """All but the training, which the shared run has behind it, and the help."""
    calls = [shlex.split(line, comments=True)[1:] for line in section("Commands").splitlines() if line.startswith("  ")]
    train, *others, help = calls
    assert train == ["scripts/train.py", "--config", "configs/smoke.yaml", "--out", "runs/first"]
    assert help == ["scripts/train.py", "--help"]
    shutil.move(run, tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    for script, *words in others:
        assert main([Path(script).stem, *words]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] in ("holds", "violated", "unsat", "sat")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https:"):
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), target
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    kinds = r"(?<![\w/.])(?:scripts|configs|tests|docs|certtrain|kernels|verifiers)/[\w./]+\.(?:py|yaml|md)\b"
    for name in re.findall(kinds, page.read_text()):
        assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in text] == []


def test_recipes_are_listed():
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert [recipe.name for recipe in (ROOT / "configs").glob("*.yaml") if recipe.name not in text] == []
