"""One call of the layer: its arguments checked, its scratch shared out, its steps in order."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from cumoe import _arrays, _check, _plan, _quantised_rows
from cumoe._arrays import Array
from cumoe._experts import Experts, for_rows, make_experts, weight_arrays
from cumoe._kernel_choice import choose_kernel, rows_are_aligned
from cumoe._piece import Piece, Scratch
from cumoe._prepare import PreparedExperts
from cumoe._workspace import Workspace, given_workspace

_IDS = ("int32", "int64", "uint32")
_WEIGHTS = ("float32", "float64", "float16", "bfloat16")
ON_INPUT = (False, True, "hidden_states", "accumulator")


class Call(NamedTuple):
    """A checked call."""

    side: Any
    x: Any
    experts: Experts
    topk_weights: Any
    topk_ids: Any
    expert_map: Any
    on_input: bool | str
    out: Any
    workspace: Workspace | None
    shares: _plan.Shares

    def pieces(self) -> Iterator[Piece]:
        """The tokens, as many at a time as the workspace holds."""
        xp, e, (num_tokens, top_k) = self.side.xp, self.experts, self.topk_ids.shape
        if num_tokens == 0:
            return
        most = min(self.shares.tokens_per_piece, num_tokens)
        bits = np.float32 if e.dtype == "float32" else np.uint16
        empty = xp.empty if self.workspace is None else self.workspace.take
        scratch = Scratch(
            empty((e.num_experts + 1,), np.int64),
            empty((most * top_k,), np.int32),
            empty((most, top_k), np.int32),
            empty((self.shares.schedule_size,), np.int32),
            empty((most * top_k, e.intermediate_size), bits),
            empty((most * top_k, e.hidden_size), bits),
            None,
            None,
            empty((self.shares.expanded,), bits),
        )
        tokens, between = self._spaces(most, scratch.activated, bits, empty)
        for first in range(0, num_tokens, most):
            last = min(first + most, num_tokens)
            rows = (last - first) * top_k
            yield Piece(
                xp,
                self.x[first:last],
                e,
                self.topk_weights[first:last],
                self.topk_ids[first:last],
                self.expert_map,
                self.on_input,
                Scratch(
                    scratch.expert_first_token_offset,
                    scratch.permuted_idx[:rows],
                    scratch.inv_permuted_idx[: last - first],
                    scratch.schedule,
                    scratch.activated[:rows],
                    scratch.rows[:rows],
                    tokens and tokens.first(rows if tokens.rows.is_by_expert else last - first),
                    between and between.first(rows),
                    scratch.expanded,
                ),
                self.shares.block_rows,
                _arrays.bits(self.out)[first:last],
                self.workspace,
            )

    def _spaces(
        self, num_tokens: int, activated: Any, bits: Any, empty: Any
    ) -> tuple[_quantised_rows.Space | None, _quantised_rows.Space | None]:
        """Memory for the quantised rows of both products; None where they are not."""
        scheme, tokens, between = self.experts.scheme, None, None
        if scheme is not None and scheme.a1 is not None:
            num_rows = len(activated) if scheme.a1.is_by_expert else num_tokens
            tokens = _quantised_rows.space(scheme.a1, num_rows, self.experts.hidden_size, bits, empty)
        if scheme is not None and scheme.a2 is not None:
            num_rows, size = activated.shape
            between = _quantised_rows.space(scheme.a2, num_rows, size, bits, empty, activated)
        return tokens, between

    def result(self) -> Array:
        """The output in the caller's kind."""
        return self.side.leave(self.out)


