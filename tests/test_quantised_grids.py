"""
The quantised rows of public test grids that concern the expert computation.

Every cell is judged twice, as in `test_moe_grids`: at the tolerance that the public test states, and at the derived
bound with a limit for the average (`quantised_grids.assert_within`). The stated tolerance is against float64 that is
rounded where the layer's notes say that it rounds, as the public tests' references are rounded where their kernels
round. Of activations in groups with 8-bit weights in blocks nothing is rounded: partial sums are scaled in float32, as
in the public kernels; only a CPU without AVX-512 rounds both to bfloat16 after they are multiplied by their scales.

All in bfloat16 unless the cell says otherwise; distributions have the public tests' sizes.
"""

import itertools

import numpy as np
import pytest
from drawn_codes import KINDS, Drawn, in_groups
from quantised_grids import check, check_all, judge, kinds, layer, ms_of, shapes_of
from sides import back, on

import cumoe

# ---- weights of 4 and 8 bits, 16-bit activations ----

WN16 = [(1, 128, 128), (1, 1024, 1024), (32, 2048, 128), (222, 2048, 1024)]


@shapes_of(WN16)
@kinds(*(in_groups(*parts) for parts in itertools.product((4, 8), (64, 128), (False, True))))
def test_wn16(xp, kind, m, n, k):
    """12 cells: e 8, 64, 192; topk 2, 6; ep 1, 4. atol 2e-2."""
    check_all(xp, layer(kind, ms_of(WN16, n, k), n, k), m, (8, 64, 192), (2, 6), 2e-2, ep_sizes=(1, 4))


MARLIN = [
    (1, 128, 256, 5, 2, 1), (1, 1024, 2048, 5, 2, 1), (133, 256, 256, 5, 2, 1), (133, 1024, 2048, 12, 3, 1),
    (128, 256, 256, 5, 2, 1), (128, 1024, 2048, 12, 3, 1), (64, 1024, 2048, 12, 3, 4),
]  # fmt: skip
MARLIN_KINDS = ("4 bits, 128", "4 bits, 64, zero points", "4 bits, channel", "8 bits, 128", "fp8 w8a16 channel")
MARLIN_KINDS += ("nvfp4 w4a16", "mxfp4")


@pytest.mark.parametrize(("n", "k"), [(128, 256), (256, 256), (1024, 2048)])
@kinds(*MARLIN_KINDS)
def test_marlin(xp, kind, n, k):
    """One to four cells; atol 4e-2. Weights are as loaders have them, not in the public kernel's order."""
    cells = [cell for cell in MARLIN if cell[1:3] == (n, k)]
    the_layer = layer(kind, tuple(cell[0] for cell in cells), n, k, size=1 / 20)
    for m, _, _, e, topk, ep_size in cells:
        check(xp, the_layer, m, e, topk, 4e-2, cell=f"ep {ep_size}", ep_size=ep_size)


@pytest.mark.parametrize(("n", "k"), [(128, 256), (1024, 2048)])
def test_marlin_with_biases(xp, n, k):
    """Two cells: m 1, 64. atol 5e-2."""
    the_layer = layer("4 bits, 128", (1, 64), n, k, size=1 / 20, bias=0.1)
    for m in (1, 64):
        check(xp, the_layer, m, 5, 2, 5e-2)


@pytest.mark.parametrize("n", [1024, 2048])
@kinds("fp8 w8a16 channel", "nvfp4 w4a16")
def test_marlin_without_gate(xp, kind, n):
    """Six cells: m 1, 64, 256; (e, topk) (8, 2), (64, 4). atol 1e-1."""
    the_layer = layer(kind, (1, 64, 256), n, n, "relu2_no_mul", size=1 / 20)
    for m, (e, topk) in itertools.product((1, 64, 256), ((8, 2), (64, 4))):
        check(xp, the_layer, m, e, topk, 1e-1, last=(m, e) == (256, 64))


