"""LLVM code of norm, rotation, activation and choice, and of kernels one after the other."""

import math
from collections.abc import Callable

from dspark.models.cpu_emitter import F32, F64, I1, I32, I64, VOID, Emitter, Machine, Value, lanes_for


def sequence_kernel(machine: Machine, width: int) -> Emitter:
    """Other kernels one after the other, all threads at each of them together.

    Fields: table [count, width] (a kernel's address, then its fields), count.
    """
    e = Emitter("qi", machine, 1)
    table, count = e.fields
    with e.loop(0, count) as i:
        row = table + i * width
        e.call(row[0], VOID, row + 1)
        e.call(machine.barrier, VOID)
    return e


def rms_norm_kernel(machine: Machine, width: int, eps: float) -> Emitter:
    """y = x / sqrt(mean(x^2) + eps) * weight. Fields: x [N, width], weight [width], y [N, width]; items: rows."""
    e = Emitter("fffi", machine, lanes_for(width, machine))
    x, weight, y, _ = e.fields
    with e.items() as row:
        _normalise_row(e, x + row * width, weight, y + row * width, width, eps)
    return e


def _normalise_row(e: Emitter, x: Value, weight: Value, y: Value, width: int, eps: float) -> None:
    """Squares are summed in fp64: in fp32 the huge ones that some tokens of a text have swallow the others."""
    with e.sums(0, width, [e.constant(0.0, F64)], e.lanes) as (i, carried, results):
        value = x.vector(i).to(F64)
        carried[0] += value * value
    scale = e.spread(1.0 / e.elementwise("sqrt", e.total(results[0]) / float(width) + eps))
    with e.loop(0, width, e.lanes) as i:
        y[i] = (x.vector(i).to(F64) * scale * weight.vector(i).to(F64)).to(F32)


def add_rms_norm_kernel(machine: Machine, width: int, eps: float) -> Emitter:
    """sum = x + delta, y = its norm. Fields: x, delta [N, width], weight [width], sum, y [N, width]; items: rows."""
    e = Emitter("fffffi", machine, lanes_for(width, machine))
    x, delta, weight, total, y, _ = e.fields
    with e.items() as row:
        start = row * width
        with e.loop(start, start + width, e.lanes) as i:
            total[i] = x.vector(i) + delta.vector(i)
        _normalise_row(e, total + start, weight, y + start, width, eps)
    return e


def rotary_kernel(machine: Machine, heads: int, head_dim: int) -> Emitter:
    """Rotate the first `heads` heads of each row in place.

    Fields: x (row stride given), table of cos and sin [positions, 2, head_dim], positions [N], row stride; items: rows.
    """
    half = head_dim // 2
    e = Emitter("ffqii", machine, lanes_for(half, machine))
    x, table, positions, stride, _ = e.fields
    with e.items() as row:
        cos = table + positions[row] * (2 * head_dim)
        sin = cos + head_dim
        with e.loop(0, heads) as head:
            own = x + (row * stride + head * head_dim)
            with e.loop(0, half, e.lanes) as i:
                places = i, i + half
                values = [own.vector(p) for p in places]
                for p, value, other in zip(places, values, reversed(values)):
                    own[p] = e.fma(other, sin.vector(p), value * cos.vector(p))
    return e


def silu_mul_kernel(machine: Machine, width: int) -> Emitter:
    """y = silu(gate) * up. Fields: gate_up [N, 2*width], y [N, width]; items: rows."""
    e = Emitter("ffi", machine, lanes_for(width, machine))
    gate_up, y, _ = e.fields
    with e.items() as row:
        gates, out = gate_up + row * (2 * width), y + row * width
        ups = gates + width
        with e.loop(0, width, e.lanes) as i:
            gate = gates.vector(i)
            out[i] = gate / (1.0 + e.exp(-gate)) * ups.vector(i)
    return e


