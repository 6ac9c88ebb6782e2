"""Build the documentation's site: gather the pages, make the reference from the code, and run the generator strictly.

    python docs/site/build.py        # or: make docs

The pages are README's own, docs/*.md, so that they can be read on a code host too. Here they are copied into one
folder, where links to the repository's other files lead to copies of these. A broken link or anchor, and a page that
the navigation leaves out, end the build with an error. The site of a version is written to ``site/VERSION/``; those of
other versions beside it stay, and the site's selector offers all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "docs" / "site"
WORK = ROOT / "build" / "site"
#: Pages that are not in docs/, and their names in the site.
ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/golden/losses/README.md": "golden_losses.md",
}
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.S | re.M)
_MARK = re.compile(r"^ *<!--.*?-->\n", re.M)


class SiteError(Exception):
    """The documentation is not consistent; the message names page and link."""


def pages() -> dict[Path, str]:
    """Return the pages and their names in the site."""
    found = {page: page.name for page in sorted((ROOT / "docs").glob("*.md"))}
    return found | {ROOT / path: name for path, name in ELSEWHERE.items()}


def gather(folder: Path, reference: Mapping[str, str]) -> None:
    """Write all pages into a folder, with what they link to.

    Args:
        folder: the site's pages.
        reference: the pages made from the code, as if they were in ``docs/reference``.
    """
    texts = {page: page.read_text("utf-8") for page in pages()}
    names = pages()
    for name, text in reference.items():
        made = ROOT / "docs" / "reference" / name
        texts[made], names[made] = text, f"reference/{name}"
    for page, text in texts.items():
        out = folder / names[page]
        out.parent.mkdir(exist_ok=True)
        out.write_text(_MARK.sub("", mended(text, page, names, folder)), "utf-8")


def mended(text: str, page: Path, names: Mapping[Path, str], folder: Path) -> str:
    """Return a page's text with links that lead to the same files in the site.

    Args:
        text: of the page.
        page: where it is in the repository.
        names: the pages and their names in the site.
        folder: the site's pages; files that are linked to are copied here, under ``files``.

    Raises:
        SiteError: a link leads to nothing, or to a folder.
    """
    up = "../" * names[page].count("/")

    def target_of(match: re.Match[str]) -> str:
        link, _, anchor = match[1].partition("#")
        if not link or re.match(r"\w+:", link):
            return match[0]
        file = Path(os.path.normpath(page.parent / link))
        if file not in names and not file.is_file():
            raise SiteError(f"{page.relative_to(ROOT)}: the link {match[1]} leads to no file")
        if file not in names:
            copy = folder / "files" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            return f"]({up}files/{file.relative_to(ROOT)})"
        return f"]({up}{names[file]}{'#' if anchor else ''}{anchor})"

    # Code is left as it is: every second piece.
    pieces = _CODE.split(text)
    for number in range(0, len(pieces), 2):
        pieces[number] = _LINK.sub(target_of, pieces[number])
    return "".join(pieces)


def read_navigation() -> Any:
    """Return the navigation."""
    return yaml.load((HERE / "mkdocs.yml").read_text("utf-8"), yaml.BaseLoader)["nav"]


def named_in(navigation: Any) -> list[str]:
    """Return the pages that a navigation names, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [name for part in parts for name in named_in(part)]


def check_navigation(navigation: Any, there: set[str]) -> None:
    """Raise ``SiteError`` unless a navigation names every page once, and no other."""
    named = named_in(navigation)
    for name in named:
        if name not in there or named.count(name) > 1:
            raise SiteError(f"docs/site/mkdocs.yml: nav has {name}, which is not a page, or is listed twice")
    missing = sorted(there - set(named))
    if missing:
        raise SiteError(f"docs/site/mkdocs.yml: nav lacks {', '.join(missing)}; add each page where its readers look")


def write_versions(site: Path) -> None:
    """Write the list that the selector reads, and a first page that leads to the newest version."""
    found = [folder.name for folder in site.iterdir() if (folder / "index.html").is_file()]
    found.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)], reverse=True)
    entries = [{"version": name, "title": name, "aliases": []} for name in found]
    (site / "versions.json").write_text(json.dumps(entries), "utf-8")
    newest = f"{found[0]}/index.html"
    (site / "index.html").write_text(
        f'<!doctype html>\n<meta charset="utf-8">\n<title>vlm-distill</title>\n'
        f'<meta http-equiv="refresh" content="0; url={newest}">\n<a href="{newest}">vlm-distill {found[0]}</a>\n',
        "utf-8",
    )


def build(site: Path) -> Path:
    """Build the site of this version into its folder, and return the folder."""
    from reference import reference_pages

    from vlm_distill.version import __version__

    # Gather the pages.
    shutil.rmtree(WORK, ignore_errors=True)
    folder = WORK / "pages"
    folder.mkdir(parents=True)
    reference = reference_pages(ROOT)
    check_navigation(read_navigation(), {*pages().values(), *(f"reference/{name}" for name in reference)})
    gather(folder, reference)
    for name in ("mkdocs.yml", "style.css"):
        shutil.copyfile(HERE / name, (WORK if name == "mkdocs.yml" else folder) / name)

    # Build, and put the result in its place.
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(WORK / "mkdocs.yml")]
    subprocess.run(command, check=True, cwd=WORK)
    out = site / __version__
    shutil.rmtree(out, ignore_errors=True)
    site.mkdir(exist_ok=True)
    shutil.move(WORK / "html", out)
    write_versions(site)
    return out


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    try:
        print(build(ROOT / "site") / "index.html")
    except (SiteError, ValueError) as mistake:
        sys.exit(f"error: {mistake}")
    except subprocess.CalledProcessError:
        sys.exit("error: the site has the mistakes above")
