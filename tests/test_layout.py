"""Who may import whom: six floors, each standing on those below it, and no circle."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("models", "datasets", "utils")  # the three that stand beside the scripts
SCRIPTS = tuple(sorted(file.stem for file in ROOT.glob("*.py") if file.stem not in MODULES))


def imports(file: Path) -> set[str]:
    """What a file imports, also inside functions: the first part of each module's name."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def ours(file: Path) -> set[str]:
    return imports(file) & {*MODULES, *SCRIPTS, "captioning", "metrics", "tests", "benchmarks"}


def test_no_import_points_upwards():
    assert not ours(ROOT / "utils.py")
    assert all(not ours(file) for file in (ROOT / "metrics").glob("*.py"))
    assert ours(ROOT / "models.py") <= {"utils"}
    for file in (ROOT / "captioning").glob("*.py"):
        assert ours(file) <= {"captioning", "models", "metrics", "utils"}, file.name
    assert ours(ROOT / "datasets.py") <= {"captioning", "models", "metrics", "utils"}
    for script in SCRIPTS:
        others = ours(ROOT / f"{script}.py") & {*SCRIPTS, "tests", "benchmarks"}
        assert not others or script == "run_pipeline", f"{script}.py imports {others}"


def test_the_model_and_the_metrics_stand_alone():
    """Whoever copies models.py has the model; whoever copies metrics/ has the scores."""
    standard = {"__future__", "collections", "functools", "typing"}
    assert imports(ROOT / "models.py") <= {*standard, "torch", "torchvision", "utils"}
    assert len((ROOT / "models.py").read_text(encoding="utf-8").splitlines()) < 250
    for file in (ROOT / "metrics").glob("*.py"):
        assert "torch" not in imports(file), file.name


def test_captioning_has_no_circle():
    modules = {file.stem: file for file in (ROOT / "captioning").glob("*.py")}
    needs = {}
    for name, file in modules.items():
        needs[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captioning"):
                parts = node.module.split(".")
                needs[name] |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    while needs:
        free = {name for name, needed in needs.items() if not needed & set(needs)}
        assert free, f"these import each other: {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in free}


def test_few_files_in_front():
    assert len([*ROOT.glob("*.py")]) <= 14


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "benchmarks").glob("*_speed.py")))
def test_what_a_benchmark_imports_is_there(script):
    command = [sys.executable, "-c", f"import {script}"]
    result = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
