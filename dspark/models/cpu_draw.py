"""LLVM code that draws tokens from logits: a slot of all blocks in one kernel.

PyTorch takes some twenty-five operations for that, each of which costs more in being called than in its work.
"""

import math
from collections.abc import Callable

from llvmlite import ir

from dspark.models.cpu_emitter import F32, F64, I32, I64, Emitter, Machine, Value, lanes_for
from dspark.models.cpu_verdict import drawn_index, sum_from

HALVINGS = 24  # of the range of logits; what lies closer together than a 2^24th of it counts as equal


def draw_kernel(machine: Machine, vocab: int, candidates: int, furthest: float, least: float) -> ir.Module:
    """Draw a token of each row from its `candidates` likeliest under logits + bias.

    The law of these, which is written too, is cut short as in `truncated_probs`, but that of equals the first ones are
    kept. Numbers further from 0 than `furthest` count as that far, NaN as the least; a weight below exp(least) is 0.

    Fields: logits (row stride slots * vocab), bias [N, vocab], which is written over, ids [vocab], settings [N, 4]
    (temperature, top-k, top-p, min-p), draws in fp64 (stride slots), tokens (stride slots + 1), support and probs
    [candidates] (stride slots * candidates), slots; items: rows.
    """
    e = Emitter("ffqfqqqfii", machine, math.gcd(lanes_for(vocab, machine), candidates))
    b = e.b
    logits, bias, ids, settings, draws, tokens, support, probs, slots, _ = e.fields
    with e.loop(e.first, e.last) as row:
        scores, first_slot = b.gep(bias, [b.mul(row, I64(vocab))]), b.mul(row, slots)
        best, lowest = _add_cleaned(e, b.gep(logits, [b.mul(first_slot, I64(vocab))]), scores, vocab, furthest)
        own = b.mul(first_slot, I64(candidates))
        weights, chosen = b.gep(probs, [own]), b.gep(support, [own])
        _collect_largest(e, scores, (lowest, best), ids, weights, chosen, (vocab, candidates))

        own_settings = b.gep(settings, [b.mul(row, I64(4))])
        temperature, top_k, top_p, min_p = (b.load(b.gep(own_settings, [I64(i)])) for i in range(4))
        with e.loop(I64(0), I64(candidates), e.lanes) as i:
            exponent = b.fdiv(b.fsub(e.load(weights, i), e.spread(best)), e.spread(temperature))
            seen = b.fcmp_ordered(">=", exponent, e.constant(least))
            e.store(b.select(seen, e.exp(exponent), e.constant(0.0)), weights, i)
        _keep(e, weights, scores, candidates, lambda weight, rank, held, total: b.fcmp_ordered("<", rank, top_k))
        _keep(
            e,
            scores,
            weights,
            candidates,
            lambda weight, rank, held, total: b.and_(
                b.fcmp_ordered("<", held, b.fmul(top_p, total)), b.fcmp_ordered(">=", weight, min_p)
            ),
        )

        total = sum_from(e, weights, I64(candidates), F32(0.0))
        with e.loop(I64(0), I64(candidates), e.lanes) as i:
            e.store(b.fdiv(e.load(weights, i), e.spread(total)), weights, i)
        index = drawn_index(e, weights, candidates, b.load(b.bitcast(b.gep(draws, [first_slot]), F64.as_pointer())))
        b.store(b.load(b.gep(chosen, [index])), b.gep(tokens, [b.add(first_slot, row)]))
    b.ret_void()
    return e.module