@pytest.mark.parametrize(("e", "n", "k", "topk", "m"), [(4, 32, 64, 2, 8), (8, 64, 128, 2, 16)])
@kinds("4 bits, 32", "4 bits, 32, zero points")
def test_int4_ranks_add_up(xp, kind, e, n, k, topk, m):
    """Three cells: all experts in one place; 2 and 4 ranks, whose sum is within 1e-3 of that."""
    the_layer = layer(kind, (m,), n, k, size=0.2)
    check(xp, the_layer, m, e, topk, 1e-2)
    whole = [w.put(xp, range(e), e) for w in (the_layer.w1, the_layer.w2)]
    x, logits = the_layer.batch(xp, m), np.random.default_rng(m).standard_normal((m, e), np.float32)
    weights, ids = cumoe.fused_topk(on(xp, logits), topk)

    def run(first, last):
        w1, w2 = (Drawn(*(None if part is None else part[first:last] for part in w)) for w in whole)
        own = on(xp, np.where((np.arange(e) >= first) & (np.arange(e) < last), np.arange(e) - first, -1).astype("i4"))
        config = KINDS[kind].build(w1, w2)
        out = cumoe.fused_experts(x, w1.codes, w2.codes, weights, ids, quant_config=config, expert_map=own)
        return back(out).astype(np.float32)

    one = run(0, e)
    assert np.abs(one).max() > 1e-2
    for ranks in (2, 4):
        parts = [run(first, first + e // ranks) for first in range(0, e, e // ranks)]
        np.testing.assert_allclose(sum(parts), one, atol=1e-3)


# ---- blocks of 128 x 128: fp8 atol = rtol = 0.035, of 8192 tokens 0.039; int8 0.065 ----

BLOCK_FP8 = [
    (1, 128, 128), (1, 128, 7168), (1, 1024, 7168), (1, 4608, 128), (1, 4608, 7168), (83, 128, 128), (83, 512, 512),
    (83, 4608, 512), (83, 4608, 7168), (128, 512, 512), (128, 1024, 7168), (128, 4608, 7168), (2048, 128, 128),
    (2048, 1024, 7168), (2048, 4608, 512), (2048, 4608, 7168), (8192, 128, 128), (8192, 128, 7168),
    (8192, 1024, 7168), (8192, 4608, 7168),
    # of the contiguous, aligned path
    (128, 128, 128), (128, 128, 7168), (128, 4608, 128), (192, 512, 512), (192, 1024, 7168), (192, 4608, 7168),
    (1335, 128, 128), (1335, 1024, 7168), (1335, 4608, 512), (1335, 4608, 7168), (2048, 128, 7168),
]  # fmt: skip
BLOCK_INT8 = [
    (1, 128, 7168), (1, 1024, 7168), (1, 4096, 512), (1, 4096, 7168), (33, 512, 512), (33, 128, 7168),
    (33, 1024, 7168), (33, 4096, 128), (33, 4096, 7168), (128, 128, 128), (128, 1024, 7168), (128, 4096, 512),
    (128, 4096, 7168), (222, 512, 512), (222, 1024, 7168), (222, 4096, 7168), (2048, 128, 128), (2048, 1024, 7168),
    (2048, 4096, 4096),
]  # fmt: skip


@shapes_of(BLOCK_FP8)
def test_block_fp8(xp, m, n, k):
    """10 cells: e 2, 8, 16 and topk 1, 2, 6, as many as there are experts; ep 2, 4 of e 8, topk 2."""
    the_layer, tolerance = layer("fp8 block", ms_of(BLOCK_FP8, n, k), n, k, size=1 / 15), 0.035 if m < 8192 else 0.039
    check_all(xp, the_layer, m, (8,), (2,), tolerance, tolerance, ep_sizes=(2, 4))
    check_all(xp, the_layer, m, (2, 8, 16), (1, 2, 6), tolerance, tolerance)


def test_block_fp8_with_a_limit(xp):
    """Numbers so large that the limit counts."""
    the_layer = layer("fp8 block", (16,), 256, 512, x_size=5.0, size=1 / 15, gemm1_clamp_limit=10.0)
    out, _ = check(xp, the_layer, 16, 8, 2, 0.035, 0.035)
    free = layer("fp8 block", (16,), 256, 512, x_size=5.0, size=1 / 15)
    assert (judge(xp, free, 16, 8, 2)[0] != out).any()


@shapes_of(BLOCK_INT8)
def test_block_int8(xp, m, n, k):
    """Four cells: e 8, 24; topk 2, 6."""
    the_layer = layer("int8 block", ms_of(BLOCK_INT8, n, k), n, k, size=1 / 15)
    check_all(xp, the_layer, m, (8, 24), (2, 6), 0.065, 0.065)


# ---- fp8 with scales of tokens or tensors, channels or tensors: atol 5.5e-2, rtol 1e-2 ----
# The public grid is in float16. Its second scale for all tokens is that of the batch; here it is so for the smallest
# shape, and in the others it was stored, so that the law needs no other tokens than the judged ones.

CUTLASS = [
    (2, 1024, 1024), (2, 3072, 1024), (2, 3072, 1536), (7, 3072, 1536), (64, 1024, 1024), (64, 1024, 1536),
    (64, 3072, 1024), (224, 1024, 1024), (224, 3072, 1024), (224, 3072, 1536), (32768, 1024, 1024),
]  # fmt: skip


@shapes_of(CUTLASS)
@kinds("fp8 token, channel", "fp8 token, tensor", "fp8 static, channel", "fp8 static, tensor")
def test_cutlass(xp, kind, m, n, k):
    """Four cells: e 40, 64; topk 6, 8."""
    check_all(xp, layer(kind, ms_of(CUTLASS, n, k), n, k), m, (40, 64), (6, 8), 5.5e-2, 1e-2)


@kinds("fp8 dynamic, channel", "fp8 dynamic, tensor")
def test_cutlass_with_the_scale_of_a_batch(xp, kind):
    """Four cells: e 40, 64; topk 6, 8."""
    check_all(xp, layer(kind, (2,), 1024, 1024), 2, (40, 64), (6, 8), 5.5e-2, 1e-2)


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8, 16])
def test_cutlass_ranks(xp, ep_size):
    """Two cells: topk 1, 8. The public test adds up the ranks; here one rank is judged."""
    check_all(xp, layer("fp8 token, channel", (64,), 1024, 4096), 64, (16,), (1, 8), 5.5e-2, 1e-2, ep_sizes=(ep_size,))


