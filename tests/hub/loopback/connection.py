"""HTTP of the loopback Hub: requests, answers, tokens, injected faults."""

from __future__ import annotations

import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.loopback.faults import Fault
from tests.hub.loopback.store import HubError, Repository

if TYPE_CHECKING:
    from tests.hub.loopback.server import HubServer

TOKEN = "hf_loopback"
USER = "user"


class Connection(BaseHTTPRequestHandler):
    """Reads a request, finds its route, injects faults, and sends the answer. Subclasses have the routes' functions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for a delayed acknowledgement
    server_state: HubServer
    routes: list[tuple]

    def log_message(self, *_args) -> None:
        pass

    def _dispatch(self) -> None:
        hub = self.server_state
        url = urlsplit(self.path)
        self.route, self.query = url.path, parse_qs(url.query)
        with hub.lock:
            hub.requests.append((self.command, self.route))
        fault = hub.faults.take(self.command, self.route)
        if fault is not None and fault.kind == "drop":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self._hang_up()
        self.body = self._read_body()
        if fault is not None and fault.kind == "status":
            return self._send(fault.status, {"error": "injected fault"})
        self.fault: Fault | None = fault
        try:
            for method, pattern, action in self.routes:
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
