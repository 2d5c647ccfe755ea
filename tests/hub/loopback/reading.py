"""What the loopback Hub answers about repositories and their files, and the files themselves."""

from __future__ import annotations

import hashlib
import re
from urllib.parse import parse_qs

import yaml

from tests.hub.loopback.connection import USER, Connection
from tests.hub.loopback.store import File, HubError, Repository


class Reading(Connection):
    """Routes that change nothing but the list of repositories."""

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
