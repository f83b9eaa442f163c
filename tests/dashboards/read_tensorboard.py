"""Prints the data that TensorBoard reads from a folder: `python read_tensorboard.py FOLDER`."""

import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
print("file_version", events.file_version)
for tag in events.Tags()["scalars"]:
    points = events.Scalars(tag)
    print(tag, len(points), "first", (points[0].step, points[0].value), "last", (points[-1].step, points[-1].value))
