"""A Hub on this machine: as much of the API as huggingface_hub needs to make repositories, commit and read back."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


# A token that may write, and one that only reads.
OURS, READER = "hf_ourTokenThatMayWrite", "hf_tokenThatOnlyReads"


@dataclass
class Repository:
    """Branches of files, the history of commits, and who may see it."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Fault:
    """Answers the next `times` requests whose line matches with a status, or by hanging up (status 0)."""

    pattern: str
    status: int
    times: int = 1


class HubServer:
    """The server and what it holds.

    Args:
        tokens (`dict[str, dict]`): user of each token: `name`, `orgs` (names) and `write` (`bool`).
    """

    def __init__(self, tokens: dict[str, dict[str, Any]]) -> None:
        self.tokens, self.repositories, self.blobs = tokens, {}, {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault(self, line: str) -> int | None:
        """The status of a fault that is due for this request."""
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, line):
                fault.times -= 1
                return fault.status
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    do_HEAD = do_POST = do_PUT = None

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{method} {path}"
        self.hub.requests.append(line)
        status = self.hub.fault(line)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            return self._send(status, {"error": "a fault that was asked for"})
        for pattern, action in _ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return action(self, body, *found.groups())
        self._send(404, {"error": f"no such address: {line}"})

    def _send(
        self, status: int, content: Any = None, headers: dict[str, str] | None = None, head: bool = False
    ) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(raw)

    def _user(self) -> dict[str, Any] | None:
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _writable(self, repo: str) -> bool:
        user = self._user()
        return bool(user and user["write"] and repo.split("/")[0] in (user["name"], *user["orgs"]))

    # ---- Actions ----

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            return self._send(401, {"error": "Invalid username or password."})
        self._send(200, {"name": user["name"], "type": "user", "orgs": [{"name": name} for name in user["orgs"]]})

    def create(self, body: bytes) -> None:
        content, user = json.loads(body), self._user()
        if user is None:
            return self._send(401, {"error": "Invalid username or password."})
        repo = f"{content.get('organization') or user['name']}/{content['name']}"
        if not self._writable(repo):
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        known = repo in self.hub.repositories
        if not known:
            self.hub.repositories[repo] = Repository(private=content.get("visibility") == "private")
        self._send(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def validate(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        found = self.hub.repositories.get(repo)
        if found is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha = found.commits[-1]["oid"] if found.commits else "0" * 40
        self._send(200, {"id": repo, "sha": sha, "private": found.private, "siblings": [], "tags": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        if not self._writable(repo):
            return self._send(403, {"error": "Forbidden"})
        branches = self.hub.repositories[repo].branches
        if name in branches:
            return self._send(409, {"error": "Reference already exists"})
        branches[name] = dict(branches["main"])
        self._send(200, {})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._writable(repo):
            return self._send(403, {"error": "Forbidden: pass a token that may write"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png", ".bin")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/storage/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.hub.blobs else {**entry, "actions": actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "the content is not what its name says"})
        self.hub.blobs[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._writable(repo):
            return self._send(403, {"error": "Forbidden"})
        found = self.hub.repositories[repo]
        header, *entries = (json.loads(line) for line in body.splitlines())
        files = dict(found.branches[revision])
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        found.branches[revision] = files
        oid = hashlib.sha1(body).hexdigest()
        found.commits.append({"oid": oid, "summary": header["value"]["summary"], "branch": revision})
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, method: str, repo: str, revision: str, name: str) -> None:
        found = self.hub.repositories.get(repo)
        content = None
        if found is not None and (not found.private or self._user()):
            content = found.branches.get(revision, found.branches["main"]).get(name)
        if content is None:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}, method == "HEAD")
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": found.commits[-1]["oid"]}
        self._send(200, content, headers, method == "HEAD")

    def tree(self, body: bytes, repo: str, rest: str) -> None:
        files = self.hub.repositories[repo].branches["main"]
        self._send(
            200, [{"type": "file", "path": name, "size": len(raw), "oid": "0" * 40} for name, raw in files.items()]
        )


for _method in ("HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{_method}", lambda self, method=_method: self._answer(method))

_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(.+)", _Handler.commit),
    (rf"POST /api/models/{_REPO}/branch/(.+)", _Handler.branch),
    (rf"GET /api/models/{_REPO}/tree/(.+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}(?:/revision/(.+))?", _Handler.info),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/(\w+)", _Handler.store),
    (rf"(GET|HEAD) /{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
