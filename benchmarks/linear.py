"""Is a weight packed for oneDNN read faster than `F.linear` reads it?

Decoding reads every weight once a step, so for few rows time is bytes / memory bandwidth and the figure to look at
is GB/s; the roofline is what a plain sum over a large tensor reaches. Where rows are many, GFLOP/s count.

    python benchmarks/linear.py
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

from dspark.eval.machine import provenance
from dspark.models.layers import Linear, storage_dtype, use_packed

OUT, IN = 3072, 576  # SmolLM2's gate and up maps, fused
WEIGHTS = 40  # together far larger than any cache
ROWS = (1, 2, 4, 5, 8, 16, 32, 64)


def median_seconds(run, repeats: int = 9) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    dtype = storage_dtype(torch.bfloat16, torch.device("cpu"))
    weights = [torch.randn(OUT, IN, dtype=dtype) for _ in range(WEIGHTS)]
    packed = [Linear(w, use_packed(torch.bfloat16, torch.device("cpu"))) for w in weights]
    num_bytes = WEIGHTS * OUT * IN * dtype.itemsize
    plain = torch.randn(num_bytes // 4)
    rows = []
    print(f"sum of a large tensor: {num_bytes / median_seconds(plain.sum) / 1e9:.1f} GB/s")
    for n in ROWS:
        x = torch.randn(n, IN, dtype=dtype)
        seconds = {
            "f_linear": median_seconds(lambda x=x: [F.linear(x, w) for w in weights]),
            "packed": median_seconds(lambda x=x: [linear(x) for linear in packed]),
        }
        row = {"rows": n} | {f"{k}_gb_per_s": round(num_bytes / s / 1e9, 1) for k, s in seconds.items()}
        print(row)
        rows.append(row)
    print(json.dumps({"dtype": str(dtype), "rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
