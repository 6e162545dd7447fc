"""
What the config.json of each model family says about one of its MoE layers.

A family is one function ``(fields, layer) -> LayerSpec``; `FAMILIES` lists them by model_type. Nothing
here opens a file or touches an array. Fields that change the numbers have no default: a config.json
that lacks one is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cumoe import _check
from cumoe.layer import Routing

# hidden_act of config.json -> the name in fused_experts
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer as config.json and the family's naming describe it; 0 means "there is none"."""

    model_type: str
    layer: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    activation: str
    routing: Routing
    blocks: tuple[str, ...] = ("mlp",)  # names of the MoE module inside a layer, oldest spelling last
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    float32_router: bool = False  # logits in float32 whatever the dtype of the file
    router_bias: str = ""  # selection bias inside the module
    shared_intermediate_size: int = 0
    shared_expert: str = ""
    shared_gate: str = ""
    router: str = "gate"
    logit_bias: str = ""  # bias of the router logits inside the module
    has_biases: bool = False  # of both products
    limit: float | None = None  # of the activation


class Fields:
    """
    A JSON object with checked reads; the first of several names that is present and not null counts.

    `prefix` is the way to an object inside another, as messages spell it.
    """

    def __init__(self, values: dict[str, Any], prefix: str = "", file: str = "config.json") -> None:
        self.values, self._prefix, self._file = values, prefix, file

    def get(self, *names: str, default: Any = None) -> Any:
        value = self.optional(*names)
        if value is None and default is None:
            also = "".join(f" (or {self._prefix + name!r})" for name in names[1:])
            wanted = f"the field {self._prefix + names[0]!r}{also}"
            raise ValueError(f"{self._file} must have {wanted}, got none; take it from the model's page")
        return default if value is None else value

    def optional(self, *names: str) -> Any:
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def inside(self, name: str) -> "Fields":
        """The object in a field."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise TypeError(f"{self._says(name)} must be an object, got {value!r}")
        return Fields(value, f"{self._prefix}{name}.", self._file)

    def integer(self, *names: str, low: int = 1, high: int | None = None, default: int | None = None) -> int:
        return _check.integer(self._says(*names), self.get(*names, default=default), low, high)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise TypeError(f"{self._says(name)} must be true or false, got {value!r}")
        return value

    def number(self, name: str) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self._says(name)} must be a number, got {value!r}")
        return float(value)

    def choice(self, *names: str, among: tuple[Any, ...], default: Any = None) -> Any:
        """A field whose other values are not implemented."""
        value = self.get(*names, default=default)
        if value not in among:
            listed = ", ".join(map(repr, among))
            raise NotImplementedError(
                f"no loader for {self._of(*names)} = {value!r} in {self._file}; available: {listed}"
            )
        return value

    def string(self, *names: str) -> str:
        value = self.get(*names)
        if not isinstance(value, str):
            raise TypeError(f"{self._says(*names)} must be a string, got {value!r}")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.get(name, default=[])
        if not isinstance(value, list):
            raise TypeError(f"{self._says(name)} must be a list, got {value!r}")
        return value

    def activation(self) -> str:
        name = self.string("hidden_act")
        if name not in _ACTIVATIONS:
            raise NotImplementedError(
                f"no loader for hidden_act = {name!r} in {self._file}; available: {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def _of(self, *names: str) -> str:
        return self._prefix + next((name for name in names if self.values.get(name) is not None), names[0])

    def _says(self, *names: str) -> str:
        return f"{self._of(*names)} in {self._file}"


def _dense(model_type: str, layer: int, reason: str) -> ValueError:
    return ValueError(f"layer must be an MoE layer of this {model_type} model, got {layer}, a dense layer: {reason}")


def _top_k(fields: Fields, num_experts: int) -> int:
    return fields.integer("num_experts_per_tok", high=num_experts)


def _mixtral(fields: Fields, layer: int) -> LayerSpec:
    num_experts = fields.integer("num_local_experts", "num_experts")
    return LayerSpec(
        model_type="mixtral",
        layer=layer,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_experts=num_experts,
        activation=fields.activation(),
        routing=Routing(top_k=_top_k(fields, num_experts), renormalize=True),
        blocks=("mlp", "block_sparse_moe"),
        projections=("w1", "w3", "w2"),
    )


def _qwen(model_type: str, fields: Fields, layer: int, **shared: Any) -> LayerSpec:
    """The part that Qwen2-MoE and Qwen3-MoE have in common."""
    dense_layers = fields.items("mlp_only_layers")
    step = fields.integer("decoder_sparse_step", default=1)
    if layer in dense_layers:
        raise _dense(model_type, layer, f"mlp_only_layers = {dense_layers}")
    if (layer + 1) % step:
        raise _dense(model_type, layer, f"decoder_sparse_step = {step}")
    num_experts = fields.integer("num_experts", "num_local_experts")
    return LayerSpec(
        model_type=model_type,
        layer=layer,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        num_experts=num_experts,
        activation=fields.activation(),
        routing=Routing(
            top_k=_top_k(fields, num_experts), renormalize=fields.flag("norm_topk_prob"), rounded_weights=True
        ),
        **shared,
    )


def _qwen2_moe(fields: Fields, layer: int) -> LayerSpec:
    return _qwen(
        "qwen2_moe",
        fields,
        layer,
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        shared_expert="shared_expert",
        shared_gate="shared_expert_gate",
    )


def _qwen3_moe(fields: Fields, layer: int) -> LayerSpec:
    return _qwen("qwen3_moe", fields, layer)


def _deepseek_v3(fields: Fields, layer: int) -> LayerSpec:
    fields.choice("scoring_func", among=("sigmoid",), default="sigmoid")
    fields.choice("topk_method", among=("noaux_tc",), default="noaux_tc")
    first, step = fields.integer("first_k_dense_replace", low=0), fields.integer("moe_layer_freq", default=1)
    if layer < first:
        raise _dense("deepseek_v3", layer, f"first_k_dense_replace = {first}")
    if layer % step:
        raise _dense("deepseek_v3", layer, f"moe_layer_freq = {step}")
    num_experts = fields.integer("n_routed_experts", "num_local_experts")
    num_groups = fields.integer("n_group", high=num_experts)
    if num_experts % num_groups or num_experts // num_groups < 2:
        raise ValueError(
            f"n_group in config.json must split n_routed_experts = {num_experts} into equal groups of at least 2, "
            f"got {num_groups}"
        )
    topk_group = fields.integer("topk_group", high=num_groups)
    intermediate_size = fields.integer("moe_intermediate_size")
    return LayerSpec(
        model_type="deepseek_v3",
        layer=layer,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        activation=fields.activation(),
        routing=Routing(
            top_k=fields.integer("num_experts_per_tok", high=topk_group * (num_experts // num_groups)),
            renormalize=fields.flag("norm_topk_prob"),
            scoring_func="sigmoid",
            num_expert_group=num_groups,
            topk_group=topk_group,
            routed_scaling_factor=fields.number("routed_scaling_factor"),
        ),
        float32_router=True,
        router_bias="gate.e_score_correction_bias",
        shared_intermediate_size=intermediate_size * fields.integer("n_shared_experts", low=0, default=0),
        shared_expert="shared_experts",
    )


def _gpt_oss(fields: Fields, layer: int) -> LayerSpec:
    num_experts = fields.integer("num_local_experts", "num_experts")
    return LayerSpec(
        model_type="gpt_oss",
        layer=layer,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_experts=num_experts,
        activation="swigluoai",  # whatever hidden_act says
        routing=Routing(top_k=_top_k(fields, num_experts), renormalize=True, rounded_weights=True),
        router="router",
        logit_bias="router.bias",
        has_biases=True,
        limit=fields.number("swiglu_limit"),
    )


FAMILIES: dict[str, Callable[[Fields, int], LayerSpec]] = {
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}


def layer_spec(config: dict[str, Any], layer: int) -> LayerSpec:
    """Check the config and the layer number, and describe that layer."""
    fields = Fields(config)
    model_type = fields.string("model_type")
    if model_type not in FAMILIES:
        raise NotImplementedError(
            f"no loader for model_type {model_type!r} in config.json; available: {', '.join(FAMILIES)}"
        )
    layer = _check.integer("layer", layer, 0, fields.integer("num_hidden_layers") - 1)
    return FAMILIES[model_type](fields, layer)
