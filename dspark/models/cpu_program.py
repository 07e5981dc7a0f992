"""Programs: kernels run one after the other by one call, all threads walking the table of them together.

A decoder layer is ten operations of a few microseconds each; called one by one from Python, a third of a token's time
would go into calling them.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from dspark.models.cpu_linear import TILE_ROWS
from dspark.models.cpu_ops import SERIAL_WORK, CompiledLinear, Field, Kernel, kernel

Built = TypeVar("Built")


class Program:
    """Kernels and their fields, run in the order added."""

    WIDTH = 12  # an address and at most eleven fields

    def __init__(self):
        self._rows: list[list[int]] = []
        self._tensors: list[Tensor] = []  # whose memory the table points to
        self._named: dict[str, list[int]] = {}  # places of named fields in the flat table
        self._places: dict[str, np.ndarray] = {}  # the same, once all are known
        self._table = np.empty(0, np.int64)

    def add(self, kernel: Kernel, *fields: Field | str) -> None:
        """Fields in the kernel's order; one that is a name gets its value at each run."""
        row = [kernel.address]
        for field in fields:
            if isinstance(field, str):
                self._named.setdefault(field, []).append(len(self._rows) * self.WIDTH + len(row))
                field = 0
            if isinstance(field, Tensor):
                self._tensors.append(field)
                field = field.data_ptr()
            row.append(field)
        self._rows.append(row + [0] * (self.WIDTH - len(row)))

    def add_linear(self, linear: CompiledLinear, x: Tensor, y: Tensor, scratch: Tensor, rows: int) -> None:
        """See `CompiledLinear.fields`."""
        self.add(linear.kernel, *linear.fields(x, y, scratch, rows))

    def run(self, **values: Field | np.ndarray | list[int]) -> None:
        """Give all fields of a name its value, or each its own; one that is not given keeps what it had."""
        if self._rows:  # all are known now; lists of Python's numbers take five times the memory of the table
            self._table = np.array(self._rows, dtype=np.int64).reshape(-1)
            self._places = {name: np.array(places) for name, places in self._named.items()}
            self._rows = []
        for name, value in values.items():
            self._table[self._places[name]] = value.data_ptr() if isinstance(value, Tensor) else value
        kernel("sequence", self.WIDTH)(SERIAL_WORK, self._table.ctypes.data, len(self._table) // self.WIDTH)


class Programs(Generic[Built]):
    """What was built for each shape so far, and the buffers that all of them share."""

    def __init__(self, build: Callable[..., Built], widths: dict[str, int], inputs: int):
        """build: rows and whatever else makes the shape -> a program, alone or with what it writes to.

        widths: floats a row of each buffer; inputs: most that a linear map reads, for the scratch of all threads.
        """
        self._build, self._widths, self._inputs = build, widths, inputs
        self._capacity = self._threads = 0
        self._built: dict[tuple, Built] = {}
        self.buffers: dict[str, Tensor] = {}  # [rows or more, width]
        self.scratch = torch.empty(0)

    def get(self, rows: int, *shape) -> Built:
        """Built on first use. What was built points into the buffers, so it goes when they grow."""
        threads = torch.get_num_threads()
        if rows > self._capacity or threads > self._threads:
            self._capacity = max(rows + -rows % TILE_ROWS, self._capacity)  # whole tiles are written
            self._threads = max(threads, self._threads)
            self.buffers = {name: torch.empty(self._capacity, width) for name, width in self._widths.items()}
            self.scratch = torch.empty(self._threads * self._capacity * self._inputs // 2)  # of bf16
            self._built.clear()
        key = rows, *shape
        if key not in self._built:
            self._built[key] = self._build(*key)
        return self._built[key]
