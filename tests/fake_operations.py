"""
The operations of vLLM and zentorch that `cumoe.bench.compiled_peers` calls, by plain torch.

They read weights as their signatures document them: packing turns into a note of what was packed, and the layer is
computed from it, so that a peer which hands over a wrong scale, order or method number computes a wrong layer.
"""

from types import SimpleNamespace

import numpy as np
import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Packed(torch.Tensor):
    """A tensor that only its own operation may read."""


def packed(tensor):
    return tensor.clone().as_subclass(Packed)


def unpacked(tensor):
    assert isinstance(tensor, Packed), "weights must be packed first"
    return tensor.as_subclass(torch.Tensor)


def layer(out, x, w1, w2, topk_weights, topk_ids):
    """The layer in float64 from numbers, written into `out`."""
    assert topk_weights.dtype == torch.float32 and topk_ids.dtype == torch.int32 and out.shape == x.shape
    total = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(len(x)):
        for weight, e in zip(topk_weights[t], topk_ids[t], strict=True):
            gate, up = (w1[e].double() @ x[t].double()).chunk(2)
            total[t] += weight * (w2[e].double() @ (torch.nn.functional.silu(gate) * up))
    out.copy_(total)


def nibbles(words, axis):
    """Eight codes of each int32, the lowest first, in place of it."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (words.unsqueeze(axis + 1) >> shifts.view(-1, *[1] * (words.ndim - axis - 1))) & 15
    return codes.flatten(axis, axis + 1)


def spread(scale, w, axis=2):
    """Repeat scales over the groups of `axis`."""
    return scale.float().repeat_interleave(w.shape[axis] // scale.shape[axis], axis)


# -- vLLM -------------------------------------------------------------------------------------------


def prepack_moe_weight(weight, out, isa):
    assert isa == "vec"
    out.copy_(-weight)  # in an order of its own


def cpu_fused_moe(out, x, w1, w2, bias1, bias2, topk_weights, topk_ids, skip_weighted, activation, isa):
    assert (bias1, bias2, skip_weighted, activation, isa) == (None, None, False, "silu", "vec")
    layer(out, x, -w1, -w2, topk_weights, topk_ids)


def convert_weight_packed_scale_zp(words, zero_points, scale, order):
    assert order == 1  # GPTQ
    codes, zeros = nibbles(words, 1), nibbles(zero_points, 2) + 1
    return packed(codes.transpose(1, 2)), packed(zeros.transpose(1, 2)), packed(scale.transpose(1, 2))


def fused_experts_cpu(
    out, x, w1, w2, topk_weights, topk_ids, method, s1, s2, z1, z2, a1_scale, block, b1, b2, alpha, limit, is_packed
):
    assert (a1_scale, b1, b2, alpha, limit, is_packed) == (None, None, None, None, None, True)
    assert (block == [128, 128]) == (method == 2) and (z1 is not None) == (method == 3)
    numbers = []
    for w, s, z in ((unpacked(w1), s1, z1), (unpacked(w2), s2, z2)):
        if method == 0:
            numbers.append(w)
        elif method == 1:
            numbers.append(w.float() * s.view(len(w), -1, 1))
        elif method == 2:
            rows = s.repeat_interleave(128, 1)[:, : w.shape[1]]
            numbers.append(w.float() * rows.repeat_interleave(128, 2)[..., : w.shape[2]])
        elif method == 3:
            numbers.append((w - spread(unpacked(z), w)) * spread(unpacked(s), w))
        else:
            codes = torch.stack([w & 15, w >> 4], -1).flatten(2)
            numbers.append(E2M1[codes.int()] * torch.exp2(spread(unpacked(s), codes) - 127))
    layer(out, x, *numbers, topk_weights, topk_ids)


VLLM = SimpleNamespace(
    prepack_moe_weight=prepack_moe_weight,
    cpu_fused_moe=cpu_fused_moe,
    convert_weight_packed=packed,
    convert_scale_packed=packed,
    convert_weight_packed_scale_zp=convert_weight_packed_scale_zp,
    fused_experts_cpu=fused_experts_cpu,
)


# -- zentorch ---------------------------------------------------------------------------------------


class Zentorch:
    """Packs at the first call and remembers by address, as the real one does."""

    def __init__(self):
        self.remembered = {}

    def zentorch_flush_moe_weight_cache(self):
        self.remembered.clear()

    def zentorch_woq_repack_weight(self, codes):
        assert codes.dtype == torch.int8 and codes.min() >= -8 and codes.max() <= 7
        words = (codes.int() & 15).view(len(codes), -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
        return words.sum(2, dtype=torch.int32)

    def zentorch_fused_moe(
        self, out, x, w1, w2, b1, b2, topk_weights, topk_ids, skip_weighted, activation, s1=None, s2=None
    ):
        assert (b1, b2, skip_weighted, activation) == (None, None, False, "silu")
        key = w1.data_ptr(), w2.data_ptr()
        if key not in self.remembered:
            self.remembered[key] = self.numbers(w1, s1), self.numbers(w2, s2)
        layer(out, x, *self.remembered[key], topk_weights, topk_ids)

    def numbers(self, w, scale):
        if scale is None:
            return w.clone()
        if w.dtype == torch.int8:
            assert scale.dtype == torch.float32 and scale.shape == w.shape[:2]
            return w.float() * scale[..., None]
        codes = nibbles(w, 2)
        return torch.where(codes > 7, codes - 16, codes) * spread(scale.transpose(1, 2), codes)


def as_installed(monkeypatch, package, folder, name):
    """Let `package` be found, with an operation library that torch "loads"."""
    (folder / package).mkdir(exist_ok=True)
    (folder / package / "__init__.py").write_text("raise AssertionError('the package itself must not be imported')")
    (folder / package / name).write_bytes(np.zeros(4, np.uint8).tobytes())
    monkeypatch.syspath_prepend(str(folder))