def enter_call(
    hidden_states: Array,
    w1: Array | PreparedExperts,
    w2: Array | None,
    topk_weights: Array,
    topk_ids: Array,
    activation: str,
    quant_config: Any,
    on_input: bool | str,
    expert_map: Array | None,
    global_num_experts: int | None,
    out: Array | None,
    check: bool,
    workspace_limit: int | None,
    workspace: Array | None = None,
    backend: str | None = None,
    taken: int = 0,
) -> Call:
    """Check everything once; nothing after this looks at an argument again. `taken` bytes of `workspace` are in use."""
    is_prepared = isinstance(w1, PreparedExperts)
    own = {} if is_prepared else weight_arrays(w1, w2, quant_config)
    side, inside = _arrays.enter(
        **own,
        hidden_states=hidden_states,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
        out=out,
        workspace=workspace,
    )
    x, weights, ids, expert_map, out, workspace = inside[-6:]
    space = None if workspace is None else given_workspace(side.xp, workspace, taken)
    lent = contextlib.nullcontext if space is None else space.lent
    with lent():
        if isinstance(w1, PreparedExperts):
            experts = _prepared(side.xp, x, w1, w2, activation, quant_config)
        else:
            own = dict(zip(own, inside, strict=False))
            experts = make_experts(side.xp, own, activation, quant_config, x)
    _check.choice("apply_router_weight_on_input", on_input, ON_INPUT)
    _check.ndim("hidden_states", x, "(T, H)", 2)
    _check.ndim("topk_ids", ids, "(T, k)", 2)
    hidden_size = experts.hidden_size
    num_tokens = len(x) if x.shape[1] == hidden_size else len(ids)
    _check.shape("hidden_states", x, "(T, H)", (num_tokens, hidden_size))
    if _check.name_of(x.dtype) != experts.dtype:
        raise TypeError(
            f"hidden_states must have the dtype of w1 = {experts.dtype}, got {x.dtype.name}; convert one of them"
        )
    top_k = check_routing(weights, ids, num_tokens)
    num_global = _global_experts(experts, expert_map, global_num_experts)
    if check:
        _check_values(x, weights, ids, expert_map, num_global, experts.num_experts)
    inputs = {"hidden_states": x, "topk_weights": weights, "topk_ids": ids, "expert_map": expert_map}
    inputs |= own  # nobody else holds the memory of prepared ones; as they came: converted, they are in the workspace
    on_tokens = on_input in (True, "hidden_states")
    if on_tokens and experts.scheme is not None and experts.scheme.a1 is not None and top_k != 1:
        raise NotImplementedError(
            f"no kernel for apply_router_weight_on_input={on_input!r} and quantised activations with k = {top_k}; "
            "available: k = 1"
        )
    if out is None:
        out = side.xp.empty((num_tokens, hidden_size), x.dtype)
    else:
        _check.output("out", out, "(T, H)", (num_tokens, hidden_size), experts.dtype, **inputs)
    if workspace is not None:
        _check.no_overlap("workspace", workspace[taken:], **inputs)  # what is taken may be the choices
        _check.no_overlap("out", out, workspace=workspace)
    with lent():
        x = _arrays.bits(x)
        weights = _arrays.bits(weights.astype(np.float32, copy=False))
        ids = _arrays.bits(ids)
        expert_map = side.xp.empty(0, np.int32) if expert_map is None else _arrays.bits(expert_map)
    if backend is not None or side.xp is not np:
        experts = experts._replace(kernel=_kernel(side.xp, experts, backend, on_input, is_prepared, x, out))
    if experts.scheme is not None:
        room, products = _arrays.room(side.xp, "grouped_gemm"), (experts.hidden_size, experts.intermediate_size)
        experts = experts._replace(scheme=experts.scheme.for_kernel(room, experts.kernel, *products))
    sizes = _sizes(top_k, experts)
    shares = _plan.share_out(side.xp, experts.kernel, num_tokens, sizes, workspace_limit)
    if shares.tokens_per_piece < num_tokens and any(
        rows is not None and rows.is_batch_wide for rows in (sizes.a1, sizes.a2)
    ):
        raise ValueError(
            f"workspace_limit must hold all {num_tokens} tokens where one scale serves them, got {workspace_limit}; "
            "give static scales, or one a token"
        )
    if space is not None and num_tokens:
        space.must_hold(_plan.scratch_bytes(sizes, shares))
    return Call(side, x, experts, weights, ids, expert_map, on_input, out, space, shares)


def _sizes(top_k: int, experts: Experts) -> _plan.Sizes:
    """What the scratch depends on."""
    e, scheme = experts, experts.scheme
    sizes = _plan.Sizes(top_k, e.num_experts, e.hidden_size, e.intermediate_size, e.dtype)
    if scheme is None:
        return sizes
    largest = e.num_experts * (1 + e.is_gated) * e.intermediate_size * e.hidden_size
    return sizes._replace(a1=scheme.a1, a2=scheme.a2, code_bits=scheme.code_bits, largest=largest)


def _kernel(
    xp: ModuleType, experts: Experts, backend: str | None, on_input: bool | str, is_prepared: bool, x: Array, out: Array
) -> str:
    """The kernel for the arrays of this call."""
    scheme = experts.scheme
    kernel = choose_kernel(
        xp,
        backend,
        experts.dtype,
        experts.hidden_size,
        experts.intermediate_size,
        experts.aligned and (xp is np or rows_are_aligned(x, out)),
        on_input in (True, "hidden_states"),
        experts.kernel if is_prepared and scheme is None else None,
        scheme is not None,
    )
    if scheme is not None and scheme.is_packed and not _arrays.room(xp, "pack").multiplies_codes(kernel):
        raise ValueError(f"backend must multiply codes as w1 packs them, got {kernel!r}; give the codes themselves")
    return kernel


