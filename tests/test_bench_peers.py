"""Who the CPU suite compares with: what a peer gets and gives, when it cannot run, and when its result is wrong."""

import importlib.util
import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

import cumoe
from cumoe.bench import compiled_peers, cpu_check, cpu_contenders, ggml_peers, peers, schemes, shapes

torch = pytest.importorskip("torch")
fake_operations = pytest.importorskip("fake_operations")

TINY = shapes.SHAPES["tiny"]
GROUPS = shapes.Shape("groups", num_experts=3, top_k=2, hidden_size=256, intermediate_size=256)
BY_NAME = {peer.name: peer for peer in cpu_contenders.PEERS}
SCHEMES = [(peer.name, scheme) for peer in cpu_contenders.PEERS for scheme in peer.schemes]
COMPILED = [(peer.name, scheme) for peer in compiled_peers.PEERS for scheme in peer.schemes]


def quiet():
    return Console(file=io.StringIO(), width=400)


def held_in(scheme, shape=TINY, seed=0):
    return cpu_contenders.hold(shape, schemes.SCHEMES[scheme], seed)


def errors_of(layer, held, shape, num_tokens, kind="uniform", numbers=None):
    """Relative error of all tokens; tokens and routing must stay as they are."""
    x = shapes.tokens(shape, num_tokens, held.scheme.dtype)
    routed = shapes.routing(shape, num_tokens, kind)
    kept = [array.copy() for array in (x, *routed)]
    out = layer(x, *routed)
    assert out.dtype == x.dtype and out.shape == x.shape
    for array, copy in zip((x, *routed), kept, strict=True):
        assert array.tobytes() == copy.tobytes()
    return cpu_check.exact(x, *(numbers or (held.w1, held.w2)), *routed, sample=num_tokens).error(out)


# -- each of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), SCHEMES, ids=lambda part: part)
def test_every_peer_computes_the_layer(name, scheme):
    peer = BY_NAME[name]
    if peer.missing(scheme):
        pytest.skip(peer.missing(scheme))
    shape = TINY if scheme != "int4 w4a16" else GROUPS
    held = held_in(scheme, shape)
    layer = peer.make(held.w1, held.w2)
    contender = cpu_contenders.Contender(layer, peer.rounds_activations)
    allowed = cpu_check.tolerance(contender, held)
    for num_tokens, kind in ((1, "uniform"), (2, "skewed"), (33, "uniform")):
        if num_tokens <= (peer.most_tokens or num_tokens):
            assert errors_of(layer, held, shape, num_tokens, kind, contender.numbers) <= allowed


@pytest.mark.parametrize(("name", "scheme"), COMPILED, ids=lambda part: part)
def test_compiled_operations_get_what_they_document(name, scheme, monkeypatch):
    monkeypatch.setattr(torch.ops, "_C", fake_operations.VLLM, raising=False)
    monkeypatch.setattr(torch.ops, "zentorch", fake_operations.Zentorch(), raising=False)
    rounding = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 1e-6}[schemes.SCHEMES[scheme].dtype]
    held = held_in(scheme, GROUPS)
    layer = BY_NAME[name].make(held.w1, held.w2)
    assert errors_of(layer, held, GROUPS, 5) <= rounding  # the fake one rounds once


def test_zentorch_forgets_the_weights_of_another_layer(monkeypatch):
    monkeypatch.setattr(torch.ops, "zentorch", fake_operations.Zentorch(), raising=False)
    held = held_in("float32")
    assert errors_of(BY_NAME["zentorch"].make(held.w1, held.w2), held, TINY, 2) < 1e-6
    held.w1[...] *= 2  # others at the same address
    assert errors_of(BY_NAME["zentorch"].make(held.w1, held.w2), held, TINY, 2) < 1e-6


@pytest.mark.parametrize(
    ("name", "scheme", "sizes", "message"),
    [
        ("vLLM vec", "bfloat16", (48, 64), "H and I must be multiples of 32, got 48 and 64"),
        ("vLLM SGL", "int8 w8a8", (64, 48), "H and I must be multiples of 32, got 64 and 48"),
        ("vLLM SGL w4a8", "int4 w4a16", (128, 64), "H and I must be multiples of 128, got 128 and 64"),
    ],
)
def test_sizes_that_an_operation_would_read_beyond_are_refused(name, scheme, sizes, message):
    held = held_in(scheme, shapes.Shape("odd", 2, 1, *sizes))
    with pytest.raises(ValueError, match=f"^{message}$"):
        BY_NAME[name].make(held.w1, held.w2)