def _add_cleaned(e: Emitter, x: Value, y: Value, count: int, furthest: float) -> tuple[Value, Value]:
    """y = x + y, numbers alone: see `draw_kernel`; the largest and the smallest."""
    b, start = e.b, e.constant(-math.inf)
    with e.sums(I64(0), I64(count), [start, start], e.lanes) as (i, carried, results):
        value = b.fadd(e.load(x, i), e.load(y, i))
        value = b.fneg(e.maximum(b.fneg(e.maximum(value, e.constant(-furthest))), e.constant(-furthest)))
        e.store(value, y, i)
        carried[:] = [e.maximum(carried[0], value), e.maximum(carried[1], b.fneg(value))]
    return e.highest(results[0]), b.fneg(e.highest(results[1]))


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
    b, (count, wanted) = e.b, sizes
    counts = ir.VectorType(I32, e.lanes)

    def number_from(bound: Value) -> Value:
        """How many are not below it."""
        with e.sums(I64(0), I64(count), [ir.Constant(counts, [0] * e.lanes)], e.lanes) as (i, carried, results):
            reached = b.fcmp_ordered(">=", e.load(x, i), e.spread(bound))
            carried[0] = b.add(carried[0], b.zext(reached, counts))
        total = e.function(f"llvm.vector.reduce.add.v{e.lanes}i32", I32, [counts])
        return b.zext(b.call(total, [results[0]]), I64)

    # At least so many as wanted lie from `low` on and, unless all are equal, fewer from `high` on.
    with e.sums(I64(0), I64(HALVINGS), [*bounds, number_from(bounds[1])]) as (_, carried, (low, high, above)):
        middle = b.fmul(b.fadd(low, high), F32(0.5))
        number = number_from(middle)
        enough = b.icmp_unsigned(">=", number, I64(wanted))
        carried[:] = [b.select(enough, middle, low), b.select(enough, high, middle), b.select(enough, above, number)]

    with e.sums(I64(0), I64(count), [I64(0), b.sub(I64(wanted), above)], e.lanes) as (i, carried, _):
        looked_at = b.select(e.any_from(e.load(x, i), low), I64(e.lanes), I64(0))
        with e.sums(i, b.add(i, looked_at), list(carried)) as (place, inner, results):
            found, room = inner
            value = b.load(b.gep(x, [place]))
            surely = b.fcmp_ordered(">=", value, high)
            between = b.and_(b.fcmp_ordered(">=", value, low), b.icmp_signed(">", room, I64(0)))
            taken = b.and_(b.or_(surely, between), b.icmp_unsigned("<", found, I64(wanted)))
            with e.loop(I64(0), b.zext(taken, I64)):
                b.store(value, b.gep(values, [found]))
                b.store(b.load(b.gep(ids, [place])), b.gep(chosen, [found]))
            inner[:] = [
                b.add(found, b.zext(taken, I64)),
                b.sub(room, b.zext(b.and_(taken, b.not_(surely)), I64)),
            ]
        carried[:] = results


def _keep(e: Emitter, x: Value, y: Value, count: int, kept: Callable[..., Value]) -> None:
    """y = the weights x that are kept, else 0; kept(weight, how many rank before it, what these hold, total) says."""
    b = e.b
    indices = ir.VectorType(I32, e.lanes)
    total, lanes = sum_from(e, x, I64(count), F32(0.0)), ir.Constant(indices, list(range(e.lanes)))
    with e.loop(I64(0), I64(count)) as i:
        weight = b.load(b.gep(x, [i]))
        with e.sums(I64(0), I64(count), [e.constant(0.0)] * 2, e.lanes) as (j, carried, results):
            other, own = e.load(x, j), e.spread(weight)
            earlier = b.icmp_signed("<", b.add(e.spread(b.trunc(j, I32)), lanes), e.spread(b.trunc(i, I32)))
            equal = b.and_(b.fcmp_ordered("==", other, own), earlier)
            before = b.or_(b.fcmp_ordered(">", other, own), equal)
            parts = (b.select(before, part, e.constant(0.0)) for part in (e.constant(1.0), other))
            carried[:] = [b.fadd(old, new) for old, new in zip(carried, parts)]
        rank, held = (e.total(result) for result in results)
        b.store(b.select(kept(weight, rank, held, total), weight, F32(0.0)), b.gep(y, [i]))
