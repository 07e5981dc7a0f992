"""LLVM code for what the target's rows say: probabilities after truncation, and verdicts on drafts.

What `sampling.truncated_probs` and `spec.verify.verify` are made of finds its code and numbers out of the caches, where
each step's weights went through; here each is one kernel.
"""

import math
from collections.abc import Callable

from llvmlite import ir

from dspark.models.cpu_emitter import F32, F64, I8, I32, I64, Emitter, Machine, Value, lanes_for
from dspark.sampling import BLOCK

LIKELY = 2.0**-10  # times the likeliest token: few are, and filters mostly cut above it
ONE = 0x3F800000  # the bits of 1.0; those of smaller positive numbers are smaller
BELOW_ONE = 1 - 2.0**-51  # a draw next to 1 times a sum may round to the sum


def truncated_probs_kernel(machine: Machine, vocab: int, least: float) -> ir.Module:
    """`sampling.truncated_probs` in place, each row by one thread; a weight below exp(least) is 0.

    Fields: x [N, vocab], settings [N, 4] (temperature above 0, top-k up to vocab, top-p, min-p), scratch [threads,
    vocab + 16]; items: rows.
    """
    e = Emitter("fffi", machine, lanes_for(vocab, machine))
    b = e.b
    x, settings, scratch, _ = e.fields
    likely = b.gep(scratch, [b.mul(e.thread, I64(vocab + 16))])
    with e.loop(e.first, e.last) as row:
        own, own_settings = b.gep(x, [b.mul(row, I64(vocab))]), b.gep(settings, [b.mul(row, I64(4))])
        temperature, top_k, top_p, min_p = (b.load(b.gep(own_settings, [I64(i)])) for i in range(4))
        total = _add_weights(e, own, vocab, temperature, least)

        # Floors of weights, found by halving the range of their bits, among the likely ones if these are enough.
        by_count, by_mass = b.fcmp_ordered("<", top_k, F32(vocab)), b.fcmp_ordered("<", top_p, F32(1.0))
        filtered = b.or_(by_count, by_mass)
        count = _collect_likely(e, own, b.select(filtered, I64(vocab), I64(0)), likely)
        has_rank = b.fcmp_ordered(">=", b.uitofp(count, F32), top_k)
        has_mass = b.fcmp_ordered(">=", sum_from(e, likely, count, F32(0.0)), b.fmul(top_p, total))
        enough = b.and_(filtered, b.select(by_count, has_rank, has_mass))
        values, size = b.select(enough, likely, own), b.select(enough, count, I64(vocab))
        floor = _floor(e, by_count, lambda at: b.fcmp_ordered(">=", sum_from(e, values, size, at, count=True), top_k))
        wanted = b.fmul(top_p, b.select(by_count, sum_from(e, values, size, floor), total))
        nucleus = _floor(
            e, by_mass, lambda at: b.fcmp_ordered(">=", sum_from(e, values, size, e.maximum(at, floor)), wanted)
        )
        floor = e.maximum(e.maximum(floor, nucleus), min_p)

        kept = sum_from(e, values, size, floor)
        with e.loop(I64(0), I64(vocab), e.lanes) as i:
            weight = e.load(own, i)
            stays = b.fcmp_ordered(">=", weight, e.spread(floor))
            e.store(b.fdiv(b.select(stays, weight, e.constant(0.0)), e.spread(kept)), own, i)
    b.ret_void()
    return e.module


def _add_weights(e: Emitter, x: Value, count: int, temperature: Value, least: float) -> Value:
    """x = exp((x - the largest) / temperature), 0 where that is below exp(least) or not a number; their sum."""
    b = e.b
    with e.sums(I64(0), I64(count), [e.constant(-math.inf)], e.lanes) as (i, carried, results):
        carried[0] = e.maximum(carried[0], e.load(x, i))
    best, divisor = e.spread(e.highest(results[0])), e.spread(temperature)
    with e.sums(I64(0), I64(count), [e.constant(0.0)], e.lanes) as (i, carried, results):
        exponent = b.fdiv(b.fsub(e.load(x, i), best), divisor)
        seen = b.fcmp_ordered(">=", exponent, e.constant(least))
        weight = b.select(seen, e.exp(exponent), e.constant(0.0))
        e.store(weight, x, i)
        carried[0] = b.fadd(carried[0], weight)
    return e.total(results[0])


