"""The launcher of _copy_kernels.py: rows of bytes, in the widest units that the addresses allow."""

from cumoe.rawkernels import _numba

_THREADS = 128
_UNITS = {16: "bytes16", 8: "uint64", 4: "uint32", 2: "uint16", 1: "uint8"}


def rows(source, index, target, top_k, scatter):
    """Gather or scatter the rows of two byte arrays with rows of one length, at least a byte."""
    width = source.shape[1]
    together = width | source.data.ptr | target.data.ptr | 16
    unit = together & -together  # the greatest power of two that divides them
    units = width // unit
    lanes = min(_THREADS, 1 << (-(-units // 4) - 1).bit_length()).bit_length() - 1
    blocks = -(-index.size // (_THREADS >> lanes))
    _numba.kernel("_copy_kernels.py", "copy_rows", UNIT=_UNITS[unit], SCATTER=scatter)(
        blocks, _THREADS, source, index, target, index.size, source.shape[0], units, top_k, lanes, overlap=True
    )
