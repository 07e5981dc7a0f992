"""LLVM code of norm, rotation, activation and choice, and of kernels one after the other."""

import math
from collections.abc import Callable

from llvmlite import ir

from dspark.models.cpu_emitter import F32, F64, I32, I64, VOID, Emitter, Machine, Value, lanes_for


def sequence_kernel(machine: Machine, width: int) -> ir.Module:
    """Other kernels one after the other, all threads at each of them together.

    Fields: table [count, width] (a kernel's address, then its fields), count.
    """
    e = Emitter("qi", machine, 1)
    b = e.b
    table, count = e.fields
    barrier = b.inttoptr(I64(machine.barrier), ir.FunctionType(VOID, []).as_pointer())
    with e.loop(I64(0), count) as i:
        row = b.gep(table, [b.mul(i, I64(width))])
        kernel = b.inttoptr(b.load(row), ir.FunctionType(VOID, [I64.as_pointer()]).as_pointer())
        b.call(kernel, [b.gep(row, [I64(1)])])
        b.call(barrier, [])
    b.ret_void()
    return e.module


def rms_norm_kernel(machine: Machine, width: int, eps: float) -> ir.Module:
    """y = x / sqrt(mean(x^2) + eps) * weight. Fields: x [N, width], weight [width], y [N, width]; items: rows."""
    e = Emitter("fffi", machine, lanes_for(width, machine))
    b = e.b
    x, weight, y, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(width))
        _normalise_row(e, b.gep(x, [start]), weight, b.gep(y, [start]), width, eps)
    b.ret_void()
    return e.module


def _normalise_row(e: Emitter, x: Value, weight: Value, y: Value, width: int, eps: float) -> None:
    """Squares are summed in fp64: in fp32 the huge ones that some tokens of a text have swallow the others."""
    b, doubles = e.b, ir.VectorType(F64, e.lanes)
    with e.sums(I64(0), I64(width), [ir.Constant(doubles, [0.0] * e.lanes)], e.lanes) as (i, carried, results):
        value = b.fpext(e.load(x, i), doubles)
        carried[0] = b.fadd(carried[0], b.fmul(value, value))
    total = e.function(f"llvm.vector.reduce.fadd.v{e.lanes}f64", F64, [F64, doubles])
    mean = b.fdiv(b.call(total, [F64(0.0), results[0]], fastmath=("reassoc",)), F64(float(width)))
    root = b.call(e.function("llvm.sqrt.f64", F64, [F64]), [b.fadd(mean, F64(eps))])
    scale = e.spread(b.fdiv(F64(1.0), root))
    with e.loop(I64(0), I64(width), e.lanes) as i:
        value, factor = (b.fpext(e.load(p, i), doubles) for p in (x, weight))
        e.store(b.fptrunc(b.fmul(b.fmul(value, scale), factor), e.vector), y, i)


def add_rms_norm_kernel(machine: Machine, width: int, eps: float) -> ir.Module:
    """sum = x + delta, y = its norm. Fields: x, delta [N, width], weight [width], sum, y [N, width]; items: rows."""
    e = Emitter("fffffi", machine, lanes_for(width, machine))
    b = e.b
    x, delta, weight, total, y, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            here = b.add(start, i)
            e.store(b.fadd(e.load(x, here), e.load(delta, here)), total, here)
        _normalise_row(e, b.gep(total, [start]), weight, b.gep(y, [start]), width, eps)
    b.ret_void()
    return e.module


def rotary_kernel(machine: Machine, heads: int, head_dim: int) -> ir.Module:
    """Rotate the first `heads` heads of each row in place.

    Fields: x (row stride given), table of cos and sin [positions, 2, head_dim], positions [N], row stride; items: rows.
    """
    half = head_dim // 2
    e = Emitter("ffqii", machine, lanes_for(half, machine))
    b = e.b
    x, table, positions, stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        cos = b.gep(table, [b.mul(b.load(b.gep(positions, [row])), I64(2 * head_dim))])
        sin = b.gep(cos, [I64(head_dim)])
        with e.loop(I64(0), I64(heads)) as head:
            start = b.add(b.mul(row, stride), b.mul(head, I64(head_dim)))
            with e.loop(I64(0), I64(half), e.lanes) as i:
                places = [b.add(i, I64(0)), b.add(i, I64(half))]
                values = [e.load(x, b.add(start, p)) for p in places]
                for p, own, other in zip(places, values, reversed(values)):
                    rotated = e.fma(other, e.load(sin, p), b.fmul(own, e.load(cos, p)))
                    e.store(rotated, x, b.add(start, p))
    b.ret_void()
    return e.module


