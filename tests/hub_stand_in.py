"""A local HTTP server that stands in for the Hugging Face hub: repositories in memory, by the hub's own protocol.

Serves what huggingface_hub calls to publish a model: who am I, make a repository, list its files, take small files in
a commit and large ones (as by Git LFS) before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN, USER = "hf_right", "somebody"
SMALL = 10_000  # bytes; what is larger goes the way of large files


@dataclass
class Hub:
    """What the stand-in holds.

    Attributes:
        repos: the files of each repository.
        private: which repositories are private.
        blobs: large files by their SHA-256, before a commit names them.
        commits: message of every commit.
        status: answer everything with this status, where it is set.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    status: int | None = None
    url: str = ""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            held = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    held: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        if self.path == "/api/whoami-v2":
            self.answer({"type": "user", "name": USER})
        elif found := re.match(r"/api/models/([^/]+/[^/?]+)", self.path):
            files = self.held.repos.get(found[1])
            if files is None:
                self.answer({"error": "not found"}, 404)
            elif "/tree/" in self.path:
                self.answer(
                    [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in files.items()]
                )
            else:
                self.answer({"id": found[1], "siblings": [{"rfilename": name} for name in files]})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not self.is_allowed():
            return
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in self.path:
            self.answer({"files": [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["size"] > SMALL else "regular"}
                for each in json.loads(body)["files"]
            ]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {"oid": each["oid"], "size": each["size"],
                 "actions": {"upload": {"href": f"{self.held.url}/upload/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]})  # fmt: skip
        elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": f"no {self.path}"}, 404)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.held.blobs[oid] = body
        self.answer({})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        known = name in self.held.repos
        self.held.repos.setdefault(name, {})
        if (asked.get("private") or asked.get("visibility") == "private") and not known:
            self.held.private.add(name)
        self.answer({"url": f"{self.held.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.held.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.held.commits.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.held.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = f"{len(self.held.commits):040x}"
        self.answer({"commitUrl": f"{self.held.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def is_allowed(self) -> bool:
        if self.held.status is not None:
            self.answer({"error": "out of order"}, self.held.status)
            return False
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid user token."}, 401)
            return False
        return True

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
