"""Ragged matrix products: each expert's rows of activations times that expert's weights."""

from cumoe.rawkernels import _coded_weights, formats
from cumoe.rawkernels import _grouped_gemm_mma as mma
from cumoe.rawkernels import _grouped_gemm_wgmma as wgmma

_MOST_ROWS = 2**31 - 1  # rows are int32 in a schedule
_FEW_ROWS = 384  # of an expert, up to which decoding for each tile costs less than numbers that go through memory


def grouped_gemm(
    x,
    permuted_idx,
    top_k,
    input_scale,
    weights,
    weight_format,
    expert_first_token_offset,
    bias,
    output_scale,
    row_factor,
    column_factor,
    activation,
    interleaved,
    alpha,
    beta,
    limit,
    dtype,
    kernel,
    schedule,
    block_rows,
    ahead,
    expanded,
    out,
):
    """
    ``out[r] = activation(((x[source(r)] * input_scale) @ weights[expert of r].T * factors + bias) * output_scale)``.

    The twin of the CPU's, with tiles of the schedule in place of offsets. With `ahead` the schedule and `permuted_idx`
    are read while the kernel before this one still runs: that must not be the one that writes them.

    With a `weight_format`, whose arrays and `weights` are C-contiguous, codes become numbers in shared memory,
    tile by tile, or where `expanded` (E, N, K) is not empty once for all tiles, in there.

    With ``weight_format.row_cols``, `row_factor` is (rows, parts): sums of parts of that many elements of K meet it,
    and the scales of the weights where those do not change within a part.
    """
    if len(out) > _MOST_ROWS:
        raise NotImplementedError(f"no kernel for {len(out)} rows in one product; at most {_MOST_ROWS}")
    if expanded.size:
        how, weight_format = _coded_weights.expanded(weight_format, x.shape[-1])
        formats.decode(weights, *how, dtype, expanded)
        weights, ahead = expanded, False  # the kernel before the product writes them
    launch = wgmma.launch if kernel == "wgmma" else mma.launch
    launch(
        x,
        permuted_idx,
        top_k,
        input_scale,
        weights,
        weight_format,
        bias,
        output_scale,
        row_factor,
        column_factor,
        activation,
        interleaved,
        alpha,
        beta,
        limit,
        dtype,
        kernel,
        schedule,
        block_rows,
        ahead,
        out,
    )


def expands(num_pairs, num_experts):
    """Whether codes become numbers once for all tiles: where so many share them that it is less work."""
    return wgmma.mean_rows(num_pairs, num_experts) > _FEW_ROWS


def scales_parts(weight_format, row_cols, kernel):
    """Whether sums of parts of `row_cols` elements can meet factors of rows."""
    return row_cols % wgmma.BLOCK_K == 0


def takes_bytes(weight_format, k, kernel):
    """Whether rows of integers come as int8: they are numbers here."""
    return False


def block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel):
    """
    Rows of a tile of the schedule for both products of a call.

    `code_bits` of a code, 0 for numbers; `parted` if sums of parts are scaled.
    """
    if kernel == "wgmma":
        return wgmma.block_rows(num_pairs, num_experts, hidden_size, intermediate_size, code_bits > 0, parted)
    return mma.block_rows(num_pairs, num_experts, hidden_size, intermediate_size, dtype, kernel)


def explain(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel, gated):
    """Lines that say which tiles a call uses and why."""
    if kernel == "wgmma":
        return wgmma.explain(num_pairs, num_experts, hidden_size, intermediate_size, code_bits > 0, parted)
    return mma.explain(num_pairs, num_experts, hidden_size, intermediate_size, dtype, code_bits, parted, kernel, gated)


def variants(arch):
    """Kernels that the default dtypes and the common activations use on `arch`: (file, entry point, constants)."""
    yield from wgmma.variants(arch)
    yield from mma.variants(arch)
