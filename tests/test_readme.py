"""The README's Python works by paste."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_python_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = "\n".join(blocks)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "smoke" / "verdicts.jsonl").exists()


def test_the_scripts_and_recipes_it_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:scripts|configs)/[\w.]+\w", text):
        assert (ROOT / name).exists(), name
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert recipe.name in text
