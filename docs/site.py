"""Hooks of the docs site (mkdocs.yml): pages outside docs/, and links that hold in the repository too."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/*.md", "benchmarks/*.png")
#: file in the repository -> page of the site; README.md is the home page
PAGES = {"README.md": "index.md"} | {
    name: name
    for pattern in _OUTSIDE
    for name in sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))
}
_LINK = re.compile(r"(?P<text>!?\[[^\]\n]*\])\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = next((source for source, uri in PAGES.items() if uri == here), f"docs/{here}")

    def rewrite(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        uri = PAGES.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            uri = posixpath.relpath(uri, posixpath.dirname(here) or ".")
            return f"{link['text']}({uri}{link['anchor'] or ''})"
        if (ROOT / target).exists():  # code, which the site does not have
            return link["text"][1:-1]
        return link[0]  # mkdocs warns of it

    return _LINK.sub(rewrite, markdown)