def _collect_likely(e: Emitter, x: Value, count: Value, y: Value) -> Value:
    """y = the weights of x from LIKELY on, then a vector of zeros; how many they are."""
    b = e.b
    with e.sums(I64(0), count, [I64(0)], e.lanes) as (i, carried, results):
        looked_at = b.select(e.any_from(e.load(x, i), F32(LIKELY)), I64(e.lanes), I64(0))
        with e.sums(i, b.add(i, looked_at), list(carried)) as (place, inner, found):
            weight = b.load(b.gep(x, [place]))
            taken = b.zext(b.fcmp_ordered(">=", weight, F32(LIKELY)), I64)
            with e.loop(I64(0), taken):
                b.store(weight, b.gep(y, [found[0]]))
            inner[0] = b.add(found[0], taken)
        carried[:] = found
    e.store(e.constant(0.0), y, results[0])
    return results[0]


def sum_from(e: Emitter, x: Value, size: Value, bound: Value, count: bool = False) -> Value:
    """The sum, or the number, of those of x that are not below the bound; zeros may follow x to a whole vector."""
    b = e.b
    with e.sums(I64(0), size, [e.constant(0.0)], e.lanes) as (i, carried, results):
        value = e.load(x, i)
        part = b.select(
            b.fcmp_ordered(">=", value, e.spread(bound)), e.constant(1.0) if count else value, e.constant(0)
        )
        carried[0] = b.fadd(carried[0], part)
    return e.total(results[0])


def _floor(e: Emitter, wanted: Value, reached: Callable[[Value], Value]) -> Value:
    """The largest number up to 1 that is still `reached`, as smaller ones are; 0 if none is wanted."""
    b = e.b
    steps = b.select(wanted, I64(ONE.bit_length() + 1), I64(0))
    with e.sums(I64(0), steps, [I32(0), I32(ONE + 1)]) as (_, carried, (low, high)):
        middle = b.lshr(b.add(low, high), I32(1))
        enough = reached(b.bitcast(middle, F32))
        carried[:] = [b.select(enough, middle, low), b.select(enough, high, middle)]
    return b.bitcast(low, F32)


def verify_kernel(machine: Machine, vocab: int, candidates: int) -> ir.Module:
    """`spec.verify.verify`, each request by one thread; rows of target_probs that end a round are written over.

    Fields: target_probs [B, vocab], lengths [R], tokens [R, G], support and draft_probs [R, G, candidates]; draws in
    fp64 [R, G + 1], one whether the round may end before slot k, 0 first, and one of the token there; accepted and next
    tokens [R], G; items: R.
    """
    e = Emitter("fqqqfffqqii", machine, lanes_for(math.gcd(vocab, BLOCK), machine))
    b = e.b
    probs, lengths, tokens, support, draft_probs, accept, own, accepted, next_token, slots, _ = e.fields
    accept, own = (b.bitcast(draws, F64.as_pointer()) for draws in (accept, own))
    tiny = F64(2.0**-126)
    with e.loop(e.first, e.last) as request:
        with e.sums(I64(0), request, [request]) as (i, carried, results):
            carried[0] = b.add(carried[0], b.load(b.gep(lengths, [i])))
        first_row, length = results[0], b.load(b.gep(lengths, [request]))
        first_slot, first_draw = b.mul(request, slots), b.mul(request, b.add(slots, I64(1)))

        def row_at(k: Value, first_row: Value = first_row) -> Value:
            return b.gep(probs, [b.mul(b.add(first_row, k), I64(vocab))])

        def drafted(k: Value, length: Value = length) -> Value:
            """How many tokens the draft distribution of slot k speaks of: none behind the last verified one."""
            return b.select(b.icmp_unsigned("<", k, length), I64(candidates), I64(0))

        def entry(k: Value, i: Value, first_slot: Value = first_slot) -> tuple[Value, Value]:
            """One of them, and its probability."""
            place = b.add(b.mul(b.add(first_slot, k), I64(candidates)), i)
            return b.load(b.gep(support, [place])), b.fpext(b.load(b.gep(draft_probs, [place])), F64)

        # w, the longest prefix so far at which the round may end, and w there
        with e.sums(I64(0), b.add(length, I64(1)), [F64(1.0), I64(0), F64(1.0)]) as (k, carried, results):
            kept, row = carried[0], row_at(k)
            with e.sums(I64(0), drafted(k), [F64(0.0)] * 3) as (i, inner, (overlap, target_prob, draft_prob)):
                token, q = entry(k, i)
                p = b.fpext(b.load(b.gep(row, [token])), F64)
                both = b.fmul(kept, p)
                is_own = b.icmp_unsigned("==", token, b.load(b.gep(tokens, [b.add(first_slot, k)])))
                inner[0] = b.fadd(overlap, b.select(b.fcmp_ordered("<", both, q), both, q))
                inner[1] = b.select(is_own, p, target_prob)
                inner[2] = b.fadd(draft_prob, b.select(is_own, q, F64(0.0)))
            mass = b.fsub(kept, overlap)
            mass = b.select(b.fcmp_ordered(">", mass, F64(0.0)), mass, F64(0.0))
            rest = b.fsub(b.fadd(mass, F64(1.0)), kept)
            ending = b.select(b.fcmp_ordered("<", kept, F64(1.0)), b.fdiv(mass, rest), F64(1.0))
            ends = b.fcmp_ordered("<", b.load(b.gep(accept, [b.add(first_draw, k)])), ending)
            ratio = b.fdiv(target_prob, b.select(b.fcmp_ordered(">", draft_prob, tiny), draft_prob, tiny))
            stays = b.fmul(kept, ratio)
            carried[0] = b.select(b.fcmp_ordered("<", stays, F64(1.0)), stays, F64(1.0))
            carried[1], carried[2] = b.select(ends, k, carried[1]), b.select(ends, kept, carried[2])
        _, end, kept = results
        b.store(end, b.gep(accepted, [request]))

        row, count = row_at(end), drafted(end)
        with e.loop(I64(0), count) as i:
            token, q = entry(end, i)
            excess = b.fsub(b.fpext(b.load(b.gep(row, [token])), F64), b.fdiv(q, kept))
            excess = b.select(b.fcmp_ordered(">", excess, F64(0.0)), excess, F64(0.0))
            b.store(b.fptrunc(excess, F32), b.gep(row, [token]))
        total, _, _ = _cumulative_by_blocks(e, row, vocab, F64(0.0))
        nothing = b.fcmp_ordered("==", total, F64(0.0))  # then p is q / w up to rounding
        with e.loop(I64(0), b.select(nothing, count, I64(0))) as i:
            token, q = entry(end, i)
            place = b.gep(row, [token])
            b.store(b.fadd(b.load(place), b.fptrunc(b.fdiv(q, kept), F32)), place)
        draw = b.load(b.gep(own, [b.add(first_draw, end)]))
        b.store(drawn_index(e, row, vocab, draw), b.gep(next_token, [request]))
    b.ret_void()
    return e.module


