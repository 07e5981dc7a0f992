"""What attention over the cache of many requests takes: in AMX tiles, by dot products of bf16 pairs, in vectors of
fp32, and PyTorch's, request by request.

A step of speculative decoding asks for several rows of each request. Whether those rows are nearly free decides what a
draft token costs.

    python benchmarks/attention.py
"""

import json
import statistics
import time
from collections.abc import Callable

import torch

from dspark.machine import provenance
from dspark.models.attention import attend, causal_mask
from dspark.models.cpu_chunks import AttentionShape, Chunks, attend_chunks

KV_HEADS, GROUP, HEAD_DIM = 3, 3, 64  # SmolLM2-135M
LAYERS = 30  # caches, together larger than what stays in the caches near a core
CONTEXT = 256


class InPairs(AttentionShape):
    tiled = False  # pyright: ignore


class InFp32(InPairs):
    in_pairs = False  # pyright: ignore


def measure(requests: int, rows_each: int) -> dict[str, float]:
    slots = CONTEXT + rows_each
    caches = [torch.randn(requests * slots, 2, KV_HEADS, HEAD_DIM).bfloat16() for _ in range(LAYERS)]
    q = torch.randn(requests * rows_each, KV_HEADS * GROUP, HEAD_DIM)
    segments = [(rows_each, i * slots, slots, True) for i in range(requests)]
    row: dict[str, float] = {"requests": requests, "rows_each": rows_each}
    for name, kind in (("tiles", AttentionShape), ("pairs", InPairs), ("fp32", InFp32)):
        shape = kind(KV_HEADS, GROUP, HEAD_DIM, in_bf16=True)
        if name == "fp32" or (shape.tiled if name == "tiles" else shape.in_pairs):
            chunks = Chunks.of(segments, shape)
            row[f"{name}_us"] = median_microseconds(lambda kv, chunks=chunks: attend_chunks(q, kv, chunks), caches)
    mask = causal_mask(rows_each, slots, GROUP, torch.bfloat16, q.device)

    def by_request(kv: torch.Tensor) -> None:
        for request, own in zip(q.bfloat16().split(rows_each), kv.split(slots)):
            attend(request, own[:, 0], own[:, 1], mask)

    row["pytorch_us"] = median_microseconds(by_request, caches)
    return row


def median_microseconds(run: Callable[[torch.Tensor], object], caches: list[torch.Tensor]) -> float:
    times = []
    for _ in range(6):
        started = time.perf_counter()
        for kv in caches:
            run(kv)
        times.append(time.perf_counter() - started)
    return round(statistics.median(times[1:]) / LAYERS * 1e6, 1)


@torch.inference_mode()
def main() -> None:
    rows = []
    for requests, rows_each in ((1, 1), (1, 5), (8, 1), (8, 5), (64, 1), (64, 5)):
        rows.append(measure(requests, rows_each))
        print(rows[-1])
    print(json.dumps({"rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
