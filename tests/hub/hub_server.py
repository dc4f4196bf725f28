"""A Hub on a loopback port, which the real `huggingface_hub` client talks to, and which fails when told to.

    with HubServer() as hub:              # or the fixture `hub` of conftest.py, which points the client at it as well
        hub.store.add("org/a", folder)    # a repository from a folder, or from a dict name -> bytes
        hub.store.add("org/b", folder, private=True)  # and gated="auto", granted={"me"}, type="dataset"
        hub.fail("commit", 503, times=2)  # the next two commits are answered with 503, then all is well
        ...                               # the real client: HfApi(endpoint=hub.url), or the command line
        hub.store.repos["model", "org/a"].head  # what came of it: commits, files, references, pull requests
        hub.requests                      # what was asked: [Request(route, method, path, token, ...), ...]

Users: tokens `hf_write_...` and `hf_read_...` of `me` (member of `lab`) and `hf_other_...` of `other`; see
`hub_store.Store.users`. `hub.token` is the first.

Uploads go through LFS: the client runs with HF_HUB_DISABLE_XET=1. Without that it uses xet wherever hf_xet is
installed, whatever the Hub offers, and never falls back to LFS. xet's storage protocol is that of compiled code, and
what is tested here (one commit, retries, nothing half-written) lies above it; the route that gives a token for it
refuses. LFS objects are served from a second port, as the Hub's storage is another host, so that a token sent there
would be seen.

`hub.fail(route, what, times=1, after=0, match="", **options)`; the first `after` requests to the route that carry
`match` in their path are let through, the `times` next ones fail:

    401, 403, 404, 409, 412, 429, 500 ...  answered so; options: code= (X-Error-Code), message=, retry_after=
    "reset"      the connection is reset after half of the request's body was read
    "lost"       the request is carried out, then the connection is reset before it is answered
    "slow"       answered after delay= seconds (0.2), or when the server stops
    "truncate"   half of the answer's body is sent, then the connection is closed
    "corrupt"    the body (of an upload: the request's, else the answer's) has another first half, the length is right
    callable     called with the server before the request is carried out: to move a branch, for instance

Routes: agent, whoami, validate, create, delete, move, settings, auth-check, info, refs, commits, tree, paths-info,
preupload, commit, discussions, resolve, xet-token, lfs-batch, lfs-upload, lfs-verify, storage.
"""

import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_routes import Answer, Call, answer
from hub_store import Store

