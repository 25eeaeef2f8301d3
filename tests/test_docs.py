"""README.md and docs/ say what the scripts do: settings, commands, links.

python -m tests.test_docs       # rewrite the tables of docs/settings.md from the scripts' settings
"""

import ast
import importlib
import inspect
import re
import shlex
import textwrap
import typing
from pathlib import Path

import pytest
from packaging.version import Version

import utils
from captioning import command_line
from captioning.decoding.options import DecodingOptions
from captioning.folders.plan import FolderOptions
from captioning.training.resume import TrainingSettings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
FOLDERS = ("captioning", "metrics")
SCRIPTS = sorted(file.stem for file in ROOT.glob("*.py") if "\n    run_script(" in file.read_text("utf-8"))


# --- settings tables ----------------------------------------------------------------------------------------


SHARED = {  # classes that settings are inherited from, and the heading of their table
    "A folder of images": FolderOptions,
    "Decoding": DecodingOptions,
    "Training": TrainingSettings,
}


def settings_table(settings_class: type, with_inherited: bool) -> list[str]:
    """The lines of a table of a class's settings: name, default, help text with the values that it may have.

    with_inherited: list what it inherits too; otherwise the last line says in which table that is.
    """
    comments, hints = command_line.read_field_comments(settings_class), typing.get_type_hints(settings_class)
    defaults, heading, lines = default_texts(settings_class), "", []
    for name, (own_heading, meaning) in comments.items():
        if not (with_inherited or name in settings_class.__annotations__):
            continue
        if own_heading != heading:
            lines.append(f"| **{own_heading}** | | |")
            heading = own_heading
        choices = [choice for hint in (hints[name], *typing.get_args(hints[name])) for choice in values(hint)]
        if choices:
            meaning += f" (one of {', '.join(f'`{choice}`' for choice in choices)})"
        meaning = re.sub(r"([|*])", r"\\\1", meaning).replace("<", "&lt;")
        lines.append(f"| `{name}` | {defaults[name]} | {meaning} |")
    links = [table_link(base) for base in settings_class.__bases__ if base is not object]
    if links and not with_inherited:
        lines.append(f"| **and those of** {', '.join(links)} | | |")
    return ["| setting | default | meaning |", "|---|---|---|", *lines]


def table_link(base: type) -> str:
    """A link to the table that has the settings of a shared class."""
    title = next(title for title, shared in SHARED.items() if issubclass(shared, base))
    return f"[{base.__name__}](#{anchor_of(title)})"


def values(hint) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def default_texts(settings_class: type) -> dict[str, str]:
    """Each setting's default as it is typed; what depends on the machine, as the source has it."""
    classes = [owner for owner in reversed(settings_class.__mro__) if owner is not object]
    trees = [ast.parse(textwrap.dedent(inspect.getsource(owner))) for owner in classes]
    nodes = [node for tree in trees for node in ast.walk(tree) if is_setting(node)]
    sources = {node.target.id: ast.unparse(node.value) for node in nodes}
    texts = {}
    for name, field in settings_class.__dataclass_fields__.items():
        if "cpu_count" in sources[name]:
            texts[name] = "number of CPU cores"
        elif field.default is None or field.default == ():
            texts[name] = "none"
        elif isinstance(field.default, tuple):
            texts[name] = f"`{','.join(map(str, field.default))}`"
        else:
            texts[name] = f"`{field.default}`" if field.default != "" else "empty"
    return texts