def silu_mul_kernel(machine: Machine, width: int) -> ir.Module:
    """y = silu(gate) * up. Fields: gate_up [N, 2*width], y [N, width]; items: rows."""
    e = Emitter("ffi", machine, lanes_for(width, machine))
    b = e.b
    gate_up, y, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(2 * width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            gate = e.load(gate_up, b.add(start, i))
            up = e.load(gate_up, b.add(start, b.add(i, I64(width))))
            denominator = b.fadd(e.constant(1.0), e.exp(b.fneg(gate)))
            e.store(b.fmul(b.fdiv(gate, denominator), up), y, b.add(b.mul(row, I64(width)), i))
    b.ret_void()
    return e.module


def store_kernel(machine: Machine, width: int, to_bf16: bool) -> ir.Module:
    """Write rows to slots. Fields: x (row stride given), cache [slots, width], slots [N], row stride; items: rows."""
    e = Emitter(f"f{'h' if to_bf16 else 'f'}qii", machine, lanes_for(width, machine))
    b = e.b
    x, cache, slots, stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        source, target = b.mul(row, stride), b.mul(b.load(b.gep(slots, [row])), I64(width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            value = e.load(x, b.add(source, i))
            e.store(e.to_bf16(value) if to_bf16 else value, cache, b.add(target, i))
    b.ret_void()
    return e.module


def embed_kernel(machine: Machine, width: int) -> ir.Module:
    """Fields: tokens (stride given) of rows, table [V, width], y [N, width], token stride; items: rows."""
    e = Emitter("qffii", machine, lanes_for(width, machine))
    b = e.b
    tokens, table, y, stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(b.load(b.gep(tokens, [b.mul(row, stride)])), I64(width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            e.store(e.load(table, b.add(start, i)), y, b.add(b.mul(row, I64(width)), i))
    b.ret_void()
    return e.module


def draft_input_kernel(machine: Machine, width: int, eps: float, from_bf16: bool) -> ir.Module:
    """[norm(feature); norm(token)] of each row and, N rows below, [norm(feature); mask]; a slot below 0: feature 0.

    Fields: features [slots, width], slots [N], tokens [N], embedding [V, width], weights of the two norms [width], mask
    [width], y [2N, 2*width]; items: rows.
    """
    e = Emitter(f"{'h' if from_bf16 else 'f'}qqfffffi", machine, lanes_for(width, machine))
    b = e.b
    features, slots, tokens, embedding, feature_weight, token_weight, mask, y, rows = e.fields
    with e.loop(e.first, e.last) as row:
        upper, lower = (b.gep(y, [b.mul(r, I64(2 * width))]) for r in (row, b.add(row, rows)))
        slot = b.load(b.gep(slots, [row]))
        is_there = b.icmp_signed(">=", slot, I64(0))
        start = b.mul(b.select(is_there, slot, I64(0)), I64(width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            value = (e.load_bf16 if from_bf16 else e.load)(features, b.add(start, i))
            e.store(b.select(is_there, value, e.constant(0.0)), upper, i)
        _normalise_row(e, upper, feature_weight, upper, width, eps)
        token = b.gep(embedding, [b.mul(b.load(b.gep(tokens, [row])), I64(width))])
        _normalise_row(e, token, token_weight, b.gep(upper, [I64(width)]), width, eps)
        with e.loop(I64(0), I64(width), e.lanes) as i:
            e.store(e.load(upper, i), lower, i)
            e.store(e.load(mask, i), lower, b.add(i, I64(width)))
    b.ret_void()
    return e.module


def block_rows_kernel(machine: Machine, width: int) -> ir.Module:
    """Blocks of the upper row of each, then the lower one again and again.

    Fields: y [2N, width], x [N*count, width], count; items: N.
    """
    e = Emitter("ffii", machine, lanes_for(width, machine))
    b = e.b
    y, x, count, rows = e.fields
    with e.loop(e.first, e.last) as row, e.loop(I64(0), count) as k:
        source = b.select(b.icmp_unsigned("==", k, I64(0)), row, b.add(row, rows))
        source, target = b.mul(source, I64(width)), b.mul(b.add(b.mul(row, count), k), I64(width))
        with e.loop(I64(0), I64(width), e.lanes) as i:
            e.store(e.load(y, b.add(source, i)), x, b.add(target, i))
    b.ret_void()
    return e.module


def likeliest_kernel(machine: Machine, vocab: int) -> ir.Module:
    """The id of each row's first maximum of logits + bias; under their softmax, the probability of that maximum, and
    how far below it logits are in the mean.

    Fields: logits (row stride given), bias [N, vocab], ids [vocab], tokens (stride given), largest, below [N], row
    stride, token stride; items: rows.
    """
    e = Emitter("ffqqffiii", machine, lanes_for(vocab, machine))
    b = e.b
    logits, bias, ids, tokens, largest, below, stride, token_stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        own, of_bias = b.mul(row, stride), b.mul(row, I64(vocab))

        def at(i: Value, own=own, of_bias=of_bias) -> Value:
            return b.fadd(e.load(logits, b.add(own, i)), e.load(bias, b.add(of_bias, i)))

        index, highest = _first_maximum(e, at, vocab)
        b.store(b.load(b.gep(ids, [index])), b.gep(tokens, [b.mul(row, token_stride)]))
        with e.sums(I64(0), I64(vocab), [e.constant(0.0)] * 2, e.lanes) as (i, carried, sums):
            distance = b.fsub(highest, at(i))
            weight = e.exp(b.fneg(distance))
            carried[:] = [b.fadd(carried[0], weight), e.fma(weight, distance, carried[1])]
        share = b.fdiv(F32(1.0), e.total(sums[0]))
        b.store(share, b.gep(largest, [row]))
        b.store(b.fmul(share, e.total(sums[1])), b.gep(below, [row]))
    b.ret_void()
    return e.module


def signals_kernel(machine: Machine, width: int, rank: int, eps: float) -> ir.Module:
    """What tells whether a slot is accepted: `drafters.bound.slot_signals`.

    Fields: hidden [R, G, width], weights [width + rank + 1], embeddings [G, R, rank], largest, below, lengths [G, R]
    (see "likeliest" and "copy_bias"), temperatures [R], signals [R, G, 6], G; items: R * G.
    """
    e = Emitter("ffffffffii", machine, lanes_for(math.gcd(width, rank), machine))
    b = e.b
    hidden, weights, embeddings, largest, below, lengths, temperatures, signals, slots, items = e.fields
    requests = b.udiv(items, slots)
    with e.loop(e.first, e.last) as item:
        request, slot = b.udiv(item, slots), b.urem(item, slots)
        place = b.add(b.mul(slot, requests), request)
        parts = (hidden, item, width, 0), (embeddings, place, rank, width)
        logit = b.load(b.gep(weights, [I64(width + rank)]))
        for values, row, count, first in parts:
            own = b.gep(values, [b.mul(row, I64(count))])
            with e.sums(I64(0), I64(count), [e.constant(0.0)], e.lanes) as (i, carried, results):
                carried[0] = e.fma(e.load(own, i), e.load(weights, b.add(i, I64(first))), carried[0])
            logit = b.fadd(logit, e.total(results[0]))
        probability = b.load(b.gep(largest, [place]))
        capped = b.fneg(e.maximum(b.fneg(e.maximum(probability, F32(eps))), F32(eps - 1)))
        numbers = [
            logit,
            probability,
            b.fsub(e.log(capped), e.log(b.fsub(F32(1.0), capped))),
            b.fsub(b.load(b.gep(below, [place])), e.log(probability)),
            b.load(b.gep(lengths, [place])),
            b.load(b.gep(temperatures, [request])),
        ]
        for i, number in enumerate(numbers):
            b.store(number, b.gep(signals, [b.add(b.mul(item, I64(len(numbers))), I64(i))]))
    b.ret_void()
    return e.module


def copy_bias_kernel(machine: Machine, longest: int) -> ir.Module:
    """Add to a logit of each row what copying the context's own continuation is worth (`drafters.copying`).

    Fields: history [slots] of token ids, spans [2, N] (where a row's own begins, and its anchor), tokens (stride given)
    to be noted k places after the anchor, ids [V] (below 0: no column), weights [1 + longest] by length of the match,
    scores (row stride given), lengths [N] of the matches, k, token stride, row stride; items: rows.
    """
    e = Emitter("qqqqfffiiii", machine, 1)
    b = e.b
    history, spans, tokens, ids, weights, scores, lengths, k, token_stride, stride, rows = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.load(b.gep(spans, [row]))
        last = b.add(b.load(b.gep(spans, [b.add(rows, row)])), k)
        b.store(b.load(b.gep(tokens, [b.mul(row, token_stride)])), b.gep(history, [last]))

        def token_at(place: Value, back: int, start=start) -> tuple[Value, Value]:
            """Whether the row has a token so far back of a place, and which."""
            at = b.sub(place, I64(back))
            inside = b.icmp_signed(">=", at, start)
            return inside, b.load(b.gep(history, [b.select(inside, at, start)]))

        suffix = [token_at(last, back)[1] for back in range(longest)]
        with e.sums(start, last, [I64(0), I64(0)]) as (place, carried, results):
            length, where = carried
            agreeing, run = I64(0), ir.Constant(ir.IntType(1), 1)
            for back, own in enumerate(suffix):
                inside, token = token_at(place, back)
                run = b.and_(b.and_(run, inside), b.icmp_signed("==", token, own))
                agreeing = b.add(agreeing, b.zext(run, I64))
            better = b.and_(b.icmp_signed(">=", agreeing, length), b.icmp_signed(">", agreeing, I64(0)))
            carried[:] = [b.select(better, agreeing, length), b.select(better, place, where)]
        length, where = results
        b.store(b.sitofp(length, F32), b.gep(lengths, [row]))
        found = b.icmp_signed(">", length, I64(0))
        column = b.load(b.gep(ids, [b.load(b.gep(history, [b.select(found, b.add(where, I64(1)), last)]))]))
        found = b.and_(found, b.icmp_signed(">=", column, I64(0)))
        score = b.gep(scores, [b.add(b.mul(row, stride), b.select(found, column, I64(0)))])
        bias = b.select(found, b.load(b.gep(weights, [length])), F32(0.0))
        b.store(b.fadd(b.load(score), bias), score)
    b.ret_void()
    return e.module


def first_maximum_kernel(machine: Machine, width: int) -> ir.Module:
    """Index of each row's first maximum. Fields: x [N, width], indices [N]; items: rows."""
    e = Emitter("fqi", machine, lanes_for(width, machine))
    b = e.b
    x, indices, _ = e.fields
    with e.loop(e.first, e.last) as row:
        start = b.mul(row, I64(width))
        index, _ = _first_maximum(e, lambda i, start=start: e.load(x, b.add(start, i)), width)
        b.store(index, b.gep(indices, [row]))
    b.ret_void()
    return e.module


def _first_maximum(e: Emitter, at: Callable[[Value], Value], count: int) -> tuple[Value, Value]:
    """Index of the first maximum of `count` numbers, vectors of which `at` gives, and the maximum in every lane.

    What is NaN is never the maximum; of NaNs alone some index is found.
    """
    b, indices = e.b, ir.VectorType(I32, e.lanes)

    def constant(number: int) -> Value:
        return ir.Constant(indices, [number] * e.lanes)

    start = [e.constant(-math.inf), constant(0), ir.Constant(indices, list(range(e.lanes)))]
    with e.sums(I64(0), I64(count), start, e.lanes) as (i, carried, results):
        best, best_index, index = carried
        value = at(i)
        better = b.fcmp_ordered(">", value, best)
        carried[:] = [
            b.select(better, value, best),
            b.select(better, index, best_index),
            b.add(index, constant(e.lanes)),
        ]
    best, best_index, _ = results
    highest = e.spread(e.highest(best))
    candidates = b.select(b.fcmp_ordered("==", best, highest), best_index, constant(count - 1))
    smallest = e.function(f"llvm.vector.reduce.umin.v{e.lanes}i32", I32, [indices])
    return b.zext(b.call(smallest, [candidates]), I64), highest
