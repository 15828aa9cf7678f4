"""A Hub on this machine: the parts of its HTTP API that uploads and downloads use, with LFS and failures on demand.

Made after huggingface_hub 2.4's client; without xet (HF_HUB_DISABLE_XET=1).
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"
LFS_SUFFIXES = (".safetensors", ".png")


class Hub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 while its `with` block runs.

    Attributes:
        commits: by repository, all commits in order: `(id, {path: content})`.
        failures: patterns of "METHOD /path" and the status that they are answered with.
        private: repositories that were made private.
        requests: "METHOD /path" of all that were answered.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, int] = {}
        self.private: set[str] = set()
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """The published files of a repository."""
        return self.commits[repo][-1][1]

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for commit in reversed(self.commits.get(repo, [])):
            if revision in ("main", commit[0]):
                return commit
        return None

    def add(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit."""
        identity = json.dumps([len(self.commits[repo]), sorted(files)]).encode()
        commit = hashlib.sha1(identity).hexdigest()
        self.commits[repo].append((commit, files))
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        line = f"{self.command} {path}"
        self.server.requests.append(line)
        for pattern, status in self.server.failures.items():
            if re.search(pattern, line):
                return self.send(status, {"error": f"told to answer {status}"})
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, line):
                is_write = self.command in ("POST", "PUT")
                if is_write and self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
                    return self.send(401, {"error": "Invalid username or password."})
                return method(self, body, *(group for group in match.groups() if group is not None))
        return self.send(404, {"error": f"{line} is not spoken here"})

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, content: dict | list | bytes, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass

    def create(self, body: bytes) -> None:
        fields = json.loads(body)
        repo = f"{fields['organization']}/{fields['name']}"
        status = 409 if repo in self.server.commits else 200
        if status == 200:
            self.server.commits[repo] = []
            self.server.add(repo, {})
            if fields.get("visibility") == "private" or fields.get("private"):  # as newer and older clients say it
                self.server.private.add(repo)
        self.send(status, {"url": f"{self.server.url}/{repo}"})

    def validate(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in files}
        answer = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.send(200, {"files": answer})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        actions = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/{repo}/lfs/{each['oid']}"}}}
            for each in objects
        ]
        self.send(200, {"transfer": "basic", "objects": actions})

    def store(self, body: bytes, repo: str, oid: str) -> None:
        self.server.objects[oid] = body
        self.send(200 if hashlib.sha256(body).hexdigest() == oid else 422, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.server.files(repo))
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.server.add(repo, files)
        url = f"{self.server.url}/{repo}/commit/{commit}"
        self.send(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self.server.find(repo, revision)) is None:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in found[1]]
        private = repo in self.server.private
        return self.send(200, {"id": repo, "sha": found[0], "private": private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        if (found := self.server.find(repo, revision)) is None:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in found[1].items()
            if path.startswith(folder.removeprefix("/"))
        ]
        if folder and not files:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self.send(200, files)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (found := self.server.find(repo, revision)) is None:
            return self.send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path not in found[1]:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
        content = found[1][path]
        return self.send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=found[0])


REPO = r"(\w[\w.-]*/\w[\w.-]*)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{REPO}/preupload/(.+)", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"PUT /{REPO}/lfs/(\w+)", Handler.store),
    (rf"POST /api/models/{REPO}/commit/(.+)", Handler.commit),
    (rf"GET /api/models/{REPO}/tree/([^/]+)(/.*)?", Handler.tree),
    (rf"GET /api/models/{REPO}/revision/(.+)", Handler.info),
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
]
