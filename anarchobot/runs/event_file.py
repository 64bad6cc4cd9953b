"""TensorBoard event files: TFRecords of Event protocol buffers, encoded here because tensorboardX imports torch, which
takes seconds.

Field numbers: tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
"""

import errno
import math
import os
import struct
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

_DT_STRING = 7  # of tensorflow/core/framework/types.proto


class EventFile:
    """A new event file in `folder`. Every event is written before the call returns, or raises OSError."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.anarchobot").open("xb", buffering=0)
        self._write(_bytes(3, b"brain.Event:2"))  # the version comes first

    def add_scalars(self, step: int, values: dict[str, float]) -> None:
        if values:
            points = (_bytes(1, tag.encode()) + _float(2, value) for tag, value in values.items())
            self._write(_int(2, step) + _bytes(5, b"".join(_bytes(1, point) for point in points)))

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Shows `text` as Markdown."""
        shape = _bytes(2, _int(1, 1))  # one dimension of size 1
        tensor = _int(1, _DT_STRING) + _bytes(2, shape) + _bytes(8, text.encode())
        metadata = _bytes(1, _bytes(1, b"text"))  # the plugin that shows it
        value = _bytes(1, f"{tag}/text_summary".encode()) + _bytes(8, tensor) + _bytes(9, metadata)
        self._write(_int(2, step) + _bytes(5, _bytes(1, value)))

    def _write(self, event: bytes) -> None:
        """Writes one TFRecord: length, CRC of the length, data, CRC of the data."""
        data = _double(1, time.time()) + event
        length = struct.pack("<Q", len(data))
        append(self._file, length + _masked_crc(length) + data + _masked_crc(data))

    def close(self) -> None:
        self._file.close()


def append(file: FileIO, data: bytes) -> None:
    """Writes all of `data` or raises OSError and writes nothing: a partial record would corrupt what follows."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _int(field: int, value: int) -> bytes:
    """`value` is not negative."""
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    """Strings and messages as well."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    try:
        data = struct.pack("<f", value)
    except OverflowError:  # a perplexity beyond 3.4e38
        data = struct.pack("<f", math.copysign(math.inf, value))
    return _varint(field << 3 | 5) + data


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as in TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
