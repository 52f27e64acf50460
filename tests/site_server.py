"""The built site behind a local server, and a browser that lets no request leave it."""

from __future__ import annotations

import functools
import html.parser
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from conftest import REPOSITORY

PREFIX = "moebius"
"""The site is served below this path, so that a page which assumes to lie at the root is found out."""


class Server(http.server.ThreadingHTTPServer):
    """With room for all the connections that a browser opens at once; the default of five makes it wait and try again."""

    request_queue_size = 128


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server without a log, which keeps connections open."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


def build(folder: Path, port: int) -> Path:
    """The site, built strictly with the address at which it will be served: instant navigation needs to know it."""
    run = functools.partial(subprocess.run, cwd=REPOSITORY, check=False, capture_output=True, text=True)
    pages, site = folder / "docs", folder / "www" / PREFIX
    place = {"SITE_DOCS": str(pages), "SITE_DIR": str(site), "SITE_URL": f"http://127.0.0.1:{port}/{PREFIX}/", "NO_MKDOCS_2_WARNING": "1"}
    steps = ["docs/tools/build.py", "--target", str(pages)], ["-m", "mkdocs", "build", "--strict"], ["docs/tools/finish.py", str(site)]
    for command in steps:
        done = run([sys.executable, *command], env=os.environ | place)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return site


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(folder: Path, port: int) -> Iterator[None]:
    """The folder over HTTP while the block runs."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = Server(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class Anchors(html.parser.HTMLParser):
    """The ids of a page and everything it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := found.get(key))}
        self.targets += [(tag, value) for key in ("href", "src") if (value := found.get(key))]


def broken_links(site: Path) -> list[str]:
    """Links and files that the built pages point to and that do not exist, anchors included; what loads from elsewhere too."""
    pages = {path: Anchors(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for tag, target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                if tag in ("script", "img", "iframe", "source"):
                    broken.append(f"{path.relative_to(site)}: <{tag}> loads {target}")
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.exists():
                broken.append(f"{path.relative_to(site)}: no {target}")
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].ids:
                broken.append(f"{path.relative_to(site)}: no anchor {target}")
    return broken
