"""The pages name what is there: a line for every module in docs/architecture.md; paths, names, and links that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Files of a reader's: any, and those that docs/extending.md shows.
NOT_OURS = {"FILE.py"} | set(
    re.findall(r"^# (\S+\.py)$", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
)


def test_architecture_has_one_line_for_every_module():
    package = ROOT / "instrdiv"
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    listed, room = [], ""
    for cell in re.findall(r"^\| `([^`]+)` \|", page.partition("## Where files are")[2], flags=re.MULTILINE):
        room = cell if cell.endswith("/") else room
        listed += [] if cell.endswith("/") else [room + cell]
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_file_that_a_page_names_exists(page):
    """From the root or from the package; a bare name may be any file's."""
    ours = [f"/{path.relative_to(ROOT).as_posix()}" for top in ("instrdiv", "experiments", "tests", "tools")
            for path in (ROOT / top).rglob("*.py")]  # fmt: skip
    named = set(re.findall(r"`([\w/.-]+\.py)`", page.read_text())) - NOT_OURS
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in ours)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_of_ours_can_be_imported(page):
    for name in set(re.findall(r"(?:from|import) (instrdiv(?:\.\w+)*)", page.read_text())):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
