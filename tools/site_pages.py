"""Builds the documentation as a web site: README.md, docs/ and every file of the repository that they link to.

    make site                      writes site/
    make site ARGS="--serve 8000"  and shows it on http://127.0.0.1:8000

Pages keep their places relative to each other, so the links of the repository work in the site as they are. A link to a
folder leads to its README.md; where it has none, only the link's text stays. Nothing is loaded from other servers.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
LARGEST = 4_000_000  # bytes of a file that is copied


def target(page: Path, link: str) -> Path | None:
    """The file of the repository that a link of a page leads to, or None."""
    path = (page.parent / link).resolve()
    if path.is_dir():
        path /= "README.md"
    inside = path.is_relative_to(ROOT) and not set(path.relative_to(ROOT).parts) & {".git", ".venv"}
    return path if inside and path.is_file() and path.stat().st_size <= LARGEST else None


def rewritten(page: Path, found: set[Path]) -> str:
    """A page whose links lead to files of the site. Adds these files to `found`."""

    def link(match: re.Match[str]) -> str:
        image, text, address, anchor = match.groups()
        path = target(page, address)
        if path is None:
            return text
        found.add(path)
        return f"{image}[{text}]({os.path.relpath(path, page.parent)}{anchor or ''})"

    return LINK.sub(link, page.read_text())


def collect(folder: Path) -> list[Path]:
    """Copies README.md and all that can be reached from it to a folder. Returns the files, in order."""
    waiting, done = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}, set()
    while waiting:
        page = min(waiting)
        waiting.discard(page)
        done.add(page)
        place = folder / page.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".md":
            found: set[Path] = set()
            place.write_text(rewritten(page, found))
            waiting |= found - done
        else:
            shutil.copy(page, place)
    return sorted(done)


def build(out: Path) -> None:
    """The site. Errors: CalledProcessError where mkdocs fails, with its words on stderr."""
    with tempfile.TemporaryDirectory() as work:
        source, result = Path(work) / "source", Path(work) / "site"
        collect(source)
        config = (ROOT / "mkdocs.yml").read_text()
        (Path(work) / "mkdocs.yml").write_text(f"{config}\ndocs_dir: {source}\nsite_dir: {result}\n")
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", str(Path(work) / "mkdocs.yml")]
        subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(result, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder, which is replaced")
    parser.add_argument("--serve", type=int, metavar="PORT", help="show the site on this machine until Ctrl-C")
    options = parser.parse_args()
    if options.out.exists() and not (options.out / "sitemap.xml").exists():
        print(f"error: --out {options.out}: is no site of an earlier build; it is left as it is", file=sys.stderr)
        return 2
    try:
        build(options.out)
    except subprocess.CalledProcessError as error:
        print(f"error: mkdocs ended with exit code {error.returncode}", file=sys.stderr)
        return 1
    print(f"written: {options.out}/index.html")
    if options.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=options.out)
        print(f"http://127.0.0.1:{options.serve}")
        try:
            http.server.ThreadingHTTPServer(("127.0.0.1", options.serve), handler).serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
