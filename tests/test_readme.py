"""The README is short, its figures are measured, its links work and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny import llama, prompt

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 120


def section(title: str) -> str:
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.parametrize("title", ["What it keeps", "How fast it is"])
def test_every_figure_of_the_readme_is_in_the_results(title):
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [line for line in section(title).splitlines() if line.startswith("| ") and "16-bit cache |" not in line]
    cells = [cell.strip() for row in rows[1:] for cell in row.strip("|").split("|")[1:]]
    figures = {figure for cell in cells for figure in re.findall(r"\d[\d.,]*x?", cell)}
    assert len(figures) > 8
    measured = set(re.findall(r"\d[\d.,]*x?", results))
    assert not {figure for figure in figures if figure.rstrip(".,") not in measured}


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


def test_pages_under_docs_link_to_pages_that_exist():
    broken = []
    for page in (ROOT / "docs").glob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_the_five_lines_of_python_run(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    program = code[1].replace("max_new_tokens=200", "max_new_tokens=2")
    names = {"model": llama(), "input_ids": prompt(90)}
    exec(program, names)
    assert names["tokens"].shape == (1, 92)  # type: ignore[attr-defined]
    assert "fast_bytes" in capsys.readouterr().out
