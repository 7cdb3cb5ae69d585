"""A W&B server that takes runs, as far as the client needs one, on this machine."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from typing import Any


class WandbServer:
    """Answers on a port of 127.0.0.1 until `stop`."""

    def __init__(self, *, opens_runs: bool = True) -> None:
        """
        Args:
            opens_runs: else whoever asks for a run waits until `stop`.
        """
        self.rows: list[dict[str, Any]] = []
        """What the client has uploaded."""
        self.projects: list[str] = []
        server = self
        stopped = self._stopped = threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("content-encoding") == "gzip":
                    data = gzip.decompress(data)
                if self.path == "/graphql":
                    if not opens_runs:
                        stopped.wait(100)
                    self._answer({"data": server._graphql(json.loads(data), f"http://{self.headers['host']}")})
                    return
                if self.path.endswith("/file_stream"):
                    lines = json.loads(data).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                    server.rows += map(json.loads, lines)
                self._answer({})

            do_PUT = do_POST

            def _answer(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # a client that was ended

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _graphql(self, request: dict[str, Any], url: str) -> dict[str, Any]:
        asked, name = request["variables"] or {}, request.get("operationName")
        if name == "UpsertBucket":
            project = {"id": "p", "name": asked.get("project"), "entity": {"id": "e", "name": "me"}}
            self.projects.append(project["name"])
            bucket = {
                "id": "b",
                "name": asked.get("name"),
                "displayName": "x",
                "historyLineCount": 0,
                "project": project,
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{url}/upload"} for file in asked["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}
