"""How an MoE layer is cut over devices: tensor, data and expert parallel sizes and this device's ranks."""

from dataclasses import KW_ONLY, dataclass

from cumoe import _check

ALL2ALL_BACKENDS = (
    "allgather_reducescatter",
    "naive",
    "pplx",
    "deepep_high_throughput",
    "deepep_low_latency",
    "deepep_v2",
    "mori_high_throughput",
    "mori_low_latency",
    "moonep",
    "nixl_ep",
    "flashinfer_nvlink_two_sided",
    "flashinfer_all2allv",
    "flashinfer_nvlink_one_sided",
    "passthrough",
)


@dataclass(frozen=True)
class FusedMoEParallelConfig:
    """
    Sizes of the parallel groups of an MoE layer and this device's rank in each.

    Use `make`, which derives them from the sizes of the whole model.

    Parameters
    ----------
    tp_size, dp_size, ep_size : int
        Devices that share each expert's columns, that have tokens of their own, that share the experts.
    tp_rank, dp_rank, ep_rank : int
        This device's place in each group.
    use_ep : bool
        Whether each device owns whole experts.
    pcp_size, pcp_rank : int
        Prefill context parallel group.
    sp_size : int
        Sequence parallel group.
    all2all_backend : str
        Who moves tokens between devices that own different experts.
    enable_eplb : bool
        Whether experts are replicated to balance the load.
    """

    tp_size: int
    dp_size: int
    ep_size: int
    tp_rank: int
    dp_rank: int
    ep_rank: int
    use_ep: bool
    _: KW_ONLY
    pcp_size: int = 1
    pcp_rank: int = 0
    sp_size: int = 1
    all2all_backend: str = "allgather_reducescatter"
    enable_eplb: bool = False

    def __post_init__(self) -> None:
        for group in ("tp", "dp", "ep", "pcp"):
            size = _check.integer(f"{group}_size", getattr(self, f"{group}_size"), 1)
            _check.integer(f"{group}_rank", getattr(self, f"{group}_rank"), 0, size - 1)
        _check.integer("sp_size", self.sp_size, 1)
        _check.choice("all2all_backend", self.all2all_backend, ALL2ALL_BACKENDS)
        if not self.use_ep and self.ep_size != 1:
            raise ValueError(f"ep_size must be 1 without use_ep, got {self.ep_size}")

    @staticmethod
    def make(
        tp_size: int = 1,
        dp_size: int = 1,
        *,
        enable_expert_parallel: bool = False,
        tp_rank: int = 0,
        dp_rank: int = 0,
        pcp_size: int = 1,
        pcp_rank: int = 0,
        sp_size: int = 1,
        all2all_backend: str = "allgather_reducescatter",
        enable_eplb: bool = False,
    ) -> "FusedMoEParallelConfig":
        """
        Derive the groups of the MoE layer from those of the model.

        All ``dp_size * pcp_size * tp_size`` devices share the layer: with expert parallelism each owns
        whole experts, without it each owns some columns of every expert.

        Parameters
        ----------
        tp_size, dp_size : int, default 1
            Tensor and data parallel sizes of the model.
        enable_expert_parallel : bool, default False
            Share experts, not columns; without effect on a single device.
        tp_rank, dp_rank : int, default 0
            This device's rank in the model's groups.
        pcp_size, pcp_rank, sp_size : int
            Prefill context parallel size and rank, sequence parallel size.
        all2all_backend : str, default "allgather_reducescatter"
            Who moves tokens between devices that own different experts.
        enable_eplb : bool, default False
            Whether experts are replicated to balance the load.

        Returns
        -------
        config : FusedMoEParallelConfig

        Raises
        ------
        ValueError
            A rank outside its group or an unknown `all2all_backend`.

        Examples
        --------
        Device 2 of four, two tensor parallel in each of two data parallel replicas:

        >>> from cumoe import FusedMoEParallelConfig
        >>> config = FusedMoEParallelConfig.make(2, 2, enable_expert_parallel=True, dp_rank=1)
        >>> config.tp_size, config.ep_size, config.ep_rank, config.use_all2all_kernels
        (1, 4, 2, True)
        """
        for name, size, rank in (("tp", tp_size, tp_rank), ("dp", dp_size, dp_rank), ("pcp", pcp_size, pcp_rank)):
            _check.integer(f"{name}_size", size, 1)
            _check.integer(f"{name}_rank", rank, 0, size - 1)
        flat_size = dp_size * pcp_size * tp_size
        flat_rank = (dp_rank * pcp_size + pcp_rank) * tp_size + tp_rank
        use_ep = bool(enable_expert_parallel) and flat_size > 1
        tensor, expert = ((1, 0), (flat_size, flat_rank)) if use_ep else ((flat_size, flat_rank), (1, 0))
        return FusedMoEParallelConfig(
            tp_size=tensor[0],
            dp_size=dp_size,
            ep_size=expert[0],
            tp_rank=tensor[1],
            dp_rank=dp_rank,
            ep_rank=expert[1],
            use_ep=use_ep,
            pcp_size=pcp_size,
            pcp_rank=pcp_rank,
            sp_size=sp_size,
            all2all_backend=all2all_backend,
            enable_eplb=enable_eplb,
        )

    @staticmethod
    def make_no_parallel() -> "FusedMoEParallelConfig":
        """Give the config of a single device."""
        return FusedMoEParallelConfig.make()

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether the tokens of a sequence are shared out."""
        return self.sp_size > 1

    @property
    def use_all2all_kernels(self) -> bool:
        """Whether tokens move between devices; tensor parallel devices hold the same tokens, so they do not."""
        return self.use_ep and (self.dp_size > 1 or self.pcp_size > 1 or self.is_sequence_parallel)

    @property
    def use_pplx_kernels(self) -> bool:
        """Whether tokens move through pplx."""
        return self._moves_through("pplx")

    @property
    def use_deepep_ht_kernels(self) -> bool:
        """Whether tokens move through DeepEP's high-throughput kernels."""
        return self._moves_through("deepep_high_throughput")

    @property
    def use_deepep_ll_kernels(self) -> bool:
        """Whether tokens move through DeepEP's low-latency kernels."""
        return self._moves_through("deepep_low_latency")

    @property
    def use_deepep_v2_kernels(self) -> bool:
        """Whether tokens move through DeepEP V2."""
        return self._moves_through("deepep_v2")

    @property
    def use_mori_kernels(self) -> bool:
        """Whether tokens move through MoRI."""
        return self._moves_through("mori_high_throughput", "mori_low_latency")

    @property
    def use_nixl_ep_kernels(self) -> bool:
        """Whether tokens move through NIXL."""
        return self._moves_through("nixl_ep")

    @property
    def use_fi_nvl_two_sided_kernels(self) -> bool:
        """Whether tokens move through FlashInfer's two-sided NVLink kernels."""
        return self._moves_through("flashinfer_nvlink_two_sided", "flashinfer_all2allv")

    @property
    def use_fi_nvl_one_sided_kernels(self) -> bool:
        """Whether tokens move through FlashInfer's one-sided NVLink kernels."""
        return self._moves_through("flashinfer_nvlink_one_sided")

    @property
    def use_ag_rs_all2all_kernels(self) -> bool:
        """Whether every device gathers all tokens and the results are reduced and scattered."""
        return self._moves_through("allgather_reducescatter")

    @property
    def use_batched_activation_format(self) -> bool:
        """Whether tokens arrive grouped by expert, ``(E_l, max_num_tokens, H)``."""
        return self.use_deepep_ll_kernels or self.use_nixl_ep_kernels

    @property
    def needs_round_robin_routing_tables(self) -> bool:
        """Whether a round-robin placement needs routing tables besides the expert map."""
        return self.use_deepep_ll_kernels or self.use_nixl_ep_kernels

    def _moves_through(self, *backends: str) -> bool:
        return self.use_all2all_kernels and self.all2all_backend in backends
