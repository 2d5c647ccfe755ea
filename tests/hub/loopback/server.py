"""A Hub on loopback that the real `huggingface_hub` client talks to (`HF_ENDPOINT`, with xet switched off).

It speaks create repo, preupload, git-lfs batch with basic and multipart uploads, commit, pull requests, merge,
branches, tags, tree, paths-info, and resolve with redirects to a "CDN" of another origin and with range requests.
`store.py` keeps the data, `faults.py` injects faults, `reading.py` and `writing.py` have the routes.

Run by hand: `python -m tests.hub.loopback.server` prints the address to put into HF_ENDPOINT.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from tests.hub.loopback.connection import TOKEN
from tests.hub.loopback.faults import Faults
from tests.hub.loopback.reading import Reading
from tests.hub.loopback.store import Repository
from tests.hub.loopback.writing import Writing


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


class _Handler(Reading, Writing):
    """All routes."""


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

_Handler.routes = ROUTES

if __name__ == "__main__":
    with running_hub() as running:
        print(f"HF_ENDPOINT={running.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1")
        threading.Event().wait()
