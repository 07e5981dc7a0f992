"""What verdicts on sampled drafts take: truncation of the target's rows and block verification, by kernels and by the
operations that they stand for.

Between two calls 64 MiB are read, as a step reads its weights, so code and numbers come from memory again.

    python benchmarks/verdict.py
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dspark.machine import provenance
from dspark.models import cpu_ops
from dspark.sampling import truncated_probs
from dspark.spec.draft import Draft
from dspark.spec.verify import verify

VOCAB, CANDIDATES, SLOTS = 49_152, 64, 8  # SmolLM2-135M and its drafter
WEIGHTS = torch.zeros(64 << 18)


def measure(requests: int, length: int, temperature: float, top_p: float) -> dict[str, float]:
    rows, generator = requests * (length + 1), np.random.default_rng(0)
    logits = 3 * torch.randn(rows, VOCAB)
    settings = np.array([(temperature, 0, top_p, 0)] * rows, np.float32)
    support = torch.rand(requests, SLOTS, 8_192).topk(CANDIDATES).indices
    draft_probs = torch.rand(support.shape).softmax(-1)
    all_slots, lengths = torch.full((requests,), SLOTS), torch.full((requests,), length)
    draft = Draft(support[..., 0].clone(), support, draft_probs, all_slots, torch.zeros(requests, SLOTS, 1))
    draws = generator.random((requests, SLOTS)), generator.random((requests, SLOTS + 1))
    probs = truncated_probs(logits, *settings.T)
    return {
        "requests": requests,
        "verify_length": length,
        "temperature": temperature,
        "top_p": top_p,
        "truncation_kernel_us": microseconds(cpu_ops.truncated_probs, logits, settings),
        "truncation_us": microseconds(lambda x: truncated_probs(x, *settings.T), logits),
        "verdict_kernel_us": microseconds(cpu_ops.verify, probs, draft, lengths, *draws),
        "verdict_us": microseconds(verify, probs, draft, lengths, *draws),
    }


def microseconds(run: Callable, x: torch.Tensor, *arguments: object) -> float:
    """Median; x may be written over."""
    times = []
    for _ in range(40):
        own = x.clone()
        WEIGHTS.sum()
        started = time.perf_counter()
        run(own, *arguments)
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e6, 1)


@torch.inference_mode()
def main() -> None:
    rows = []
    for requests, length in ((1, 0), (1, 5), (8, 0), (8, 2), (64, 0)):
        for temperature, top_p in ((1.0, 1.0), (0.2, 0.9)):
            rows.append(measure(requests, length, temperature, top_p))
            print(rows[-1])
    print(json.dumps({"rows": rows, **provenance()}))


if __name__ == "__main__":
    main()
