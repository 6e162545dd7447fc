"""How a warp holds a row of numbers: constants of the kernels that include logits.cuh or vectors.cuh."""

WARPS = 4  # of a block, one token each
_LANES = 32
BLOCK = WARPS * _LANES
ONE_BY_ONE = {"VALUES": 1, "WIDTH": 1}  # for the kernels that hold no row
_MOST_EXPERTS = 1024  # that a warp holds in registers
_SORTED_VALUES = 8  # as in best.cuh: as many make a power of two
WIDEST_BYTES = 16  # of one load


def width(*arrays):
    """Neighbours that one load or store may take: as many as divide the rows and the addresses of all arrays."""
    width = WIDEST_BYTES // arrays[0].itemsize
    for array in arrays:
        while array.shape[1] % width or array.data.ptr % (width * array.itemsize):
            width //= 2
    return width


def in_registers(num_experts, top_k):
    """Say whether a warp can hold a row of logits, and each lane one choice."""
    return num_experts <= _MOST_EXPERTS and top_k <= _LANES


def values_and_width(num_experts, neighbours):
    """Constants VALUES (logits a lane) and WIDTH (of one load, at most `neighbours`) for rows that fit."""
    per_lane = -(-num_experts // _LANES)
    if per_lane <= _SORTED_VALUES:
        values = 1 << (per_lane - 1).bit_length()
        return {"VALUES": values, "WIDTH": min(neighbours, values)}
    return {"VALUES": -(-per_lane // neighbours) * neighbours, "WIDTH": neighbours}


def blocks(num_tokens):
    """Blocks for so many tokens."""
    return -(-num_tokens // WARPS)


def c_type(ids):
    """Name of the signed integer of an array of ids in the kernels; -1 has the bits of uint32's greatest."""
    return "int64" if ids is not None and ids.itemsize == 8 else "int"
