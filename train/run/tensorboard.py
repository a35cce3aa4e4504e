"""Writes TensorBoard's event files, at once rather than in a thread.

tensorboardX's own `SummaryWriter` writes in a thread: on a full disk that dies, and the training waits for
it without end.
"""

from __future__ import annotations

import importlib.util
import os
import time
from typing import Any


class EventFile:
    """An event file in a folder; the folder is made if need be.

    Args:
      folder: a folder of this machine.
      first_step: the step that the run goes on after; points of later steps in older files do not count any
        more.

    Raises:
      OSError: it cannot be written.
    """

    def __init__(self, folder: str, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        os.makedirs(folder, exist_ok=True)
        self._writer = EventsWriter(os.path.join(folder, 'events'))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
        self._writer.flush()

    def add(self, step: int | None, values: dict[str, Any]) -> None:
        """Adds a point for each value, under its tag.

        Raises:
          OSError: it cannot be written.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def is_available() -> bool:
    """Whether tensorboardX is installed."""
    return importlib.util.find_spec('tensorboardX') is not None
