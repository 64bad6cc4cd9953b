"""How many queries attention takes at a time. No MLX here: operations and memory are counted by it too."""

# Bytes of float32 scores in a block: what stays in a CPU's caches; what keeps a GPU busy.
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 4 << 20, 64 << 20


def query_blocks(rows: int, heads: int, length: int, size: int | None, *, on_cpu: bool) -> list[tuple[int, int]]:
    """[start, end) of each block of queries of `rows` sequences of `length`, which sees the keys [0, end). `size` is
    the number of queries in a block; None: by the memory that their scores take."""
    if size is None:
        of_one_query = 4 * rows * heads * length  # bytes
        size = max(32, (CPU_BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES) // of_one_query // 32 * 32)
    return [(start, min(start + size, length)) for start in range(0, length, size)]
