"""Prints the records of a `.wandb` file as the client of wandb 0.19 reads them: `python read_wandb.py FILE`."""

import sys
from collections import Counter

import wandb

wandb._assert_is_internal_process = True
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402
from wandb.sdk.internal.datastore import DataStore  # noqa: E402

store = DataStore()
store.open_for_scan(sys.argv[1])
kinds = Counter()
first = {}
while (data := store.scan_data()) is not None:
    record = Record()
    record.ParseFromString(data)
    kind = record.WhichOneof("record_type")
    kinds[kind] += 1
    assert record.num == kinds.total(), record.num
    first.setdefault(kind, record)
    last = record
print(dict(kinds))
for record in [*first.values(), last]:
    print(str(record)[:700])
