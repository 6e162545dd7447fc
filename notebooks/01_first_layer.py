# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A first Mixture-of-Experts layer
#
# One layer from a checkpoint to a checked result: load it, route tokens, look at the routing, run the
# experts, verify the numbers, and see how far the time is from what the machine can do at all.
# Everything runs on the CPU in well under a minute.

# %%
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import save_file

import cumoe
from cumoe.bench import ceilings, shapes, timing

# %% [markdown]
# ## A checkpoint
#
# A real one would be downloaded: any Hugging Face folder with `config.json` and safetensors files. Here we
# write a small one ourselves, with the names that a Mixtral model uses: a router (`gate`) and, for each
# expert, `w1` (gate rows), `w3` (up rows) and `w2`.

# %%
E, k, H, I = 8, 2, 512, 1024
rng = np.random.default_rng(0)


def draw(rows, columns):
    return (rng.standard_normal((rows, columns), np.float32) * columns**-0.5).astype("bfloat16")


tensors = {"gate": draw(E, H)}
for e in range(E):
    tensors |= {f"experts.{e}.w1": draw(I, H), f"experts.{e}.w3": draw(I, H), f"experts.{e}.w2": draw(H, I)}

folder = tempfile.TemporaryDirectory()
checkpoint = Path(folder.name) / "first-layer"
checkpoint.mkdir()
config = {"model_type": "mixtral", "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 1}
config |= {"num_local_experts": E, "num_experts_per_tok": k, "hidden_act": "silu", "torch_dtype": "bfloat16"}
(checkpoint / "config.json").write_text(json.dumps(config))
save_file(
    {f"model.layers.0.block_sparse_moe.{name}.weight": tensor for name, tensor in tensors.items()},
    checkpoint / "model.safetensors",
)

layer = cumoe.load_layer(checkpoint, 0)
print(layer.explain())

# %% [markdown]
# ## Tokens and their experts
#
# The router scores each of the T tokens against each of the E experts and keeps the best k. The report shows
# who got how much: with random weights the load is nearly even, with a trained model it seldom is.

# %%
T = 256
hidden_states = rng.standard_normal((T, H), np.float32).astype("bfloat16")
topk_weights, topk_ids = layer.route(hidden_states)
print(f"token 0 goes to experts {topk_ids[0]} with weights {topk_weights[0]}")

report = cumoe.routing_report(topk_weights, topk_ids, E)
report

# %%
report.plot()

# %% [markdown]
# ## Run
#
# Calling the layer routes and computes. The same in two steps, with plain arrays: `fused_experts` takes the
# weights as (E, 2I, H) and (E, H, I) and gives the same bits.

# %%
out = layer(hidden_states)

w1 = np.stack([np.concatenate([tensors[f"experts.{e}.w1"], tensors[f"experts.{e}.w3"]]) for e in range(E)])
w2 = np.stack([tensors[f"experts.{e}.w2"] for e in range(E)])
by_hand = cumoe.fused_experts(hidden_states, w1, w2, topk_weights, topk_ids)
assert (by_hand.view("uint16") == out.view("uint16")).all()
print(out.shape, out.dtype)

# %% [markdown]
# ## Verify
#
# `verify` computes sampled tokens again in float64 and gives every element a bound that rounding can prove.
# A ratio of at most 1 means: nothing but rounding happened.

# %%
found = cumoe.verify(out, hidden_states, w1, w2, topk_weights, topk_ids)
assert found.max_ratio <= 1
print(f"max(error/bound) = {found.max_ratio:.4f} over {len(found.tokens)} tokens")

# %% [markdown]
# ## Time
#
# Two limits hold for every method: the weights of the chosen experts have to be read, and the products have
# to be computed. The floor is the larger of both times, from rates measured on this machine, now. A layer
# as small as this one may stay in a cache and then beats its memory floor.

# %%
shape = shapes.Shape("first", E, k, H, I)
limits = ceilings.measure("bfloat16", 2 << 30)
prepared = cumoe.prepare(w1, w2)
token_counts = [1, 4, 16, 64, 256]
measured_us, floor_us = [], []
for t in token_counts:
    x = hidden_states[:t]
    routings = [shapes.routing(shape, t, seed=seed) for seed in range(timing.ROUTINGS_CYCLED)]

    def call(number, x=x, routings=routings):
        return cumoe.fused_experts(x, prepared, None, *routings[number])

    measured_us.append(timing.compare({"cumoe": call}, mode="back-to-back", budget_s=0.3)["cumoe"].median_us)
    experts_hit = len(np.unique(routings[0][1]))
    floor_us.append(1e6 * limits.floor_s(shape.moved_bytes(t, experts_hit, "bfloat16"), shape.flops(t)))

print(f"reads {limits.stream_gbs:.1f} GB/s, computes {limits.peak_gflops:.0f} GFLOP/s")
for t, us, least in zip(token_counts, measured_us, floor_us, strict=True):
    print(f"T = {t:4d}: {us:9.1f} us, floor {least:9.1f} us")

# %%
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
axes.loglog(token_counts, measured_us, "o-", label="cumoe")
axes.loglog(token_counts, floor_us, "k--", label="floor of this machine")
axes.set(xlabel="tokens", ylabel="time, us", title="one layer, bfloat16")
axes.legend()

# %%
folder.cleanup()
