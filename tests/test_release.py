"""What a release is made of agrees with itself."""

import re
import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[1] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]


def test_supported_versions_are_those_that_are_tested():
    """The workflow runs others too, but only as experiments; constraints.txt pins the torch."""
    named = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.", name)}
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    assert set(job["strategy"]["matrix"]["python"]) == named
    assert job["strategy"]["matrix"]["experimental"] == [False]
    torch = re.search(r"^torch==(\d+\.\d+)", read("constraints.txt"), re.MULTILINE)[1]
    (statement,) = re.findall(r"\*\*Tested with\*\* Python ([\d., and]+?) and torch (\S+) on Linux", read("README.md"))
    assert (set(re.findall(r"\d\.\d+", statement[0])), statement[1]) == (named, torch)


def test_a_link_on_pypi_leads_somewhere():
    """The substitutions of pyproject.toml, which make the description there of the README."""
    hook = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = read("README.md")
    assert "![" in text
    assert "](docs/" in text
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets), targets
    assert "![" not in text
    assert "[How it was measured]" not in text
    assert "How it was measured" in text


def test_the_readme_is_short_and_begins_with_what_convinces():
    """Five lines of code, the picture, the table of peers and all links in one screen; the rest is in `docs/`."""
    lines = read("README.md").splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:34])
    assert "| Mechanic | Prodigy | Schedule-Free | D-Adaptation | Automagic" in first
    assert "](docs/demo.png)" in first
    assert (ROOT / "docs" / "demo.png").exists() or not (ROOT / "docs" / "step_cost.png").exists()  # an sdist has none
    assert len(re.search(r"```python\n(.*?)```", first, flags=re.DOTALL)[1].splitlines()) == 5
    assert {"scripts", "recipes", "troubleshooting", "compare"} <= set(re.findall(r"\]\(docs/([\w-]+)\.md\)", first))


def rows_of(text):
    """Return the table that compares features: the cells of its columns, by their heads, and those of a column."""
    table = re.search(r"^\| \| Mechanic \|.*\n(?:\|.*\n)+", text, re.MULTILINE)[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_each_cell_that_compares_features_has_a_source_and_the_readme_says_the_same():
    page = rows_of(read("docs/compare.md"))
    bare = [cell for row in page.values() for cell in row.values() if cell != "\N{EN DASH}" and "[" not in cell]
    assert bare == []
    for name, row in rows_of(read("README.md")).items():
        for peer, cell in row.items():
            assert re.sub(r"\[(.*?)\](?:\[.*?\]|\(.*?\))", r"\1", page[name][peer]) == cell, (name, peer)


def test_nothing_private_is_in_the_repository():
    """No path or mail address of a machine on which it was made."""
    private = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|mnt)/\w|[\w.]+@[\w-]+\.(?:com|org|net|io)\b")
    files = [path for path in ROOT.glob("*") if path.suffix in (".md", ".cff", ".toml", ".txt")]
    for folder in (".github", "benchmarks", "docs", "examples", "src", "tests", "tools"):
        files += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".md", ".py", ".yml", ".jsonl", ".toml", ".ipynb")
        ]
    assert len(files) > 50
    found = [f"{path}: {hit[0]}" for path in files for hit in private.finditer(path.read_text(encoding="utf-8"))]
    assert found == []
