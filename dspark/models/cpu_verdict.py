"""LLVM code for what the target's rows say: probabilities after truncation, and verdicts on drafts.

What `sampling.truncated_probs` and `spec.verify.verify` are made of finds its code and numbers out of the caches, where
each step's weights went through; here each is one kernel.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dspark.models.cpu_emitter import F32, F64, I1, I32, I64, Emitter, Machine, Value, lanes_for
from dspark.sampling import BLOCK

LIKELY = 2.0**-10  # times the likeliest token: few are, and filters mostly cut above it
ONE = 0x3F800000  # the bits of 1.0; those of smaller positive numbers are smaller
BELOW_ONE = 1 - 2.0**-51  # a draw next to 1 times a sum may round to the sum


def truncated_probs_kernel(machine: Machine, vocab: int, least: float) -> Emitter:
    """`sampling.truncated_probs` in place, each row by one thread; a weight below exp(least) is 0.

    Fields: x [N, vocab], settings [N, 4] (temperature above 0, top-k up to vocab, top-p, min-p), scratch [threads,
    vocab + 16]; items: rows.
    """
    e = Emitter("fffi", machine, lanes_for(vocab, machine))
    x, settings, scratch, _ = e.fields
    likely = scratch + e.thread * (vocab + 16)
    with e.items() as row:
        own, own_settings = x + row * vocab, settings + row * 4
        temperature, top_k, top_p, min_p = (own_settings[i] for i in range(4))
        total = _add_weights(e, own, vocab, temperature, least)

        # Floors of weights, found by halving the range of their bits, among the likely ones if these are enough.
        by_count, by_mass = top_k < float(vocab), top_p < 1.0
        filtered = by_count | by_mass
        count = _collect_likely(e, own, e.select(filtered, vocab, 0), likely)
        has_rank, has_mass = count.to(F32) >= top_k, sum_from(e, likely, count, 0.0) >= top_p * total
        enough = filtered & e.select(by_count, has_rank, has_mass)
        values, size = e.select(enough, likely, own), e.select(enough, count, vocab)
        floor = _floor(e, by_count, lambda at: sum_from(e, values, size, at, count=True) >= top_k)
        wanted = top_p * e.select(by_count, sum_from(e, values, size, floor), total)
        nucleus = _floor(e, by_mass, lambda at: sum_from(e, values, size, e.maximum(at, floor)) >= wanted)
        floor = e.maximum(e.maximum(floor, nucleus), min_p)

        kept = sum_from(e, values, size, floor)
        with e.loop(0, vocab, e.lanes) as i:
            weight = own.vector(i)
            own[i] = e.select(weight >= floor, weight, 0.0) / kept
    return e


def _add_weights(e: Emitter, x: Value, count: int, temperature: Value, least: float) -> Value:
    """x = exp((x - the largest) / temperature), 0 where that is below exp(least) or not a number; their sum."""
    with e.sums(0, count, [e.constant(-math.inf)], e.lanes) as (i, carried, results):
        carried[0] = e.maximum(x.vector(i), carried[0])
    best, divisor = e.spread(e.reduce("fmax", results[0])), e.spread(temperature)
    with e.sums(0, count, [e.constant(0.0)], e.lanes) as (i, carried, results):
        exponent = (x.vector(i) - best) / divisor
        weight = e.select(exponent >= least, e.exp(exponent), 0.0)
        x[i] = weight
        carried[0] += weight
    return e.total(results[0])


def _collect_likely(e: Emitter, x: Value, count: Value, y: Value) -> Value:
    """y = the weights of x from LIKELY on, then a vector of zeros; how many they are."""
    with sums_from(e, x, count, LIKELY, [0]) as (place, carried, (found,), (total,)):
        weight = x[place]
        taken = (weight >= LIKELY).to(I64)
        with e.loop(0, taken):
            y[found] = weight
        carried[0] += taken
    y[total] = e.constant(0.0)
    return total


@contextmanager
def sums_from(e: Emitter, x: Value, count: Any, bound: Any, initial: list) -> Iterator[tuple]:
    """As `Emitter.sums` over places of x, without vectors of numbers that are all below the bound.

    Yields (place, carried, what was carried there, results).
    """
    with e.sums(0, count, initial, e.lanes) as (i, carried, results):
        looked_at = e.select(e.reduce("or", x.vector(i) >= bound), e.lanes, 0)
        with e.sums(i, i + looked_at, list(carried)) as (place, inner, found):
            yield place, inner, found, results
        carried[:] = found


def sum_from(e: Emitter, x: Value, size: Any, bound: Any, count: bool = False) -> Value:
    """The sum, or the number, of those of x that are not below the bound; zeros may follow x to a whole vector."""
    with e.sums(0, size, [e.constant(0.0)], e.lanes) as (i, carried, results):
        value = x.vector(i)
        carried[0] += e.select(value >= bound, e.constant(1.0) if count else value, 0.0)
    return e.total(results[0])


def _floor(e: Emitter, wanted: Value, reached: Callable[[Value], Value]) -> Value:
    """The largest number up to 1 that is still `reached`, as smaller ones are; 0 if none is wanted."""
    steps = e.select(wanted, ONE.bit_length() + 1, 0)
    with e.sums(0, steps, [I32(0), I32(ONE + 1)]) as (_, carried, (low, high)):
        middle = (low + high) >> 1
        enough = reached(middle.bits(F32))
        carried[:] = [e.select(enough, middle, low), e.select(enough, high, middle)]
    return low.bits(F32)


def verify_kernel(machine: Machine, vocab: int, candidates: int) -> Emitter:
    """`spec.verify.verify`, each request by one thread; rows of target_probs that end a round are written over.

    Fields: target_probs [B, vocab], lengths [R], tokens [R, G], support and draft_probs [R, G, candidates]; draws in
    fp64 [R, G + 1], one whether the round may end before slot k, 0 first, and one of the token there; accepted and next
    tokens [R], G; items: R.
    """
    e = Emitter("fqqqfffqqii", machine, lanes_for(math.gcd(vocab, BLOCK), machine))
    probs, lengths, tokens, support, draft_probs, accept, own, accepted, next_token, slots, _ = e.fields
    accept, own = (draws.bits(F64.as_pointer()) for draws in (accept, own))
    tiny = 2.0**-126
    with e.items() as request:
        with e.sums(0, request, [request]) as (i, carried, (first_row,)):
            carried[0] += lengths[i]
        length, first_slot, first_draw = lengths[request], request * slots, request * (slots + 1)

        def row_at(k: Value) -> Value:
            return probs + (first_row + k) * vocab

        def drafted(k: Value) -> Value:
            """How many tokens the draft distribution of slot k speaks of: none behind the last verified one."""
            return e.select(k < length, candidates, 0)

        def entry(k: Value, i: Value) -> tuple[Value, Value]:
            """One of them, and its probability."""
            place = (first_slot + k) * candidates + i
            return support[place], draft_probs[place].to(F64)

        # w, the longest prefix so far at which the round may end, and w there
        with e.sums(0, length + 1, [F64(1.0), 0, F64(1.0)]) as (k, carried, (kept, end, kept_there)):
            row = row_at(k)
            with e.sums(0, drafted(k), [F64(0.0)] * 3) as (i, inner, (overlap, target_prob, draft_prob)):
                token, q = entry(k, i)
                p = row[token].to(F64)
                is_own = token == tokens[first_slot + k]
                inner[:] = [
                    overlap + e.minimum(kept * p, q),
                    e.select(is_own, p, target_prob),
                    draft_prob + e.select(is_own, q, 0.0),
                ]
            mass = e.maximum(kept - overlap, 0.0)
            rest = mass + 1.0 - kept
            ending = e.select(kept < 1.0, mass / rest, 1.0)
            ends = accept[first_draw + k] < ending
            stays = kept * (target_prob / e.maximum(draft_prob, tiny))
            carried[:] = [e.minimum(stays, 1.0), e.select(ends, k, end), e.select(ends, kept, kept_there)]
        accepted[request] = end

        row, count = row_at(end), drafted(end)
        with e.loop(0, count) as i:
            token, q = entry(end, i)
            row[token] = e.maximum(row[token].to(F64) - q / kept_there, 0.0).to(F32)
        total, _, _ = _cumulative_by_blocks(e, row, vocab, F64(0.0))
        nothing = total == 0.0  # then p is q / w up to rounding
        with e.loop(0, e.select(nothing, count, 0)) as i:
            token, q = entry(end, i)
            row[token] = row[token] + (q / kept_there).to(F32)
        next_token[request] = drawn_index(e, row, vocab, own[first_draw + end])
    return e


def _cumulative_by_blocks(e: Emitter, x: Value, count: int, bound: Any) -> list[Value]:
    """The sum; how many blocks' cumulative sums do not exceed the bound, and the last of these sums."""
    with e.sums(0, -(-count // BLOCK), [F64(0.0), 0, F64(0.0)]) as (j, carried, results):
        total, passed, before = results
        start = j * BLOCK
        with e.sums(start, e.minimum(start + BLOCK, count), [e.constant(0.0)], e.lanes) as (i, inner, of_block):
            inner[0] += x.vector(i)
        so_far = total + e.total(of_block[0]).to(F64)
        passes = so_far <= bound
        carried[:] = [so_far, passed + passes.to(I64), e.select(passes, so_far, before)]
    return results


def drawn_index(e: Emitter, x: Value, count: int, draw: Value) -> Value:
    """As `sampling.categorical`: the first index, of those above 0, whose cumulative sum is above the draw's share."""
    total, _, _ = _cumulative_by_blocks(e, x, count, F64(0.0))
    bound = draw * BELOW_ONE * total
    _, block, before = _cumulative_by_blocks(e, x, count, bound)
    start = e.minimum(block, -(-count // BLOCK) - 1) * BLOCK
    with e.sums(start, e.minimum(start + BLOCK, count), [before, start, I1(0)]) as (i, carried, results):
        (so_far, chosen, done), value = results, x[i]
        counts = ~done & (value > 0.0)
        so_far = so_far + value.to(F64)
        carried[:] = [so_far, e.select(counts, i, chosen), done | (so_far > bound)]
    return results[1]
