"""A Hub on loopback that the real `huggingface_hub` client talks to (`HF_ENDPOINT`, with xet switched off).

It speaks create repo, preupload, git-lfs batch with basic and multipart uploads, commit, pull requests, merge,
branches, tags, tree, paths-info, and resolve with redirects to a "CDN" of another origin and with range requests.
`hub_store.py` keeps the data, `hub_faults.py` injects faults.

Run by hand: `python tests/hub/hub_server.py` prints the address to put into HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub.hub_faults import Fault, Faults
from tests.hub.hub_store import MAIN, File, HubError, PullRequest, Repository, large_file, now, regular_file

TOKEN = "hf_loopback"
USER = "user"
LARGE_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.png", "*.jpg", "tokenizer.json")


class HubServer:
    """The server. `url` is the endpoint; `repositories` maps (kind, id) to what was published.

    part_size: large files above it are uploaded in parts of this many bytes.
    page_size: entries in one page of a tree listing.
    """

    def __init__(self, part_size: int = 5 << 20, page_size: int = 1000):
        self.part_size, self.page_size = part_size, page_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_state = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._cdn = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_port}"
        for server in (self._server, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        for server in (self._server, self._cdn):
            server.shutdown()
            server.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Environment variables of a process that uses this Hub, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def repository(self, repo_id: str, kind: str = "model") -> Repository:
        return self.repositories[(kind, repo_id)]


@contextmanager
def running_hub(**options) -> Iterator[HubServer]:
    hub = HubServer(**options)
    try:
        yield hub
    finally:
        hub.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address) -> None:
        """A client that goes away in the middle is part of the tests; anything else is shown."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for a delayed acknowledgement
    server_state: HubServer

    def log_message(self, *_args) -> None:
        pass

    # ------------------------------------------------------------------ plumbing
    def _dispatch(self) -> None:
        hub = self.server_state
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        with hub.lock:
            hub.requests.append((self.command, self.route))
        fault = hub.faults.strike(self.command, self.route)
        if fault is not None and fault.kind == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._hang_up()
        self.body = self._read_body()
        if fault is not None and fault.kind == "status":
            return self._send(fault.status, {"error": "injected fault"})
        self.fault: Fault | None = fault
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    with hub.lock:
                        answer = action(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    return self._send(*answer) if isinstance(answer, tuple) else self._send(200, answer)
            raise HubError(404, f"no such route: {self.command} {self.route}")
        except HubError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            if error.code == "EntryNotFound" and getattr(self, "commit_id", None):
                headers["X-Repo-Commit"] = self.commit_id
            self._send(error.status, {"error": error.message}, headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _dispatch

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = bytearray()
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(body)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        fault = getattr(self, "fault", None)
        if fault is not None and fault.kind == "lost":
            return self._hang_up()
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        length = headers.pop("Content-Length", None)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault is not None and fault.kind == "truncate" and len(content) > fault.after_bytes:
            self.wfile.write(content[: fault.after_bytes])
            return self._hang_up()
        self.wfile.write(content)
        return None

    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def need_token(self) -> None:
        if not self.authorised():
            raise HubError(401, "Invalid credentials in Authorization header")

    def repo(self, kind: str | None, repo_id: str) -> Repository:
        repo = self.server_state.repositories.get((kind or "model", repo_id))
        if repo is None or (repo.private and not self.authorised()):
            raise HubError(401 if not self.authorised() else 404, "Repository not found", "RepoNotFound")
        return repo

    # ------------------------------------------------------------------ repositories
    def whoami(self):
        self.need_token()
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create_repo(self):
        self.need_token()
        wanted = self.json()
        kind = wanted.get("type") or "model"
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.server_state.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}
        if (kind, repo_id) in self.server_state.repositories:
            return 409, {"error": "You already created this model repo", **answer}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server_state.repositories[(kind, repo_id)] = Repository(kind, repo_id, private)
        return answer

    def repo_info(self, kind, repo_id, revision=None):
        repo = self.repo(kind, repo_id)
        commit = repo.commits[repo.resolve(revision or "main")]
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": file.size, "blobId": file.blob_id}
                if file.lfs:
                    sibling["lfs"] = {"size": file.size, "sha256": file.lfs, "pointerSize": 134}
            siblings.append(sibling)
        return {
            "_id": "0" * 24,
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.id,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "createdAt": commit.date,
            "lastModified": commit.date,
        }

    def refs(self, kind, repo_id):
        repo = self.repo(kind, repo_id)

        def listed(prefix):
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
                for ref, commit in sorted(repo.refs.items())
                if ref.startswith(prefix)
            ]

        answer = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
        return answer | ({"pullRequests": listed("refs/pr/")} if "include_prs" in self.query else {})

    def commits(self, kind, repo_id, revision):
        repo = self.repo(kind, repo_id)
        return [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": USER}]}
            for c in repo.history(revision)
        ]

    # ------------------------------------------------------------------ trees
    def _entry(self, path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
        return entry | ({"lfs": {"oid": file.lfs, "size": file.size, "pointerSize": 134}} if file.lfs else {})

    def _entries(self, files: dict[str, File], folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
            if recursive or len(parts) == 1:
                entries[path] = self._entry(path, file)
        return list(entries.values())

    def tree(self, kind, repo_id, revision, folder=None):
        repo = self.repo(kind, repo_id)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        self.commit_id = repo.resolve(revision)
        entries = self._entries(repo.files(revision), folder or "", recursive)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.server_state.page_size
        headers = {}
        if end < len(entries):
            flag = "true" if recursive else "false"
            following = f"{self.server_state.url}{self.route}?recursive={flag}&cursor={end}"
            headers["Link"] = f'<{following}>; rel="next"'
        return 200, entries[start:end], headers

    def paths_info(self, kind, repo_id, revision):
        files = self.repo(kind, repo_id).files(revision)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        found = [self._entry(path, files[path]) for path in wanted if path in files]
        for path in wanted:
            if path not in files and any(name.startswith(f"{path}/") for name in files):
                oid = hashlib.sha1(path.encode()).hexdigest()
                found.append({"type": "directory", "path": path, "size": 0, "oid": oid})
        return found

    # ------------------------------------------------------------------ downloads
    def resolve(self, kind, repo_id, revision, path):
        repo = self.repo(kind.removesuffix("s/") if kind else None, repo_id)
        self.commit_id = repo.resolve(revision)
        files = repo.files(revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": self.commit_id, "Accept-Ranges": "bytes"}
        if file.lfs is None:
            return self._ranged(file.content, headers | {"ETag": f'"{file.blob_id}"'})
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        location = f"{self.server_state.cdn_url}/cdn/{prefix}{repo.id}/{file.lfs}"
        linked = {"X-Linked-ETag": f'"{file.lfs}"', "X-Linked-Size": str(file.size), "Location": location}
        return 302, b"", headers | linked

    def cdn(self, kind, repo_id, oid):
        repo = self.server_state.repositories[(kind.removesuffix("s/") if kind else "model", repo_id)]
        return self._ranged(repo.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]):
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return 200, content, headers
        first, last = match.groups()
        size = len(content)
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last), size - 1) if first and last else size - 1
        if start >= size:
            raise HubError(416, f"range {self.headers['Range']} of {size} bytes")
        return 206, content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"}

    # ------------------------------------------------------------------ uploads
    def validate_yaml(self):
        """The checks that the Hub makes on the metadata of a card (those that we know of)."""
        wanted = self.json()
        errors, warnings = [], []
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", wanted["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError as error:
            metadata, errors = {}, [{"message": f"not YAML: {error}"}]
        if metadata is None:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        elif not isinstance(metadata, dict):
            errors.append({"message": "metadata is not a mapping"})
        else:
            for name in ("license", "pipeline_tag", "library_name"):
                if name in metadata and not isinstance(metadata[name], str):
                    errors.append({"message": f'"{name}" must be a string'})
            for index in metadata.get("model-index") or []:
                for result in index.get("results", []):
                    if not {"task", "dataset", "metrics"} <= result.keys():
                        errors.append({"message": '"model-index[].results[]" needs task, dataset and metrics'})
        return (400 if errors else 200), {"errors": errors, "warnings": warnings}

    def preupload(self, kind, repo_id, revision):
        self.need_token()
        repo = self.repo(kind, repo_id)
        present = repo.files(revision)
        answer = []
        for file in self.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            name = path.rsplit("/", 1)[-1]
            large = file["size"] > 10 << 20 or b"\0" in sample or any(fnmatch.fnmatch(name, p) for p in LARGE_PATTERNS)
            known = present.get(path)
            oid = None if known is None else known.lfs or known.blob_id
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, kind, repo_id):
        self.need_token()
        repo = self.repo(kind.removesuffix("s/") if kind else None, repo_id)
        wanted, url = self.json(), self.server_state.url
        objects = []
        for item in wanted["objects"]:
            oid, size = item["oid"], item["size"]
            if oid in repo.objects:
                objects.append({"oid": oid, "size": size})
                continue
            base = f"{self.server_state.cdn_url}/upload/{repo.kind}/{repo.id}/{oid}"
            if size > self.server_state.part_size and "multipart" in wanted["transfers"]:
                count = -(-size // self.server_state.part_size)
                header = {str(n): f"{base}/{n}" for n in range(1, count + 1)}
                header["chunk_size"] = str(self.server_state.part_size)
                upload = {"href": f"{url}/complete/{repo.kind}/{repo.id}/{oid}", "header": header}
            else:
                upload = {"href": base}
            verify = {"href": f"{url}/verify/{repo.kind}/{repo.id}/{oid}"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "multipart", "objects": objects}

    def _store(self, kind: str, repo_id: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"content does not match sha256 {oid}")
        self.server_state.repositories[(kind, repo_id)].objects[oid] = content

    def upload(self, kind, repo_id, oid, part=None):
        if part is None:
            self._store(kind, repo_id, oid, self.body)
            return 200, b"", {"ETag": f'"{oid}"'}
        self.server_state.parts.setdefault(oid, {})[int(part)] = self.body
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def complete(self, kind, repo_id, oid):
        parts = self.server_state.parts.get(oid, {})
        content = bytearray()
        for number, part in enumerate(self.json()["parts"], start=1):
            data = parts.get(number)
            if (
                part["partNumber"] != number
                or data is None
                or part["etag"].strip('"') != hashlib.md5(data).hexdigest()
            ):
                raise HubError(400, f"part {number} of {oid} is missing or differs")
            content += data
        self._store(kind, repo_id, oid, bytes(content))
        return {"success": True}

    def verify(self, kind, repo_id, oid):
        self.need_token()
        content = self.server_state.repositories[(kind, repo_id)].objects.get(oid)
        if content is None or len(content) != self.json()["size"]:
            raise HubError(404, f"object {oid} was not uploaded")
        return {}

    def commit(self, kind, repo_id, revision):
        """All of the operations or none: the new commit appears only when every line is valid."""
        self.need_token()
        repo = self.repo(kind, repo_id)
        header, files = {}, dict(repo.files(revision))
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = regular_file(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"LFS pointer of {value['path']} points to an object that does not exist")
                files[value["path"]] = large_file(value["oid"], len(repo.objects[value["oid"]]))
            elif key in ("deletedFile", "deletedFolder"):
                gone = [p for p in files if p == value["path"] or p.startswith(value["path"].rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for path in gone:
                    del files[path]
            else:
                raise HubError(400, f"unknown operation {key}")
        parent = header.get("parentCommit")
        if parent is not None and parent != repo.resolve(revision):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        answer = {}
        if "create_pr" in self.query:
            request = repo.open_pull_request(header["summary"], header.get("description", ""), "open")
            ref = f"refs/pr/{request.num}"
            answer["pullRequestUrl"] = f"{self.server_state.url}/{repo.id}/discussions/{request.num}"
        else:
            ref = repo.writable_ref(revision)
        commit = repo.commit(ref, files, header["summary"], header.get("description", ""))
        url = f"{self.server_state.url}/{repo.id}/commit/{commit.id}"
        return answer | {"success": True, "commitOid": commit.id, "commitUrl": url}

    # ------------------------------------------------------------------ branches, tags, pull requests
    def create_branch(self, kind, repo_id, name):
        self.need_token()
        repo = self.repo(kind, repo_id)
        ref = f"refs/heads/{name}"
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.resolve(self.json().get("startingPoint", "main"))
        return {}

    def create_tag(self, kind, repo_id, name):
        self.need_token()
        repo = self.repo(kind, repo_id)
        ref = f"refs/tags/{self.json()['tag']}"
        if ref in repo.refs:
            raise HubError(409, f"Tag reference exists already: {ref}")
        repo.refs[ref] = repo.resolve(name)
        return {}

    def delete_ref(self, kind, repo_id, what, name):
        self.need_token()
        repo = self.repo(kind, repo_id)
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if ref == MAIN:
            raise HubError(403, "main cannot be deleted")
        if repo.refs.pop(ref, None) is None:
            raise HubError(404, f"no such reference: {name}", "RevisionNotFound")
        return {}

    def _discussion(self, repo: Repository, request: PullRequest) -> dict:
        return {
            "num": request.num,
            "title": request.title,
            "author": {"name": USER},
            "createdAt": request.created_at,
            "status": request.status,
            "isPullRequest": request.is_pull_request,
            "repo": {"name": repo.id, "type": repo.kind},
        }

    def discussions(self, kind, repo_id):
        repo = self.repo(kind, repo_id)
        found = [self._discussion(repo, request) for _, request in sorted(repo.discussions.items(), reverse=True)]
        return {"count": len(found), "start": 0, "discussions": found}

    def discussion(self, kind, repo_id, num):
        repo = self.repo(kind, repo_id)
        request = self._request(repo, num)
        changes = {"base": request.base, "mergeCommitId": request.merge_commit}
        extra = {"changes": changes, "filesWithConflicts": [], "events": request.events, "diff": ""}
        return self._discussion(repo, request) | extra

    def _request(self, repo: Repository, num: str) -> PullRequest:
        if int(num) not in repo.discussions:
            raise HubError(404, f"no such discussion: {num}")
        return repo.discussions[int(num)]

    def open_discussion(self, kind, repo_id):
        self.need_token()
        wanted = self.json()
        return {"num": self.repo(kind, repo_id).open_pull_request(wanted["title"], wanted["description"], "draft").num}

    def set_status(self, kind, repo_id, num):
        self.need_token()
        request = self._request(self.repo(kind, repo_id), num)
        request.status = self.json()["status"]
        event = {
            "id": f"{len(request.events):040x}",
            "type": "status-change",
            "createdAt": now(),
            "author": {"name": USER},
            "data": {"status": request.status},
        }
        request.events.append(event)
        return {"newStatus": event}

    def merge(self, kind, repo_id, num):
        self.need_token()
        repo = self.repo(kind, repo_id)
        self._request(repo, num)
        return {"commitOid": repo.merge(int(num)).id}


_REPO = r"(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+)"
_STORED = r"/(?P<kind>model|dataset|space)/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create_repo),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/{_REPO}", _Handler.repo_info),
    ("GET", rf"/api/{_REPO}/revision/(?P<revision>[^/]+)", _Handler.repo_info),
    ("GET", rf"/api/{_REPO}/refs", _Handler.refs),
    ("GET", rf"/api/{_REPO}/commits/(?P<revision>[^/]+)", _Handler.commits),
    ("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/{_REPO}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/api/{_REPO}/branch/(?P<name>[^/]+)", _Handler.create_branch),
    ("POST", rf"/api/{_REPO}/tag/(?P<name>[^/]+)", _Handler.create_tag),
    ("DELETE", rf"/api/{_REPO}/(?P<what>branch|tag)/(?P<name>[^/]+)", _Handler.delete_ref),
    ("GET", rf"/api/{_REPO}/discussions", _Handler.discussions),
    ("POST", rf"/api/{_REPO}/discussions", _Handler.open_discussion),
    ("GET", rf"/api/{_REPO}/discussions/(?P<num>\d+)", _Handler.discussion),
    ("POST", rf"/api/{_REPO}/discussions/(?P<num>\d+)/status", _Handler.set_status),
    ("POST", rf"/api/{_REPO}/discussions/(?P<num>\d+)/merge", _Handler.merge),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", rf"/upload{_STORED}(/(?P<part>\d+))?", _Handler.upload),
    ("POST", rf"/complete{_STORED}", _Handler.complete),
    ("POST", rf"/verify{_STORED}", _Handler.verify),
    ("GET", rf"/cdn{_WEB}/(?P<oid>[0-9a-f]{{64}})", _Handler.cdn),
    ("GET", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET", rf"/api/resolve-cache/{_REPO}/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]

if __name__ == "__main__":
    with running_hub() as running:
        print(f"HF_ENDPOINT={running.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        threading.Event().wait()
