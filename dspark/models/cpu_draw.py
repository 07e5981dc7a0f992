"""LLVM code that draws tokens from logits: a slot of all blocks in one kernel.

PyTorch takes some twenty-five operations for that, each of which costs more in being called than in its work.
"""

import math
from collections.abc import Callable

from dspark.models.cpu_emitter import F64, I32, I64, Emitter, Machine, Value, lanes_for
from dspark.models.cpu_verdict import drawn_index, sum_from, sums_from

HALVINGS = 24  # of the range of logits; what lies closer together than a 2^24th of it counts as equal


def draw_kernel(machine: Machine, vocab: int, candidates: int, furthest: float, least: float) -> Emitter:
    """Draw a token of each row from its `candidates` likeliest under logits + bias.

    The law of these, which is written too, is cut short as in `truncated_probs`, but that of equals the first ones are
    kept. Numbers further from 0 than `furthest` count as that far, NaN as the least; a weight below exp(least) is 0.

    Fields: logits (row stride slots * vocab), bias [N, vocab], which is written over, ids [vocab], settings [N, 4]
    (temperature, top-k, top-p, min-p), draws in fp64 (stride slots), tokens (stride slots + 1), support and probs
    [candidates] (stride slots * candidates), slots; items: rows.
    """
    e = Emitter("ffqfqqqfii", machine, math.gcd(lanes_for(vocab, machine), candidates))
    logits, bias, ids, settings, draws, tokens, support, probs, slots, _ = e.fields
    with e.items() as row:
        scores, first_slot = bias + row * vocab, row * slots
        best, lowest = _add_cleaned(e, logits + first_slot * vocab, scores, vocab, furthest)
        weights, chosen = probs + first_slot * candidates, support + first_slot * candidates
        _collect_largest(e, scores, (lowest, best), ids, weights, chosen, (vocab, candidates))

        own_settings = settings + row * 4
        temperature, top_k, top_p, min_p = (own_settings[i] for i in range(4))
        with e.loop(0, candidates, e.lanes) as i:
            exponent = (weights.vector(i) - best) / temperature
            weights[i] = e.select(exponent >= least, e.exp(exponent), 0.0)
        _keep(e, weights, scores, candidates, lambda weight, rank, held, total: rank < top_k)
        _keep(
            e,
            scores,
            weights,
            candidates,
            lambda weight, rank, held, total: (held < top_p * total) & (weight >= min_p),
        )

        total = sum_from(e, weights, candidates, 0.0)
        with e.loop(0, candidates, e.lanes) as i:
            weights[i] = weights.vector(i) / total
        index = drawn_index(e, weights, candidates, (draws + first_slot).bits(F64.as_pointer())[0])
        tokens[first_slot + row] = chosen[index]
    return e


def _add_cleaned(e: Emitter, x: Value, y: Value, count: int, furthest: float) -> tuple[Value, Value]:
    """y = x + y, numbers alone: see `draw_kernel`; the largest and the smallest."""
    start = e.constant(-math.inf), e.constant(math.inf)
    with e.sums(0, count, list(start), e.lanes) as (i, carried, (largest, smallest)):
        value = e.minimum(e.maximum(x.vector(i) + y.vector(i), -furthest), furthest)
        y[i] = value
        carried[:] = [e.maximum(value, largest), e.minimum(value, smallest)]
    return e.reduce("fmax", largest), e.reduce("fmin", smallest)


def _collect_largest(
    e: Emitter,
    x: Value,
    bounds: tuple[Value, Value],
    ids: Value,
    values: Value,
    chosen: Value,
    sizes: tuple[int, int],
) -> None:
    """The largest of x in their order, and their ids. sizes: of how many, how many; bounds: smallest, largest of x."""
    count, wanted = sizes

    def number_from(bound: Value) -> Value:
        """How many are not below it."""
        with e.sums(0, count, [e.constant(0, I32)], e.lanes) as (i, carried, results):
            carried[0] += (x.vector(i) >= bound).to(I32)
        return e.reduce("add", results[0]).to(I64)

    # At least so many as wanted lie from `low` on and, unless all are equal, fewer from `high` on.
    with e.sums(0, HALVINGS, [*bounds, number_from(bounds[1])]) as (_, carried, (low, high, above)):
        middle = (low + high) * 0.5
        number = number_from(middle)
        enough = number >= wanted
        carried[:] = [e.select(enough, middle, low), e.select(enough, high, middle), e.select(enough, above, number)]

    with sums_from(e, x, count, low, [0, wanted - above]) as (place, carried, (found, room), _):
        value = x[place]
        surely = value >= high
        taken = (surely | ((value >= low) & (room > 0))) & (found < wanted)
        with e.loop(0, taken.to(I64)):
            values[found] = value
            chosen[found] = ids[place]
        carried[:] = [found + taken.to(I64), room - (taken & ~surely).to(I64)]


def _keep(e: Emitter, x: Value, y: Value, count: int, kept: Callable[..., Value]) -> None:
    """y = the weights x that are kept, else 0; kept(weight, how many rank before it, what these hold, total) says."""
    total, lanes = sum_from(e, x, count, 0.0), e.lane_numbers(I32)
    with e.loop(0, count) as i:
        weight = x[i]
        with e.sums(0, count, [e.constant(0.0)] * 2, e.lanes) as (j, carried, results):
            other = x.vector(j)
            earlier = lanes + j.to(I32) < i.to(I32)
            before = (other > weight) | ((other == weight) & earlier)
            parts = (e.select(before, part, 0.0) for part in (e.constant(1.0), other))
            carried[:] = [old + new for old, new in zip(carried, parts)]
        rank, held = (e.total(result) for result in results)
        y[i] = e.select(kept(weight, rank, held, total), weight, 0.0)
