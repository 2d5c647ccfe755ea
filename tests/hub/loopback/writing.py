"""How files, branches, tags and pull requests get into the loopback Hub."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json

from tests.hub.loopback.connection import USER, Connection
from tests.hub.loopback.store import MAIN, HubError, PullRequest, Repository, large_file, now, regular_file

LARGE_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.png", "*.jpg", "tokenizer.json")


class Writing(Connection):
    """Routes that change a repository."""

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
