"""Which linear map reads its weight fastest: `F.linear`, oneDNN's packed layout, or our bf16 kernel?

Decoding reads every weight once a step, so for few rows time is bytes / memory bandwidth and the figure to look at
is milliseconds, and GB/s beside what a plain sum over a large tensor reaches. Where rows are many, GFLOP/s count.

    python benchmarks/linear.py
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from dspark.machine import provenance
from dspark.models import cpu_ops
from dspark.models.layers import PackedLinear, has_bf16_products

OUT, IN = 3072, 576  # SmolLM2's gate and up maps, fused
WEIGHTS = 120  # together far larger than any cache
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 16, 32, 64, 128, 256)


def median_seconds(run, repeats: int = 9) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    weights = [torch.randn(OUT, IN).bfloat16() for _ in range(WEIGHTS)]
    wide = [w.float() for w in weights]
    systems: dict[str, tuple[torch.dtype, Sequence[Callable[[torch.Tensor], torch.Tensor]]]] = {
        "f_linear_fp32": (torch.float32, [functools.partial(F.linear, weight=w) for w in wide]),
        "packed_fp32": (torch.float32, [PackedLinear(w) for w in wide]),
    }
    if has_bf16_products(torch.device("cpu")):
        systems["packed_bf16"] = (torch.bfloat16, [PackedLinear(w) for w in weights])
    if cpu_ops.available():
        systems["compiled"] = (torch.float32, [cpu_ops.CompiledLinear(w) for w in weights])
    plain = torch.randn(WEIGHTS * OUT * IN)
    print(f"sum of a large tensor: {4 * plain.numel() / median_seconds(plain.sum) / 1e9:.1f} GB/s")
    rows = []
    for n in ROWS:
        row: dict[str, float] = {"rows": n}
        for name, (dtype, maps) in systems.items():
            x = torch.randn(n, IN, dtype=dtype)
            seconds = median_seconds(lambda x=x, maps=maps: [linear(x) for linear in maps])
            item = 4 if name.endswith("fp32") else 2
            row[f"{name}_ms"] = round(seconds / WEIGHTS * 1e3, 3)
            row[f"{name}_gb_per_s"] = round(WEIGHTS * OUT * IN * item / seconds / 1e9, 1)
            row[f"{name}_gflop_per_s"] = round(WEIGHTS * OUT * IN * 2 * n / seconds / 1e9)
        print(row)
        rows.append(row)
    print(json.dumps({"rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
