"""A hook of MkDocs: links of the pages to files of the repository lead to pages of the site.

The README becomes the first page. Files outside of ``docs/`` that a page links to are added under
``repository/``: Markdown as pages, whose links are followed in turn, sources as pages that show
them, folders as their README or a list of their files, and pictures and data as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = "docs"
FOLDER = "repository"
LISTING = "listing.md"
AS_THEY_ARE = (".csv", ".gif", ".jpg", ".json", ".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}

_FENCE = re.compile(r"^( *```.*?^ *```.*?$)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()(?![a-z]+:)([^)#\s]+)(#[^)\s]*)?(\))")
_DIRECTIVE = re.compile(r"^::: [\w.]+\.(\w+)$", flags=re.MULTILINE)


def links(text: str) -> Iterator[str]:
    """Yield the targets of the links between files, without those in blocks of code."""
    for part in _FENCE.split(text)[::2]:
        yield from (match[2] for match in _LINK.finditer(part))


def resolve(source: str, target: str) -> str:
    """Return the path in the repository to which a link of the file ``source`` leads."""
    return os.path.normpath(os.path.join(os.path.dirname(source), target))


def page_of(path: str) -> str:
    """Return the path in the site of a file or folder of the repository."""
    file = ROOT / path
    if file.is_dir():
        if (file / "README.md").is_file():
            return page_of(f"{path}/README.md")
        return f"{FOLDER}/{path}/{LISTING}"
    if path == "README.md":
        return "index.md"
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    if path.endswith((".md", *AS_THEY_ARE)):
        return f"{FOLDER}/{path}"
    return f"{FOLDER}/{path}.md"


def path_of(page: str) -> str:
    """Return the path in the repository of a Markdown page of the site."""
    if page == "index.md":
        return "README.md"
    if page.startswith(f"{FOLDER}/"):
        path = page.removeprefix(f"{FOLDER}/").removesuffix(f"/{LISTING}")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return f"{DOCS}/{page}"


def rewritten(text: str, path: str) -> str:
    """Return the text of the file ``path`` with links that lead to pages of the site."""
    here = os.path.dirname(page_of(path)) or "."

    def lead(match: re.Match[str]) -> str:
        target = os.path.relpath(page_of(resolve(path, match[2])), here)
        return f"{match[1]}{target}{match[3] or ''}{match[4]}"

    parts = _FENCE.split(text)
    parts[::2] = [_LINK.sub(lead, part) for part in parts[::2]]
    return "".join(parts)


def linked_files(roots: list[str]) -> set[str]:
    """Return ``roots`` and all that links lead to: files, and folders that have no README."""
    known: set[str] = set()
    waiting = [*roots]
    while waiting:
        path = waiting.pop()
        if path in known or not (ROOT / path).exists():  # MkDocs names what does not exist
            continue
        if (ROOT / path / "README.md").is_file():
            waiting.append(f"{path}/README.md")
            continue
        known.add(path)
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [resolve(path, target) for target in links(text)]
    return known


def shown(path: str) -> str:
    """Return the Markdown of a page that shows a source file, or lists the files of a folder."""
    file = ROOT / path
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    if file.is_dir():
        names = sorted(entry.name for entry in file.iterdir())
        kept = (name for name in names if name != "__pycache__" and not name.startswith("."))
        listing = "".join(f"- `{name}`\n" for name in kept)
        return f"{head}Files of this folder of the repository:\n\n{listing}"
    text = file.read_text(encoding="utf-8").rstrip()
    return f"{head}``````{LANGUAGES.get(file.suffix, 'text')}\n{text}\n``````\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the README and what pages link to outside of ``docs/``."""
    from mkdocs.structure.files import File

    roots = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    roots += [path_of(page) for page in _pages_in(config.nav)]
    for path in sorted(linked_files(roots)):
        file, uri = ROOT / path, page_of(path)
        if files.get_file_from_path(uri) is not None:
            continue
        if file.is_dir() or not path.endswith((".md", *AS_THEY_ARE)):
            files.append(File.generated(config, uri, content=shown(path)))
        else:
            files.append(File.generated(config, uri, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of a page lead to pages of the site, and public names be targets of links."""
    path = path_of(page.file.src_uri)
    return rewritten(with_public_names(markdown), path)


def with_public_names(text: str) -> str:
    """Return a page with an anchor at each directive of mkdocstrings: the name that users import.

    The directive names the module that defines an object. Its page is headed by the module that
    users import it from.
    """
    module = text.partition("\n")[0].removeprefix("# ")
    return _DIRECTIVE.sub(rf"[](){{#{module}.\1}}\n\n\g<0>", text)


def _pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        yield from (page for value in nav.values() for page in _pages_in(value))
    else:
        yield from (page for value in nav or () for page in _pages_in(value))
