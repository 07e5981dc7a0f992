"""LLVM code of attention over a cache: in vectors, or in AMX tiles (see `attention_kernel`, `tiled_attention_kernel`).

Fields of both: q (row stride given), kv [slots, 2, kv_heads, head_dim] in fp32 or bf16, out [N,
kv_heads*group*head_dim], scratch (`room` floats a thread), chunks [items / kv_heads, 5] (see `Chunks`), q row stride,
room, span (floats for the scores of a row and query), items: chunks * kv_heads.
A chunk is a few consecutive query rows over their request's slots; an item all queries of one KV head in it, which
read the keys and values once together. A row's result does not depend on the other rows.
"""

from llvmlite import ir

from dspark.models.cpu_emitter import F32, I8, I16, I32, I64, VOID, Emitter, Machine, Value, lanes_for
from dspark.models.cpu_linear import (
    TILE_INPUTS,
    TILE_ROWS,
    dot,
    round_vector,
    tile_config,
    tile_dot,
    tile_load,
    tile_store,
    tile_zero,
)

CHUNK_ROWS = 8  # rows that share the turning of their keys; scores of a chunk stay in the cache nearest to a core
KEYS_AHEAD = 32  # that attention fetches: 64 requests of 256 tokens take 0.85 ms a layer instead of 1.12
LOWEST = -1e30  # a score that is not seen


def load_chunk(chunks: Value, chunk: Value) -> list[Value]:
    """Its first row, number of rows, first slot, slots that its last row sees, how many fewer each row before it."""
    return [chunks[chunk * 5 + i] for i in range(5)]


def prefetch_slots(e: Emitter, base: Value, slot: Value, count: int, slot_size: int, lines: range) -> None:
    """Fetch what a head has in slots ahead of `slot`: they lie too far apart for the hardware to see the stream."""
    for j in range(count):
        ahead = base + (slot + (j + KEYS_AHEAD)) * slot_size
        for line in lines:
            e.prefetch(ahead + line, locality=2)


