"""Checks the data of a run that a server received: `python check_wandb_sync.py LOG METRICS`, with the LOG written by
fake_wandb_server.py."""

import json
import math
import sys

NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "epoch": "train/epoch",
    "tokens": "train/tokens",
    "target_tokens": "train/target_tokens",
    "tokens_per_second": "train/tokens_per_second",
    "valid_loss": "valid/loss",
    "peak_rss_bytes": "system/peak_rss_bytes",
    "step": "train/global_step",
}
rows, last, config, complete = {}, {}, {}, None
for line in open(sys.argv[1]):
    request = json.loads(line)
    body = request["body"]
    if request["path"].endswith("file_stream"):
        files = body.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, row in enumerate(history["content"], history["offset"]):
            rows[number] = json.loads(row)
        for summary in files.get("wandb-summary.json", {"content": []})["content"]:
            last = json.loads(summary)
        complete = (body["exitcode"]) if body.get("complete") else complete
    elif "upsertBucket" in str(body) and body["variables"].get("config"):
        config = json.loads(body["variables"]["config"])
metrics = [json.loads(line) for line in open(sys.argv[2])]
assert len(rows) == len(metrics), (len(rows), len(metrics))
for number, line in enumerate(metrics):
    expected = {name: line[key] for key, name in NAMES.items() if line.get(key) is not None}
    found = {key: value for key, value in rows[number].items() if not key.startswith("_")}
    assert found.keys() == expected.keys(), (number, found, expected)
    # A resumed run reads its lines back with `serde_json`, whose numbers can be off in the last bit.
    assert all(math.isclose(found[key], expected[key], rel_tol=4e-16) for key in expected), (number, found, expected)
    assert rows[number]["_step"] == number and math.isclose(rows[number]["_runtime"], line["elapsed_seconds"])
for key, value in rows[len(metrics) - 1].items():
    assert last[key] == value, key
print("rows", len(rows), "all as in the metrics; exit code", complete)
print("config", {k: v["value"] if k != "long" else len(v["value"]) for k, v in config.items() if k != "_wandb"})
print("charts", config["_wandb"]["value"]["m"][:3])
print("summary", last)
