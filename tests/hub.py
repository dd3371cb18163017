"""A Hub on this machine, of the standard library alone: pushing and loading by name are tested without a network.

It answers the routes that `huggingface_hub`, `transformers` and `datasets` use for models and datasets: creating a
repository, uploading regular and LFS files, committing, reading files (whole or by range), listing trees, revisions
`main` and commit ids. Everything is held in memory. The libraries read `HF_ENDPOINT` and its like at import, so
clients are fresh processes:

    with LocalHub(tmp_path) as hub:
        hub.run("from transformers import AutoModel; AutoModel.from_pretrained('org/name')")
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".arrow", ".zip", ".png")


def run_python(
    code: str,
    *args: str,
    env: dict[str, str] | None = None,
    blocked: tuple[str, ...] = (),
    cwd: Path | None = None,
    timeout: float = 300,
) -> str:
    """Runs `code` in a fresh Python process and returns what it printed.

    A failure raises AssertionError with the output of the process.

    Args:
        code: the program; it is dedented. `args` are its `sys.argv[1:]`.
        env: variables on top of this process' own.
        blocked: packages that must look as if they were not installed (import fails, `find_spec` gives None).
        cwd: working directory, also first on `sys.path`.
        timeout: in seconds.
    """
    preamble = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + textwrap.dedent(code), *args],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise AssertionError(f"process exited with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class StoredFile:
    """The bytes of one file and whether they came through LFS."""

    data: bytes
    lfs: bool

    @property
    def sha1(self) -> str:
        """The id git gives to these bytes."""
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        """What clients name their cached copy by: the sha256 of an LFS file, else the git id."""
        return hashlib.sha256(self.data).hexdigest() if self.lfs else self.sha1

    def entry(self, path: str) -> dict[str, Any]:
        """This file as a row of a tree listing."""
        row = {"type": "file", "path": path, "size": len(self.data), "oid": self.sha1}
        if self.lfs:
            row["lfs"] = {"oid": self.etag, "size": len(self.data), "pointerSize": 134}
        return row


@dataclass
class Repo:
    """A repository: every commit is a whole mapping from path to file; `head` is the id of the newest one."""

    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    head: str = ""

    def __post_init__(self) -> None:
        self.add({})

    def add(self, files: dict[str, StoredFile]) -> str:
        """Makes `files` the state of `main`; returns the commit id."""
        text = f"{len(self.commits)} {self.head} {sorted((path, file.etag) for path, file in files.items())}"
        self.head = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> str:
        """The commit id that `main` or a commit id stands for; anything else is an error of the client."""
        commit = self.head if revision == "main" else revision
        if commit not in self.commits:
            raise HubError(404, "RevisionNotFound", f"no revision {revision!r}")
        return commit


class HubError(Exception):
    """An answer other than success: HTTP status, the Hub's error code, and a sentence."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class LocalHub:
    """The server. Use it as a context manager.

    Args:
        home: a folder for the caches of the clients.

    Attributes:
        url: the address, with a free port of 127.0.0.1.
        env: the variables a client process needs (with one cache; `run` makes a new one for each process).
        repos: `(kind, id) -> Repo`, kind is `models` or `datasets`; tests may look inside.
        lfs: uploaded LFS objects by sha256.
        unknown: requests that no route answers (method and path), to see what a new client version asks for.
    """

    def __init__(self, home: Path) -> None:
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.env = {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_local",
            "HF_HOME": str(self.home / "client"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "LocalHub":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def run(self, code: str, *args: str, blocked: tuple[str, ...] = (), timeout: float = 300) -> str:
        """`run_python` against this Hub, in an empty folder with an empty cache; returns what the process printed."""
        fresh = tempfile.mkdtemp(dir=self.home)
        env = {**self.env, "HF_HOME": fresh}
        return run_python(code, *args, env=env, blocked=blocked, cwd=Path(fresh), timeout=timeout)

    def repo(self, kind: str, repo_id: str) -> Repo:
        """The repository, or the Hub's `RepoNotFound`."""
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "RepoNotFound", f"no repository {repo_id!r} among the {kind}")
        return self.repos[kind, repo_id]


_ID = r"(?P<repo_id>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_ID}"
_ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", "paths_info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("GET", rf"{_API}(?:/revision/(?P<revision>.+))?", "info"),
    ("POST", rf"(?:/datasets)?/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", rf"/(?:(?P<kind>datasets)/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "read"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request: finds the route by method and path, calls the method of that name, sends its JSON or bytes."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the test output quiet."""
        return None

    def answer(self) -> None:
        """Answers any request; errors carry the header `X-Error-Code` that the clients map to exceptions."""
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, url.path)
                if verb == method and match:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    with self.hub.lock:
                        result = getattr(self, name)(**parts)
                    return self.send(*result) if isinstance(result, tuple) else self.send(200, result)
            self.hub.unknown.append(f"{self.command} {url.path}")
            raise HubError(404, "EntryNotFound", f"no route for {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            return self.send(error.status, {"error": str(error)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        """Sends bytes as they are and anything else as JSON; a HEAD request gets the headers alone."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def create(self) -> Any:
        """`create_repo`: the address, or 409 with the address when the repository exists."""
        wanted = json.loads(self.body)
        kind = f"{wanted.get('type') or 'model'}s"
        repo_id = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"}
        if (kind, repo_id) in self.hub.repos:
            return 409, {**answer, "error": "You already created this repository"}
        self.hub.repos[kind, repo_id] = Repo()
        return answer

    def validate_card(self) -> Any:
        """The check of a card's metadata: always in order."""
        return {"errors": [], "warnings": []}

    def preupload(self, kind: str, repo_id: str, revision: str) -> Any:
        """Says for each file whether it goes into the commit or through LFS."""
        self.hub.repo(kind, repo_id).resolve(revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def lfs_batch(self, repo_id: str) -> Any:
        """Says for each LFS object where to put it; objects that are known need no upload."""
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        """Takes the bytes of an LFS object; they must have the promised sha256."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(422, "BadObject", f"the bytes sent are not those of {oid}")
        self.hub.lfs[oid] = self.body
        return {}

    def commit(self, kind: str, repo_id: str, revision: str) -> Any:
        """Applies the operations of a commit to the newest state of `main`."""
        repo = self.hub.repo(kind, repo_id)
        files = dict(repo.commits[repo.resolve(revision)])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                if value.get("parentCommit") not in (None, repo.head):
                    raise HubError(412, "ParentMoved", f"{value['parentCommit']} is not the newest commit")
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise HubError(400, "MissingObject", f"{value['path']}: LFS object was not uploaded")
                files[value["path"]] = StoredFile(self.hub.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", f"cannot delete {value['path']}: no such file")
            else:
                raise HubError(400, "BadOperation", f"operation {key!r} is not known to this Hub")
        oid = repo.add(files)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid, "success": True}

    def info(self, kind: str, repo_id: str, revision: str = "main") -> Any:
        """The repository at a revision, with its list of files."""
        repo = self.hub.repo(kind, repo_id)
        commit = repo.resolve(revision)
        siblings = [{"rfilename": path, "size": len(file.data)} for path, file in sorted(repo.commits[commit].items())]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"id": repo_id, "sha": commit, "siblings": siblings, **flags}

    def tree(self, kind: str, repo_id: str, revision: str, folder: str = "") -> Any:
        """The files and folders below a folder, all of them or one level deep."""
        repo = self.hub.repo(kind, repo_id)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        below = {p: f for p, f in sorted(repo.commits[repo.resolve(revision)].items()) if p.startswith(prefix)}
        if prefix and not below:
            raise HubError(404, "EntryNotFound", f"no folder {folder!r}")
        deep = self.query.get("recursive", "").lower() in ("1", "true")
        return self.folders(below, prefix, deep) + [
            file.entry(path) for path, file in below.items() if deep or "/" not in path[len(prefix) :]
        ]

    @staticmethod
    def folders(files: dict[str, StoredFile], prefix: str, deep: bool) -> list[dict[str, Any]]:
        """The folders that hold `files`, below `prefix`."""
        names = {str(parent) for path in files for parent in Path(path[len(prefix) :]).parents} - {"."}
        return [
            {"type": "directory", "path": prefix + name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name in sorted(names)
            if deep or "/" not in name
        ]

    def paths_info(self, kind: str, repo_id: str, revision: str) -> Any:
        """Those of the asked paths that exist, as rows of a tree listing."""
        repo = self.hub.repo(kind, repo_id)
        files = repo.commits[repo.resolve(revision)]
        form = parse_qs(self.body.decode())
        wanted = form["paths"] if "paths" in form else json.loads(self.body)["paths"]
        known = {row["path"]: row for row in self.folders(files, "", deep=True)}
        known.update({path: file.entry(path) for path, file in files.items()})
        return [known[path] for path in wanted if path in known]

    def read(self, repo_id: str, revision: str, path: str, kind: str = "models") -> Any:
        """A file, or the bytes of it that the header `Range` asks for."""
        repo = self.hub.repo(kind, repo_id)
        commit = repo.resolve(revision)
        if path not in repo.commits[commit]:
            raise HubError(404, "EntryNotFound", f"no file {path!r} in {repo_id} at {revision}")
        file = repo.commits[commit][path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if span is None or span.groups() == ("", ""):
            return 200, file.data, headers
        size = len(file.data)
        first, last = span.groups()
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return 416, b"", {**headers, "Content-Range": f"bytes */{size}"}
        return 206, file.data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