def zip_slots(e: Emitter, values: Value, places: list[Value], starts: range) -> list[Value]:
    """From bf16 values of two slots, at two places, words of a number of each: 32 numbers from each start on make two
    vectors."""
    halves, zipped = ir.VectorType(I16, 32), []
    for start in starts:
        even, odd = ((values + (place + start)).bits(F32.as_pointer()).vector().bits(halves) for place in places)
        for k in range(2):
            order = [16 * k + j // 2 + 32 * (j % 2) for j in range(32)]
            zipped.append(e.shuffled(even, odd, order))
    return zipped


def attention_kernel(machine: Machine, kv_heads: int, group: int, head_dim: int, in_bf16: bool, dots: bool) -> Emitter:
    """In vectors of fp32. Scratch: a block of keys, queries in bf16, `span` scores for each row and query of a chunk.

    Keys are read and turned once for all rows of a chunk, `lanes` of them at a time, so that the scores of a query
    against them grow side by side without a sum across lanes. dots: queries and the softmax's numerators are rounded to
    bf16 and multiplied in pairs, products summed in fp32; values are paired up slot by slot. For a cache in bf16,
    head_dim a multiple of 32.
    """
    packed = 2 if in_bf16 else 1  # numbers of a key in 32 bits, which are turned together
    e = Emitter(f"f{'h' if in_bf16 else 'f'}ffqiiii", machine, lanes_for(head_dim // packed, machine))
    lanes = e.lanes
    q, kv, out, scratch, chunks, q_stride, room, span, _ = e.fields
    parts, slot_size = head_dim // lanes, 2 * kv_heads * head_dim
    query_words = group * head_dim // packed
    turned = scratch + e.thread * room  # [head_dim / packed, lanes]
    rounded = turned + head_dim // packed * lanes  # [rows, query_words], with dots
    scores = rounded + (CHUNK_ROWS * query_words if dots else 0)  # [rows, group, span]
    scale = head_dim**-0.5

    def add_product(total: Value, x: Value, y: Value) -> Value:
        return dot(e, total, x, y) if dots else e.fma(x, y, total)

    def paired(values: Value, t: Value, last: Value) -> list[Value]:
        """Of slots t and t + 1: the numbers of one beside those of the other. Past the last it is the last again, whose
        weight is 0 there: what lies further on may be no number."""
        slots = t, e.minimum(t + 1, last)
        return zip_slots(e, values, [slot * slot_size for slot in slots], range(0, head_dim, 2 * lanes))

    def before(end: Value, start: Value) -> Value:
        """Which lanes of a vector that begins at `start` lie before `end`."""
        return e.lane_numbers(I64) < end - start

    with e.items() as item:
        chunk, head = item // kv_heads, item % kv_heads
        first_row, count, first_slot, length, shrink = load_chunk(chunks, chunk)
        keys = kv + (first_slot * slot_size + head * head_dim)
        values = keys + kv_heads * head_dim

        def visible(row: Value) -> Value:
            return length - shrink * (count - 1 - row)

        def scores_of(row: Value, g: int) -> Value:
            return scores + (row * group + g) * span

        def queries(row: Value) -> Value:
            return q + ((first_row + row) * q_stride + head * (group * head_dim))

        if dots:  # scaled before they are rounded
            with e.loop(0, count) as row:
                query = queries(row)
                for i in range(0, group * head_dim, lanes):
                    rounded[row * query_words + i // 2] = round_vector(e, query.vector(i) * scale)

        with e.loop(0, length, lanes) as t:
            # Of the block's keys; past the end the last one again, which is masked below.
            places = [e.minimum(t + j, length - 1) * slot_size for j in range(lanes)]
            for base in (keys, values):
                prefetch_slots(e, base, t, lanes, slot_size, range(0, head_dim, 16 * packed))
            for p in range(parts // packed):
                block = [(keys + (place + p * lanes * packed)).bits(F32.as_pointer()).vector() for place in places]
                for d, vector in enumerate(e.transposed(block)):
                    turned[(p * lanes + d) * lanes] = vector
            with e.loop(0, count) as row:
                query = rounded + row * query_words if dots else queries(row)
                numbers = 1 if dots else packed  # of a query, multiplied one after the other
                chains = parts // packed * numbers
                with e.sums(0, lanes, [e.constant(0.0)] * (group * chains)) as (d, carried, results):
                    for p in range(parts // packed):
                        here = d + p * lanes
                        key = turned.vector(here * lanes)
                        for n, numbers_of_keys in enumerate(e.widen(key.bits(I32)) if numbers == 2 else [key]):
                            for g in range(group):
                                part = e.spread(query[here * numbers + (n + g * head_dim * numbers // packed)])
                                i = g * chains + p * numbers + n
                                carried[i] = add_product(carried[i], part, numbers_of_keys)
                seen = before(visible(row), t)
                for g in range(group):
                    score = sum(results[g * chains + 1 : (g + 1) * chains], results[g * chains])
                    scores_of(row, g)[t] = e.select(seen, score if dots else score * scale, LOWEST)
        with e.loop(0, count) as row:
            end = visible(row)
            own = [scores_of(row, g) for g in range(group)]
            with e.sums(0, end, [e.constant(LOWEST)] * group, lanes) as (t, carried, highest):
                carried[:] = [e.maximum(s.vector(t), c) for c, s in zip(carried, own)]
            shifts = [e.spread(e.reduce("fmax", value)) for value in highest]
            with e.sums(0, end, [e.constant(0.0)] * group, lanes) as (t, carried, sums):
                seen = before(end, t)
                for g in range(group):
                    weight = e.select(seen, e.exp(own[g].vector(t) - shifts[g]), 0.0)
                    if dots:  # in the first half of their scores' place
                        own[g][t // 2] = round_vector(e, weight)
                    else:
                        own[g][t] = weight
                    carried[g] += weight
            inverses = [e.spread(1.0 / e.total(value)) for value in sums]
            slots = 2 if dots else 1  # at a time
            with e.sums(0, end, [e.constant(0.0)] * (group * parts), slots) as (t, carried, results):
                if dots:
                    value = paired(values, t, end - 1)
                else:
                    value = [values.vector(t * slot_size + p * lanes) for p in range(parts)]
                for g in range(group):
                    weight = e.spread(own[g][t // slots])
                    for p in range(parts):
                        carried[g * parts + p] = add_product(carried[g * parts + p], weight, value[p])
            result = out + ((first_row + row) * kv_heads + head) * (group * head_dim)
            for i, value in enumerate(results):
                result[i * lanes] = value * inverses[i // parts]
    return e


VALUE_DIMS = 64  # of values multiplied together: four tiles of sums


def tiled_scratch(head_dim: int) -> int:
    """Floats of scratch that `tiled_attention_kernel` needs beside its scores."""
    return 16 * head_dim + 16 * 16 + 16 * VALUE_DIMS + 16 * head_dim + 16


def tiled_attention_kernel(machine: Machine, kv_heads: int, group: int, head_dim: int) -> Emitter:
    """In AMX tiles, for a cache in bf16, head_dim a multiple of 64 up to 128 and at most 16 queries in an item.

    Queries and the softmax's numerators are rounded to bf16, products summed in fp32. Keys lie in the cache as a tile's
    rows, so scores come out turned, [16 keys, 16 queries], and are turned back; values are paired up slot by slot.
    Scratch: bf16 queries, then the last keys [16, head_dim], queries turned, scores of a block, a block of values,
    results [16, head_dim], one over each query's sum [16], scores [16, span].
    """
    e = Emitter("fhffqiiii", machine, 16)
    q, kv, out, scratch, chunks, q_stride, room, span, _ = e.fields
    slot_size, words, parts = 2 * kv_heads * head_dim, head_dim // 2, head_dim // TILE_INPUTS
    rows = scratch + e.thread * room  # [16, words]
    turned = rows + 16 * words  # [parts, 16 words, 16 queries]
    block = turned + 16 * words  # [16 keys, 16 queries], or a block of values [tiles, 16 pairs, 16 dims]
    paired = block + 16 * 16
    results = paired + 16 * VALUE_DIMS  # [16 queries, head_dim]
    inverses = results + 16 * head_dim
    scores = inverses + 16  # [16 queries, span]
    lane_numbers = e.lane_numbers(I64)

    config = ir.GlobalVariable(e.module, ir.ArrayType(I8, 64), "tile_config")
    config.global_constant, config.linkage = True, "internal"
    config.initializer = ir.Constant(config.value_type, bytearray(tile_config(TILE_ROWS)))  # pyright: ignore
    e.call("x86.ldtilecfg", VOID, Value(e, config).bits(I8.as_pointer()))

    with e.items() as item:
        chunk, head = item // kv_heads, item % kv_heads
        first_row, count, first_slot, length, shrink = load_chunk(chunks, chunk)
        keys = kv + (first_slot * slot_size + head * head_dim)
        values = keys + kv_heads * head_dim
        last_slot = length - 1

        # Queries, scaled and rounded, then turned: pairs of numbers side by side for all of them.
        with e.loop(0, count) as row:
            source = q + ((first_row + row) * q_stride + head * (group * head_dim))
            target = (rows + row * (group * words)).bits(I16.as_pointer())
            with e.loop(0, group * head_dim, 16) as i:
                target[i] = round_vector(e, source.vector(i) * head_dim**-0.5)
        for p in range(parts):
            vectors = [rows.vector(j * words + p * 16) for j in range(16)]
            for i, vector in enumerate(e.transposed(vectors)):
                turned[(p * 16 + i) * 16] = vector

        # The last keys, where a tile would read past the end: the last one again, whose scores nobody sees.
        tail = last_slot & -16
        for j in range(16):
            key = keys + e.minimum(tail + j, last_slot) * slot_size
            for i in range(0, head_dim, 32):
                rows[j * words + i // 2] = (key + i).bits(F32.as_pointer()).vector()

        for p in range(parts):
            tile_load(e, 3 + p, turned + p * 256, 64)
        with e.loop(0, length, 16) as t:
            for base in (keys, values):
                prefetch_slots(e, base, t, 16, slot_size, range(0, head_dim, 32))
            whole = t < tail
            source = e.select(whole, keys + t * slot_size, rows.bits(I16.as_pointer()))
            stride = e.select(whole, 2 * slot_size, 2 * head_dim)
            tile_zero(e, 0)
            for p in range(parts):
                tile_load(e, 1 + p % 2, source + p * TILE_INPUTS, stride)
                tile_dot(e, 0, 1 + p % 2, 3 + p)
            tile_store(e, 0, block, 64)
            for j, vector in enumerate(e.transposed([block.vector(i * 16) for i in range(16)])):
                scores[span * j + t] = vector

        # Numerators take the first half of their scores' place, in bf16, zeros to the end of the last block.
        padded = (length + (TILE_INPUTS - 1)) & -TILE_INPUTS
        with e.loop(0, count) as row:
            end = length - shrink * (count - 1 - row)
            own = [scores + (row * group + g) * span for g in range(group)]
            with e.sums(0, end, [e.constant(LOWEST)] * group, 16) as (t, carried, highest):
                seen = lane_numbers < end - t
                carried[:] = [e.maximum(e.select(seen, s.vector(t), LOWEST), c) for c, s in zip(carried, own)]
            shifts = [e.spread(e.reduce("fmax", value)) for value in highest]
            with e.sums(0, padded, [e.constant(0.0)] * group, 16) as (t, carried, sums):
                seen = lane_numbers < end - t
                for g in range(group):
                    weight = e.select(seen, e.exp(own[g].vector(t) - shifts[g]), 0.0)
                    own[g].bits(I16.as_pointer())[t] = round_vector(e, weight)
                    carried[g] += weight
            for g, value in enumerate(sums):
                inverses[row * group + g] = 1.0 / e.total(value)

        for dims in range(0, head_dim, VALUE_DIMS):
            for n in range(4):
                tile_zero(e, n)
            with e.loop(0, padded, TILE_INPUTS) as t:
                for i in range(16):
                    places = [e.minimum(t + (2 * i + j), last_slot) * slot_size for j in range(2)]
                    for n, zipped in enumerate(zip_slots(e, values, places, range(dims, dims + VALUE_DIMS, 32))):
                        paired[(n * 16 + i) * 16] = zipped
                tile_load(e, 4, scores.bits(I16.as_pointer()) + t, span * 4)
                for n in range(4):
                    tile_load(e, 5 + n % 2, paired + n * 256, 64)
                    tile_dot(e, n, 4, 5 + n % 2)
            for n in range(4):
                tile_store(e, n, results + (dims + n * 16), 4 * head_dim)

        with e.loop(0, count) as row:
            target = out + ((first_row + row) * kv_heads + head) * (group * head_dim)
            for g in range(group):
                query = row * group + g
                source, inverse = results + query * head_dim, e.spread(inverses[query])
                for i in range(0, head_dim, 16):
                    target[g * head_dim + i] = source.vector(i) * inverse
    e.call("x86.tilerelease", VOID)
    return e
