"""Ragged matrix products: each expert's rows of activations times that expert's weights."""

from cumoe.rawkernels import _grouped_gemm_wgmma as wgmma


def block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, kernel):
    """Rows of a tile of the schedule for both products of a call."""
    return wgmma.choose(num_pairs, num_experts)[0].tokens
