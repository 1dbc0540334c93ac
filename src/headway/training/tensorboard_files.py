"""TensorBoard's event files after a kill: without the steps that will be done again."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter


def drop_later_events(folder: Path, step: int) -> None:
    """Remove the figures of later steps, and a half-written last record, from all event files of a folder.

    TensorBoard itself would do with the mark that `SummaryWriter(purge_step=...)` leaves (which a TensorBoard that is
    open needs, since it has read them already); whatever else reads event files takes them as they are.

    Args:
        folder: with event files; need not exist.
        step: the last one kept.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.glob("*tfevents*")):
        # Not a name that a reader would take for an event file.
        aside = folder / ".kept.writing"
        with aside.open("wb") as file:
            writer = RecordWriter(file)
            for raw in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(raw)
                if not event.HasField("summary") or event.step <= step:
                    writer.write(raw)
        aside.replace(path)
