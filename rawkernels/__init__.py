"""The GPU side: CuPy raw kernels and Numba CUDA kernels, one file a room."""