@pytest.mark.parametrize(
    ("m", "n", "k", "topk"), [(1, 8192, 5120, 31), (32768, 1024, 1024, 16), (65536, 512, 1024, 16)]
)
def test_cutlass_large(xp, m, n, k, topk):
    """Many choices among 128 experts, of which 16 are here."""
    check(xp, layer("fp8 token, channel", (m,), n, k), m, 128, topk, 5.5e-2, 1e-2, ep_size=8)


DISABLED = [(7232, 2048, 5120), (40000, 2048, 5120)]


@shapes_of(DISABLED)
@kinds("fp8 token, channel", "fp8 static, tensor")
def test_cutlass_disabled(xp, kind, m, n, k):
    """Four cells: e 40, 64; topk 6, 8. The public grid has these shapes as comments, for wrong results."""
    check_all(xp, layer(kind, ms_of(DISABLED, n, k), n, k), m, (40, 64), (6, 8), 5.5e-2, 1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("k", [256, 4096])
@pytest.mark.parametrize("n", [128, 1024])
def test_ptpc(xp, n, k, dtype):
    """Four cells: m 1, 33; topk 2, 6. Scales (E, N). The public test wants a mean difference below 5 %."""
    the_layer = layer("fp8 token, channel in 2-D", (1, 33), n, k, dtype=dtype, size=1.0)
    for m, topk in itertools.product((1, 33), (2, 6)):
        out, steps = check(xp, the_layer, m, 8, topk, np.inf)
        assert np.abs(out - steps).mean() < 0.05 * np.abs(steps).mean()


FLASHINFER = [
    (256, 8192, 5120),
    (127, 4096, 5120),
    (10, 8192, 5120),
    (10, 4096, 5120),
    (1, 8192, 5120),
    (1, 4096, 5120),
]


@shapes_of(FLASHINFER)
@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_flashinfer(xp, activation, m, n, k):
    """One choice among 16, its weight on the input, stored scales. 92.5 % within atol 0.1, rtol 0.85; here all are."""
    scores = np.random.default_rng(1).standard_normal(256, np.float32)
    more = {"size": 1.0, "a2_scale": 1.0, "input_weights": tuple(1 / (1 + np.exp(-scores)))}
    check(xp, layer("fp8 static, tensor", ms_of(FLASHINFER, n, k), n, k, activation, **more), m, 16, 1, 0.1, 0.85)


# ---- whole layers and their pieces ----

MOE_LAYER = [(1, 128, 256), (32, 512, 512), (222, 1024, 2048)]


@shapes_of(MOE_LAYER)
@kinds("fp8 block", "fp8 token, channel", "nvfp4")
def test_moe_layer(xp, kind, m, n, k):
    """12 cells: e 8, 64; topk 2, 6; ranks 1, 2, 4, of which one is judged. fp8 6.5e-2; nvfp4 1e-1, k >= 2048 more."""
    tolerance = 6.5e-2 if kind != "nvfp4" else 0.1 + k * 1e-4 * (k >= 2048)
    the_layer = layer(kind, ms_of(MOE_LAYER, n, k), n, k, size=1 / 15)
    check_all(xp, the_layer, m, (8, 64), (2, 6), tolerance, tolerance, ep_sizes=(1, 2, 4))


@pytest.mark.parametrize("activation", ["silu", "gelu", "swigluoai", "swigluoai_uninterleave"])
@kinds("fp8 token, channel", "nvfp4")
def test_modular_kernels(xp, kind, activation):
    """Four cells: m 32, 64; topk 1, 4; e 32. fp8 3e-2; fp4 1e-1 of 90 % of the elements, here of all."""
    limits = {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0} if activation[-1] == "e" else {}
    the_layer = layer(kind, (32, 64), 1024, 2048, activation, size=1 / 15, **limits)
    tolerance = 1e-1 if kind == "nvfp4" else 3e-2
    for m in (32, 64):
        check_all(xp, the_layer, m, (32,), (1, 4), tolerance, tolerance)


BATCHED = [
    (1, 128, 128), (1, 512, 512), (1, 1024, 2048), (32, 128, 128), (32, 512, 512), (32, 1024, 2048),
    (45, 128, 2048), (45, 1024, 128), (64, 512, 512), (64, 1024, 2048), (222, 128, 2048), (222, 1024, 2048),
]  # fmt: skip


@shapes_of(BATCHED)
@kinds("fp8 token, channel", "fp8 static, tensor", "fp8 block")
def test_batched(xp, kind, m, n, k):
    """Six cells: e 8, 64; topk 1, 2, 6. atol 3e-2, rtol 2e-2."""
    the_layer = layer(kind, ms_of(BATCHED, n, k), n, k, size=1 / 15)
    check_all(xp, the_layer, m, (8, 64), (1, 2, 6), 3e-2, 2e-2, shelves=True)


def difference(out, steps):
    """The measure of the public tests of DeepGEMM."""
    out = out.astype(np.float64)
    return 1 - 2 * (out * steps).sum() / (out**2 + steps**2).sum()


@pytest.mark.parametrize(("m", "n", "k"), [(1024, 768, 128), (2048, 768, 512), (512, 1024, 1024), (4096, 4096, 1024)])
def test_deepgemm(xp, m, n, k):
    """Two cells: topk 2, 6; e 32. A difference below 1e-3."""
    for topk in (2, 6):
        out, steps = check(xp, layer("fp8 block", (m,), n, k), m, 32, topk, np.inf, last=topk == 6)
        assert difference(out, steps) < 1e-3


@pytest.mark.parametrize("k", [128, 256])
@pytest.mark.parametrize("n", [512, 1024])
def test_batched_deepgemm(xp, n, k):
    """Eight cells: e 16, 32; shelves for 256, 512; topk 2, 4. A difference below 1e-3."""
    for m, e, topk in itertools.product((256, 512), (16, 32), (2, 4)):
        last = (m, e, topk) == (512, 32, 4)
        out, steps = check(xp, layer("fp8 block", (256, 512), n, k), m, e, topk, np.inf, shelves=True, last=last)
        assert difference(out, steps) < 1e-3


# ---- four bits ----

NVFP4 = [
    (2, 1024, 1024), (2, 1024, 1536), (2, 3072, 1024), (64, 1024, 1024), (64, 3072, 1024), (64, 2048, 1536),
    (224, 1024, 1024), (224, 1024, 1536),
]  # fmt: skip


@shapes_of(NVFP4)
def test_nvfp4(xp, m, n, k):
    """Nine cells: e 40, 64, 256; topk 1, 6, 8. atol = rtol = 1e-1."""
    check_all(xp, layer("nvfp4", ms_of(NVFP4, n, k), n, k, size=1 / 15), m, (40, 64, 256), (1, 6, 8), 1e-1, 1e-1)


@pytest.mark.parametrize("m", [2, 64, 224])
def test_nvfp4_swiglustep(xp, m):
    """Four cells: e 64, 288; topk 1, 8."""
    the_layer = layer("nvfp4", (2, 64, 224), 1280, 4096, "swiglustep", size=1 / 15)
    check_all(xp, the_layer, m, (64, 288), (1, 8), 1e-1, 1e-1)


@pytest.mark.parametrize(("n", "k"), [(32, 64), (128, 256)])
def test_nvfp4_emulation(xp, n, k):
    """Six cells: m 1, 2, 4, 17, 64, 1024; topk 4. atol 0.02."""
    ms = (1, 2, 4, 17, 64, 1024)
    for m in ms:
        check(xp, layer("nvfp4", ms, n, k), m, 8, 4, 0.02)


@pytest.mark.parametrize("parameters", [(1.0, 1.0, np.inf), (1.702, 1.0, 7.0)])
@kinds("mxfp4", "mxfp4 mxfp8")
def test_ocp_mx(xp, kind, parameters):
    """12 cells: m 1, 128, 1024; e 32, 128; topk 1, 4; biases. 80 % within rtol 0.3."""
    names = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    more = {"size": 1.0, "x_size": 1.0, "bias": 1.0} | dict(zip(names, parameters, strict=True))
    the_layer = layer(kind, (1, 128, 1024), 3072, 3072, "swigluoai_uninterleave", **more)
    for e, m, topk in itertools.product((32, 128), (1, 128, 1024), (1, 4)):
        out, steps = check(xp, the_layer, m, e, topk, np.inf, renormalize=True, last=(e, m, topk) == (128, 1024, 4))
        assert (np.abs(out - steps) <= 0.3 * np.abs(steps)).mean() >= 0.8


OAI = [(1, 512, 384), (1, 2880, 2880), (2, 512, 384), (2, 2880, 2880), (16, 2880, 2880)]


@shapes_of(OAI)
def test_gpt_oss(xp, m, n, k):
    """Two cells: e 32, 128; topk 4. Relative differences: 0.025 at most, 0.005 their root mean square."""
    more = {"size": 1.0, "x_size": 1.0, "bias": 1.0, "gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}
    for e in (32, 128):
        the_layer = layer("mxfp4", ms_of(OAI, n, k), n, k, "swigluoai", **more)
        out, steps = check(xp, the_layer, m, e, 4, np.inf, renormalize=True)
        relative = np.abs(out - steps) / np.maximum(np.abs(steps), np.sqrt(np.mean(steps**2)))
        assert relative.max() <= 0.025
        assert np.sqrt(np.mean(relative**2)) <= 0.005


W4A8 = [
    (8, 512, 2048), (8, 2048, 2048), (64, 512, 1024), (64, 2048, 2048), (4, 2048, 768), (8, 768, 2048),
    (64, 1536, 2048), (128, 8192, 4096),
]  # fmt: skip


@pytest.mark.parametrize(("e", "rows", "k"), W4A8)
def test_w4a8(xp, e, rows, k):
    """
    atol = rtol = 1e-2. The public test is of one product, of (E, N, K) codes; here it is the first one of a layer.

    Its activations come in fp8 with scales of any sign; here they are quantised on the way.
    """
    m = 16 * e
    check(xp, layer("int4 w4a8", (m,), rows // 2, k), m, e, 2, 1e-2, 1e-2)


# ---- the rows of the CPU ----

W8A16 = [(256, 512), (512, 256), (512, 512), (768, 2048)]


@pytest.mark.parametrize(("n", "k"), W8A16)
def test_cpu_fp8_w8a16(xp, n, k):
    """Eight cells, 12 of the last shape: m 1, 2, 64, 121; e 8, topk 2, 4; e 128, topk 8. atol = rtol = 1e-2."""
    the_layer = layer("fp8 w8a16 block", (1, 2, 64, 121), n, k, x_size=k**-0.5, size=0.3)
    for m in (1, 2, 64, 121):
        check_all(xp, the_layer, m, (8,), (2, 4), 1e-2, 1e-2)
        if k == 2048:
            check_all(xp, the_layer, m, (128,), (8,), 1e-2, 1e-2)


@pytest.mark.parametrize(("n", "k"), W8A16)
@kinds("int8 token, channel", "int8 w8a16 channel", "4 bits, 64", "4 bits, 128", "4 bits, 128, zero points")
def test_cpu_integers(xp, kind, n, k):
    """Four cells: m 1, 2, 64, 121. int8 weights and activations 2e-1, int8 weights 2e-2, int4 1e-2."""
    tolerance, size = {"i": (2e-1, 0.02), "1": (2e-2, 0.02), "4": (1e-2, 0.04)}["1" if "w8a16" in kind else kind[0]]
    the_layer = layer(kind, (1, 2, 64, 121), n, k, x_size=2 * k**-0.5, size=size)
    for m in (1, 2, 64, 121):
        check(xp, the_layer, m, 8, 4 if (n, k) == (512, 512) else 2, tolerance, tolerance)


@pytest.mark.parametrize(
    ("n", "k", "e", "topk"), [(128, 128, 4, 2), (256, 256, 8, 4), (352, 256, 8, 4), (512, 320, 8, 4)]
)
def test_cpu_mxfp4(xp, n, k, e, topk):
    """Four cells: m 1, 2, 32, 121. atol = rtol = 1e-2."""
    for m in (1, 2, 32, 121):
        check(xp, layer("mxfp4", (1, 2, 32, 121), n, k), m, e, topk, 1e-2, 1e-2)


@pytest.mark.parametrize("n", [64, 128])
def test_cpu_gpt_oss(xp, n):
    """Two cells: m 1, 32; biases."""
    the_layer = layer("mxfp4", (1, 32), n, n, "swigluoai", bias=0.1, gemm1_alpha=1.702, gemm1_clamp_limit=7.0)
    for m in (1, 32):
        check(xp, the_layer, m, 4, 2, 1e-2, 1e-2)


@pytest.mark.parametrize("code", [0, 1, 127, 200, 254, 255])
def test_codes_of_zero_stay_zero(xp, code):
    """Whatever their scale; but 255 is no number, in the standard and here, and so is a product with it."""
    x, codes = on(xp, np.ones((2, 64), "bfloat16")), xp.zeros((4, 128, 32), np.uint8)
    scale = xp.full((4, 128, 2), code, np.uint8)
    config = cumoe.mxfp4_w4a16_moe_quant_config(scale, scale[:, :64])
    weights, ids = xp.ones((2, 2), np.float32), xp.zeros((2, 2), np.int32)
    out = back(cumoe.fused_experts(x, codes, codes[:, :64], weights, ids, quant_config=config)).astype(np.float32)
    assert np.isnan(out).all() if code == 255 else not out.any()
