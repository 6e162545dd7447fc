"""Scratch in memory of the caller's: the same bits wherever it lies, nothing read unwritten, clear refusals."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sides import back, bits, device_of, on
from strategies import make_problem, problems
from test_moe import run

import cumoe
from cumoe import _plan, _workspace
from cumoe._call import enter_call
from cumoe._kernel_choice import choose_kernel
from cumoe.reference import experts


def bytes_for(problem, xp):
    """What `plan` says; it wants no more choices than experts, which an expert map allows."""
    (num_tokens, hidden_size), dtype = problem.hidden_states.shape, problem.w1.dtype.name
    sizes = _plan.Sizes(problem.topk_ids.shape[1], len(problem.w1), hidden_size, problem.w2.shape[2], dtype)
    kernel = choose_kernel(xp, None, dtype, hidden_size, problem.w2.shape[2])
    needed = _plan.scratch_bytes(sizes, _plan.share_out(xp, kernel, num_tokens, sizes))
    if sizes.top_k <= sizes.num_experts:
        plan = cumoe.plan(
            num_tokens, hidden_size, sizes.intermediate_size, *sizes[1::-1], dtype=dtype, device=device_of(xp)
        )
        assert plan.workspace_bytes >= needed or num_tokens == 0
    return needed


@given(problem=problems(), offset=st.integers(0, 300))
def test_a_poisoned_workspace_changes_no_bit(xp, problem, offset):
    """Experts without tokens and tokens without experts are NaN too."""
    used = np.unique(experts.local_experts(problem.topk_ids, len(problem.w1), problem.expert_map))
    w1, w2, x = problem.w1.copy(), problem.w2.copy(), problem.hidden_states.copy()
    idle = np.setdiff1d(np.arange(len(w1)), used)
    w1[idle], w2[idle] = np.nan, np.nan
    x[(experts.local_experts(problem.topk_ids, len(w1), problem.expert_map) < 0).all(axis=1)] = np.nan
    # biases of another dtype would be converted in the workspace and take more of it
    biases = {
        name: None if (b := getattr(problem, name)) is None else b.astype("f4") for name in ("w1_bias", "w2_bias")
    }
    problem = problem._replace(**biases)
    workspace = xp.full(bytes_for(problem, xp) + offset, 0xFF, np.uint8)[offset:]
    dirty = run(problem._replace(w1=w1, w2=w2, hidden_states=x), xp, workspace=workspace)
    assert dirty.tobytes() == run(problem, xp).tobytes()


def test_the_workspace_is_what_is_used(xp):
    problem = make_problem(40, 2, 4, 64, 48, "bfloat16")
    workspace = xp.zeros(cumoe.plan(40, 64, 48, 4, 2, device=device_of(xp)).workspace_bytes, np.uint8)
    expected = run(problem, xp, workspace=workspace)
    assert np.count_nonzero(back(workspace)) > workspace.size // 2
    limit = cumoe.plan(7, 64, 48, 4, 2, device=device_of(xp)).workspace_bytes
    small = xp.zeros(limit, np.uint8)
    assert run(problem, xp, workspace=small, workspace_limit=limit).tobytes() == expected.tobytes()


def test_routing_and_experts_share_it(xp):
    problem = make_problem(40, 2, 4, 64, 48, "bfloat16")
    x, w1, w2 = (on(xp, array) for array in problem[:3])
    logits = on(xp, np.random.default_rng(0).standard_normal((40, 4), np.float32))
    expected = cumoe.fused_moe(x, w1, w2, logits, top_k=2)
    needed = cumoe.plan(40, 64, 48, 4, 2, device=device_of(xp)).workspace_bytes
    for offset in (0, 1, 256, 300):
        workspace, out = xp.full(needed + offset, 0xFF, np.uint8)[offset:], xp.empty_like(x)
        assert cumoe.fused_moe(x, w1, w2, logits, top_k=2, workspace=workspace, out=out) is out
        assert out.tobytes() == expected.tobytes()
    # without room for both, the result does not come out of it
    out = cumoe.fused_moe(x, w1, w2, logits, top_k=2, workspace=workspace)
    workspace.fill(0)
    assert out.tobytes() == expected.tobytes()


def test_tensors_as_workspace():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    problem = make_problem(20, 2, 4, 32, 24)
    tensors = [torch.from_numpy(array) for array in problem[:5]]
    workspace = torch.empty(cumoe.plan(20, 32, 24, 4, 2, dtype="float32").workspace_bytes, dtype=torch.uint8)
    out = cumoe.fused_experts(*tensors, workspace=workspace)
    assert out.numpy().tobytes() == run(problem).tobytes()
    logits = torch.randn(20, 4)
    expected = cumoe.fused_moe(*tensors[:3], logits, top_k=2)
    assert torch.equal(cumoe.fused_moe(*tensors[:3], logits, top_k=2, workspace=workspace), expected)


def test_what_is_converted_lies_in_it(xp):
    """Weights whose elements are no neighbours, biases and choices of other dtypes; all as bits as if they were not."""
    problem = make_problem(20, 2, 4, 32, 24, "bfloat16", bias=True)
    names = ("w1_bias", "w2_bias")
    problem = problem._replace(**{name: getattr(problem, name).astype("float16") for name in names})
    expected = run(problem._replace(**{name: getattr(problem, name).astype("float32") for name in names}), xp)
    x, *weights, topk_weights, topk_ids = (on(xp, array) for array in problem[:5])
    wide = [xp.zeros((*w.shape[:-1], 2 * w.shape[-1]), w.dtype) for w in map(bits, weights)]
    for target, w in zip(wide, map(bits, weights), strict=True):
        target[..., ::2] = w
    w1, w2 = (target.view(problem.w1.dtype)[..., ::2] for target in wide)
    config = cumoe.biased_moe_quant_config(*(on(xp, getattr(problem, name)) for name in names))
    workspace = xp.full(1 << 17, 0xFF, np.uint8)
    arguments = (x, w1, w2, topk_weights.astype("float64"), topk_ids)
    out = cumoe.fused_experts(*arguments, quant_config=config, workspace=workspace)
    assert back(out).tobytes() == expected.tobytes()


def test_pieces_are_aligned_and_apart(xp):
    memory = xp.zeros(5000, np.uint8)
    space = _workspace.Workspace(xp, memory[3:])
    taken = [space.take(shape, dtype) for shape, dtype in (((3, 5), np.int32), ((0, 7), np.uint16), ((300,), np.int64))]
    assert [array.shape for array in taken] == [(3, 5), (0, 7), (300,)]
    first, _, last = (array.ctypes.data if xp is np else array.data.ptr for array in taken)
    assert first % 256 == last % 256 == 0 and last >= first + 60
    with pytest.raises(ValueError, match=r"^workspace must have at least \d+ bytes, got 4997; see plan"):
        space.take((4000,), np.uint8)


def test_what_is_taken_of_a_workspace_counts(xp):
    """Choices that were made in it stay there; a refusal tells the size of all of it."""
    problem = make_problem(6, 2, 3, 32, 16)
    x, w1, w2, weights, ids = (on(xp, array) for array in problem[:5])
    memory = xp.full(20_000, 0xFF, np.uint8)
    space = _workspace.given_workspace(xp, memory)
    taken_weights, taken_ids = space.take(weights.shape, np.float32), space.take(ids.shape, np.int32)
    taken_weights[...], taken_ids[...] = weights, ids
    arguments = (x, w1, w2, taken_weights, taken_ids, "silu", None, False, None, None, None, False, None)
    call = enter_call(*arguments, memory, None, space.used)
    for piece in call.pieces():
        piece.sort()
        piece.first_product()
        piece.second_product()
        piece.add_up()
    assert back(call.result()).tobytes() == back(cumoe.fused_experts(x, w1, w2, weights, ids)).tobytes()
    assert back(taken_ids).tobytes() == back(ids).tobytes()
    with pytest.raises(ValueError, match=r"^workspace must have at least \d+ bytes, got 20000; see plan"):
        enter_call(*arguments, memory, None, 19_000)
    with pytest.raises(ValueError, match=r"^workspace must not share memory with topk_weights"):
        enter_call(*arguments, memory)


def test_the_allocator_of_the_gpu_is_lent_to_one_thread_for_a_while():
    """Calls may lie in each other and may fail; other threads, and what comes after, allocate as ever. No GPU."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")

    def space(address):  # never touched
        memory = cupy.cuda.UnownedMemory(address, 4096, None, 0)
        array = cupy.ndarray((4096,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
        return _workspace.Workspace(cupy, array)

    def address():
        return cupy.cuda.alloc(10).ptr

    usual, seen, first, second = cupy.cuda.get_allocator(), [], space(1 << 20), space(1 << 21)

    def elsewhere():
        seen.append(cupy.cuda.get_allocator())
        with second.lent():
            seen.append(address())

    with first.lent():
        assert [address(), address()] == [1 << 20, (1 << 20) + 256]
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match=r"^workspace must have at least \d+ bytes, got 4096"), second.lent():
            assert address() == (1 << 21) + 256
            cupy.cuda.alloc(4000)
        assert cupy.empty((3, 5), np.int32).data.ptr == (1 << 20) + 512
    assert seen == [usual, 1 << 21]
    assert cupy.cuda.get_allocator() == usual


def test_fewer_tokens_never_need_more():
    for dtype in ("bfloat16", "float32"):
        sizes = _plan.Sizes(2, 7, 9, 5, dtype)
        needed = [_plan.scratch_bytes(sizes, _plan.share_out(np, "portable", t, sizes)) for t in range(200)]
        assert needed == sorted(needed)


def problem_and(**changes):
    problem = make_problem(6, 2, 3, 32, 16)
    names = ("hidden_states", "w1", "w2", "topk_weights", "topk_ids")
    return dict(zip(names, problem, strict=False)) | {"workspace": np.zeros(20_000, np.uint8)} | changes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"workspace": np.zeros((2, 9000), np.uint8)}, ValueError, "workspace must have 1 axis (bytes,), got shape"),
        ({"workspace": np.zeros(20_000, np.int8)}, TypeError, "workspace must be uint8, got int8"),
        (
            {"workspace": np.zeros(40_000, np.uint8)[::2]},
            ValueError,
            "workspace must be C-contiguous, got strides (2,)",
        ),
        (
            {"workspace": 20_000},
            TypeError,
            "workspace must be a NumPy, CuPy or DLPack array, got int; use numpy.asarray",
        ),
        ({"workspace": np.zeros(100, np.uint8)}, ValueError, "workspace must have at least "),
        ({"workspace_limit": 100}, ValueError, "workspace_limit must be >= one token = 1536, got 100"),
    ],
)
def test_wrong_workspaces_are_refused(change, error, message):
    with pytest.raises(error) as caught:
        cumoe.fused_experts(**problem_and(**change))
    assert str(caught.value).startswith(message)


def test_a_workspace_is_no_other_array():
    memory = np.zeros(40_000, np.uint8)
    x = memory[512 : 512 + 6 * 32 * 4].view(np.float32).reshape(6, 32)
    config = cumoe.biased_moe_quant_config(None, memory[512 : 512 + 3 * 32 * 4].view(np.float32).reshape(3, 32))
    with pytest.raises(ValueError, match=r"^workspace must not share memory with w2_bias"):
        cumoe.fused_experts(**problem_and(quant_config=config, workspace=memory))
    for name in ("hidden_states", "out"):
        with pytest.raises(ValueError) as caught:
            cumoe.fused_experts(**problem_and(**{name: x, "workspace": memory}))
        pair = ("workspace", "hidden_states") if name == "hidden_states" else ("out", "workspace")
        assert str(caught.value).startswith(f"{pair[0]} must not share memory with {pair[1]}")
    read_only = np.zeros(20_000, np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="workspace must be writeable"):
        cumoe.fused_experts(**problem_and(workspace=read_only))
