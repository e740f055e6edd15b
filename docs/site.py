"""Hooks of the docs site (mkdocs.yml): pages outside docs/, and links that hold here and on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: file in the repository -> page of the site; README.md is the home page
OUTSIDE = {"README.md": "index.md"}
OUTSIDE |= {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
_BENCHMARKS = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*.[mp][dn]*")]
OUTSIDE |= {path: path for path in _BENCHMARKS}
_LINK = re.compile(r"(?P<text>!?\[[^\]\n]*\])\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files, config):
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    own = page.file.src_uri
    source = next((at for at, uri in OUTSIDE.items() if uri == own), f"docs/{own}")

    def rewrite(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        uri = OUTSIDE.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            uri = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
            return f"{link['text']}({uri}{link['anchor'] or ''})"
        if (ROOT / target).exists():  # of the code: not on the site
            return link["text"][1:-1]
        return link[0]  # mkdocs warns

    return _LINK.sub(rewrite, markdown)
