"""Small calls that come again: recorded and done at once, they must say what the checked steps say, bit by bit."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised import CASES, quantised
from strategies import DTYPES, make_problem, problems
from test_moe import quant_config

import cumoe
from cumoe import _recorded
from cumoe.cpu import _frozen, recording
from cumoe.cpu._jit import jit

GENERAL = {"workspace_limit": 1 << 40}  # no call with a limit is recorded
UNRECORDED = ("fp8 tensor, dynamic", "int8 tensor, dynamic", "mxfp4 w4a8", "nvfp4, each expert's scale")
RECORDED_CASES = [
    (case, dtype)
    for case in CASES
    for dtype in (DTYPES if case.name == "int8 channel, token" else ("bfloat16",))
    if case.name not in UNRECORDED
]


def prepare(problem):
    return cumoe.prepare(problem.w1, problem.w2, activation=problem.activation, quant_config=quant_config(problem))


def call(problem, prepared, **keywords):
    keywords.setdefault("expert_map", problem.expert_map)
    return cumoe.fused_experts(
        problem.hidden_states, prepared, None, problem.topk_weights, problem.topk_ids, **keywords
    )


def recorded(prepared):
    return [one for one in prepared._recorded.values() if one is not None]


def draw_again(problem, seed):
    """Other tokens, choices and weights of the same shapes."""
    rng = np.random.default_rng(seed)
    x, ids = problem.hidden_states, problem.topk_ids
    num_experts = len(problem.w1) if problem.expert_map is None else len(problem.expert_map)
    return problem._replace(
        hidden_states=rng.standard_normal(x.shape).astype(x.dtype),
        topk_weights=rng.random(ids.shape, np.float32),
        topk_ids=rng.integers(-1, num_experts + 1, ids.shape).astype(ids.dtype),
    )


def assert_same_bits(problem, prepared, **keywords):
    """Two calls by steps, then recorded ones, on the same arrays and on others."""
    for _ in range(2):
        call(problem, prepared, **keywords)
    is_small = problem.topk_ids.size and recording.is_worthwhile(problem.topk_ids.size)
    assert len(recorded(prepared)) == bool(is_small)
    for one in (problem, draw_again(problem, 1), draw_again(problem, 2), problem):
        assert call(one, prepared, **keywords).tobytes() == call(one, prepared, **GENERAL, **keywords).tobytes()


@given(
    problem=problems(), on_input=st.sampled_from((False, True, "accumulator")), ids=st.sampled_from(("int32", "int64"))
)
def test_recorded_calls_have_the_bits_of_checked_ones(problem, on_input, ids):
    problem = problem._replace(topk_ids=problem.topk_ids.astype(ids))
    assert_same_bits(problem, prepare(problem), apply_router_weight_on_input=on_input)


@settings(max_examples=10)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    skipped=st.floats(0, 1),
)
@pytest.mark.parametrize(("case", "dtype"), RECORDED_CASES, ids=str)
def test_quantised_layers_are_recorded(case, dtype, tokens, experts, bias, seed, skipped):
    size = max(64, case.multiple)
    problem = make_problem(tokens, 2, max(2, experts), size, 2 * size, dtype, bias=bias, seed=seed, skipped=skipped)
    layer = quantised(case, problem)
    prepared = cumoe.prepare(layer.w1, layer.w2, quant_config=layer.quant_config)
    assert_same_bits(problem, prepared)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in UNRECORDED], ids=str)
def test_schemes_that_look_at_all_rows_are_not_recorded(case):
    problem = make_problem(5, 2, 3, max(64, case.multiple), max(64, case.multiple), "bfloat16")
    layer = quantised(case, problem)
    prepared = cumoe.prepare(layer.w1, layer.w2, quant_config=layer.quant_config)
    results = {call(problem, prepared).tobytes() for _ in range(4)}
    assert len(results) == 1
    assert recorded(prepared) == []


def test_weights_on_tokens_that_are_quantised_are_not_recorded():
    problem = make_problem(5, 1, 3, 64, 64, "bfloat16")
    layer = quantised(next(case for case in CASES if case.name == "int8 channel, token"), problem)
    prepared = cumoe.prepare(layer.w1, layer.w2, quant_config=layer.quant_config)
    results = {call(problem, prepared, apply_router_weight_on_input=True).tobytes() for _ in range(4)}
    assert len(results) == 1
    assert recorded(prepared) == []


def test_all_tokens_may_choose_one_expert():
    problem = make_problem(recording._MOST_PAIRS, 1, 4, 96, 80, "bfloat16")
    problem.topk_ids[:] = 2
    assert_same_bits(problem, prepare(problem))


def test_large_calls_are_not_recorded():
    problem = make_problem(recording._MOST_PAIRS + 1, 1, 4, 32, 32)
    prepared = prepare(problem)
    for _ in range(3):
        call(problem, prepared)
    assert prepared._recorded == {}  # they take no place from others


def test_a_memory_that_held_something_else_changes_no_bit():
    small, large = make_problem(1, 2, 4, 32, 32), make_problem(60, 4, 4, 200, 300)
    layers = [(problem, prepare(problem)) for problem in (small, large, small)]
    for memory in recording._memory:
        memory[...] = 0xFF
    for problem, prepared in layers:
        assert_same_bits(problem, prepared)


def test_an_output_is_written_and_may_not_overlap():
    problem = make_problem(6, 2, 3, 32, 16)
    prepared, expected = prepare(problem), call(problem, prepare(problem))
    for _ in range(4):
        out = np.full((6, 32), np.nan, np.float32)
        assert call(problem, prepared, out=out) is out
        assert out.tobytes() == expected.tobytes()
    assert len(recorded(prepared)) == 1
    with pytest.raises(ValueError, match="out must not share memory"):
        call(problem, prepared, out=problem.hidden_states)


def test_what_is_wrong_is_refused_behind_recorded_calls():
    problem = make_problem(6, 2, 3, 32, 16)
    prepared = prepare(problem)
    for _ in range(3):
        call(problem, prepared, global_num_experts=3)
        call(problem, prepared)
    assert len(recorded(prepared)) == 2
    wrong = [
        (TypeError, {"hidden_states": problem.hidden_states.astype(ml_dtypes.bfloat16)}, {}),
        (TypeError, {"hidden_states": problem.hidden_states.astype(">f4")}, {}),
        (TypeError, {"topk_ids": problem.topk_ids.astype(np.int16)}, {}),
        (ValueError, {"topk_ids": problem.topk_ids[:5]}, {}),
        (ValueError, {"topk_weights": problem.topk_weights[:, :1]}, {}),
        (ValueError, {}, {"activation": "gelu"}),
        (ValueError, {}, {"apply_router_weight_on_input": "tokens"}),
        (TypeError, {}, {"global_num_experts": 3.0}),
        (ValueError, {}, {"global_num_experts": 2}),
        (TypeError, {}, {"quant_config": 1}),
        (ValueError, {"topk_ids": problem.topk_ids + 7}, {"check": True}),
        (ValueError, {}, {"out": np.broadcast_to(np.float32(0), (6, 32))}),
    ]
    for error, fields, keywords in wrong:
        with pytest.raises((error, ValueError) if keywords.get("quant_config") else error):
            call(problem._replace(**fields), prepared, **keywords)


def test_layouts_that_are_not_plain_are_taken_step_by_step():
    problem = make_problem(6, 2, 3, 32, 16)
    prepared = prepare(problem)
    expected = [call(problem, prepared) for _ in range(3)][-1].tobytes()
    wide = np.zeros((6, 40), np.float32)
    wide[:, :32] = problem.hidden_states
    read_only = problem.topk_ids.copy()
    read_only.flags.writeable = False
    assert call(problem._replace(hidden_states=wide[:, :32]), prepared).tobytes() == expected
    assert call(problem._replace(topk_ids=read_only), prepared).tobytes() == expected
    assert call(problem._replace(topk_weights=problem.topk_weights.astype(np.float64)), prepared).tobytes() == expected


@pytest.mark.parametrize("with_out", [False, True])
def test_tensors_of_another_library_are_recorded_too(with_out):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make_problem(6, 2, 3, 32, 16)
    prepared, expected = prepare(problem), call(problem, prepare(problem))
    tensors = problem._replace(
        **{name: torch.from_numpy(getattr(problem, name)) for name in ("hidden_states", "topk_weights", "topk_ids")}
    )
    for _ in range(4):
        out = torch.empty(6, 32) if with_out else None
        result = call(tensors, prepared, out=out)
        assert result is out or not with_out
        assert isinstance(result, torch.Tensor)
        assert result.numpy().tobytes() == expected.tobytes()
    assert len(recorded(prepared)) == 1
    with pytest.raises(TypeError, match="one DLPack library"):
        call(tensors._replace(topk_ids=problem.topk_ids), prepared)
    with pytest.raises(ValueError, match="out must not share memory"):
        call(tensors, prepared, out=tensors.hidden_states)


def test_weights_that_are_prepared_anew_are_used():
    old, new = (make_problem(5, 2, 3, 48, 40, "bfloat16", seed=seed) for seed in (1, 2))
    prepared = prepare(old)
    for _ in range(3):
        call(old, prepared)
    cumoe.prepare(new.w1, new.w2, out=prepared)
    assert call(new, prepared).tobytes() == call(new, prepare(new)).tobytes()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda prepared: pickle.loads(pickle.dumps(prepared))])
def test_copies_of_prepared_weights_record_for_themselves(copied):
    problem = make_problem(5, 2, 3, 48, 40, "bfloat16")
    prepared = prepare(problem)
    expected = [call(problem, prepared) for _ in range(3)][-1].tobytes()
    other = copied(prepared)
    if other.experts.w1 is not prepared.experts.w1:
        prepared.experts.w1[...] = 0
        del prepared
        assert recorded(other) == []
    assert {call(problem, other).tobytes() for _ in range(4)} == {expected}


def test_recordings_of_a_layer_are_few(monkeypatch):
    monkeypatch.setattr(_recorded, "_MOST", 3)
    problem = make_problem(20, 2, 3, 32, 16)
    prepared = prepare(problem)
    for tokens in (*range(1, 9), *range(1, 9)):
        part = [array[:tokens] for array in (problem.hidden_states, problem.topk_weights, problem.topk_ids)]
        for _ in range(3):
            out = cumoe.fused_experts(part[0], prepared, None, *part[1:])
        assert out.tobytes() == call(problem, prepared, **GENERAL)[:tokens].tobytes()
        assert len(prepared._recorded) <= 3


def test_fused_moe_is_recorded_too():
    problem, rng = make_problem(7, 2, 6, 32, 16), np.random.default_rng(0)
    prepared, logits = prepare(problem), rng.standard_normal((7, 6), np.float32)
    results = {cumoe.fused_moe(problem.hidden_states, prepared, None, logits, top_k=2).tobytes() for _ in range(4)}
    assert len(results) == 1
    assert len(recorded(prepared)) == 1


def test_the_number_of_threads_changes_no_bit():
    problem, default = make_problem(30, 3, 5, 130, 70, "bfloat16", bias=True, skipped=0.1), numba.get_num_threads()
    prepared = prepare(problem)
    expected = [call(problem, prepared) for _ in range(3)][-1].tobytes()
    try:
        for count in range(1, default + 1):
            numba.set_num_threads(count)
            assert call(problem, prepared).tobytes() == expected
    finally:
        numba.set_num_threads(default)


def test_many_callers_at_once_get_the_same_bits():
    layers = []
    for seed, dtype in enumerate(DTYPES):
        problem = make_problem(5 + 20 * seed, 2, 4, 64, 64, dtype, seed=seed)
        prepared = prepare(problem)
        layers.append((problem, prepared, [call(problem, prepared) for _ in range(3)][-1].tobytes()))
    wrong, done = [], []

    def work(first):
        for number in range(first, first + 60):
            problem, prepared, expected = layers[number % len(layers)]
            (done if call(problem, prepared).tobytes() == expected else wrong).append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), wrong) == (360, [])
    assert len(recording._memory) <= recording._KEPT


CHILD = """
import hashlib, os, sys, numpy as np, cumoe, numba
from strategies import make_problem
problem = make_problem(40, 3, 7, 96, 160, "bfloat16", skipped=0.1)
prepared = cumoe.prepare(problem.w1, problem.w2)
def call():
    out = cumoe.fused_experts(problem.hidden_states, prepared, None, problem.topk_weights, problem.topk_ids)
    return hashlib.sha256(out.tobytes()).hexdigest()
