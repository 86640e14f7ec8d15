"""The documentation as a site: `mkdocs build --strict` finds wrong links, anchors and pages that are not in the nav."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mechanic_pytorch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
UNLISTED = {"Mechanic.mechanic_config", "Mechanic.mechanic_tuner"}  # how it is made, not what it does

pytestmark = [
    pytest.mark.xdist_group("site"),  # one xdist worker: it is built once
    pytest.mark.skipif(
        not (DOCS / "step_cost.png").exists(), reason="a source distribution has no pictures, so links to them are dead"
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return target


def test_search_finds_every_page(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0].strip("/") for entry in index["docs"]}
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert found == pages - {"index"} | {"", "changes", "contributing"}


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("warmup", "recipes"),
        ("finetune", "recipes"),
        ("amp", "recipes"),
        ("huggingface", "huggingface"),
        ("kohya", "trainers"),
        ("axolotl", "trainers"),
        ("trl", "trainers"),
        ("hydra", "configuration"),
        ("changelog", "changes"),
        ("cite", "cite"),
        ("stuck", "troubleshooting"),
        ("optuna", "find-an-lr"),
        ("wandb", "watching"),
    ],
)
def test_search_finds_the_words_of_readers(site, word, page):
    """The search of the page looks for entries with a word that begins as what is typed."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    separator = re.compile(index["config"]["separator"])
    assert "stemmer" not in index["config"]["pipeline"], "then words are no longer found by their beginnings"
    found = set()
    for entry in index["docs"]:
        text = re.sub(r"<[^>]+>", " ", f"{entry['title']} {entry['text']}").lower()
        if any(token.strip(",.;'").startswith(word) for token in separator.split(text)):
            found.add(entry["location"].partition("#")[0].strip("/"))
    assert page in found


def test_formulas_are_mathml(site):
    """Which browsers set by themselves; no TeX is left over that the converter did not know."""
    for page in ("how-it-works", "safety", "numerics", "deviations"):
        written = (DOCS / f"{page}.md").read_text(encoding="utf-8").count("```math")
        built = (site / page / "index.html").read_text(encoding="utf-8")
        formulas = re.findall(r'<div class="formula">(.*?)</div>', built, flags=re.DOTALL)
        assert len(formulas) == written > 0
        assert all(text.startswith("<math") and "\\" not in text and "&amp;" not in text for text in formulas)


def test_pages_from_beside_docs_have_no_dead_link(site):
    for page, link in (("changes", None), ("contributing", "../design-notes/")):
        text = (site / page / "index.html").read_text(encoding="utf-8")
        article = re.search(r"<article.*?</article>", text, flags=re.DOTALL)[0]
        targets = re.findall(r'href="([^"#]+)', article)
        assert link is None or link in targets
        assert not [target for target in targets if target.endswith(".md") or target.startswith("docs/")]


def test_a_page_loads_nothing_from_elsewhere(site):
    """It can be read offline, and tells nobody who reads it. Links to elsewhere load nothing."""
    of_page = re.compile(r"<(?:(?:script|img|iframe|source)[^>]*\ssrc|link[^>]*\shref)=[\"']?([^\"'\s>]+)")
    of_style = re.compile(r"url\([\"']?([^)\"']+)")
    urls = {url for page in site.rglob("*.html") for url in of_page.findall(page.read_text(encoding="utf-8"))}
    urls |= {url for style in site.rglob("*.css") for url in of_style.findall(style.read_text(encoding="utf-8"))}
    assert any(url.endswith(".css") for url in urls)
    assert [url for url in urls if re.match(r"(?:[a-z]+:)?//", url)] == []


def test_the_api_page_has_every_public_name(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    named = {*mechanic_pytorch.__all__, "telemetry.read_out", "telemetry.ReadOut", "telemetry.Trace"}
    named |= {f"Mechanic.{name}" for name in vars(mechanic_pytorch.Mechanic) if name[0] != "_"} - UNLISTED
    for name in named:
        assert f'id="mechanic_pytorch.{name}"' in page, name


def test_what_a_function_returns_is_told_in_one_row(site):
    """Lines of a docstring that go on are no values of their own."""
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    tables = re.findall(r">Returns:<.*?</table>", page, flags=re.DOTALL)
    assert len(tables) > 1
    assert [table.count('"doc-section-item"') for table in tables] == [1] * len(tables)
