"""LLVM code of the linear map: one kernel for each way this CPU can multiply (see `linear_kernel`)."""

from dataclasses import dataclass

from llvmlite import ir

from dspark.models.cpu_emitter import F32, I8, I32, I64, VOID, BFloat, Emitter, Machine, Value

VECTORS = 2  # vectors of outputs a tile of the linear map is wide
PREFETCH = 4096  # bytes ahead; hardware prefetching stops at pages. 13.8 GB/s without it, 19 with it, for one row
CACHE_LINE = 16  # words of 4 bytes
FEW_ROWS = 5  # whose weights are fetched to the first level; with more rows fetches that wait there hold up products


@dataclass(frozen=True)
class Products:
    """How a tile's sums grow: `step` inputs at a time, x and weights read as `x_type` and `weight_type` of 4 bytes."""

    step: int
    x_type: ir.Type
    weight_type: ir.Type
    weight_vectors: int = VECTORS  # read for a tile's outputs, each step


KINDS = {"fp32": Products(1, F32, F32), "widened": Products(1, F32, I32, 1), "dots": Products(2, I32, I32)}


def linear_kernel(machine: Machine, kind: str) -> ir.Module:
    """y = x W^T. Fields: x [N, K], w, y [N, tiles*tile], scratch, N, K; items: tiles. By `kind`:

    fp32      w [tiles, K, tile] fp32
    widened   w [tiles, K, tile/2, 2] bf16, outputs i and i + tile/2 of a tile in a word, widened in registers by one
              operation each: products and sums in fp32
    dots      w [tiles, K/2, tile, 2] bf16, K a multiple of 16; x rounded to bf16 (into `scratch`, [threads, N, K]
              bf16), products of pairs summed in fp32: several times the speed where rows are many
    Every output is one chain of additions over K in its order, whatever N is.
    """
    products = KINDS[kind]
    e = Emitter(f"f{'f' if kind == 'fp32' else 'w'}fwiii", machine, machine.lanes)
    b = e.b
    x, w, y, scratch, rows, inputs, tiles = e.fields
    if kind == "dots":
        x = b.gep(scratch, [b.udiv(b.mul(e.thread, b.mul(rows, inputs)), I64(2))])
        _round_to_bf16(e, e.fields[0], x, b.mul(rows, inputs))
        inputs = b.udiv(inputs, I64(2))
    # Accumulators of a tile, two weight vectors and a broadcast must fit the vector registers.
    max_rows = 12 if machine.registers == 32 else 6
    functions = [_tile_function(e, n, products) for n in range(1, max_rows + 1)]
    tile_size = I64(VECTORS * machine.lanes)
    stride = b.mul(tiles, tile_size)
    tile_words = b.mul(inputs, I64(products.weight_vectors * machine.lanes))
    # Passes over a tile of about as many rows each: in a pass of few, reading and widening weights is most of the work.
    # If there is one, it fetches what it will soon read itself; several share the fetching of the next tile's weights,
    # so that memory keeps reading while all of them multiply.
    passes = b.udiv(b.add(rows, I64(max_rows - 1)), I64(max_rows))
    divisor = b.select(b.icmp_unsigned("==", rows, I64(0)), I64(1), passes)
    pass_rows = b.udiv(b.add(rows, b.sub(divisor, I64(1))), divisor)
    share = b.udiv(tile_words, divisor)
    first_ahead = b.select(b.icmp_unsigned("<", passes, I64(2)), I64(PREFETCH // 4), tile_words)
    with e.loop(e.first, e.last) as tile:
        tile_weights = b.gep(w, [b.mul(tile, tile_words)])
        tile_y = b.gep(y, [b.mul(tile, tile_size)])
        with e.loop(I64(0), passes) as i:
            row = b.mul(i, pass_rows)
            ahead = b.gep(tile_weights, [b.add(first_ahead, b.mul(i, share))])
            places = [b.gep(x, [b.mul(row, inputs)]), tile_weights, b.gep(tile_y, [b.mul(row, stride)])]
            args = [*places, inputs, stride, ahead, b.udiv(share, inputs)]
            switch_block, done = b.block, b.append_basic_block()
            blocks = []
            for function in functions:
                blocks.append(b.append_basic_block())
                b.position_at_end(blocks[-1])
                b.call(function, args)
                b.branch(done)
            b.position_at_end(switch_block)
            left = b.sub(rows, row)
            switch = b.switch(b.select(b.icmp_unsigned("<", left, pass_rows), left, pass_rows), blocks[-1])
            for n, block in enumerate(blocks[:-1], 1):
                switch.add_case(I64(n), block)
            b.position_at_end(done)
    b.ret_void()
    return e.module


def round_vector(e: Emitter, value: Value) -> Value:
    """16 fp32 numbers as 8 words of two bf16 numbers each."""
    function = e.function("llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), 16), [e.vector])
    return e.b.bitcast(e.b.call(function, [value]), ir.VectorType(I32, 8))


def dot(e: Emitter, total: Value, x: Value, y: Value) -> Value:
    """total + the sum of two bf16 products in each of 16 words of x and y."""
    pairs = ir.VectorType(BFloat(), 2 * e.lanes)
    function = e.function("llvm.x86.avx512bf16.dpbf16ps.512", e.vector, [e.vector, pairs, pairs])
    return e.b.call(function, [total, e.b.bitcast(x, pairs), e.b.bitcast(y, pairs)])


def _round_to_bf16(e: Emitter, source: Value, target: Value, count: Value) -> None:
    """`count` fp32 numbers, a multiple of the vector width, to bf16 numbers packed two in a word."""
    with e.loop(I64(0), count, e.lanes) as i:
        e.store(round_vector(e, e.load(source, i)), target, e.b.udiv(i, I64(2)))


def _tile_function(e: Emitter, rows: int, products: Products) -> ir.Function:
    """tile_<rows>(x, w, y, inputs, stride, ahead, words): one tile of outputs for `rows` rows, all sums in registers.

    `inputs` counts steps of `products`; each fetches the lines at `ahead`, which moves on by so many words.
    """
    pointers = [products.x_type.as_pointer(), products.weight_type.as_pointer(), F32.as_pointer()]
    function = ir.Function(e.module, ir.FunctionType(VOID, [*pointers, I64, I64, pointers[1], I64]), f"tile_{rows}")
    function.linkage = "internal"
    x, w, y, inputs, stride, ahead, words = function.args
    locality = 3 if rows <= FEW_ROWS else 2
    lanes, outer = e.lanes, e.b
    e.b = b = ir.IRBuilder(function.append_basic_block())
    x_rows = [b.gep(x, [b.mul(I64(r), inputs)]) for r in range(rows)]
    vector = ir.VectorType(products.weight_type, lanes)

    def add(x_value: Value, weight: Value, total: Value) -> Value:
        if products.step == 1:
            return e.fma(e.spread(x_value), weight, total)
        return dot(e, total, e.spread(b.bitcast(x_value, F32)), weight)

    with e.sums(I64(0), inputs, [e.constant(0.0)] * (rows * VECTORS)) as (k, carried, results):
        start = b.mul(k, I64(products.weight_vectors * lanes))
        places = [b.gep(w, [b.add(start, I64(v * lanes))]) for v in range(products.weight_vectors)]
        weights = [b.load(b.bitcast(place, vector.as_pointer()), align=4) for place in places]
        if products.weight_vectors < VECTORS:
            weights = e.widen(weights[0])
        for line in range(0, products.weight_vectors * lanes, CACHE_LINE):
            e.prefetch(ahead, b.add(b.mul(k, words), I64(line)), locality)
        for r in range(rows):
            x_value = b.load(b.gep(x_rows[r], [k]))
            for v in range(VECTORS):
                i = r * VECTORS + v
                carried[i] = add(x_value, weights[v], carried[i])
    for i, total in enumerate(results):
        r, v = divmod(i, VECTORS)
        e.store(total, y, b.add(b.mul(I64(r), stride), I64(v * lanes)))
    b.ret_void()
    e.b = outer
    return function


TILE_ROWS = 16  # of x, and of weights: pairs of inputs
TILE_INPUTS = 32


def tile_config(rows: int) -> bytes:
    """What LDTILECFG reads: palette 1, then bytes a row (16 bit) and rows (8 bit) of the eight tile registers."""
    tile_rows = [rows] * 6 + [TILE_ROWS] * 2
    return bytes([1]) + bytes(15) + bytes([64, 0] * 8) + bytes(16) + bytes(tile_rows) + bytes(8)


def tiled_linear_kernel(machine: Machine) -> ir.Module:
    """y = x W^T in AMX tiles, K a multiple of 32. Fields: x [N, K], w as for "dots", y with P rows, scratch [threads,
    P, K] bf16, tile_config(min(N, 16)), N, P, K; items: tiles. P is N up to 16 and a multiple of 16 above.

    x is rounded to bf16, products are summed in fp32. Rows past N hold whatever scratch held; a tile's rows are
    independent of each other, and each is summed over K in its order.
    """
    e = Emitter("fwfwwiiii", machine, machine.lanes)
    b = e.b
    x, w, y, scratch, config, rows, padded, inputs, tiles = e.fields
    words = b.udiv(inputs, I64(2))  # of a row in bf16
    own = b.gep(scratch, [b.mul(e.thread, b.mul(padded, words))])
    _round_to_bf16(e, x, own, b.mul(rows, inputs))
    size = VECTORS * machine.lanes
    stride = b.mul(tiles, I64(size))

    def call(name: str, *arguments: Value) -> None:
        b.call(e.function(f"llvm.{name}", VOID, [a.type for a in arguments]), arguments)

    def pointer(base: Value, index: Value) -> Value:
        return b.bitcast(b.gep(base, [index]), I8.as_pointer())

    def multiply(row: Value, tile: Value, count: int, first: bool) -> None:
        """A tile of outputs for `count` times 16 rows: sums in registers 0..3, x in 4 and 5, weights in 6 and 7.

        The first rows fetch the next tile's weights, so that memory keeps reading while other rows use this one's.
        """
        sums = [(a, v, I8(a * VECTORS + v)) for a in range(count) for v in range(VECTORS)]
        for _, _, register in sums:
            call("x86.tilezero", register)
        x_tiles = [b.gep(own, [b.mul(b.add(row, I64(a * TILE_ROWS)), words)]) for a in range(count)]
        weights = b.gep(w, [b.mul(b.mul(tile, words), I64(size))])
        with e.loop(I64(0), words, TILE_INPUTS // 2) as k:
            for a in range(count):
                call("x86.tileloadd64", I8(4 + a), pointer(x_tiles[a], k), b.mul(words, I64(4)))
            for v in range(VECTORS):
                at = b.add(b.mul(k, I64(size)), I64(v * machine.lanes))
                call("x86.tileloadd64", I8(6 + v), pointer(weights, at), I64(4 * size))
            for line in range(0, TILE_INPUTS // 2 * size * first, 16):
                e.prefetch(weights, b.add(b.mul(b.add(words, k), I64(size)), I64(line)), locality=2)
            for a, v, register in sums:
                call("x86.tdpbf16ps", register, I8(4 + a), I8(6 + v))
        for a, v, register in sums:
            at = b.add(b.mul(b.add(row, I64(a * TILE_ROWS)), stride), b.mul(tile, I64(size)))
            call("x86.tilestored64", register, pointer(y, b.add(at, I64(v * machine.lanes))), b.mul(stride, I64(4)))

    call("x86.ldtilecfg", b.bitcast(config, I8.as_pointer()))
    pair = 2 * TILE_ROWS
    few = b.icmp_unsigned("<", padded, I64(pair))
    first_pair, few_rows = (b.select(few, *ends) for ends in ((I64(0), I64(pair)), (padded, I64(0))))
    pairs = b.and_(padded, I64(-pair))
    with e.loop(e.first, e.last) as tile:
        with e.loop(I64(0), few_rows, pair) as row:
            multiply(row, tile, 1, first=True)
        with e.loop(I64(0), first_pair, pair) as row:
            multiply(row, tile, 2, first=True)
        with e.loop(first_pair, pairs, pair) as row:
            multiply(row, tile, 2, first=False)
        with e.loop(b.add(pairs, few_rows), padded, TILE_ROWS) as row:
            multiply(row, tile, 1, first=False)
    call("x86.tilerelease")
    b.ret_void()
    return e.module