def store_kernel(machine: Machine, width: int, to_bf16: bool) -> Emitter:
    """Write rows to slots. Fields: x (row stride given), cache [slots, width], slots [N], row stride; items: rows."""
    e = Emitter(f"f{'h' if to_bf16 else 'f'}qii", machine, lanes_for(width, machine))
    x, cache, slots, stride, _ = e.fields
    with e.items() as row:
        source, target = x + row * stride, cache + slots[row] * width
        with e.loop(0, width, e.lanes) as i:
            target[i] = e.to_bf16(source.vector(i)) if to_bf16 else source.vector(i)
    return e


def embed_kernel(machine: Machine, width: int) -> Emitter:
    """Rows of a table. Fields: tokens (stride given), table [V, width], y [N, width], token stride; items: tokens."""
    e = Emitter("qffii", machine, lanes_for(width, machine))
    tokens, table, y, stride, _ = e.fields
    with e.items() as row:
        _copy(e, table + tokens[row * stride] * width, y + row * width, width)
    return e


def _copy(e: Emitter, source: Value, target: Value, count: int) -> None:
    with e.loop(0, count, e.lanes) as i:
        target[i] = source.vector(i)


def draft_input_kernel(machine: Machine, width: int, eps: float, from_bf16: bool) -> Emitter:
    """[norm(feature); norm(token)] of each row and, N rows below, [norm(feature); mask]; a slot below 0: feature 0.

    Fields: features [slots, width], slots [N], tokens [N], embedding [V, width], weights of the two norms [width], mask
    [width], y [2N, 2*width]; items: rows.
    """
    e = Emitter(f"{'h' if from_bf16 else 'f'}qqfffffi", machine, lanes_for(width, machine))
    features, slots, tokens, embedding, feature_weight, token_weight, mask, y, rows = e.fields
    with e.items() as row:
        upper, lower = (y + r * (2 * width) for r in (row, row + rows))
        is_there = slots[row] >= 0
        feature = features + e.select(is_there, slots[row], 0) * width
        with e.loop(0, width, e.lanes) as i:
            upper[i] = e.select(is_there, feature.vector(i), 0.0)
        _normalise_row(e, upper, feature_weight, upper, width, eps)
        _normalise_row(e, embedding + tokens[row] * width, token_weight, upper + width, width, eps)
        _copy(e, upper, lower, width)
        _copy(e, mask, lower + width, width)
    return e


def likeliest_kernel(machine: Machine, vocab: int) -> Emitter:
    """The id of each row's first maximum of logits + bias; under their softmax, the probability of that maximum, and
    how far below it logits are in the mean.

    Fields: logits (row stride given), bias [N, vocab], ids [vocab], tokens (stride given), largest, below [N], row
    stride, token stride; items: rows.
    """
    e = Emitter("ffqqffiii", machine, lanes_for(vocab, machine))
    logits, bias, ids, tokens, largest, below, stride, token_stride, _ = e.fields
    with e.items() as row:
        own, own_bias = logits + row * stride, bias + row * vocab

        def at(i: Value) -> Value:
            return own.vector(i) + own_bias.vector(i)

        index, highest = _first_maximum(e, at, vocab)
        tokens[row * token_stride] = ids[index]
        with e.sums(0, vocab, [e.constant(0.0)] * 2, e.lanes) as (i, carried, sums):
            distance = highest - at(i)
            weight = e.exp(-distance)
            carried[:] = [carried[0] + weight, e.fma(weight, distance, carried[1])]
        share = 1.0 / e.total(sums[0])
        largest[row] = share
        below[row] = share * e.total(sums[1])
    return e


