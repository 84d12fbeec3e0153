"""A wandb server as far as its client asks, which can die or fall silent while a run is sent to it."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from typing import Any


class WandbServer:
    """Answers on a local port; `lines` are the steps that arrived.

    `die`: connections are cut, further ones refused. `fall_silent`: they are taken, and nothing is answered.
    """

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        """What was said of each artifact."""
        self.runs: set[str] = set()
        self.began = threading.Event()
        """A run is known here."""
        self._silent, self._dead = threading.Event(), threading.Event()
        self._over = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if server._silent.is_set():
                    server._over.wait()
                if server._silent.is_set() or server._dead.is_set():
                    self.close_connection = True
                    return
                answer = json.dumps(server.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST  # noqa: N815 - their names at http.server

            def log_message(self, *_: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """What a server says to a request of wandb 0.31."""
        if "file_stream" in path:
            if history := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                self.lines[history["offset"] :] = map(json.loads, history["content"])
            return {"exitcode": None, "limits": {}}
        asked = json.loads(body or b"{}") if path.endswith("graphql") else {}
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        if "upsertBucket" in query:
            self.began.set()
            self.runs.add(variables.get("name"))
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "x", "name": variables.get("name"), "displayName": "n", "config": "{}"}
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/f/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
        if "RunResumeStatus" in query and self.lines:
            tail = json.dumps([json.dumps(self.lines[-1])])
            bucket = {
                "id": "x", "name": variables["name"], "displayName": "n", "config": "{}", "tags": [],
                "summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]",
                "historyLineCount": len(self.lines), "historyTail": tail, "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            entity = {"id": "e", "name": "e"}
            return {"data": {"model": {"id": "p", "name": "p", "entity": entity, "bucket": bucket}}}
        if "ArtifactType" in query:
            return {"data": {"project": {"artifact": None}}}
        if "createArtifact(" in query:
            self.artifacts.append(variables["input"])
            sequence = {"id": "s", "latestArtifact": None}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
            return {"data": {"createArtifact": {"artifact": artifact}}}
        return {"data": {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}"}}}

    def fall_silent(self) -> None:
        self._silent.set()

    def die(self) -> None:
        self._dead.set()
        self._http.shutdown()
        self._http.server_close()

    def close(self) -> None:
        self._over.set()
        if not self._dead.is_set():
            self.die()
