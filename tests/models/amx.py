"""AMX where the CPU has none: its instructions become calls of functions that do what Intel's manual says of them.

python -m pytest -p tests.models.amx tests/models/test_cpu_ops.py
"""

import ctypes
import dataclasses
import threading
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark.models import cpu_ops
from dspark.models.cpu_emitter import Emitter

REGISTER, PLACE, STRIDE = ctypes.c_int8, ctypes.c_void_p, ctypes.c_int64


class Tiles:
    """The eight registers of a thread, 16 rows of 64 bytes each, and of how many of both LDTILECFG spoke."""

    def __init__(self) -> None:
        self.bytes = np.zeros((8, 16, 64), np.uint8)
        self.rows = self.widths = [0] * 8


of_threads = defaultdict[int, Tiles](Tiles)  # Python's own thread-local data ends with each call from C
used = set[str]()


def ldtilecfg(tiles: Tiles, place: int) -> None:
    read = ctypes.string_at(place, 64)
    tiles.widths, tiles.rows = list(np.frombuffer(read[16:32], np.uint16)), list(read[48:56])
    tiles.bytes[:] = 0


def tilerelease(tiles: Tiles) -> None:
    tiles.rows = tiles.widths = [0] * 8


def tilezero(tiles: Tiles, register: int) -> None:
    tiles.bytes[register] = 0


def in_memory(tiles: Tiles, register: int, place: int, stride: int) -> list[NDArray[np.uint8]]:
    width = int(tiles.widths[register])
    addresses = (place + row * stride for row in range(tiles.rows[register]))
    return [np.ctypeslib.as_array((ctypes.c_uint8 * width).from_address(a)) for a in addresses]


def tileloadd64(tiles: Tiles, register: int, place: int, stride: int) -> None:
    tiles.bytes[register] = 0
    for own, row in zip(tiles.bytes[register], in_memory(tiles, register, place, stride)):
        own[: len(row)] = row


def tilestored64(tiles: Tiles, register: int, place: int, stride: int) -> None:
    for own, row in zip(tiles.bytes[register], in_memory(tiles, register, place, stride)):
        row[:] = own[: len(row)]


def tdpbf16ps(tiles: Tiles, sums: int, x: int, y: int) -> None:
    """sums [M, N] fp32 += x [M, K, 2] y [K, N, 2], of pairs of bf16."""
    pairs = tiles.widths[x] // 4
    ours, others = ((tiles.bytes[r].view(np.uint16).astype(np.uint32) << 16).view(np.float32) for r in (x, y))
    with np.errstate(all="ignore"):  # rows past the last one are whatever memory held
        for half in (0, 1):
            product = ours[: tiles.rows[sums], half::2][:, :pairs] @ others[:pairs, half::2]
            tiles.bytes[sums].view(np.float32)[: len(product)] += product


def instruction(function: Any, *arguments: Any) -> Any:
    def noted(*values: Any) -> None:
        used.add(function.__name__)
        function(of_threads[threading.get_native_id()], *values)

    return ctypes.CFUNCTYPE(None, *arguments)(noted)


INSTRUCTIONS = {
    "x86.ldtilecfg": instruction(ldtilecfg, PLACE),
    "x86.tilerelease": instruction(tilerelease),
    "x86.tilezero": instruction(tilezero, REGISTER),
    "x86.tileloadd64": instruction(tileloadd64, REGISTER, PLACE, STRIDE),
    "x86.tilestored64": instruction(tilestored64, REGISTER, PLACE, STRIDE),
    "x86.tdpbf16ps": instruction(tdpbf16ps, REGISTER, REGISTER, REGISTER),
}


def pytest_configure() -> None:
    """As a plugin: all code that is compiled is for a CPU with AMX, and does without it."""
    machine = cpu_ops.compiler().machine
    cpu_ops.compiler().machine = dataclasses.replace(machine, bf16_tiles=True)
    plain_call = Emitter.call

    def call(self: Emitter, function: Any, *arguments: Any, **options: Any):
        if isinstance(function, str) and function in INSTRUCTIONS:
            function = ctypes.cast(INSTRUCTIONS[function], PLACE).value
        return plain_call(self, function, *arguments, **options)

    Emitter.call = call


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What was never run was not tested."""
    if len(used) < len(INSTRUCTIONS):
        session.exitstatus = 1
        print(f"\nof AMX only {', '.join(used) or 'nothing'} ran")
