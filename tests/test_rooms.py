"""The rooms of the library stand in one order, and what is in them keeps to a few rules of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "instrdiv"
#: A room imports itself and the rooms before it.
ROOMS = (
    *("runtime", "data", "tasks", "config", "models", "training", "evaluation", "analysis", "runs", "reports"),
    "launch",
)
LINES = 400
#: Files that have more lines today, each with why.
LONGER = {
    "tools/benchmark_lora.py": "one measurement with a contender per branch; run by hand, and nothing imports it",
}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(source: str, module: str = "instrdiv.room.module", is_package: bool = False) -> set[str]:
    """Full names that a module imports, wherever in it, ``import_module`` and relative imports included.

    Of ``from a import b`` both ``a`` and ``a.b``: b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def wrong_imports(room: str, names: set[str]) -> list[str]:
    """Of the names that a module of a room imports, those of later rooms and of what stands above the rooms."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    wrong = []
    for name in sorted(names):
        top, _, rest = name.partition(".")
        of_house = top == "instrdiv" and (not rest or rest.partition(".")[0] not in allowed)
        if of_house or top in ("experiments", "tools", "tests"):
            wrong.append(name)
    return wrong


def test_every_room_has_its_place_and_nothing_lies_outside():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]
    for folder in (path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))):
        assert (folder / "__init__.py").exists(), f"{named(folder)} is no package: setuptools would leave it out"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    wrong = {}
    for path in files(f"instrdiv/{room}"):
        module = named(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        names = wrong_imports(room, imported(path.read_text(), module, path.name == "__init__.py"))
        if names:
            wrong[named(path)] = names
    assert not wrong


def test_imports_of_every_kind_are_seen():
    """The check itself: inside functions, of a package, relative, by ``importlib``."""
    shown = {
        "import instrdiv.launch.flags": ["instrdiv.launch.flags"],
        "def f():\n    from instrdiv.launch import flags": ["instrdiv.launch", "instrdiv.launch.flags"],
        "from instrdiv import launch": ["instrdiv", "instrdiv.launch"],
        "import instrdiv": ["instrdiv"],
        "if True:\n    from ..launch.flags import start": ["instrdiv.launch.flags", "instrdiv.launch.flags.start"],
        "importlib.import_module('instrdiv.runs.run')": ["instrdiv.runs.run"],
        "from experiments import all": ["experiments", "experiments.all"],
        "from instrdiv.tasks.task import Task\nfrom instrdiv.runtime import files\nimport jax": [],
        "from . import jsonl\nfrom .strings import rules": [],
    }
    for source, wrong in shown.items():
        assert wrong_imports("tasks", imported(source, "instrdiv.tasks.module")) == wrong, source
    in_package = imported("from .rules import Rule\nfrom ..task import Task", "instrdiv.tasks.strings", True)
    assert {"instrdiv.tasks.strings.rules", "instrdiv.tasks.task"} <= in_package


@pytest.mark.parametrize("path", files("instrdiv", "experiments", "tools"), ids=named)
def test_a_module_says_what_it_is(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said, "no docstring"
    assert not any(word in said.upper() for word in ("TODO", "FIXME", "XXX")), said
    assert len(said.splitlines()[0]) > 20, said


def test_no_file_is_too_long():
    lengths = {named(path): len(path.read_text().splitlines()) for path in files("instrdiv", "experiments", "tools")}
    assert {name for name, lines in lengths.items() if lines > LINES} == set(LONGER)


def test_there_are_no_global_flags():
    """Commands run several to a process, each with flags of its own (``launch.flags``)."""
    found = []
    for path in files("instrdiv", "experiments"):
        for node in ast.walk(ast.parse(path.read_text())):
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if word == "FLAGS" or word.startswith("DEFINE_"):
                found.append(f"{named(path)}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "FLAGS" for alias in node.names):
                found.append(f"{named(path)}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and node.module == "absl" and {a.name for a in node.names} & {"app"}:
                found.append(f"{named(path)}:{node.lineno}: absl.app parses global flags")
    assert not found