def _cumulative_by_blocks(e: Emitter, x: Value, count: int, bound: Value) -> tuple[Value, Value, Value]:
    """The sum; how many blocks' cumulative sums do not exceed the bound, and the last of these sums."""
    b, blocks = e.b, -(-count // BLOCK)
    with e.sums(I64(0), I64(blocks), [F64(0.0), I64(0), F64(0.0)]) as (j, carried, results):
        start = b.mul(j, I64(BLOCK))
        end = b.add(start, I64(BLOCK))
        end = b.select(b.icmp_unsigned("<", end, I64(count)), end, I64(count))
        with e.sums(start, end, [e.constant(0.0)], e.lanes) as (i, inner, of_block):
            inner[0] = b.fadd(inner[0], e.load(x, i))
        so_far = b.fadd(carried[0], b.fpext(e.total(of_block[0]), F64))
        passed = b.fcmp_ordered("<=", so_far, bound)
        carried[:] = [so_far, b.add(carried[1], b.zext(passed, I64)), b.select(passed, so_far, carried[2])]
    return results[0], results[1], results[2]


def drawn_index(e: Emitter, x: Value, count: int, draw: Value) -> Value:
    """As `sampling.categorical`: the first index, of those above 0, whose cumulative sum is above the draw's share."""
    b = e.b
    total, _, _ = _cumulative_by_blocks(e, x, count, F64(0.0))
    bound = b.fmul(b.fmul(draw, F64(BELOW_ONE)), total)
    _, block, before = _cumulative_by_blocks(e, x, count, bound)
    last = I64(-(-count // BLOCK) - 1)
    start = b.mul(b.select(b.icmp_unsigned("<", block, last), block, last), I64(BLOCK))
    end = b.add(start, I64(BLOCK))
    end = b.select(b.icmp_unsigned("<", end, I64(count)), end, I64(count))
    with e.sums(start, end, [before, start, I8(0)]) as (i, carried, results):
        so_far, chosen, done = carried
        value = b.load(b.gep(x, [i]))
        so_far = b.fadd(so_far, b.fpext(value, F64))
        counts = b.and_(b.icmp_unsigned("==", done, I8(0)), b.fcmp_ordered(">", value, F32(0.0)))
        above = b.zext(b.fcmp_ordered(">", so_far, bound), I8)
        carried[:] = [so_far, b.select(counts, i, chosen), b.or_(done, above)]
    return results[1]
