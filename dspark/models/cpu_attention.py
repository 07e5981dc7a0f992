"""LLVM code of attention over a cache: in vectors, or in AMX tiles (see `attention_kernel`, `tiled_attention_kernel`).

Fields of both: q (row stride given), kv [slots, 2, kv_heads, head_dim] in fp32 or bf16, out [N,
kv_heads*group*head_dim], scratch (`room` floats a thread), chunks [items / kv_heads, 5] (see `Chunks`), q row stride,
room, span (floats for the scores of a row and query), items: chunks * kv_heads.
A chunk is a few consecutive query rows over their request's slots; an item all queries of one KV head in it, which
read the keys and values once together. A row's result does not depend on the other rows.
"""

from llvmlite import ir

from dspark.models.cpu_emitter import F32, I8, I16, I32, I64, VOID, Emitter, Machine, Value, lanes_for
from dspark.models.cpu_linear import TILE_INPUTS, TILE_ROWS, dot, round_vector, tile_config

CHUNK_ROWS = 8  # rows that share the turning of their keys; scores of a chunk stay in the cache nearest to a core
KEYS_AHEAD = 32  # that attention fetches: 64 requests of 256 tokens take 0.85 ms a layer instead of 1.12


def load_chunk(e: Emitter, chunks: Value, chunk: Value) -> list[Value]:
    """Its first row, number of rows, first slot, slots that its last row sees, how many fewer each row before it."""
    return [e.b.load(e.b.gep(chunks, [e.b.add(e.b.mul(chunk, I64(5)), I64(i))])) for i in range(5)]


def prefetch_slots(e: Emitter, base: Value, slot: Value, count: int, slot_size: int, lines: range) -> None:
    """Fetch what a head has in slots ahead of `slot`: they lie too far apart for the hardware to see the stream."""
    for j in range(count):
        ahead = e.b.mul(e.b.add(slot, I64(j + KEYS_AHEAD)), I64(slot_size))
        for line in lines:
            e.prefetch(base, e.b.add(ahead, I64(line)), locality=2)


