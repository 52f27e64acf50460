"""KaTeX's style and fonts and mermaid from npm into the built pages, so that the site asks no other origin for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
MODULES = DOCS / "node_modules"
COPIES = {
    "katex/dist/katex.min.css": "katex/katex.min.css",
    "mermaid/dist/mermaid.min.js": "mermaid.min.js",
}


def tool(name: str) -> str:
    """Path of node or npm. Raises SystemExit with what to do where it is missing."""
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"The site needs {name} (Node.js 20 or newer): KaTeX and mermaid come from npm, and figures are drawn by node.")
    return found


def install() -> None:
    """docs/node_modules as docs/package.json pins it; nothing to do where it is so already."""
    wanted = json.loads((DOCS / "package.json").read_text(encoding="utf-8"))
    pins = wanted["dependencies"] | wanted["devDependencies"]
    if all(installed(name) == version for name, version in pins.items()):
        return
    quiet = ["--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run([tool("npm"), "install", *quiet], cwd=DOCS, check=False)
    if done.returncode:
        raise SystemExit("npm could not install what docs/package.json names; is there a network or a registry mirror?")


def installed(name: str) -> str | None:
    """The version of a package in docs/node_modules."""
    path = MODULES / name / "package.json"
    return json.loads(path.read_text(encoding="utf-8"))["version"] if path.is_file() else None


def copy(target: Path) -> None:
    """The files that pages load into `target`, fonts in the one format that browsers of today read."""
    fonts = {f"katex/dist/fonts/{path.name}": f"katex/fonts/{path.name}" for path in (MODULES / "katex/dist/fonts").glob("*.woff2")}
    for source, name in (COPIES | fonts).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(MODULES / source, target / name)
    style = target / "katex/katex.min.css"
    style.write_text(only_woff2(style.read_text(encoding="utf-8")), encoding="utf-8")


def only_woff2(css: str) -> str:
    """KaTeX's style without the fonts in older formats, which are not copied."""
    return re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("[a-z]+"\)', "", css)
