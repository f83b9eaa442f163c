"""Prints the constants used in the tests of `tensorboard.rs` and `wandb.rs`.

    pip install tensorboard==2.21.0 wandb==0.19.11
    python record_vectors.py
"""

import io
import os
import tempfile
import zlib

import wandb

wandb._assert_is_internal_process = True
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402
from wandb.proto.wandb_internal_pb2 import Record  # noqa: E402
from wandb.sdk.internal.datastore import DataStore  # noqa: E402


def framed(event):
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue().hex()


tags = [("train/loss", 1.25), ("train/learning_rate", 1e-4)]
values = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags]
print("SCALAR", framed(Event(wall_time=1.5, step=7, summary=Summary(value=values))))
print("START", framed(Event(wall_time=1.5, step=7, session_log=SessionLog(status=SessionLog.START))))
print("VERSION", framed(Event(wall_time=1.5, file_version="brain.Event:2")))


def stored(records):
    path = os.path.join(tempfile.mkdtemp(), "run.wandb")
    store = DataStore()
    store.open_for_write(path)
    for record in records:
        store._write_data(record)
    store.close()
    return open(path, "rb").read()


# With these lengths, block boundaries occur at every position of a record.
lengths = [*range(32700, 32800), *range(100), 200000]
whole = stored(bytes(place % 251 for place in range(length)) for length in lengths)
print("FILE", len(whole), hex(zlib.crc32(whole)))

summary, history = Record(num=1), Record(num=2)
row = [("_step", "0"), ("_runtime", "2.5"), ("_timestamp", "102.5"), ("train/global_step", "7"), ("train/loss", "1.25")]
for key, value in row:
    summary.summary.update.add(nested_key=[key], value_json=value)
    history.history.item.add(nested_key=[key], value_json=value)
history.history.step.SetInParent()
print("ROW", hex(zlib.crc32(stored([summary.SerializeToString(), history.SerializeToString()])[7:])), stored([history.SerializeToString()])[7:].hex())
