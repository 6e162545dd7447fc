"""The CPU side: Numba loops over arrays of bits and numbers, one file a room."""