# -- those that cannot run --------------------------------------------------------------------------


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert BY_NAME["torch loop"].missing("float32") == "torch is not installed"
    assert BY_NAME["torch loop"].missing("int8 w8a8") == "it has no int8 w8a8"
    assert BY_NAME["vLLM SGL"].missing("float16") == "it has no float16"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("vllm", "transformers") else name)
    assert BY_NAME["vLLM vec"].missing("float32") == "vllm is not installed"
    assert BY_NAME["transformers eager"].missing("float32") == "transformers is not installed"


def test_a_torch_without_grouped_mm_is_named(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    reason = f"torch {torch.__version__} has no nn.functional.grouped_mm"
    assert BY_NAME["torch grouped_mm"].missing("float32") == reason


@pytest.mark.parametrize(
    ("features", "name"), [("11", "_C.abi3.so"), ("01", "_C_AVX512.abi3.so"), ("00", "_C_AVX2.abi3.so")]
)
def test_vllm_gets_the_library_of_this_cpu(features, name, monkeypatch, tmp_path):
    has_bf16, has_avx512 = (flag == "1" for flag in features)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append, raising=False)
    monkeypatch.setattr(torch.ops, "_C", fake_operations.VLLM, raising=False)
    fake_operations.as_installed(monkeypatch, "vllm", tmp_path, "other.so")
    assert BY_NAME["vLLM vec"].missing("float32") == f"vllm has no {name}"
    fake_operations.as_installed(monkeypatch, "vllm", tmp_path, name)
    assert BY_NAME["vLLM vec"].missing("float32") == ""
    assert loaded == [str(tmp_path / "vllm" / name)]


