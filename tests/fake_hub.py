"""A small fake of the HTTP interface of the Hugging Face hub, which records what it is asked."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from typing import NamedTuple

COMMIT = "0123456789" * 4


def digest(content):
    """Returns the name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Call(NamedTuple):
    """A request: method and path, the token in its header, and its decoded body."""

    method: str
    path: str
    token: str | None
    body: object


class FakeHub:
    """A hub on this machine.

    Attributes:
      calls: Requests in order.
      repositories: Files of each repository by their paths.
      private: Whether each repository is private.
      status: Status of every answer, 200 unless a test sets another one.
    """

    def __init__(self):
        self.calls, self.repositories, self.private, self.status = [], {}, {}, 200
        self.address = ""

    def answer(self, call):
        """Returns the status and the body of the answer to a request."""
        self.calls.append(call)
        if self.status != 200:
            return self.status, {"error": "You are not welcome here"}
        path = call.path.partition("?")[0]
        if path == "/api/repos/create":
            name = f"{call.body['organization']}/{call.body['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created it", "url": f"{self.address}/{name}"}
            self.repositories[name] = {}
            self.private[name] = call.body.get("visibility") == "private"
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.removeprefix("/api/models/") in self.repositories:
            name = path.removeprefix("/api/models/")
            return 200, {"id": name, "private": self.private[name]}
        name = path.removeprefix("/api/models/").partition("/revision/")[0].partition("/tree/")[0]
        if "/revision/" in path and name in self.repositories:
            siblings = [{"rfilename": x} for x in self.repositories[name]]
            return 200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False}
        if "/tree/" in path and name in self.repositories:
            files = self.repositories[name].items()
            return 200, [
                {"type": "file", "path": x, "size": len(content), "oid": digest(content)}
                for x, content in files
            ]
        if f"/resolve/{COMMIT}/" in path:
            name, _, file = path[1:].partition(f"/resolve/{COMMIT}/")
            return 200, self.repositories[name][file]
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in call.body["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in call.body:
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[name][line["value"]["path"]] = content
            url = f"{self.address}/{name}/commit/{COMMIT}"
            return 200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""}
        return 404, {"error": f"no {path}"}


@contextlib.contextmanager
def running():
    """Runs a hub on a free port of this machine; its address is `FakeHub.address`."""
    hub = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def respond(self):
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            lines = [json.loads(line) for line in data.decode().splitlines() if line]
            many = self.headers.get("Content-Type") == "application/x-ndjson"
            body = lines if many else lines[0] if lines else None
            token = self.headers.get("Authorization")
            status, result = hub.answer(Call(self.command, self.path, token, body))
            content = result if isinstance(result, bytes) else json.dumps(result).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{digest(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
