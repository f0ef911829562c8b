"""Frames of a log: each record with its length and hashes, so that a torn last record is found."""

from __future__ import annotations

import struct
import zlib

import xxhash

from .errors import DamagedLog

_HEAD = struct.Struct("<4sIQ")  # magic, bytes of the payload, XXH3-64 of the payload
_CHECK = struct.Struct("<I")  # CRC-32 of the head
_MAGIC = b"TSL1"
HEADER_BYTES = _HEAD.size + _CHECK.size


def frame(payload: bytes) -> bytes:
    """The record as it lies in a log."""
    head = _HEAD.pack(_MAGIC, len(payload), xxhash.xxh3_64_intdigest(payload))
    return head + _CHECK.pack(zlib.crc32(head)) + payload


def read_frames(data: bytes) -> tuple[list[bytes], int]:
    """The records, and the end of the last complete one.

    The rest is a torn record: one append was cut off by a crash and never acknowledged. Raises DamagedLog if a whole
    record follows, because then an acknowledged record is damaged.
    """
    payloads, at = [], 0
    while (found := _frame_at(data, at)) is not None:
        payload, at = found
        payloads.append(payload)
    search = data.find(_MAGIC, at + 1)
    while search >= 0:
        if _frame_at(data, search) is not None:
            raise DamagedLog(f"record {len(payloads)} at byte {at}")
        search = data.find(_MAGIC, search + 1)
    return payloads, at


def _frame_at(data: bytes, at: int) -> tuple[bytes, int] | None:
    """The payload at a place and the end of its frame, None if there is no whole frame."""
    start = at + HEADER_BYTES
    if start > len(data):
        return None
    head = data[at : at + _HEAD.size]
    magic, size, digest = _HEAD.unpack(head)
    (check,) = _CHECK.unpack_from(data, at + _HEAD.size)
    if magic != _MAGIC or check != zlib.crc32(head) or start + size > len(data):
        return None
    payload = data[start : start + size]
    return (payload, start + size) if xxhash.xxh3_64_intdigest(payload) == digest else None
