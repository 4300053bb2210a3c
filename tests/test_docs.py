"""The documents: lines that can be read, and nothing named in them that is not there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/README.md"]
FOLDERS = "lpl_jax|docs|tests|configs|benchmarks|scripts|requirements"
CLASS_NAME_IN_FILES = "lpl_jax.MMDiT"  # written into weights, and no Python name

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def targets(text):
    """What a document links to or shows: of links, images and <picture>."""
    return [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'(?:src|srcset|href)="([^"]+)"', text)]


def anchors(document):
    """The anchors that GitHub gives to the headings of a document."""
    outside_code = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", outside_code, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolves(name):
    """Whether a dotted name is a module or something in one."""
    module, found = importlib.import_module("lpl_jax"), "lpl_jax"
    for part in name.split(".")[1:]:
        found += f".{part}"
        if not hasattr(module, part):
            try:
                importlib.import_module(found)
            except ImportError:
                return False
        module = getattr(module, part)
    return True


@each_document
def test_no_line_but_a_table_row_is_longer_than_120(document):
    lines = enumerate(document.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_readme_has_fewer_than_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@each_document
def test_links_lead_somewhere(document):
    missing = []
    for target in targets(document.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = document.parent / path if path else document
        if not found.exists() or (anchor and anchor not in anchors(found)):
            missing.append(target)
    assert missing == []


@each_document
def test_files_that_are_named_exist(document):
    named = re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]*", document.read_text())
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists()] == []


@each_document
def test_names_of_the_package_exist(document):
    named = set(re.findall(r"(?<![\w./-])lpl_jax(?:\.[A-Za-z_]\w*)+", document.read_text())) - {CLASS_NAME_IN_FILES}
    assert {name for name in named if not resolves(name)} == set()


def test_every_figure_is_shown():
    shown = {(document.parent / target).resolve() for document in DOCUMENTS for target in targets(document.read_text())}
    assert [figure for figure in (ROOT / "docs").rglob("*.png") if figure.resolve() not in shown] == []


def test_the_contents_list_every_document():
    listed = targets((ROOT / "docs/README.md").read_text())
    pages = {document.name for document in DOCUMENTS if document.parent.name == "docs"} - {"README.md"}
    assert pages - set(listed) == set()


@pytest.mark.slow
def test_the_loss_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    names = {}
    exec(next(code for code in blocks if "latent_perceptual_loss" in code), names)
    assert names["gradient"].shape == names["clean"].shape
    assert names["value"] > 0
