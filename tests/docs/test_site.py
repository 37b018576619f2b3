"""The site's map and its links, without MkDocs: `make docs` builds what is checked here."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HOOK = SimpleNamespace(**runpy.run_path(str(DOCS / "site/repository.py")))


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions of packages that are not installed here."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
CONFIG: dict[str, Any] = yaml.load(
    (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader
)
NAV = [*HOOK._pages_in(CONFIG["nav"])]
OWN_PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))
LINKED = sorted(HOOK.linked_files([*OWN_PAGES, *map(HOOK.path_of, NAV)]))
PAGES = [path for path in LINKED if path.endswith(".md")]


def headings_of(path: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", read(path), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_the_nav_names_files_that_exist_each_once():
    assert [page for page in NAV if not (ROOT / HOOK.path_of(page)).is_file()] == []
    assert len(NAV) == len({*NAV})


def test_every_page_of_docs_is_in_the_nav():
    assert {*OWN_PAGES} - {*map(HOOK.path_of, NAV)} == set()


def test_links_of_all_pages_lead_somewhere():
    """Pages outside of docs/ that docs/ leads to included: the site has them too."""
    broken = [
        (path, target)
        for path in PAGES
        for target in HOOK.links(read(path))
        if not (ROOT / HOOK.resolve(path, target)).exists()
    ]
    assert broken == []


def test_links_to_headings_name_headings():
    broken = []
    for path in PAGES:
        for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#([^)\s]+)\)", read(path)):
            page = HOOK.resolve(path, target) if target else path
            if page.endswith(".md") and anchor not in headings_of(page):
                broken.append((path, f"{target}#{anchor}"))
    assert broken == []


def test_no_page_of_the_site_stands_for_two_files():
    pages = [*map(HOOK.page_of, LINKED)]
    assert len(pages) == len({*pages})


def test_pages_lead_back_to_their_files():
    assert len(PAGES) > 30
    for path in PAGES:
        assert HOOK.path_of(HOOK.page_of(path)) == path
    for path in ("tests/serving", "tokenflex/images.py", "Makefile"):
        assert HOOK.path_of(HOOK.page_of(path)) == path


@pytest.mark.parametrize(
    ("path", "link", "rewritten"),
    [
        ("README.md", "docs/kernels.md", "kernels.md"),
        ("README.md", "docs/results/demo/accuracy.png", "results/demo/accuracy.png"),
        ("README.md", "docs/training.md#data", "training.md#data"),
        ("README.md", "CONTRIBUTING.md", "repository/CONTRIBUTING.md"),
        ("docs/training.md", "../README.md", "index.md"),
        ("docs/training.md", "models.md#videos", "models.md#videos"),
        ("docs/training.md", "#data", "#data"),
        ("docs/training.md", "../configs/demo.yaml", "repository/configs/demo.yaml.md"),
        ("docs/serving/README.md", "../../README.md", "../index.md"),
        (
            "docs/ablation.md",
            "../experiments/ablation",
            "repository/experiments/ablation/listing.md",
        ),
        ("docs/models.md", "../experiments/speed", "repository/experiments/speed/README.md"),
        ("benchmarks/README.md", "../docs/kernels.md", "../../kernels.md"),
        ("docs/training.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
        ("docs/training.md", "mailto:a@b.c", "mailto:a@b.c"),
    ],
)
def test_links_lead_to_pages_of_the_site(path, link, rewritten):
    assert HOOK.rewritten(f"See [this]({link}).", path) == f"See [this]({rewritten})."


def test_links_in_code_stay_as_they_are():
    code = "```python\nx = a[0](../configs/demo.yaml)\n```\n"
    assert HOOK.rewritten(code, "docs/training.md") == code
    assert [*HOOK.links(code)] == []


def test_sources_are_shown_whole():
    shown = HOOK.shown("configs/demo.yaml")
    assert "``````yaml\n" + read("configs/demo.yaml").rstrip() in shown


def test_folders_list_their_files(tmp_path, monkeypatch):
    monkeypatch.setitem(HOOK.shown.__globals__, "ROOT", tmp_path)
    for name in ("folder/__init__.py", "folder/b.py", "folder/__pycache__/b.pyc", "folder/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert HOOK.shown("folder").endswith("repository:\n\n- `__init__.py`\n- `b.py`\n")


def test_the_readme_and_linked_files_are_added_to_the_site(monkeypatch):
    """With stand-ins for MkDocs: a file that is there already is not added again."""

    class Files(list):
        def get_file_from_path(self, uri):
            return next((file for file in self if file.src_uri == uri), None)

        def documentation_pages(self):
            return [file for file in self if file.src_uri.endswith(".md")]

    def generated(config, src_uri, *, content=None, abs_src_path=None):
        return SimpleNamespace(src_uri=src_uri, content=content, abs_src_path=abs_src_path)

    module = SimpleNamespace(File=SimpleNamespace(generated=generated))
    for name in ("mkdocs", "mkdocs.structure", "mkdocs.structure.files"):
        monkeypatch.setitem(sys.modules, name, module)
    own = Files(SimpleNamespace(src_uri=path.removeprefix("docs/")) for path in OWN_PAGES)
    files = HOOK.on_files(own, SimpleNamespace(nav=CONFIG["nav"]))
    added = {file.src_uri: file for file in files[len(OWN_PAGES) :]}
    assert added["index.md"].abs_src_path == str(ROOT / "README.md")
    assert "repository/CONTRIBUTING.md" in added
    assert added["repository/tokenflex/training/config.py.md"].content.startswith("---\n")
    uris = [file.src_uri for file in files]
    assert len(uris) == len({*uris})


def test_the_site_takes_no_address_that_is_not_there():
    """No public address of the repository exists; none may be made up."""
    assert not {"site_url", "repo_url", "edit_uri"} & CONFIG.keys()
    assert CONFIG["strict"] is True
    assert {*CONFIG["validation"].values()} == {"warn"}


def test_links_to_a_folder_lead_to_its_readme():
    linked = HOOK.linked_files(["experiments/speed"])
    assert "experiments/speed/README.md" in linked
    assert "experiments/speed" not in linked
    assert HOOK.linked_files(["experiments/ablation"]) == {"experiments/ablation"}


@pytest.mark.parametrize(
    ("docstring", "known", "shown"),
    [
        (
            "See :func:`plan_pooling`.",
            {"plan_pooling": "package.plan_pooling"},
            'See <autoref optional identifier="package.plan_pooling"><code>plan_pooling</code>'
            "</autoref>.",
        ),
        (
            "A :class:`~tokenflex.counts.TokenCounts`",
            {},
            'A <autoref optional identifier="tokenflex.counts.TokenCounts"><code>TokenCounts</code>'
            "</autoref>",
        ),
        ("``x`` and `y`: plain", {}, "``x`` and `y`: plain"),
        ("Sum.\n\nExample:\n    >>> 1", {}, "Sum.\n\nExamples:\n    >>> 1"),
        ("For Example: see", {}, "For Example: see"),
    ],
)
def test_docstrings_in_our_style_become_griffe_s(monkeypatch, docstring, known, shown):
    griffe = SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    roles = runpy.run_path(str(DOCS / "site/roles.py"))["Roles"]()
    thing = SimpleNamespace(docstring=SimpleNamespace(value=docstring), resolve=known.__getitem__)
    roles.on_object(obj=thing)
    assert thing.docstring.value == shown


def test_public_names_are_targets_of_links():
    page = "# package\n\nText.\n\n::: package.folder.module.name\n"
    anchored = "# package\n\nText.\n\n[](){#package.name}\n\n::: package.folder.module.name\n"
    assert HOOK.with_public_names(page) == anchored
    assert HOOK.with_public_names("# Other\n\n::: \n") == "# Other\n\n::: \n"
