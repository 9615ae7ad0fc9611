"""A hub on this machine that answers as the Hugging Face hub does, and serves directories as the files of its repositories."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The one commit of every repository; `main` is its branch."""

INFO = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|auth-check)(?:/([\w.-]+))?)?")
FILE = re.compile(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)")


@contextlib.contextmanager
def serving(
    monkeypatch: pytest.MonkeyPatch, cache: Path, repositories: Mapping[str, Path], gated: frozenset[str] = frozenset()
) -> Iterator[Any]:
    """Serves `repositories` ("models/org/name" -> directory) with an empty local cache; the server's `asked` lists what it was
    asked for. Those that are `gated` are described to all and given to nobody."""
    from huggingface_hub import constants

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            server.asked.append(self.path)  # type: ignore[attr-defined]
            path = self.path.split("?")[0]
            if found := INFO.fullmatch(path):
                kind, name, what, revision = found.groups()
                self.describe(f"{kind}/{name}", what or "revision", revision or "main")
            elif found := FILE.fullmatch(path):
                kind, name, revision, file = found.groups()
                self.give(f"{kind or 'models'}/{name}", revision, file)
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def describe(self, name: str, what: str, revision: str) -> None:
            if name not in repositories:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if what == "auth-check":
                return self.answer(403 if name in gated else 200, b"{}", {"X-Error-Code": "GatedRepo"} if name in gated else {})
            if revision not in ("main", COMMIT):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = [p for p in sorted(repositories[name].rglob("*")) if p.is_file()]
            names = [p.relative_to(repositories[name]).as_posix() for p in files]
            if what == "tree":
                said: Any = [
                    {"type": "file", "path": path, "size": p.stat().st_size, "oid": etag_of(p)}
                    for path, p in zip(names, files, strict=True)
                ]
            else:
                siblings = [{"rfilename": path} for path in names]
                said = {"id": name, "sha": COMMIT, "gated": "manual" if name in gated else False, "siblings": siblings}
            return self.answer(200, json.dumps(said).encode())

        def give(self, name: str, revision: str, file: str) -> None:
            place = repositories.get(name, Path()) / file
            if name not in repositories or revision not in ("main", COMMIT):
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            if not place.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content, status = place.read_bytes(), 200
            headers = {"ETag": f'"{etag_of(place)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
                content, status = content[start : end + 1], 206
            return self.answer(status, content, headers)

        def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    server.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", server.address)  # type: ignore[attr-defined]
    files = server.address + "/{repo_id}/resolve/{revision}/{filename}"  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def etag_of(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
