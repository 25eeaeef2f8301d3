"""Who may import whom: floors, each standing on those below it, no arrow upwards, no circle; and how much."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DESIGN = ROOT.parent / "shared" / "design.md"
MODULES = ("models", "datasets", "utils")  # the three that stand beside the scripts
SCRIPTS = tuple(sorted(file.stem for file in ROOT.glob("*.py") if file.stem not in MODULES))
FLOORS = (  # from the ground up; those of one floor do not import each other, but for BESIDE
    ("utils", "metrics"),
    ("models",),
    ("captioning.command_line", "captioning.files"),
    ("captioning.data",),
    ("captioning.weights",),
    ("captioning.decoding",),
    ("captioning.captioners",),
    ("datasets",),
    ("captioning.folders", "captioning.report", "captioning.training"),
    tuple(script for script in SCRIPTS if script != "run_pipeline"),
    ("run_pipeline",),
)
BESIDE = {("captioning.files", "captioning.command_line"), ("captioning.report", "captioning.folders")}
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in [*ROOT.glob("*.py"), *(ROOT / "metrics").glob("*.py")]
} | {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in (ROOT / "captioning").rglob("*.py")
    if file.name != "__init__.py"
}


def imports(file: Path, at_the_top: bool = False, at_run_time: bool = False) -> set[str]:
    """What a file imports, also inside functions unless `at_the_top`; without those that
    are for type hints alone if `at_run_time`. The full names of the modules."""
    names, tree = set(), ast.parse(file.read_text(encoding="utf-8"))
    hints = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    hints = {id(node) for block in hints for node in ast.walk(block)} if at_run_time else ()
    for node in tree.body if at_the_top else ast.walk(tree):
        if id(node) in hints:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level or file.parent.name == "metrics", f"{file}: a relative import"
            module = ".".join(filter(None, ["metrics" if node.level else "", node.module]))
            below = {f"{module}.{alias.name}" for alias in node.names}
            names |= (below & FILES.keys()) or {module}
    return names


def part_of(module: str) -> str | None:
    """The part of the house that a module belongs to; None: not ours."""
    parts = module.split(".")
    return next((name for n in (2, 1) if (name := ".".join(parts[:n])) in FLOOR_OF), None)


def test_every_module_stands_on_a_floor():
    assert all(part_of(module) for module in FILES)


@pytest.mark.parametrize("module", sorted(FILES))
def test_no_import_points_upwards(module):
    part = part_of(module)
    for name in imports(FILES[module]):
        other = part_of(name)
        if other not in (None, part):
            lower = FLOOR_OF[other] < FLOOR_OF[part]
            assert lower or (part, other) in BESIDE, (
                f"{module} imports {name}, which stands above or beside it"
            )
        assert name.split(".")[0] not in ("tests", "benchmarks"), f"{module} imports {name}"


def test_the_model_and_the_metrics_stand_alone():
    """Whoever copies models.py has the model; whoever copies metrics/ has the scores."""
    standard = {"__future__", "collections.abc", "contextlib", "functools", "typing"}
    allowed = {*standard, "torch", "torch.nn", "torch.nn.functional", "torch.nn.utils.rnn", "torchvision"}
    assert imports(ROOT / "models.py") <= allowed
    for file in (ROOT / "metrics").glob("*.py"):
        assert "torch" not in imports(file), file.name


def test_no_module_needs_itself():
    needs = {module: imports(file, at_run_time=True) & FILES.keys() for module, file in FILES.items()}
    while needs:
        free = {name for name, needed in needs.items() if not needed & needs.keys() - {name}}
        assert free, f"these import each other: {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in free}


# --- lists of files -----------------------------------------------------------------------------------------


def block_below(heading: str, page: Path) -> list[str]:
    """The lines of the code in a section of a page, fenced or indented, up to what follows two spaces."""
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [section for section in sections if section.startswith(f"{heading}\n")]
    fenced = re.search(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = fenced[1].splitlines() if fenced else re.findall(r"^ {4}(.*)$", text, flags=re.MULTILINE)
    return [re.split(r"(?<=\S)  ", line)[0].rstrip() for line in lines]


def test_the_readme_lists_every_file():
    entries = block_below("How it is laid out", ROOT / "README.md")
    inside = [name for line in entries if line.startswith("  ") for name in line.strip().split(", ")]
    assert len(inside) == len(set(inside))
    in_front = {line for line in entries if not line.startswith(" ") and line.endswith((".py", ".ipynb"))}
    assert in_front == {file.name for pattern in ("*.py", "*.ipynb") for file in ROOT.glob(pattern)}
    folder = ROOT / "captioning"
    modules = {file.relative_to(folder).as_posix() for file in folder.rglob("*.py")}
    assert set(inside) == {name for name in modules if not name.endswith("__init__.py")}


@pytest.mark.skipif(not DESIGN.is_file(), reason="the plan of the layout is not here")
def test_the_plan_has_the_folders():
    entries = block_below("Files", DESIGN)
    in_front = {line for line in entries if line.endswith((".py", ".ipynb")) and not line.startswith(" ")}
    assert in_front == {file.name for pattern in ("*.py", "*.ipynb") for file in ROOT.glob(pattern)}
    inside = {line.strip() for line in entries if line.startswith("  ")}
    folder = ROOT / "captioning"
    assert inside == {file.name for file in folder.glob("*.py")} | {
        f"{file.parent.name}/" for file in folder.glob("*/__init__.py")
    }


def reached_modules(script: str, at_the_top: bool) -> dict[str, int]:
    """The modules of ours that a script imports, and those that these do, with their lines; itself too."""
    reached, waiting = {}, [script]
    while waiting:
        module = waiting.pop()
        name = module if module in FILES else f"{module}.__init__"  # of metrics
        if name in FILES and name not in reached:
            reached[name] = len(FILES[name].read_text(encoding="utf-8").splitlines())
            waiting += imports(FILES[name], at_the_top)
            waiting.append(name.partition(".")[0])  # a package comes with its modules
    return reached


def test_a_training_is_read_in_few_files(capsys):
    """Those that train.py imports at the top, these at theirs, and so on; inside functions it is more."""
    counts = []
    for at_the_top in (True, False):
        reached = reached_modules("train", at_the_top)
        counts.append((len(reached), sum(reached.values())))
    with capsys.disabled():
        (modules, lines), (modules_in_all, lines_in_all) = counts
        print(f"\ntrain.py reaches {modules} modules of {lines} lines by its imports at the top, "
              f"{modules_in_all} of {lines_in_all} with those inside functions")  # fmt: skip
    assert modules <= 28 and lines <= 5650


def test_few_files():
    assert len([*ROOT.glob("*.py")]) <= 14
    assert sum(name.startswith("captioning.") for name in FILES) <= 42


def test_short_files_and_functions():
    """A file of more than 450 lines, or a function of more than 60, hides something."""
    for file in ROOT.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "benchmarks").glob("*_speed.py")))
def test_what_a_benchmark_imports_is_there(script):
    command = [sys.executable, "-c", f"import {script}"]
    result = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
