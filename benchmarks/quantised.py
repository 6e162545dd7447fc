"""
Time quantised layers on the GPU against the layer on weights that are decoded to bfloat16 first, and write a CSV.

Usage: python benchmarks/quantised.py [--shape qwen3-30b-a3b] [--tokens 1 64 ...] [--output DIR] [--commit ID]

Of each scheme and number of tokens, medians of a burst over a cold L2, each call one graph: the layer on its codes; the
same numbers by decoding all weights first; all weights decoded, then the layer on bfloat16 with activations as they
are; that layer alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cumoe
from cumoe import _arrays
from cumoe.bench import gpu_arrays, results, shapes
from cumoe.bench.gpu_timing import Stopwatch

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
REPLAYS = 12

Config = Callable[..., Any]


def nvfp4_config(scales: Sequence[Any], global_scales: Sequence[Any]) -> Any:
    """Activations of order one, with a static global scale."""
    ones = np.float32(300) * np.ones(1, np.float32)
    on_device = _arrays.namespace("cuda").asarray(ones)
    alphas = (1 / (g * on_device) for g in global_scales)
    return cumoe.nvfp4_moe_quant_config(*alphas, on_device, on_device, *scales)


# name -> scheme of `quantize`, its group, and the config of both scales and global scales
SCHEMES: dict[str, tuple[str, tuple[int, int], Config]] = {
    "fp8 w8a8, channel and token": (
        "fp8",
        (1, -1),
        lambda s, g: cumoe.fp8_w8a8_moe_quant_config(*s, per_act_token_quant=True, per_out_ch_quant=True),
    ),
    "fp8 w8a8, 128 x 128": (
        "fp8",
        (128, 128),
        lambda s, g: cumoe.fp8_w8a8_moe_quant_config(*s, block_shape=[128, 128]),
    ),
    "int8 w8a8, channel and token": (
        "int8",
        (1, -1),
        lambda s, g: cumoe.int8_w8a8_moe_quant_config(*s, per_act_token_quant=True),
    ),
    "int4 w4a16, groups of 128": (
        "int4",
        (1, 128),
        lambda s, g: cumoe.int4_w4a16_moe_quant_config(*s, block_shape=[0, 128]),
    ),
    "mxfp4 w4a16": ("mxfp4", (1, 32), lambda s, g: cumoe.mxfp4_w4a16_moe_quant_config(*s)),
    "nvfp4 w4a4": ("nvfp4", (1, 16), nvfp4_config),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the file, say where it is."""
    parser = argparse.ArgumentParser(description="time quantised layers and write a CSV", allow_abbrev=False)
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--commit", default="", metavar="ID", help="what the file names, outside a checkout")
    options = parser.parse_args(arguments)
    facts = results.header("quantised", options.commit, True)
    facts["command"] = facts["command"].replace("cumoe", "python benchmarks/quantised.py", 1)
    rows = []
    with Stopwatch() as stopwatch:
        for name in SCHEMES:
            for row in measured(stopwatch, shapes.SHAPES[options.shape], name, options.tokens):
                rows.append({"shape": options.shape, "scheme": name, **row})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    path = results.default_path(options.output, facts)
    results.write(path, facts, rows)
    print(f"wrote {path}")
    return 0


def measured(
    stopwatch: Stopwatch, shape: shapes.Shape, name: str, token_counts: Sequence[int]
) -> Iterator[results.Row]:
    """Yield a row for each number of tokens."""
    cp = _arrays.namespace("cuda")
    scheme, group, config = SCHEMES[name]
    E, H, I, k = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.top_k
    weights = [drawn(cp, scheme, group, (E, n, m)) for n, m in ((2 * I, H), (H, I))]
    quant_config = config([w.scale for w in weights], [w.global_scale for w in weights])
    prepared = cumoe.prepare(*(w.values for w in weights), quant_config=quant_config)
    room, experts = _arrays.room(cp, "grouped_gemm"), prepared.experts
    numbers = [cp.empty(size, np.uint16) for size in ((E, 2 * I, H), (E, H, I))]

    def decode_all() -> None:
        for codes, weight, out in zip((experts.w1, experts.w2), experts.scheme[:2], numbers, strict=True):
            f = weight.format
            how = f.scale, f.scale_dtype, f.zero_points, f.global_scale, f.group_rows, f.group_cols, f.rule
            _arrays.room(cp, "formats").decode(codes, *how, "bfloat16", out)

    plain = [array.view(gpu_arrays.DTYPES["bfloat16"]) for array in numbers]
    few_rows = room._FEW_ROWS
    for num_tokens in token_counts:
        x = gpu_arrays.tokens(shape, num_tokens, "bfloat16")
        choices = cumoe.fused_topk(gpu_arrays.normal((num_tokens, E), "float32"), k)
        sizes = num_tokens, H, I, E, k
        named = {"out": cp.empty(x.shape, x.dtype)}

        def on_codes(x: Any = x, choices: Any = choices, named: Any = named) -> Any:
            return cumoe.fused_experts(x, prepared, None, *choices, **named)

        def on_numbers(x: Any = x, choices: Any = choices, named: Any = named) -> Any:
            return cumoe.fused_experts(x, *plain, *choices, **named)

        room._FEW_ROWS = -1
        try:
            needed = cumoe.plan(*sizes, device="cuda", quant_config=quant_config).workspace_bytes
            named["workspace"] = cp.empty(needed, np.uint8)  # graphs run one at a time
            graphs = [stopwatch.capture(on_codes)]
        finally:
            room._FEW_ROWS = few_rows
        graphs.insert(0, stopwatch.capture(on_codes))
        graphs.append(stopwatch.capture(lambda run=on_numbers: (decode_all(), run())))
        graphs.append(stopwatch.capture(on_numbers))
        own, first, apart, alone = (stopwatch.burst(graph, REPLAYS).median_us for graph in graphs)
        yield {
            "tokens": num_tokens,
            "us": f"{own:.1f}",
            "decoded_first_us": f"{first:.1f}",
            "bfloat16_decoded_first_us": f"{apart:.1f}",
            "bfloat16_us": f"{alone:.1f}",
            "decoded_first_ratio": f"{first / own:.3f}",
            "bfloat16_decoded_first_ratio": f"{apart / own:.3f}",
            "bfloat16_ratio": f"{alone / own:.3f}",
        }


def drawn(cp: Any, scheme: str, group: tuple[int, int], shape: tuple[int, int, int]) -> cumoe.Quantized:
    """Quantise the weights of one expert, which all share."""
    one = gpu_arrays.normal((1, *shape[1:]), "bfloat16", shape[2] ** -0.5)
    quantised = cumoe.quantize(one, scheme, group)

    def repeated(array: Any) -> Any:
        if array is None:
            return None
        bits = array.view(np.uint8) if array.dtype.itemsize == 1 else array
        return cp.ascontiguousarray(cp.broadcast_to(bits, (shape[0], *array.shape[1:]))).view(array.dtype)

    parts = ("values", "scale", "global_scale")
    return quantised._replace(**{name: repeated(getattr(quantised, name)) for name in parts})


if __name__ == "__main__":
    sys.exit(main())