ROUTES = (
    ("agent", "GET", r"/api/agent-harnesses"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("create", "POST", r"/api/repos/create"),
    ("delete", "DELETE", r"/api/repos/delete"),
    ("move", "POST", r"/api/repos/move"),
    ("settings", "PUT", r"/api/{repo}/settings"),
    ("auth-check", "GET", r"/api/{repo}/auth-check(?P<write>/write)?"),
    ("info", "GET", r"/api/{repo}(?:/revision/(?P<revision>[^/]+))?"),
    ("refs", "GET", r"/api/{repo}/refs"),
    ("commits", "GET", r"/api/{repo}/commits/(?P<revision>[^/]+)"),
    ("tree", "GET", r"/api/{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    ("paths-info", "POST", r"/api/{repo}/paths-info/(?P<revision>[^/]+)"),
    ("preupload", "POST", r"/api/{repo}/preupload/(?P<revision>[^/]+)"),
    ("commit", "POST", r"/api/{repo}/commit/(?P<revision>[^/]+)"),
    ("discussions", "GET", r"/api/{repo}/discussions"),
    ("resolve", "GET|HEAD", r"/{prefix}(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
    ("xet-token", "GET", r"/api/{repo}/xet-write-token/(?P<revision>[^/]+)"),
    ("lfs-batch", "POST", r"/{prefix}(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("lfs-upload", "PUT", r"/lfs/{repo}/(?P<oid>[0-9a-f]{64})"),
    ("lfs-verify", "POST", r"/lfs/{repo}/verify"),
    ("storage", "GET|HEAD", r"/storage/{repo}/(?P<oid>[0-9a-f]{64})"),
)
PARTS = {
    "{repo}": r"(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)",
    "{prefix}": r"(?:(?P<kind>datasets|spaces)/)?",
}


def _pattern(text: str) -> re.Pattern[str]:
    for name, part in PARTS.items():
        text = text.replace(name, part)
    return re.compile(text)


TABLE = [(name, set(methods.split("|")), _pattern(text)) for name, methods, text in ROUTES]


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    route: str
    method: str
    path: str
    token: str | None
    storage: bool
    """Whether it came to the port of the storage, which must never see a token."""
    size: int = 0


@dataclass
class Fault:
    """What goes wrong with some requests to a route."""

    route: str
    what: int | str | Callable[["HubServer"], object]
    times: int
    after: int
    match: str
    options: dict[str, Any] = field(default_factory=dict)


class HubServer:
    """The server: start it as a context manager."""

    def __init__(self) -> None:
        self.store = Store()
        self.token = next(iter(self.store.users))
        self.environment: dict[str, str] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.stopping = threading.Event()
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
        self.url, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(
        self,
        route: str,
        what: int | str | Callable[["HubServer"], object],
        times: int = 1,
        after: int = 0,
        match: str = "",
        **options: Any,
    ) -> None:
        """Make requests to a route fail; see the module's text."""
        assert route in {name for name, *_ in ROUTES}, route
        self.faults.append(Fault(route, what, times, after, match, options))

    def count(self, route: str) -> int:
        """Return how many requests came to a route."""
        return sum(request.route == route for request in self.requests)

    def due(self, route: str, path: str) -> Fault | None:
        """Return the fault that strikes this request, and count it."""
        with self.store.lock:
            for fault in self.faults:
                if fault.route == route and fault.match in path and fault.times > 0:
                    if fault.after:
                        fault.after -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: a client that hangs up is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits for the client's delayed acknowledgement
    wbufsize = -1
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        hub, split = self.server.hub, urlsplit(self.path)
        path = split.path
        found = next(((n, m) for n, ways, p in TABLE if self.command in ways and (m := p.fullmatch(path))), None)
        route, match = found if found else ("none", None)
        fault = hub.due(route, path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        size = int(self.headers.get("Content-Length") or 0)
        storage = self.server is hub._servers[1]
        hub.requests.append(Request(route, self.command, self.path, token, storage, size))
        if fault and fault.what == "reset":
            self.rfile.read(size // 2)
            self._reset()
            return
        body = self._body(size)
        if fault and fault.what == "corrupt" and self.command == "PUT":
            body = _damaged(body)
        if fault and callable(fault.what):
            fault.what(hub)
        if fault and fault.what == "slow":
            hub.stopping.wait(fault.options.get("delay", 0.2))
        parts = {k: unquote(v) for k, v in (match.groupdict() if match else {}).items() if v is not None}
        query = {key: values[0] for key, values in parse_qs(split.query).items()}
        call = Call(hub, path, query, self.headers, body, parts, token)
        if fault and isinstance(fault.what, int):
            self._send(_failure(fault), fault)
            return
        with hub.store.lock:
            reply = answer(route, call) if match else Answer(404, {"error": "Not Found"})
        if fault and fault.what == "lost":
            self._reset()
            return
        self._send(reply, fault)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def _body(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(size)
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, reply: Answer, fault: Fault | None) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, default=str).encode()
        what = fault.what if fault else None
        if what == "corrupt" and self.command != "PUT":
            body = _damaged(body)
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if what == "truncate" else body)
        if what == "truncate":
            self.close_connection = True

    def _reset(self) -> None:
        """Close so that the client sees a reset rather than an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()
        socket.close(self.connection.detach()) if self.connection.fileno() >= 0 else None


def _damaged(body: bytes) -> bytes:
    """Return other bytes of the same length."""
    half = len(body) // 2
    return bytes(255 - byte for byte in body[:half]) + body[half:]


def _failure(fault: Fault) -> Answer:
    assert isinstance(fault.what, int)
    message = fault.options.get("message", f"injected {fault.what}")
    headers = {"X-Error-Message": message}
    for option, header in (("code", "X-Error-Code"), ("retry_after", "Retry-After")):
        if option in fault.options:
            headers[header] = str(fault.options[option])
    return Answer(fault.what, {"error": message}, headers)
