"""LLVM code of norm, rotation, activation and attention."""

from llvmlite import ir

from dspark.models.cpu_emitter import F32, I64, VOID, Emitter, Machine, Value, lanes_for

KEYS_AHEAD = 32  # that attention fetches: 64 requests of 256 tokens take 0.85 ms a layer instead of 1.12


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
    b = e.b
    sqrt = e.function("llvm.sqrt.f32", F32, [F32])
    with e.sums(I64(0), I64(width), [e.constant(0.0)], e.lanes) as (i, carried, results):
        value = e.load(x, i)
        carried[0] = e.fma(value, value, carried[0])
    mean = b.fdiv(e.total(results[0]), F32(float(width)))
    scale = e.spread(b.fdiv(F32(1.0), b.call(sqrt, [b.fadd(mean, F32(eps))])))
    with e.loop(I64(0), I64(width), e.lanes) as i:
        e.store(b.fmul(b.fmul(e.load(x, i), scale), e.load(weight, i)), y, i)


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

    Fields: x (row stride given), cos, sin [N, head_dim], row stride; items: rows.
    """
    half = head_dim // 2
    e = Emitter("fffii", machine, lanes_for(half, machine))
    b = e.b
    x, cos, sin, stride, _ = e.fields
    with e.loop(e.first, e.last) as row:
        angle = b.mul(row, I64(head_dim))
        with e.loop(I64(0), I64(heads)) as head:
            start = b.add(b.mul(row, stride), b.mul(head, I64(head_dim)))
            with e.loop(I64(0), I64(half), e.lanes) as i:
                places = [b.add(i, I64(0)), b.add(i, I64(half))]
                values = [e.load(x, b.add(start, p)) for p in places]
                for p, own, other in zip(places, values, reversed(values)):
                    at = b.add(angle, p)
                    rotated = e.fma(other, e.load(sin, at), b.fmul(own, e.load(cos, at)))
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


def attention_kernel(machine: Machine, kv_heads: int, group: int, head_dim: int, in_bf16: bool) -> ir.Module:
    """Chunks of consecutive query rows over their request's cache slots, all queries of one KV head together.

    Fields: q (row stride given), kv [slots, 2, kv_heads, head_dim] in fp32 or bf16, out [N, kv_heads*group*head_dim],
    scratch (`room` floats a thread: a block of keys, then `span` scores for each row and query of a chunk), chunks
    [items / kv_heads, 5] (see `Chunks`), q row stride, room, span; items: chunks * kv_heads.

    Keys are read and turned once for all rows of a chunk, `lanes` of them at a time, so that the scores of a query
    against them grow side by side without a sum across lanes. A row's result does not depend on the other rows.
    """
    e = Emitter(f"f{'h' if in_bf16 else 'f'}ffqiiii", machine, lanes_for(head_dim, machine))
    b, lanes = e.b, e.lanes
    q, kv, out, scratch, chunks, q_stride, room, span, _ = e.fields
    parts, slot_size = head_dim // lanes, 2 * kv_heads * head_dim
    turned = b.gep(scratch, [b.mul(e.thread, room)])  # [head_dim, lanes]
    scores = b.gep(turned, [I64(head_dim * lanes)])  # [rows, group, span]
    lane_numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    lowest = e.constant(-1e30)

    def read(pointer: Value, index: Value) -> Value:
        return e.load_bf16(pointer, index) if in_bf16 else e.load(pointer, index)

    def before(end: Value, start: Value) -> Value:
        """Which lanes of a vector that begins at `start` lie before `end`."""
        return b.icmp_unsigned("<", lane_numbers, e.spread(b.sub(end, start)))

    with e.loop(e.first, e.last) as item:
        chunk, head = b.udiv(item, I64(kv_heads)), b.urem(item, I64(kv_heads))
        first_row, count, first_slot, length, shrink = (
            b.load(b.gep(chunks, [b.add(b.mul(chunk, I64(5)), I64(i))])) for i in range(5)
        )
        keys = b.gep(kv, [b.add(b.mul(first_slot, I64(slot_size)), b.mul(head, I64(head_dim)))])
        values = b.gep(keys, [I64(kv_heads * head_dim)])

        def visible(row: Value, count=count, length=length, shrink=shrink) -> Value:
            return b.sub(length, b.mul(shrink, b.sub(b.sub(count, I64(1)), row)))

        def at(row: Value, g: int, position: Value) -> Value:
            return b.add(b.mul(b.add(b.mul(row, I64(group)), I64(g)), span), position)

        with e.loop(I64(0), length, lanes) as t:
            last = b.sub(length, I64(1))
            places = []  # of the block's keys; past the end the last one again, which is masked below
            for j in range(lanes):
                slot = b.add(t, I64(j))
                places.append(b.mul(b.select(b.icmp_unsigned("<", slot, last), slot, last), I64(slot_size)))
            # A head's slots lie too far apart for the hardware to see the stream.
            for j in range(lanes):
                ahead = b.mul(b.add(t, I64(j + KEYS_AHEAD)), I64(slot_size))
                for base in (keys, values):
                    for line in range(0, head_dim, 64 // (2 if in_bf16 else 4)):
                        e.prefetch(base, b.add(ahead, I64(line)), locality=2)
            for p in range(parts):
                block = [read(keys, b.add(place, I64(p * lanes))) for place in places]
                for d, vector in enumerate(e.transposed(block)):
                    e.store(vector, turned, I64((p * lanes + d) * lanes))
            with e.loop(I64(0), count) as row:
                query = b.gep(q, [b.add(b.mul(b.add(first_row, row), q_stride), b.mul(head, I64(group * head_dim)))])
                zeros = [e.constant(0.0)] * (group * parts)
                with e.sums(I64(0), I64(lanes), zeros) as (d, carried, results):
                    for p in range(parts):
                        here = b.add(d, I64(p * lanes))
                        key = e.load(turned, b.mul(here, I64(lanes)))
                        for g in range(group):
                            part = e.spread(b.load(b.gep(query, [b.add(here, I64(g * head_dim))])))
                            carried[g * parts + p] = e.fma(part, key, carried[g * parts + p])
                seen = before(visible(row), t)
                for g in range(group):
                    score = results[g * parts]
                    for p in range(1, parts):
                        score = b.fadd(score, results[g * parts + p])
                    score = b.fmul(score, e.constant(head_dim**-0.5))
                    e.store(b.select(seen, score, lowest), scores, at(row, g, t))
        with e.loop(I64(0), count) as row:
            end = visible(row)
            with e.sums(I64(0), end, [lowest] * group, lanes) as (t, carried, highest):
                for g in range(group):
                    carried[g] = e.maximum(carried[g], e.load(scores, at(row, g, t)))
            shifts = [e.spread(e.highest(value)) for value in highest]
            with e.sums(I64(0), end, [e.constant(0.0)] * group, lanes) as (t, carried, sums):
                seen = before(end, t)
                for g in range(group):
                    weight = e.exp(b.fsub(e.load(scores, at(row, g, t)), shifts[g]))
                    weight = b.select(seen, weight, e.constant(0.0))
                    e.store(weight, scores, at(row, g, t))
                    carried[g] = b.fadd(carried[g], weight)
            inverses = [e.spread(b.fdiv(F32(1.0), e.total(value))) for value in sums]
            with e.sums(I64(0), end, [e.constant(0.0)] * (group * parts)) as (t, carried, results):
                place = b.mul(t, I64(slot_size))
                value = [read(values, b.add(place, I64(p * lanes))) for p in range(parts)]
                for g in range(group):
                    weight = e.spread(b.load(b.gep(scores, [at(row, g, t)])))
                    for p in range(parts):
                        i = g * parts + p
                        carried[i] = e.fma(weight, value[p], carried[i])
            rows_before = b.mul(b.add(first_row, row), I64(kv_heads))
            result = b.gep(out, [b.mul(b.add(rows_before, head), I64(group * head_dim))])
            for i, value in enumerate(results):
                e.store(b.fmul(value, inverses[i // parts]), result, I64(i * lanes))
    b.ret_void()
    return e.module
