"""The pages about the structure mention what exists, and no file name stands for two things."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specache"
PAGES = ["docs/structure.md", "CONTRIBUTING.md"]
PATH = re.compile(r"`((?:[\w.]+/)+|(?:[\w.]+/)*\w+\.(?:py|cpp|hpp|toml|md))`(?:: `([\w.]+)`((?:, `[\w.]+`)*))?")
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
SAME_ROLE = {"__init__", "__main__", "base", "task", "conftest"}  # one per package, for the same thing in each


def mentioned(page: str) -> list[tuple[str, list[str]]]:
    found = []
    for path, first, more in PATH.findall((ROOT / page).read_text()):
        found.append((path, [name for name in [first, *re.findall(r"`([\w.]+)`", more)] if name]))
    return found


def names_in(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | _FUNCTIONS):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, _FUNCTIONS)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_name_that_a_page_mentions_exists(page):
    found = mentioned(page)
    assert len(found) > 10
    for path, names in found:
        places = [place for place in (ROOT / path, PACKAGE / path) if place.exists()]
        assert places, f"{page} mentions {path}, which does not exist"
        if names:
            missing = set(names) - names_in(places[-1])
            assert not missing, f"{page} mentions {missing} of {path}"


def test_structure_names_every_package_and_no_other():
    packages = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    table = re.findall(r"^\| `(\w+/)` \|", (ROOT / "docs/structure.md").read_text(), re.MULTILINE)
    assert set(table) == packages


def test_no_file_name_stands_for_two_things():
    """A command may have the name of what it runs (cli/plan.py and planning/plan.py), and a module
    may be importable from its former place.
    """
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if path.stem not in SAME_ROLE and path.parent.name != "cli" and "The former place of" not in path.read_text():
            places[path.stem].append(str(path.relative_to(PACKAGE)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
