"""A hub on this machine: as much of huggingface.co's protocol as its client uploads by."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs


def git_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """Repositories in memory. `refuses` is a file name whose commit is answered with 403."""

    def __init__(self):
        self.repos, self.objects, self.refuses = {}, {}, None
        self.sent, self.tokens = [], set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id):
        return self.repos[repo_id]["files"]

    def answer(self, method, path, body, host):
        if path == "/api/repos/create":
            given = json.loads(body)
            repo_id = f"{given['organization']}/{given['name']}"
            url = f"{self.url}/{repo_id}"
            if repo_id in self.repos:
                return 409, {"error": "exists", "url": url}
            private = given.get("visibility") == "private" or given.get("private") is True
            self.repos[repo_id] = {"private": private, "files": {}}
            return 200, {"url": url}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.objects[found[1]] = body
            self.sent.append(found[1])
            return 200, {}
        if found := re.fullmatch(r"/(\S+/\S+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}
                objects.append(one | ({} if one["oid"] in self.objects else {"actions": upload}))
            return 200, {"transfer": "basic", "objects": objects}
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\S+))?", path)
        if found is None or found[1] not in self.repos:
            return 404, {"error": f"no such page {path}"}
        repo = self.repos[found[1]]
        if found[2] is None:
            return 200, {"id": found[1], "private": repo["private"], "siblings": [], "tags": []}
        kind = found[2].split("/")[0].replace("-", "_")
        return getattr(self, f"_{kind}")(found[1], repo, body)

    def _paths_info(self, repo_id, repo, body):
        infos = []
        for path in parse_qs(body.decode())["paths"]:
            if path in repo["files"]:
                data, is_lfs = repo["files"][path]
                info = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
                if is_lfs:
                    oid = hashlib.sha256(data).hexdigest()
                    info["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
                infos.append(info)
        return 200, infos

    def _preupload(self, repo_id, repo, body):
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for one in json.loads(body)["files"]
        ]
        return 200, {"files": files}

    def _commit(self, repo_id, repo, body):
        for line in filter(None, body.decode().split("\n")):
            one = json.loads(line)
            value = one["value"]
            if self.refuses and value.get("path") == self.refuses:
                return 403, {"error": "Forbidden"}
            if one["key"] == "file":
                repo["files"][value["path"]] = (base64.b64decode(value["content"]), False)
                self.sent.append(value["path"])
            elif one["key"] == "lfsFile":
                repo["files"][value["path"]] = (self.objects[value["oid"]], True)
        url = f"{self.url}/{repo_id}/commit/{'0' * 40}"
        return 200, {"commitUrl": url, "commitOid": "0" * 40, "success": True}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def _take(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        path = self.path.partition("?")[0]
        status, content = self.hub.answer(self.command, path, body, self.headers["Host"])
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = _take

    def log_message(self, *_):
        pass