def check_routing(topk_weights: Any, topk_ids: Any, num_tokens: int) -> int:
    """Check the choices of `num_tokens` tokens and return k."""
    _check.ndim("topk_ids", topk_ids, "(T, k)", 2)
    _check.dtype("topk_ids", topk_ids, _IDS)
    top_k = int(topk_ids.shape[1])
    _check.shape("topk_ids", topk_ids, "(T, k)", (num_tokens, top_k))
    _check.dtype("topk_weights", topk_weights, _WEIGHTS)
    _check.shape("topk_weights", topk_weights, "(T, k)", (num_tokens, top_k))
    _check.integer("T * k", num_tokens * top_k, 0, 2**31 - 1)
    return top_k


def check_logits(
    router_logits: Array,
    w1: Array | PreparedExperts,
    expert_map: Array | None,
    global_num_experts: int | None,
    check: bool,
) -> None:
    """Raise if the logits are not for the experts that ids count over; with `check`, if one is NaN or +inf."""
    logits = _arrays.enter(router_logits=router_logits)[1][0]
    _check.ndim("router_logits", logits, "(T, global_num_experts)", 2)
    if global_num_experts is None:
        count = _length(w1, 3) if expert_map is None else _length(expert_map, 1)
    else:
        count = _check.integer("global_num_experts", global_num_experts, 1)
    if count is not None:
        _check.shape("router_logits", logits, "(T, global_num_experts)", (len(logits), count))
    if check:
        _check_finite("router_logits", logits, "finite or -inf", -np.inf)


def _length(array: Any, num_axes: int) -> int | None:
    """Experts that the first axis counts; None for an array without these axes, which is refused later."""
    if isinstance(array, PreparedExperts):
        return array.num_experts
    shape: Any = getattr(array, "shape", ())
    return int(shape[0]) if len(shape) == num_axes else None


def _prepared(xp: ModuleType, x: Array, w1: PreparedExperts, w2: Any, activation: str, quant_config: Any) -> Experts:
    if w2 is not None:
        raise TypeError(f"w2 must be None when w1 is PreparedExperts, got {type(w2).__name__}")
    if quant_config is not None:
        raise ValueError("quant_config must be None when w1 is PreparedExperts; pass it to cumoe.prepare")
    if activation not in ("silu", w1.activation):
        raise ValueError(f"activation must be that of w1 = {w1.activation!r}, got {activation!r}; prepare w1 for it")
    if x is not None and _arrays.place(x) != w1.device:
        raise TypeError(f"hidden_states must be where w1 was prepared = {w1.device}, got {_arrays.place(x)}")
    return w1.experts if w1.experts.scheme is None else for_rows(xp, w1.experts, x)


def _global_experts(experts: Experts, expert_map: Any, global_num_experts: int | None) -> int:
    if expert_map is not None:
        _check.ndim("expert_map", expert_map, "(global_num_experts,)", 1)
        _check.dtype("expert_map", expert_map, ("int32",))
    count = experts.num_experts if expert_map is None else len(expert_map)
    if global_num_experts is None:
        return count
    _check.integer("global_num_experts", global_num_experts, experts.num_experts)
    if expert_map is not None:
        _check.shape("expert_map", expert_map, "(global_num_experts,)", (global_num_experts,))
    return global_num_experts


def _check_values(x: Any, weights: Any, ids: Any, expert_map: Any, num_global: int, num_experts: int) -> None:
    """The checks that read data, for ``check=True``."""
    if expert_map is not None and bool((expert_map >= num_experts).any()):
        i = int((expert_map >= num_experts).argmax())
        raise ValueError(f"expert_map must be < E = {num_experts}, got {int(expert_map[i])} at index {i}")
    signed = ids.view("int32") if ids.dtype.name == "uint32" else ids  # -1 skips, whatever the dtype calls it
    outside = (signed >= num_global) | (signed < -1)
    if bool(outside.any()):
        t, j = (int(i[0]) for i in outside.nonzero())
        got = int(ids[t, j])
        raise ValueError(f"topk_ids must be in 0..{num_global - 1}, or -1 to skip, got {got} for token {t}, choice {j}")
    wide, counts = signed.astype(np.int64), weights.astype(np.float32) != 0
    ordered = wide * counts - ~counts  # a choice of weight 0 may repeat another: it adds nothing
    ordered.sort(axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        t, j = (int(i[0]) for i in twice.nonzero())
        raise ValueError(f"topk_ids must be distinct in a row, got {int(ordered[t, j])} twice for token {t}")
    for name, array in (("hidden_states", x), ("topk_weights", weights)):
        _check_finite(name, array, "finite")


def _check_finite(name: str, array: Any, rule: str, allowed: float = 0.0) -> None:
    values = array.astype(np.float32)
    bad = ~(abs(values) < np.inf) & (values != allowed)
    if bool(bad.any()):
        i, j = (int(where[0]) for where in bad.nonzero())
        raise ValueError(f"{name} must be {rule}, got {float(values[i, j])} at [{i}, {j}]")