results = {call() for _ in range(200)}
assert any(prepared._recorded.values())
if len(sys.argv) > 1:
    child = os.fork()
    if child == 0:
        os._exit(call() not in results)
    assert os.waitpid(child, 0)[1] == 0
print(numba.threading_layer(), numba.config.NUMBA_NUM_THREADS, *results)
"""


def run_child(*arguments, **environment):
    paths = os.pathsep.join((os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    layer, threads, *results = result.stdout.split()
    return layer, int(threads), results


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threading_layers_and_more_threads_than_cores(threads):
    """Also those that no core is free for: nobody waits for a thread that has not come."""
    found = [
        run_child(NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=str(threads)) for layer in ("tbb", "omp", "workqueue")
    ]
    assert [(layer, count) for layer, count, _ in found] == [(name, threads) for name in ("tbb", "omp", "workqueue")]
    assert len({result for _, _, results in found for result in results}) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_goes_on():
    assert len(run_child("fork")[2]) == 1


def read_back(block, thread):
    whole, (number, flag, integer), part, address = read(block, thread)
    return whole.sum(), number, flag, integer, part[0], part[2], address


def frozen(value):
    words = []
    _frozen.freeze(value, lambda array: array.ctypes.data, words)
    return np.array(words, np.int64)


def copy_back(block, out):
    out[...] = read(block, 0)[0]


def read_nothing(block, thread):
    return read(block, thread)


read = None  # jit(...) gives it a value


def test_arguments_become_words_and_come_back():
    arrays = np.arange(12, dtype=np.uint16).reshape(3, 4), np.arange(6, dtype=np.float32).reshape(2, 3)
    value = (arrays[0], (np.float32(2.5), True, -7), _frozen.Each(arrays[1]), _frozen.Address(arrays[0]))
    words = frozen(value)
    found = jit(read=_frozen.thaw(_frozen.kind(value)))(read_back)(words.ctypes.data, 1)
    assert found == (66, 2.5, True, -7, 3, 5, arrays[0].ctypes.data)
    with pytest.raises(Exception, match="no words"):
        jit(read=_frozen.thaw(numba.types.Tuple([numba.types.complex128])))(read_nothing)(0, 0)


@pytest.mark.parametrize("view", [np.s_[:], np.s_[::2, 1:], np.s_[::-1, ::3], np.s_[:, 2]], ids=str)
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.bool_, np.int64])
def test_arrays_with_strides_become_words_and_come_back(dtype, order, view):
    array = np.asarray((np.arange(35) % 3).astype(dtype).reshape(5, 7), order=order)[view]
    value = (array,)
    block, out = frozen(value), np.empty(array.shape, array.dtype)
    jit(read=_frozen.thaw(_frozen.kind(value)))(copy_back)(block.ctypes.data, out)
    np.testing.assert_array_equal(out, array)
