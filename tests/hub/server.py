"""A small Hub on loopback: the requests of `huggingface_hub` that uploads and downloads take, over real HTTP.

Repositories of models and datasets with branches and commits, regular and LFS files, private ones, tokens that write,
read or are wrong, the answers of the real Hub to what is not there or not allowed, and connections that break halfway.
There is no Xet (`HF_HUB_DISABLE_XET=1`) and no gating.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ENDINGS = (".safetensors", ".parquet", ".png", ".bin", ".pt", ".model")
LFS_SIZE = 10 * 2**20
TOKENS = {
    "hf_writer": {"name": "me", "role": "write", "orgs": ["team"]},
    "hf_reader": {"name": "me", "role": "read", "orgs": []},
    "hf_other": {"name": "other", "role": "write", "orgs": []},
}


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        self.messages.append(message)
        told = [branch, message, len(self.commits), sorted((name, file.oid) for name, file in files.items())]
        sha = hashlib.sha1(json.dumps(told).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server and what it holds.

    Attributes:
        repos: by kind (`models`, `datasets`) and name.
        received: LFS objects that came in whole, in order; one that is sent twice is there twice.
        breaks: how many of the next LFS uploads lose their connection halfway.
        break_after: after so many whole ones, all do.
        away: answer nothing but 503.
        requests: method and path of each.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.breaks = 0
        self.break_after: int | None = None
        self.away = False
        self.closed = False
        self.accepted, self.lock = 0, threading.Lock()
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """Content of a branch by path."""
        repo = self.repos[(kind, name)]
        return {path: file.content for path, file in repo.commits[repo.branches[branch]].items()}

    def add(self, name: str, card: str, kind: str = "models", private: bool = False) -> Repo:
        """A repository of somebody else, with a card."""
        repo = self.repos[(kind, name)] = Repo(name.partition("/")[0], private)
        repo.commit("main", {"README.md": File(card.encode(), False)}, "card")
        return repo


class Handler(BaseHTTPRequestHandler):
    timeout = 20  # of a client that says less than it promised; as real ones have it
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    # ---- Requests and answers ---------------------------------------------------------------------------------------

    def _handle(self) -> None:
        self.path_, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        if self.hub.closed:  # this connection was kept alive
            return self._break()
        self.is_read = False
        self.hub.requests.append((self.command, self.path_))
        for pattern, method, function in ROUTES:
            found = re.fullmatch(pattern, self.path_)
            if found and method == ("GET" if self.command == "HEAD" else self.command):
                try:
                    if self.hub.away:
                        raise Refusal(503, "The Hub is away")
                    function(self, query=query, **found.groupdict())
                except Refusal as error:
                    self._body()
                    headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                    self._answer({"error": str(error)}, error.status, headers)
                return
        self._body()
        self._answer({"error": f"no such endpoint: {self.command} {self.path_}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        """What was sent; empty the second time, where reading on would wait for the next request."""
        if self.is_read:
            return b""
        self.is_read = True
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(length)

    def _break(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self) -> Any:
        return json.loads(self._body() or b"{}")

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- Who asks, and for what -------------------------------------------------------------------------------------

    def _user(self, required: bool = True) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token and not required:
            return None
        if token not in TOKENS:
            raise Refusal(
                401, "Invalid credentials in Authorization header" if token else "Invalid username or password."
            )
        return TOKENS[token]

    def _repo(self, kind: str, name: str, write: bool = False) -> Repo:
        user, repo = self._user(required=write), self.hub.repos.get((kind, name))
        names = [] if user is None else [user["name"], *user["orgs"]]
        if repo is None or (repo.private and repo.owner not in names):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (repo.owner not in names or user["role"] != "write"):
            raise Refusal(403, "You don't have the rights to write here")
        return repo

    @staticmethod
    def _sha(repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # ---- Endpoints --------------------------------------------------------------------------------------------------

    def whoami(self, query):
        user = self._user()
        orgs = [{"name": name} for name in user["orgs"]]
        token = {"displayName": "test", "role": user["role"]}
        self._answer({"type": "user", "name": user["name"], "orgs": orgs, "auth": {"accessToken": token}})

    def create(self, query):
        asked, user = self._json(), self._user()
        owner = asked.get("organization") or user["name"]
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        if user["role"] != "write" or owner not in [user["name"], *user["orgs"]]:
            raise Refusal(403, "You don't have the rights to create a repo under this namespace")
        if (kind, name) in self.hub.repos:
            return self._answer({"error": "You already created this repo", "url": url}, 409)
        self.hub.repos[(kind, name)] = Repo(owner, asked.get("visibility") == "private")
        self._answer({"url": url, "name": name})

    def info(self, query, kind, name, revision="main"):
        repo = self._repo(kind, name)
        sha = self._sha(repo, revision)
        files = repo.commits[sha]
        card = files["README.md"].content.decode() if "README.md" in files else ""
        self._answer(
            {
                "_id": "0",
                "id": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "disabled": False,
                "gated": False,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "cardData": _metadata(card),
            }
        )

    def auth_check(self, query, kind, name, write=None):
        self._repo(kind, name, write=bool(write))
        self._answer({})

    def refs(self, query, kind, name):
        repo = self._repo(kind, name)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
        self._answer({"branches": branches, "tags": [], "converts": []})

    def branch(self, query, kind, name, branch):
        asked, repo = self._json(), self._repo(kind, name, write=True)
        if branch in repo.branches:
            raise Refusal(409, "Reference already exists")
        repo.branches[branch] = self._sha(repo, asked.get("startingPoint") or "main")
        self._answer({})

    def validate(self, query):
        asked, errors = self._json(), []
        try:
            metadata = _metadata(asked["content"])
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    assert model["name"] and result["task"]["type"]
                    assert result["dataset"]["type"] and result["dataset"]["name"]
                    assert all(isinstance(m["value"], int | float) and m["type"] for m in result["metrics"])
            names = [metadata.get("base_model") or []] if asked["repoType"] == "model" else []
            for each in [n for found in names for n in ([found] if isinstance(found, str) else found)]:
                assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", each), f"base_model {each!r} is no model of the Hub"
        except Exception as error:
            errors = [{"message": f"{type(error).__name__}: {error}"}]
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, query, kind, name, revision):
        asked, repo = self._json(), self._repo(kind, name, write=True)
        files, found = repo.commits[self._sha(repo, revision)], []
        for each in asked["files"]:
            lfs, old = each["path"].endswith(LFS_ENDINGS) or each["size"] > LFS_SIZE, files.get(each["path"])
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            mode = "lfs" if lfs else "regular"
            found.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": found})

    def lfs_batch(self, query, name, prefix=None):
        asked = self._json()
        self._repo("datasets" if prefix else "models", name, write=True)
        objects = []
        for each in asked["objects"]:
            to = f"{self.hub.url}/lfs/{each['oid']}"
            actions = {"upload": {"href": to, "header": {}}, "verify": {"href": f"{to}/verify"}}
            known = each["oid"] in self.hub.objects
            objects.append({"oid": each["oid"], "size": each["size"], **({} if known else {"actions": actions})})
        self._answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, query, oid):
        with self.hub.lock:
            full = self.hub.break_after is not None and self.hub.accepted >= self.hub.break_after
            breaks = full or self.hub.breaks > 0
            self.hub.breaks = max(0, self.hub.breaks - 1)
            self.hub.accepted += not breaks
        if breaks:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self._break()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content does not have the announced hash")
        self.hub.objects[oid] = content
        self.hub.received.append(oid)
        self._answer({})

    def lfs_verify(self, query, oid):
        asked = self._json()
        if len(self.hub.objects.get(oid, b"")) != asked["size"]:
            raise Refusal(404, "the object did not arrive")
        self._answer({})

    def commit(self, query, kind, name, revision):
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(kind, name, write=True)
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repo.commits[repo.branches[revision]]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(400, f"The LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(revision, files, message)
        self._answer({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def tree(self, query, kind, name, revision, path=""):
        repo = self._repo(kind, name)
        files, inside = repo.commits[self._sha(repo, revision)], f"{path}/" if path else ""
        found = {p: f for p, f in files.items() if p.startswith(inside)}
        if path and not found:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        folders = {p[: i + len(inside)] for p in found for i, c in enumerate(p[len(inside) :]) if c == "/"}
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries = [_entry(p, f) for p, f in found.items()]
        entries += [{"type": "directory", "path": p, "oid": hashlib.sha1(p.encode()).hexdigest()} for p in folders]
        self._answer([e for e in entries if recursive or "/" not in e["path"][len(inside) :]])

    def paths_info(self, query, kind, name, revision):
        asked = parse_qs(self._body().decode())
        repo = self._repo(kind, name)
        files = repo.commits[self._sha(repo, revision)]
        found = [_entry(path, files[path]) for path in asked.get("paths", []) if path in files]
        for path in asked.get("paths", []):
            if path not in files and any(other.startswith(f"{path}/") for other in files):
                found.append({"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()})
        self._answer(found)

    def resolve(self, query, name, revision, path, prefix=None):
        repo = self._repo("datasets" if prefix else "models", name)
        sha = self._sha(repo, revision)
        file = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            self._body()
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._answer({"error": "Entry not found"}, 404, headers)
        if not file.lfs:
            return self._answer(file.content, headers={**headers, "ETag": f'"{file.oid}"'})
        # The real Hub sends clients on to another host for these.
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        self._answer(file.content, headers={**headers, "ETag": f'"{file.sha256}"'})


def _entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
    return entry


def _metadata(card: str) -> dict[str, Any]:
    import yaml

    found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    return yaml.safe_load(found[1]) or {} if found else {}


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_FILE = rf"/(?P<prefix>datasets/)?{_NAME}"
ROUTES = [
    (r"/api/whoami-v2", "GET", Handler.whoami),
    (r"/api/repos/create", "POST", Handler.create),
    (r"/api/validate-yaml", "POST", Handler.validate),
    (_API, "GET", Handler.info),
    (rf"{_API}/revision/(?P<revision>.+)", "GET", Handler.info),
    (rf"{_API}/auth-check(?P<write>/write)?", "GET", Handler.auth_check),
    (rf"{_API}/refs", "GET", Handler.refs),
    (rf"{_API}/branch/(?P<branch>.+)", "POST", Handler.branch),
    (rf"{_API}/preupload/(?P<revision>.+)", "POST", Handler.preupload),
    (rf"{_API}/commit/(?P<revision>.+)", "POST", Handler.commit),
    (rf"{_API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "GET", lambda h, query, kind, name, revision, path: h.tree(
        query, kind, name, revision, path or "")),
    (rf"{_API}/paths-info/(?P<revision>.+)", "POST", Handler.paths_info),
    (rf"{_FILE}\.git/info/lfs/objects/batch", "POST", Handler.lfs_batch),
    (r"/lfs/(?P<oid>\w+)", "PUT", Handler.lfs_put),
    (r"/lfs/(?P<oid>\w+)/verify", "POST", Handler.lfs_verify),
    (rf"{_FILE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "GET", Handler.resolve),
]  # fmt: skip
