"""A server on this machine that speaks the Hugging Face hub's protocol, for its real client: repositories
with branches and commits, uploads by the git-lfs protocol, downloads with ranges, private and gated
repositories, and faults."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import socketserver
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_of_ada"  # of the user ada
_LFS_BYTES = 1024  # larger files, and those of weights, go by git-lfs


class Repository:
    """Attributes: ``private``, ``gated``; ``branches``: commit by name; ``commits``: files by commit."""

    def __init__(self, private: bool = False) -> None:
        self.private, self.gated = private, False
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        number = f"{branch} {len(self.commits)}".encode()
        sha = hashlib.sha1(number + b"".join(sorted(files.values()))).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class HubServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Attributes:
    repositories: by ``user/name``.
    blobs: what was uploaded by git-lfs, by digest.
    faults: pairs of a pattern, searched for in "METHOD /path", and the HTTP status it is answered with, or
        ("cut", bytes) for a body that breaks off; each once.
    requests: "METHOD /path" of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[tuple[str, int | tuple[str, int]]] = []
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no trouble here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nobody reads it."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        asked = f"{self.command} {path}"
        self.server.requests.append(asked)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.cut: int | None = None
        for fault in self.server.faults:
            if re.search(fault[0], asked):
                self.server.faults.remove(fault)
                if isinstance(fault[1], int):
                    return self.json({"error": "a fault"}, fault[1])
                self.cut = fault[1][1]
                break
        for method, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                return handle(self, *found.groups())
        self.json({"error": "no such address"}, 404)

    def user(self) -> str | None:
        return "ada" if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    def json(self, content: object, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, **{"Content-Type": "application/json", **headers})

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if self.cut is None else body[: self.cut])
            if self.cut is not None:
                self.close_connection = True

    def problem(self, status: int, code: str, text: str) -> None:
        self.json({"error": text}, status, X_Error_Code=code, X_Error_Message=text)

    def repository(self, name: str, content: bool = False, write: bool = False) -> Repository | None:
        """The repository, or None after an answer that says why not.

        Args:
            content: of files, which a gated repository keeps to itself.
        """
        found = self.server.repositories.get(name)
        user = self.user()
        if found is None or (found.private and user != name.partition("/")[0]):
            self.problem(404 if user else 401, "RepoNotFound", "Repository not found")
        elif write and user != name.partition("/")[0]:
            self.problem(403, "", "You don't have the rights to do this")
        elif content and found.gated and user != name.partition("/")[0]:
            self.problem(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return found
        return None

    def commit_of(self, repository: Repository, revision: str) -> str | None:
        sha = repository.branches.get(revision, revision)
        if sha in repository.commits:
            return sha
        self.problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    # ---- reading ----

    def who(self) -> None:
        self.json({"type": "user", "name": self.user()}) if self.user() else self.problem(401, "", "Invalid")

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self.repository(name)
        sha = repository and self.commit_of(repository, revision or "main")
        if sha:
            files = repository.commits[sha]
            self.json(
                {
                    "id": name,
                    "sha": sha,
                    "private": repository.private,
                    "gated": "auto" if repository.gated else False,
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                    "cardData": _card_data(files.get("README.md", b"")),
                }
            )

    def tree(self, name: str, revision: str) -> None:
        repository = self.repository(name, content=True)
        sha = repository and self.commit_of(repository, revision)
        if sha:
            self.json([_entry(path, data) for path, data in sorted(repository.commits[sha].items())])

    def file(self, name: str, revision: str, path: str) -> None:
        repository = self.repository(name, content=True)
        sha = repository and self.commit_of(repository, revision)
        if not sha:
            return
        data = repository.commits[sha].get(path)
        if data is None:
            return self.problem(404, "EntryNotFound", "Entry not found")
        headers = {"X_Repo_Commit": sha, "ETag": f'"{_etag(path, data)}"', "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.send(data[start : end + 1], 206, **headers)
        self.send(data, **headers)

    # ---- writing ----

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if user is None:
            return self.problem(401, "", "Invalid username or password.")
        if owner != user:
            return self.problem(403, "", f"You don't have the rights to create a model under {owner}")
        address = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.repositories:
            return self.json({"error": "You already created this model repo", **address}, 409)
        self.server.repositories[name] = Repository(
            asked.get("visibility") == "private" or asked.get("private") is True
        )
        self.json(address)

    def branch(self, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if repository is not None:
            if branch in repository.branches:
                return self.json({"error": "already exists"}, 409)
            repository.commit(branch, repository.files(), f"branch {branch}")
            self.json({})

    def validate(self) -> None:
        try:
            _card_data(json.loads(self.body)["content"].encode())
            self.json({"errors": [], "warnings": []})
        except ValueError as error:
            self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)

    def preupload(self, name: str, revision: str) -> None:
        if self.repository(name, write=True) is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = file["size"] > _LFS_BYTES or file["path"].endswith(".safetensors")
            mode = "lfs" if lfs else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.json({"files": files})

    def batch(self, name: str) -> None:
        if self.repository(name, write=True) is None:
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.server.address}/lfs/{item['oid']}"}}
            known = item["oid"] in self.server.blobs
            objects.append({**item, **({} if known else {"actions": actions})})
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.problem(400, "", "another content than it was said to have")
        self.server.blobs[digest] = self.body
        self.json({})

    def commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if repository is None or not self.commit_of(repository, revision):
            return
        files, message = dict(repository.files(revision)), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull_request = "create_pr" in parse_qs(urlparse(self.path).query)
        sha = repository.commit("refs/pr/1" if pull_request else revision, files, message)
        address = f"{self.server.address}/{name}"
        opened = f"{address}/discussions/1" if pull_request else None
        self.json({"commitUrl": f"{address}/commit/{sha}", "commitOid": sha, "pullRequestUrl": opened})


_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.who),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", r"/api/models/([^/]+/[^/]+)", _Handler.info),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", _Handler.info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/(.+)", _Handler.tree),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", _Handler.branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _Handler.preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", _Handler.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.upload),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.file),
)


def _card_data(readme: bytes) -> dict | None:
    import yaml

    found = re.match(r"---\n(.*?)\n---\n", readme.decode("utf-8"), re.DOTALL)
    try:
        return yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _is_lfs(path: str, data: bytes) -> bool:
    return len(data) > _LFS_BYTES or path.endswith(".safetensors")


def _etag(path: str, data: bytes) -> str:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest() if _is_lfs(path, data) else blob


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _etag(path, data)[:40]}
    if _is_lfs(path, data):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
    return entry


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub that is up for as long."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
