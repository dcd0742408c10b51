"""A local server with the endpoints of the Hub that its client needs to create a repository and upload to it.

It keeps uploaded files in memory and accepts only `TOKEN`. Uploads to a repository named `cut` lose the connection in
the middle of a large file; those to one named `full` exceed its storage limit.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

import yaml

TOKEN = "hf_right"
LARGE = {".safetensors", ".bin", ".pt", ".png", ".parquet"}


class Hub:
    """Uploads: `commits[repository]` is a list of {path: content}."""

    def __init__(self):
        self.objects, self.commits, self.requests = {}, {}, []

    def files(self, repository):
        return {path: content for commit in self.commits.get(repository, []) for path, content in commit.items()}


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status >= 400:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def url(self, path):
        return f"http://{self.headers['Host']}{path}"

    def do_PUT(self):
        if "/cut/" in self.path:
            self.rfile.read(100)
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def do_POST(self):
        content = self.body()
        self.hub.requests.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if self.path == "/api/repos/create":
            name = json.loads(content)["name"]
            self.hub.commits.setdefault(f"someone/{name}", [])
            return self.answer(200, {"url": self.url(f"/someone/{name}")})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": errors_of(json.loads(content)["content"]), "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if PurePosixPath(file["path"]).suffix in LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            repository = self.path.split("/")[2].removesuffix(".git")
            objects = []
            for found in json.loads(content)["objects"]:
                entry = {"oid": found["oid"], "size": found["size"]}
                if repository == "full":
                    entry["error"] = {"code": 403, "message": "Private repository storage limit reached"}
                elif found["oid"] not in self.hub.objects:
                    entry["actions"] = {"upload": {"href": self.url(f"/{repository}/{found['oid']}")}}
                objects.append(entry)
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            return self.commit([json.loads(line) for line in content.splitlines()])
        return self.answer(404, {"error": f"not found: {self.path}"})

    def commit(self, lines):
        repository = "/".join(self.path.split("/")[3:5])
        files = {}
        for value in (line["value"] for line in lines if line["key"] != "header"):
            files[value["path"]] = (
                base64.b64decode(value["content"]) if "content" in value else self.hub.objects[value["oid"]]
            )
        self.hub.commits[repository].append(files)
        oid = f"{len(self.hub.commits[repository]):040x}"
        return self.answer(200, {"commitUrl": self.url(f"/{repository}/commit/{oid}"), "commitOid": oid})


def errors_of(card):
    """Errors in the metadata of a model card, by the relevant rules of the Hub."""
    _, head, _ = card.split("---\n", 2)
    try:
        metadata = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    texts = {key: metadata.get(key) for key in ("license", "library_name", "base_model") if key in metadata}
    lists = {key: metadata.get(key, []) for key in ("tags", "metrics", "datasets")}
    invalid = [key for key, value in texts.items() if not isinstance(value, str)]
    invalid += [
        key for key, value in lists.items() if not (isinstance(value, list) and all(isinstance(v, str) for v in value))
    ]
    return [{"message": f'"{key}" has the wrong type'} for key in invalid]


@contextmanager
def running():
    """Run the server; yields the hub and its address."""
    handler = type("Bound", (Handler,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