def test_a_library_that_does_not_fit_is_named(monkeypatch, tmp_path):
    fake_operations.as_installed(monkeypatch, "zentorch", tmp_path, "libzentorch.so")
    assert "libzentorch.so of zentorch does not load: " in BY_NAME["zentorch"].missing("float32")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None, raising=False)
    monkeypatch.setattr(torch.ops, "zentorch", SimpleNamespace(zentorch_fused_moe=None), raising=False)
    reason = "libzentorch.so of zentorch has no operation zentorch_flush_moe_weight_cache"
    assert BY_NAME["zentorch"].missing("float32") == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise OSError('no libggml.so')", "ggml does not load: no libggml.so"),
        ("", "this ggml packs no weights for this CPU"),
    ],
)
def test_a_ggml_that_does_not_fit_is_named(text, reason, monkeypatch, tmp_path):
    (tmp_path / "ggml.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "ggml", raising=False)
    monkeypatch.setattr(ggml_peers, "_packing_buffer", lambda: None)
    assert BY_NAME["ggml q4_0"].missing("int4 w4a16") == reason
    sys.modules.pop("ggml", None)


def test_ggml_refuses_rows_that_end_within_a_block(monkeypatch):
    fake = SimpleNamespace(GGML_TYPE_Q4_K="k", ggml_blck_size={"k": 256}.get)
    monkeypatch.setitem(sys.modules, "ggml", fake)
    held = held_in("int4 w4a16", shapes.Shape("odd", 2, 1, 128, 256))
    with pytest.raises(ValueError, match=r"^H and I must be multiples of 256, got 128$"):
        ggml_peers._quantised(held.w1, "q4_K")


def some_peer(name, make, **named):
    return peers.Peer(name, "", ("numpy",), ("float32",), make, peers.nothing_copied, **named)


def right(w1, w2):
    return lambda x, topk_weights, topk_ids: cumoe.fused_experts(x, w1, w2, topk_weights, topk_ids)


def test_who_takes_part_and_why_others_do_not():
    def refuses(w1, w2):
        raise RuntimeError("no [such] kernel\nand more")

    console = quiet()
    held = held_in("float32")
    among = (
        some_peer("good", right),
        peers.Peer("large", "", ("numpy",), ("float32",), right, lambda scheme: 2.0),
        some_peer("first", refuses),
        some_peer("second", refuses),
        some_peer("short", right, most_tokens=2),
    )
    made = cpu_contenders.make(console, held, held.nbytes, among)
    assert list(made) == ["good", "short", "cumoe"]
    printed = console.file.getvalue()
    assert "without first, second: no [such] kernel\n" in printed
    assert "without large: its own weights need 0.0 GB, 0.0 GB are left\n" in printed
    assert "short: only up to T = 2\n" in printed


def test_memory_goes_to_the_first():
    once = [peers.Peer(name, "", ("numpy",), ("float32",), right, lambda scheme: 1.0) for name in ("a", "b", "c")]
    held = held_in("float32")
    assert list(cpu_contenders.make(quiet(), held, 2 * held.nbytes, once)) == ["a", "b", "cumoe"]


# -- those that are wrong ---------------------------------------------------------------------------


def test_wrong_results_are_seen():
    held = held_in("float32")
    x, routed = shapes.tokens(TINY, 6, "float32"), shapes.routing(TINY, 6)
    found = cpu_check.exact(x, held.w1, held.w2, *routed, sample=6)
    out = cumoe.fused_experts(x, held.w1, held.w2, *routed)
    assert found.error(out) < 1e-6
    assert found.error(2 * out) == pytest.approx(1, rel=1e-5)
    out[-1, -1] = np.nan
    assert found.error(out) == np.inf


def test_the_sample_has_the_first_and_the_last_token():
    held = held_in("float32")
    x, routed = shapes.tokens(TINY, 50, "float32"), shapes.routing(TINY, 50)
    assert cpu_check.exact(x, held.w1, held.w2, *routed, sample=4).tokens.tolist() == [0, 16, 32, 49]


def contender_of(layer, **named):
    return cpu_contenders.Contender(layer, **named)


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_the_check_keeps_the_right_and_names_the_wrong(scheme):
    console, held = quiet(), held_in(scheme)
    own = cpu_contenders.make(quiet(), held, 0, ())["cumoe"]
    factor = 1 + 1.5 * cpu_check.tolerance(own, held)

    def scaled(x, *routed):
        return (own.layer(x, *routed).astype(np.float32) * np.float32(factor)).astype(x.dtype)

    def broken(x, *routed):
        out = own.layer(x, *routed)
        out[0, 0] = np.nan
        return out

    def fails(x, *routed):
        raise RuntimeError("no [such] kernel\nand more")

    def not_called(x, *routed):
        raise AssertionError

    contenders = {
        "same": contender_of(own.layer),
        "scaled": contender_of(scaled),
        "broken": contender_of(broken),
        "fails": contender_of(fails),
        "short": contender_of(not_called, most_tokens=2),
        "cumoe": own,
    }
    x, routed = shapes.tokens(TINY, 3, held.scheme.dtype), shapes.routing(TINY, 3)
    errors = cpu_check.check(console, contenders, x, held, routed)
    assert list(errors) == ["same", "cumoe"]
    assert 0 < errors["same"] == errors["cumoe"] <= cpu_check.tolerance(own, held)
    printed = console.file.getvalue()
    assert "without scaled at T = 3: relative error" in printed
    assert "without broken at T = 3: relative error inf\n" in printed
    assert "without fails at T = 3: no [such] kernel\n" in printed


def test_a_peer_with_a_format_of_its_own_is_held_against_its_own_numbers():
    held, own = held_in("int4 w4a16"), held_in("bfloat16")  # the same weights, before they were codes

    class Layer:
        numbers = own.w1, own.w2

        def __call__(self, x, *routed):
            return cumoe.fused_experts(x, own.w1, own.w2, *routed)

    x, routed = shapes.tokens(TINY, 3, "bfloat16"), shapes.routing(TINY, 3)
    nobody, console = {"cumoe": cpu_contenders.make(quiet(), held, 0, ())["cumoe"]}, quiet()
    both = {"own format": contender_of(Layer()), "wrong format": contender_of(Layer().__call__), **nobody}
    assert list(cpu_check.check(console, both, x, held, routed)) == ["own format", "cumoe"]
    assert "without wrong format at T = 3: relative error 0." in console.file.getvalue()


def test_our_own_error_is_one():
    held = held_in("int8 w8a8")
    own = cpu_contenders.make(quiet(), held, 0, ())["cumoe"]
    x, routed = shapes.tokens(TINY, 3, "bfloat16"), shapes.routing(TINY, 3)
    doubled = contender_of(lambda *given: (2 * own.layer(*given).astype(np.float32)).astype(x.dtype))
    with pytest.raises(cpu_check.WrongResultError, match=r"^cumoe is at \S+ of its error bound for 3 tokens$"):
        cpu_check.check(quiet(), {"cumoe": doubled}, x, held, routed)

    def fails(*given):
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match=r"^no kernel$"):
        cpu_check.check(quiet(), {"cumoe": contender_of(fails)}, x, held, routed)


def test_tokens_in_eight_bits_have_a_tolerance_of_their_own():
    plain, rounded = contender_of(None), contender_of(None, rounds_activations=True)
    held = {name: SimpleNamespace(scheme=scheme) for name, scheme in schemes.SCHEMES.items()}
    assert cpu_check.tolerance(plain, held["int4 w4a16"]) == cpu_check.TOLERANCE["bfloat16"]
    assert cpu_check.tolerance(rounded, held["int4 w4a16"]) == cpu_check.ROUNDED_TOLERANCE
    assert cpu_check.tolerance(plain, held["int8 w8a8"]) == cpu_check.ROUNDED_TOLERANCE