def signals_kernel(machine: Machine, width: int, rank: int, eps: float) -> Emitter:
    """What tells whether a slot is accepted: `drafters.bound.slot_signals`.

    Fields: hidden [R, G, width], weights [width + rank + 1], embeddings [G, R, rank], largest, below, lengths [G, R]
    (see "likeliest" and "copy_bias"), temperatures [R], signals [R, G, 6], G; items: R * G.
    """
    e = Emitter("ffffffffii", machine, lanes_for(math.gcd(width, rank), machine))
    hidden, weights, embeddings, largest, below, lengths, temperatures, signals, slots, items = e.fields
    with e.items() as item:
        request, slot = item // slots, item % slots
        place = slot * (items // slots) + request
        logit = weights[width + rank]
        parts = (hidden + item * width, weights, width), (embeddings + place * rank, weights + width, rank)
        for values, factors, count in parts:
            with e.sums(0, count, [e.constant(0.0)], e.lanes) as (i, carried, results):
                carried[0] = e.fma(values.vector(i), factors.vector(i), carried[0])
            logit += e.total(results[0])
        probability = largest[place]
        capped = e.minimum(e.maximum(probability, eps), 1 - eps)
        odds = e.log(capped) - e.log(1.0 - capped)
        entropy = below[place] - e.log(probability)
        numbers = logit, probability, odds, entropy, lengths[place], temperatures[request]
        for i, number in enumerate(numbers):
            signals[item * len(numbers) + i] = number
    return e


def copy_bias_kernel(machine: Machine, longest: int) -> Emitter:
    """Add to a logit of each row what copying the context's own continuation is worth (`drafters.copying`).

    Fields: history [slots] of token ids, spans [2, N] (where a row's own begins, and its anchor), tokens (stride given)
    to be noted k places after the anchor, ids [V] (below 0: no column), weights [1 + longest] by length of the match,
    scores (row stride given), lengths [N] of the matches, k, token stride, row stride; items: rows.
    """
    e = Emitter("qqqqfffiiii", machine, 1)
    history, spans, tokens, ids, weights, scores, lengths, k, token_stride, stride, rows = e.fields
    with e.items() as row:
        start, last = spans[row], spans[rows + row] + k
        history[last] = tokens[row * token_stride]

        def token_at(place: Value, back: int) -> tuple[Value, Value]:
            """Whether the row has a token so far back of a place, and which."""
            place = place - back
            inside = place >= start
            return inside, history[e.select(inside, place, start)]

        suffix = [token_at(last, back)[1] for back in range(longest)]
        with e.sums(start, last, [0, 0]) as (place, carried, (length, where)):
            agreeing, run = e.number(0), e.number(1, I1)
            for back, own in enumerate(suffix):
                inside, token = token_at(place, back)
                run = run & inside & (token == own)
                agreeing += run.to(I64)
            better = (agreeing >= length) & (agreeing > 0)
            carried[:] = [e.select(better, agreeing, length), e.select(better, place, where)]
        lengths[row] = length.to(F32)
        found = length > 0
        column = ids[history[e.select(found, where + 1, last)]]
        found = found & (column >= 0)
        scores += row * stride + e.select(found, column, 0)
        scores[0] = scores[0] + e.select(found, weights[length], 0.0)
    return e


def first_maximum_kernel(machine: Machine, width: int) -> Emitter:
    """Index of each row's first maximum. Fields: x [N, width], indices [N]; items: rows."""
    e = Emitter("fqi", machine, lanes_for(width, machine))
    x, indices, _ = e.fields
    with e.items() as row:
        indices[row], _ = _first_maximum(e, (x + row * width).vector, width)
    return e


def _first_maximum(e: Emitter, at: Callable[[Value], Value], count: int) -> tuple[Value, Value]:
    """Index of the first maximum of `count` numbers, vectors of which `at` gives, and the maximum in every lane.

    What is NaN is never the maximum; of NaNs alone some index is found.
    """
    start = [e.constant(-math.inf), e.constant(0, I32), e.lane_numbers(I32)]
    with e.sums(0, count, start, e.lanes) as (i, carried, (best, best_index, index)):
        value = at(i)
        better = value > best
        carried[:] = [e.select(better, value, best), e.select(better, index, best_index), index + e.lanes]
    highest = e.spread(e.reduce("fmax", best))
    candidates = e.select(best == highest, best_index, count - 1)
    return e.reduce("umin", candidates).to(I64), highest
