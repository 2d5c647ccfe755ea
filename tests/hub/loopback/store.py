"""What a Hub keeps: repositories with commits, references, pull requests and large objects, all in memory.

Content addressing follows git and git-lfs (blob ids are git's SHA-1, large objects are named by SHA-256), because the
client compares these with what it computes itself.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

COMMIT_ID = re.compile(r"[0-9a-f]{40}")
MAIN = "refs/heads/main"


class HubError(Exception):
    """An answer with an error status, as the Hub gives it: `X-Error-Code` tells the client which exception to raise."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class File:
    """A file of a commit: its content, or for a large one the SHA-256 that names it in the object store."""

    size: int
    blob_id: str
    content: bytes | None = None
    lfs: str | None = None


def regular_file(content: bytes) -> File:
    return File(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content=content)


def large_file(oid: str, size: int) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
    return File(size, regular_file(pointer).blob_id, lfs=oid)


@dataclass(frozen=True)
class Commit:
    id: str
    files: dict[str, File]
    parent: str | None
    title: str
    message: str
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    status: str  # draft, open, closed or merged
    base: str
    is_pull_request: bool = True
    merge_commit: str | None = None
    created_at: str = field(default_factory=lambda: now())
    events: list[dict] = field(default_factory=list)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Repository:
    """One repository: `refs` maps full reference names to commit ids."""

    def __init__(self, kind: str, repo_id: str, private: bool):
        self.kind, self.id, self.private = kind, repo_id, private
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.discussions: dict[int, PullRequest] = {}
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
        self.commit(MAIN, {".gitattributes": regular_file(attributes)}, "initial commit", "")

    def resolve(self, revision: str) -> str:
        """Commit id of a branch, a tag, a full reference or a commit id."""
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.refs[name]
        if revision in self.commits:
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable_ref(self, revision: str) -> str:
        """Full name of the branch or pull request that a commit may go to."""
        for name in (revision, f"refs/heads/{revision}"):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str) -> dict[str, File]:
        return self.commits[self.resolve(revision)].files

    def read(self, revision: str, path: str) -> bytes:
        """Content of a file, from the commit or the object store."""
        files = self.files(revision)
        if path not in files:
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound")
        file = files[path]
        return file.content if file.lfs is None else self.objects[file.lfs]

    def commit(self, ref: str, files: dict[str, File], title: str, message: str) -> Commit:
        parent = self.refs.get(ref)
        seed = repr((ref, parent, title, len(self.commits), sorted((p, f.blob_id) for p, f in files.items())))
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), dict(files), parent, title, message, now())
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit

    def open_pull_request(self, title: str, description: str, status: str) -> PullRequest:
        num = len(self.discussions) + 1
        request = PullRequest(num, title, description, status, MAIN)
        self.discussions[num] = request
        self.refs[f"refs/pr/{num}"] = self.refs[MAIN]
        return request

    def merge(self, num: int) -> Commit:
        """Merge a pull request into main; the files that main changed since then and the request did not are kept."""
        request = self.discussions[num]
        if request.status in ("merged", "closed"):
            raise HubError(409, f"This pull request is {request.status}.")
        head = self.commits[self.refs[f"refs/pr/{num}"]]
        fork = head
        ancestors_of_main = set()
        cursor: str | None = self.refs[MAIN]
        while cursor is not None:
            ancestors_of_main.add(cursor)
            cursor = self.commits[cursor].parent
        while fork.id not in ancestors_of_main:
            fork = self.commits[fork.parent]
        merged = dict(self.files("main"))
        for path in fork.files.keys() | head.files.keys():
            before, after = fork.files.get(path), head.files.get(path)
            if before == after:
                continue
            if merged.get(path) not in (before, after):
                raise HubError(409, f"Conflict in {path}")
            if after is None:
                merged.pop(path, None)
            else:
                merged[path] = after
        commit = self.commit(MAIN, merged, f"{request.title} (#{num})", request.description)
        request.status, request.merge_commit = "merged", commit.id
        return commit

    def history(self, revision: str) -> list[Commit]:
        commits, cursor = [], self.resolve(revision)
        while cursor is not None:
            commits.append(self.commits[cursor])
            cursor = self.commits[cursor].parent
        return commits