def zip_slots(e: Emitter, values: Value, places: list[Value], starts: range) -> list[Value]:
    """From bf16 values of two slots, at two places, words of a number of each: 32 numbers from each start on make two
    vectors."""
    halves, zipped = ir.VectorType(I16, 32), []
    for start in starts:
        rows = [e.b.gep(values, [e.b.add(place, I64(start))]) for place in places]
        even, odd = (e.b.load(e.b.bitcast(row, halves.as_pointer()), align=2) for row in rows)
        for k in range(2):
            order = [16 * k + j // 2 + 32 * (j % 2) for j in range(32)]
            zipped.append(e.b.shuffle_vector(even, odd, ir.Constant(ir.VectorType(I32, 32), order)))
    return zipped


def attention_kernel(
    machine: Machine, kv_heads: int, group: int, head_dim: int, in_bf16: bool, dots: bool
) -> ir.Module:
    """In vectors of fp32. Scratch: a block of keys, queries in bf16, `span` scores for each row and query of a chunk.

    Keys are read and turned once for all rows of a chunk, `lanes` of them at a time, so that the scores of a query
    against them grow side by side without a sum across lanes. dots: queries and the softmax's numerators are rounded to
    bf16 and multiplied in pairs, products summed in fp32; values are paired up slot by slot. For a cache in bf16,
    head_dim a multiple of 32.
    """
    packed = 2 if in_bf16 else 1  # numbers of a key in 32 bits, which are turned together
    e = Emitter(f"f{'h' if in_bf16 else 'f'}ffqiiii", machine, lanes_for(head_dim // packed, machine))
    b, lanes = e.b, e.lanes
    words = ir.VectorType(I32, lanes)
    q, kv, out, scratch, chunks, q_stride, room, span, _ = e.fields
    parts, slot_size = head_dim // lanes, 2 * kv_heads * head_dim
    query_words = group * head_dim // packed
    turned = b.gep(scratch, [b.mul(e.thread, room)])  # [head_dim / packed, lanes]
    rounded = b.gep(turned, [I64(head_dim // packed * lanes)])  # [rows, query_words], with dots
    scores = b.gep(rounded, [I64(CHUNK_ROWS * query_words if dots else 0)])  # [rows, group, span]
    lane_numbers = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    lowest, scale = e.constant(-1e30), e.constant(head_dim**-0.5)

    def read(pointer: Value, index: Value) -> Value:
        return e.load_bf16(pointer, index) if in_bf16 else e.load(pointer, index)

    def unpacked(key: Value) -> list[Value]:
        """The numbers of a vector of turned keys: one of each key, or an even and an odd one in bf16."""
        if not in_bf16:
            return [key]
        bits = b.bitcast(key, words)
        halves = b.shl(bits, ir.Constant(words, [16] * lanes)), b.and_(bits, ir.Constant(words, [-65536] * lanes))
        return [b.bitcast(half, e.vector) for half in halves]

    def add_product(total: Value, x: Value, y: Value) -> Value:
        return dot(e, total, x, y) if dots else e.fma(x, y, total)

    def paired(values: Value, t: Value, last: Value) -> list[Value]:
        """Of slots t and t + 1: the numbers of one beside those of the other. Past the last it is the last again, whose
        weight is 0 there: what lies further on may be no number."""
        second = b.add(t, I64(1))
        slots = t, b.select(b.icmp_unsigned("<", second, last), second, last)
        return zip_slots(e, values, [b.mul(slot, I64(slot_size)) for slot in slots], range(0, head_dim, 2 * lanes))

    def before(end: Value, start: Value) -> Value:
        """Which lanes of a vector that begins at `start` lie before `end`."""
        return b.icmp_unsigned("<", lane_numbers, e.spread(b.sub(end, start)))

    with e.loop(e.first, e.last) as item:
        chunk, head = b.udiv(item, I64(kv_heads)), b.urem(item, I64(kv_heads))
        first_row, count, first_slot, length, shrink = load_chunk(e, chunks, chunk)
        keys = b.gep(kv, [b.add(b.mul(first_slot, I64(slot_size)), b.mul(head, I64(head_dim)))])
        values = b.gep(keys, [I64(kv_heads * head_dim)])

        def visible(row: Value, count=count, length=length, shrink=shrink) -> Value:
            return b.sub(length, b.mul(shrink, b.sub(b.sub(count, I64(1)), row)))

        def at(row: Value, g: int, position: Value) -> Value:
            return b.add(b.mul(b.add(b.mul(row, I64(group)), I64(g)), span), position)

        if dots:  # scaled before they are rounded
            with e.loop(I64(0), count) as row:
                query = b.gep(q, [b.add(b.mul(b.add(first_row, row), q_stride), b.mul(head, I64(group * head_dim)))])
                for i in range(0, group * head_dim, lanes):
                    at_word = b.add(b.mul(row, I64(query_words)), I64(i // 2))
                    e.store(round_vector(e, b.fmul(e.load(query, I64(i)), scale)), rounded, at_word)

        with e.loop(I64(0), length, lanes) as t:
            last = b.sub(length, I64(1))
            places = []  # of the block's keys; past the end the last one again, which is masked below
            for j in range(lanes):
                slot = b.add(t, I64(j))
                places.append(b.mul(b.select(b.icmp_unsigned("<", slot, last), slot, last), I64(slot_size)))
            for base in (keys, values):
                prefetch_slots(e, base, t, lanes, slot_size, range(0, head_dim, 16 * packed))
            for p in range(parts // packed):
                block = [e.load(keys, b.add(place, I64(p * lanes * packed))) for place in places]
                for d, vector in enumerate(e.transposed(block)):
                    e.store(vector, turned, I64((p * lanes + d) * lanes))
            with e.loop(I64(0), count) as row:
                query = b.gep(q, [b.add(b.mul(b.add(first_row, row), q_stride), b.mul(head, I64(group * head_dim)))])
                if dots:
                    query = b.gep(rounded, [b.mul(row, I64(query_words))])
                numbers = 1 if dots else packed  # of a query, multiplied one after the other
                chains = parts // packed * numbers
                with e.sums(I64(0), I64(lanes), [e.constant(0.0)] * (group * chains)) as (d, carried, results):
                    for p in range(parts // packed):
                        here = b.add(d, I64(p * lanes))
                        key = e.load(turned, b.mul(here, I64(lanes)))
                        for n, numbers_of_keys in enumerate([key] if dots else unpacked(key)):
                            at_query = b.add(b.mul(here, I64(numbers)), I64(n))
                            for g in range(group):
                                start = I64(g * head_dim * numbers // packed)
                                part = e.spread(b.load(b.gep(query, [b.add(at_query, start)])))
                                i = g * chains + p * numbers + n
                                carried[i] = add_product(carried[i], part, numbers_of_keys)
                seen = before(visible(row), t)
                for g in range(group):
                    score = results[g * chains]
                    for p in range(1, chains):
                        score = b.fadd(score, results[g * chains + p])
                    score = score if dots else b.fmul(score, scale)
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
                    if dots:  # in the first half of their scores' place
                        e.store(round_vector(e, weight), scores, at(row, g, b.udiv(t, I64(2))))
                    else:
                        e.store(weight, scores, at(row, g, t))
                    carried[g] = b.fadd(carried[g], weight)
            inverses = [e.spread(b.fdiv(F32(1.0), e.total(value))) for value in sums]
            slots = 2 if dots else 1  # at a time
            with e.sums(I64(0), end, [e.constant(0.0)] * (group * parts), slots) as (t, carried, results):
                if dots:
                    value = paired(values, t, b.sub(end, I64(1)))
                else:
                    value = [read(values, b.add(b.mul(t, I64(slot_size)), I64(p * lanes))) for p in range(parts)]
                for g in range(group):
                    weight = e.spread(b.load(b.gep(scores, [at(row, g, b.udiv(t, I64(slots)))])))
                    for p in range(parts):
                        i = g * parts + p
                        carried[i] = add_product(carried[i], weight, value[p])
            rows_before = b.mul(b.add(first_row, row), I64(kv_heads))
            result = b.gep(out, [b.mul(b.add(rows_before, head), I64(group * head_dim))])
            for i, value in enumerate(results):
                e.store(b.fmul(value, inverses[i // parts]), result, I64(i * lanes))
    b.ret_void()
    return e.module


VALUE_DIMS = 64  # of values multiplied together: four tiles of sums


def tiled_scratch(head_dim: int) -> int:
    """Floats of scratch that `tiled_attention_kernel` needs beside its scores."""
    return 16 * head_dim + 16 * 16 + 16 * VALUE_DIMS + 16 * head_dim + 16


def tiled_attention_kernel(machine: Machine, kv_heads: int, group: int, head_dim: int) -> ir.Module:
    """In AMX tiles, for a cache in bf16, head_dim a multiple of 64 up to 128 and at most 16 queries in an item.

    Queries and the softmax's numerators are rounded to bf16, products summed in fp32. Keys lie in the cache as a tile's
    rows, so scores come out turned, [16 keys, 16 queries], and are turned back; values are paired up slot by slot.
    Scratch: bf16 queries, then the last keys [16, head_dim], queries turned, scores of a block, a block of values,
    results [16, head_dim], one over each query's sum [16], scores [16, span].
    """
    e = Emitter("fhffqiiii", machine, 16)
    b = e.b
    q, kv, out, scratch, chunks, q_stride, room, span, _ = e.fields
    slot_size, words, parts = 2 * kv_heads * head_dim, head_dim // 2, head_dim // TILE_INPUTS
    rows = b.gep(scratch, [b.mul(e.thread, room)])  # [16, words]
    turned = b.gep(rows, [I64(16 * words)])  # [parts, 16 words, 16 queries]
    block = b.gep(turned, [I64(16 * words)])  # [16 keys, 16 queries], or a block of values [tiles, 16 pairs, 16 dims]
    paired = b.gep(block, [I64(16 * 16)])
    results = b.gep(paired, [I64(16 * VALUE_DIMS)])  # [16 queries, head_dim]
    inverses = b.gep(results, [I64(16 * head_dim)])
    scores = b.gep(inverses, [I64(16)])  # [16 queries, span]
    lane_numbers = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
    lowest, zero = e.constant(-1e30), e.constant(0.0)
    halves = ir.VectorType(I16, 32)

    def tile(name: str, *arguments: Value) -> None:
        b.call(e.function(f"llvm.x86.{name}", VOID, [a.type for a in arguments]), arguments)

    def bytes_at(base: Value, index: Value) -> Value:
        return b.bitcast(b.gep(base, [index]), I8.as_pointer())

    def as_halves(pointer: Value) -> Value:
        return b.bitcast(pointer, I16.as_pointer())

    def least(x: Value, y: Value) -> Value:
        return b.select(b.icmp_unsigned("<", x, y), x, y)

    def rounded_up(x: Value, multiple: int) -> Value:
        return b.and_(b.add(x, I64(multiple - 1)), I64(-multiple))

    config = ir.GlobalVariable(e.module, ir.ArrayType(I8, 64), "tile_config")
    config.global_constant, config.linkage = True, "internal"
    config.initializer = ir.Constant(config.value_type, bytearray(tile_config(TILE_ROWS)))  # pyright: ignore
    b.call(e.function("llvm.x86.ldtilecfg", VOID, [I8.as_pointer()]), [b.bitcast(config, I8.as_pointer())])

    with e.loop(e.first, e.last) as item:
        chunk, head = b.udiv(item, I64(kv_heads)), b.urem(item, I64(kv_heads))
        first_row, count, first_slot, length, shrink = load_chunk(e, chunks, chunk)
        keys = b.gep(kv, [b.add(b.mul(first_slot, I64(slot_size)), b.mul(head, I64(head_dim)))])
        values = b.gep(keys, [I64(kv_heads * head_dim)])
        last_slot = b.sub(length, I64(1))

        # Queries, scaled and rounded, then turned: pairs of numbers side by side for all of them.
        with e.loop(I64(0), count) as row:
            source = b.gep(q, [b.add(b.mul(b.add(first_row, row), q_stride), b.mul(head, I64(group * head_dim)))])
            target = b.gep(rows, [b.mul(row, I64(group * words))])
            with e.loop(I64(0), I64(group * head_dim), 16) as i:
                scaled = b.fmul(e.load(source, i), e.constant(head_dim**-0.5))
                e.store(round_vector(e, scaled), as_halves(target), i)
        for p in range(parts):
            vectors = [e.load(rows, I64(j * words + p * 16)) for j in range(16)]
            for i, vector in enumerate(e.transposed(vectors)):
                e.store(vector, turned, I64((p * 16 + i) * 16))

        # The last keys, where a tile would read past the end: the last one again, whose scores nobody sees.
        tail = b.and_(last_slot, I64(-16))
        for j in range(16):
            place = b.mul(least(b.add(tail, I64(j)), last_slot), I64(slot_size))
            for i in range(0, head_dim, 32):
                source = b.bitcast(b.gep(keys, [b.add(place, I64(i))]), halves.as_pointer())
                e.store(b.load(source, align=2), as_halves(rows), I64(j * head_dim + i))

        for p in range(parts):
            tile("tileloadd64", I8(3 + p), bytes_at(turned, I64(p * 256)), I64(64))
        with e.loop(I64(0), length, 16) as t:
            for base in (keys, values):
                prefetch_slots(e, base, t, 16, slot_size, range(0, head_dim, 32))
            whole = b.icmp_unsigned("<", t, tail)
            source = b.select(whole, b.gep(keys, [b.mul(t, I64(slot_size))]), as_halves(rows))
            stride = b.select(whole, I64(2 * slot_size), I64(2 * head_dim))
            tile("tilezero", I8(0))
            for p in range(parts):
                tile("tileloadd64", I8(1 + p % 2), bytes_at(source, I64(p * TILE_INPUTS)), stride)
                tile("tdpbf16ps", I8(0), I8(1 + p % 2), I8(3 + p))
            tile("tilestored64", I8(0), bytes_at(block, I64(0)), I64(64))
            for j, vector in enumerate(e.transposed([e.load(block, I64(i * 16)) for i in range(16)])):
                e.store(vector, scores, b.add(b.mul(I64(j), span), t))

        # Numerators take the first half of their scores' place, in bf16, zeros to the end of the last block.
        padded = rounded_up(length, TILE_INPUTS)
        with e.loop(I64(0), count) as row:
            end = b.sub(length, b.mul(shrink, b.sub(b.sub(count, I64(1)), row)))
            own = [b.gep(scores, [b.mul(b.add(b.mul(row, I64(group)), I64(g)), span)]) for g in range(group)]

            def seen(t: Value, end=end) -> Value:
                return b.icmp_signed("<", lane_numbers, e.spread(b.sub(end, t)))

            with e.sums(I64(0), end, [lowest] * group, 16) as (t, carried, highest):
                for g in range(group):
                    carried[g] = e.maximum(carried[g], b.select(seen(t), e.load(own[g], t), lowest))
            shifts = [e.spread(e.highest(value)) for value in highest]
            with e.sums(I64(0), padded, [zero] * group, 16) as (t, carried, sums):
                for g in range(group):
                    weight = b.select(seen(t), e.exp(b.fsub(e.load(own[g], t), shifts[g])), zero)
                    e.store(round_vector(e, weight), as_halves(own[g]), t)
                    carried[g] = b.fadd(carried[g], weight)
            for g, value in enumerate(sums):
                inverse = b.fdiv(F32(1.0), e.total(value))
                b.store(inverse, b.gep(inverses, [b.add(b.mul(row, I64(group)), I64(g))]))

        for dims in range(0, head_dim, VALUE_DIMS):
            for n in range(4):
                tile("tilezero", I8(n))
            with e.loop(I64(0), padded, TILE_INPUTS) as t:
                for i in range(16):
                    places = [b.mul(least(b.add(t, I64(2 * i + j)), last_slot), I64(slot_size)) for j in range(2)]
                    for n, zipped in enumerate(zip_slots(e, values, places, range(dims, dims + VALUE_DIMS, 32))):
                        e.store(zipped, as_halves(paired), I64((n * 16 + i) * 32))
                tile("tileloadd64", I8(4), bytes_at(as_halves(scores), t), b.mul(span, I64(4)))
                for n in range(4):
                    tile("tileloadd64", I8(5 + n % 2), bytes_at(paired, I64(n * 256)), I64(64))
                    tile("tdpbf16ps", I8(n), I8(4), I8(5 + n % 2))
            for n in range(4):
                tile("tilestored64", I8(n), bytes_at(results, I64(dims + n * 16)), I64(4 * head_dim))

        with e.loop(I64(0), count) as row:
            rows_before = b.mul(b.add(first_row, row), I64(kv_heads))
            target = b.gep(out, [b.mul(b.add(rows_before, head), I64(group * head_dim))])
            for g in range(group):
                query = b.add(b.mul(row, I64(group)), I64(g))
                inverse = e.spread(b.load(b.gep(inverses, [query])))
                source = b.gep(results, [b.mul(query, I64(head_dim))])
                for i in range(0, head_dim, 16):
                    e.store(b.fmul(e.load(source, I64(i)), inverse), target, I64(g * head_dim + i))
    tile("tilerelease")
    b.ret_void()
    return e.module
