"""A stand-in for a W&B server that records what `wandb sync` sends.

    fake_wandb_server.py PORT LOG

Answers the GraphQL operations of the client and appends every request to LOG, one JSON object per line.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUNS = {}


def bucket(variables):
    name = variables.get("name") or variables.get("id") or "run"
    run = RUNS.setdefault(name, {"inserted": True})
    project = {"id": "p1", "name": variables.get("project") or "p", "entity": {"id": "e1", "name": "me"}}
    return {
        "id": "r1",
        "name": name,
        "displayName": variables.get("displayName") or name,
        "description": None,
        "config": variables.get("config") or "{}",
        "sweepName": None,
        "project": project,
        "historyLineCount": 0,
    }, run


def answer(query, variables):
    if "__type" in query or "__schema" in query:
        return {name: None for name in ()}
    if "upsertBucket" in query:
        found, run = bucket(variables)
        inserted, run["inserted"] = run["inserted"], False
        return {"upsertBucket": {"bucket": found, "inserted": inserted}}
    if "createRunFiles" in query:
        base = f"http://127.0.0.1:{sys.argv[1]}/upload/"
        files = [{"name": f, "uploadUrl": base + f, "displayName": f} for f in variables.get("files", [])]
        return {"createRunFiles": {"runID": "r1", "uploadHeaders": [], "files": files}}
    if "serverInfo" in query:
        return {
            "serverInfo": {
                "cliVersionInfo": {"max_cli_version": "9.0.0"},
                "latestLocalVersionInfo": None,
                "features": [],
            },
            "viewer": {"id": "v1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
        }
    if "viewer" in query:
        viewer = {"id": "v1", "entity": "me", "username": "me", "email": "a@b", "admin": False, "flags": "{}"}
        return {"viewer": viewer | {"teams": {"edges": []}, "apiKeys": {"edges": []}}}
    return {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        try:
            body = json.loads(body)
        except ValueError:
            body = body.decode("utf-8", "replace")[:2000]
        with open(sys.argv[2], "a") as log:
            log.write(json.dumps({"method": self.command, "path": self.path, "body": body}) + "\n")
        if self.path.startswith("/graphql"):
            self.reply({"data": answer(body["query"], body.get("variables") or {})})
        else:
            self.reply({})

    do_GET = do_POST = do_PUT = handle_any


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
