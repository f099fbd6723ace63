"""The pages: links lead somewhere, commands that they name exist."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".git", "logs", ".pytest_cache", "corpus"} & set(path.relative_to(ROOT).parts)
)


def anchors(page: Path) -> set[str]:
    """The fragments that the code host gives to a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        if fragment:
            assert fragment in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    """`python -m data.text` and `python tests/x.py` name files of the project."""
    text = page.read_text()
    for module in re.findall(r"python -m ((?:data|evals|records|tests)(?:\.\w+)+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page}: python -m {module}"
    for script in re.findall(r"python ((?:data|evals|records|tests)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{page}: python {script}"


def test_the_front_page_is_short():
    words = len((ROOT / "README.md").read_text().split())
    assert words < 900, words
