"""Curves for TensorBoard, written in the caller's thread: on disk at ``flush``, and not a byte of them where that fails.

tensorboardX makes the events; its own writer hands them to a thread by a queue that its ``flush`` does not wait for, so
that a run killed after a checkpoint could lack its last points, and on a full disk the thread dies and the run hangs.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

SECONDS, BYTES = 30, 1_000_000  # what is newer, or less, may wait in memory
_POSITIVE = 1e-12 * 1.1 ** np.arange(774)  # up to 1e20: TensorFlow's own limits of a histogram's bins
_BINS = [*-_POSITIVE[::-1], 0.0, *_POSITIVE]


class Curves:
    """One TensorBoard run: a file of events in ``folder``.

    ``purge_step``: TensorBoard forgets what other files of the folder have from this step on. Raises OSError, which names
    the file, where the disk refuses; the file then is as it was, and what was to be written is kept.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = (
            time.time_ns()
        )  # two files of one second must differ, and TensorBoard reads a folder's in their names' order
        self.path = folder / f"events.out.tfevents.{now // 10**9}.{now}"
        self.file = self.path.open("xb", buffering=0)
        self.size = 0  # of what is whole in the file
        self.waiting = bytearray()
        self.flushed = time.monotonic()
        self.synced = True
        self._add(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int, description: str = "") -> None:
        """``description``: Markdown, which TensorBoard shows beside the curve."""
        what = summary.scalar(tag, value, summary_description=description)
        if description:  # tensorboardX leaves out whose the description is
            what.value[0].metadata.plugin_data.plugin_name = "scalars"
        self.add(what, step)

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self.add(summary.histogram(tag, values, _BINS), step)

    def add_image(self, tag: str, image: np.ndarray, step: int) -> None:
        """``image``: uint8 [H, W, 3]."""
        self.add(summary.image(tag, image, dataformats="HWC"), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """``text``: Markdown."""
        what = summary.text(tag, text)
        what.value[0].tag = tag  # tensorboardX adds an ending
        self.add(what, step)

    def add(self, what: Summary, step: int | None = None) -> None:
        self._add(Event(summary=what, step=step))
        if len(self.waiting) > BYTES or time.monotonic() > self.flushed + SECONDS:
            self._write()

    def _add(self, event: Event) -> None:
        """As a TFRecord: length, its checksum, content, its checksum (TensorFlow's core/lib/io/record_writer.h)."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        for part in (
            length,
            struct.pack("<I", masked_crc32c(length)),
            content,
            struct.pack("<I", masked_crc32c(content)),
        ):
            self.waiting += part

    def _write(self) -> None:
        self.flushed = time.monotonic()
        try:
            done = 0
            while done < len(self.waiting):
                done += self.file.write(memoryview(self.waiting)[done:])
        except OSError as error:
            self.file.truncate(self.size)  # an event's half would hide all after it
            self.file.seek(self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self.size += done
        self.synced = False
        self.waiting = bytearray()

    def flush(self) -> None:
        """All is on disk."""
        if self.waiting:
            self._write()
        if not self.synced:
            os.fsync(self.file.fileno())
            self.synced = True

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.file.close()