def is_setting(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None


def with_tables(page: str) -> str:
    """The page with the table below each heading `## SCRIPT.py` made from the script's settings, and those
    below the headings in SHARED."""
    sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)
    for i, section in enumerate(sections):
        heading = section.partition("\n")[0].removeprefix("## ")
        script = re.fullmatch(r"(\w+)\.py", heading)
        if script or heading in SHARED:
            settings_class = importlib.import_module(script[1]).Settings if script else SHARED[heading]
            table = "\n".join(settings_table(settings_class, heading in SHARED)) + "\n"
            head, *rest = re.split(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
            sections[i] = (head if rest else head.rstrip("\n") + "\n\n") + table + "".join(rest or ["\n"])
    return "".join(sections).rstrip("\n") + "\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_a_help_text(script):
    """It is found where the setting and its comment are on one line."""
    comments = command_line.read_field_comments(importlib.import_module(script).Settings)
    assert not [name for name, comment in comments.items() if not comment.text]


@pytest.mark.parametrize("script", SCRIPTS)
def test_more_than_a_dozen_settings_stand_under_headings(script):
    settings_class = importlib.import_module(script).Settings
    comments = command_line.read_field_comments(settings_class)
    own = [name for name in settings_class.__annotations__ if name in comments]
    assert len(own) <= 12 or all(comments[name].heading for name in own)


def test_a_setting_that_is_repeated_at_the_top_of_a_script_holds(tmp_path, monkeypatch):
    """Its default is the script's; without a comment of its own it keeps the shared class's help text."""
    source = (
        "class Settings(DecodingOptions):\n    # here\n    beam_size: int = 7  # wide\n    seed: int = 5\n"
    )
    (tmp_path / "repeating.py").write_text(
        "from dataclasses import dataclass\nfrom captioning.decoding.options import DecodingOptions\n\n\n"
        f"@dataclass\n{source}"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings_class = importlib.import_module("repeating").Settings
    comments = command_line.read_field_comments(settings_class)
    assert comments["beam_size"] == ("here", "wide") and comments["seed"].text == "of the samples"
    assert next(iter(comments)) == "beam_size" and set(comments) == {*settings_class.__dataclass_fields__}
    settings = command_line.parse_settings(settings_class, ["--min_length", "3"])
    assert (settings.beam_size, settings.seed, settings.min_length, settings.top_p) == (7, 5, 3, None)


def test_the_settings_page_has_a_table_of_every_script():
    headings = re.findall(r"^## (.+)$", SETTINGS_PAGE.read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(headings) == sorted([*SHARED, *(f"{script}.py" for script in SCRIPTS)])


def test_the_settings_tables_are_those_of_the_scripts():
    page = SETTINGS_PAGE.read_text("utf-8")
    assert page == with_tables(page), "run: python -m tests.test_docs"


# --- commands, links, lines ---------------------------------------------------------------------------------


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each command that starts one of our scripts in a page's blocks of code."""
    blocks = re.findall(r"^(?:    .*\n?)+|^```(?:sh|bash)\n.*?^```$", page, flags=re.MULTILINE | re.DOTALL)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if not re.match(r"(OMP_NUM_THREADS=\d+ )?(python|torchrun|accelerate|pip) ", line.strip()):
            continue
        for command in re.split(r" && |; ", line):
            words = shlex.split(command, comments=True)
            scripts = [i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
            found += [(words[i][:-3], words[i + 1 :]) for i in scripts[:1]]
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_commands_are_ones_that_the_scripts_take(page):
    for script, arguments in commands(page.read_text("utf-8")):
        settings_class = importlib.import_module(script).Settings
        try:
            command_line.parse_settings(settings_class, arguments)
        except utils.UserError as error:
            pytest.fail(f"{script}.py {shlex.join(arguments)}: {error}")


def test_commands_are_found():
    assert commands("Text.\n\n    python train.py --epochs 5   # more\n    python eval.py; python -V\n") == [
        ("train", ["--epochs", "5"]),
        ("eval", []),
    ]
    assert len(commands((ROOT / "README.md").read_text("utf-8"))) > 10


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), flags=re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{page.name}: {target}"


def anchor_of(heading: str) -> str:
    """The address that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- names --------------------------------------------------------------------------------------------------


def names_of(file: Path) -> set[str]:
    """What a module defines: `function`, `Class`, `CONSTANT`, `Class.method`, and `method` alone."""
    names = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        names |= defined_by(node)
        if isinstance(node, ast.ClassDef):
            inside = set().union(*map(defined_by, node.body))
            names |= inside | {f"{node.name}.{name}" for name in inside}
    return names


def defined_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """`name` in `file`, --setting in a script, files of ours, and dotted names of our modules."""
    text = page.read_text("utf-8")
    for names, file in re.findall(r"((?:`[\w.-]+`(?:, | and )?)+) in `([\w/]+\.py)`", text):
        for name in re.findall(r"`([\w.-]+)`", names):
            defined = names_of(ROOT / file)
            if name.startswith("--"):
                defined = {
                    f"--{field}" for field in importlib.import_module(file[:-3]).Settings.__dataclass_fields__
                }
            assert name in defined, f"{page.name}: `{name}` in `{file}`"
    for file in re.findall(r"`([\w/]+/\w+\.py|\w+\.py)`", text):
        assert (ROOT / file).is_file() or (page.parent / file).is_file(), f"{page.name}: `{file}`"
    for dotted in re.findall(rf"`((?:{'|'.join(FOLDERS)})\.[\w.]+)`", text):
        module, _, name = dotted.rpartition(".")
        assert hasattr(importlib.import_module(module), name), f"{page.name}: `{dotted}`"


def test_names_are_found():
    names = names_of(ROOT / "models.py")
    assert {"Encoder", "Attention", "ENCODERS", "Attention.forward"} <= names and "nothing" not in names


def test_the_oldest_versions_that_are_tried_are_those_that_are_promised():
    """Each requirement's floor, `numpy>=1.26`, is pinned as `numpy==1.26.0`."""
    promised, tried = [], []
    for file, operator, versions in (
        ("requirements.txt", ">=", promised),
        ("requirements-test.txt", ">=", promised),
        ("constraints-oldest.txt", "==", tried),
    ):
        for line in (ROOT / file).read_text("utf-8").splitlines():
            if requirement := line.partition("#")[0].strip():
                name, version = requirement.split(operator)
                versions.append((name, Version(version)))
    assert tried == promised


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_lines_are_short(page):
    lines = page.read_text("utf-8").splitlines()
    assert page != ROOT / "README.md" or len(lines) <= 200
    long = [number for number, line in enumerate(lines, 1) if len(line) > 120 and not line.startswith("|")]
    assert not long, f"{page.name}: lines {long}"


if __name__ == "__main__":
    text = SETTINGS_PAGE.read_text("utf-8")
    SETTINGS_PAGE.write_text(with_tables(text), "utf-8")
    print(f"{SETTINGS_PAGE.relative_to(ROOT)}: {'unchanged' if text == with_tables(text) else 'rewritten'}")
