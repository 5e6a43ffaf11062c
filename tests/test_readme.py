"""The README's Python works by paste."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def run(code: list[str], folder: Path) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    result = subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_python_examples_run(tmp_path):
    plain = [block for block in blocks() if "auto_LiRPA" not in block]
    assert len(plain) == 4
    run(plain, tmp_path)
    assert (tmp_path / "runs" / "smoke" / "verdicts.jsonl").exists()


@pytest.mark.lirpa
def test_the_kernels_run_inside_auto_lirpa(tmp_path):
    pytest.importorskip("auto_LiRPA", reason="needs auto_LiRPA 0.7 or later (from its git)")
    plain = [block for block in blocks() if "auto_LiRPA" not in block]
    (rival,) = [block for block in blocks() if "auto_LiRPA" in block]
    check = """
ours = lower, upper
from auto_LiRPA import unregister_custom_op
unregister_custom_op("onnx::Conv")
register_custom_op("onnx::Conv", BoundConv)
bounded = BoundedModule(model, images)
assert not any(isinstance(node, KernelConv) for node in bounded.nodes())
torch.testing.assert_close(ours, bounded.compute_bounds(x=(box,), method="IBP"))
"""
    run([*plain, rival, "assert any(isinstance(node, KernelConv) for node in bounded.nodes())", check], tmp_path)


def test_the_scripts_and_recipes_it_names_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"(?:scripts|configs)/[\w.]+\w", text):
        assert (ROOT / name).exists(), name
    text += (ROOT / "docs" / "recipes.md").read_text()
    for recipe in (ROOT / "configs").glob("*.yaml"):
        assert recipe.name in text
