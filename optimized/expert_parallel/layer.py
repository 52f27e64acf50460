"""`parallelize`: turn every MoE of a module into one whose experts live on many ranks, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reference.autograd import MoE as ReferenceMoE
from reference.autograd import Routing
from reference.autograd.layer import apply_experts_forward, route_forward
from reference.autograd.tokens import TokenInfo
from reference.config import ExpertsConfig, GatingConfig, MoEConfig, require
from reference.zero_computation import zero_computation_shapes

from ..backends import AUTO
from ..contracts import contract
from ..layer import MoE
from ..zero_computation import add_zero_computation
from .exchange import Journey, combine, receive, send
from .limits import check_supported
from .placement import Placement
from .plan import DTYPES, Pass, agree_on_counts, agree_on_pass, arrange, outgoing
from .shards import cut, is_down_bias, padded_bias, placements
from .transport import Transport, fingerprint, require_agreement


class _MeanGradient(torch.autograd.Function):
    """The tensor as it is; its gradient divided by the number of ranks whose losses are averaged."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.ranks, None


class _Total(torch.autograd.Function):
    """The sum over ranks. Every rank's loss contains the result once, so that an addend is met once per rank: dx = R · dy."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Ranks) -> Tensor:
        ctx.ranks = group.count
        return group.sum_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None


class Ranks:
    """What a parallel layer knows of the others.

    experts   the ranks over which the experts are spread;  data: replicas of that arrangement with other tokens, or None
    layer     number of the layer in its module;  placement: expert → rank;  calls: passes so far
    """

    def __init__(self, experts: Transport, data: Transport | None, layer: int, placement: Placement) -> None:
        self.experts, self.data, self.layer, self.placement = experts, data, layer, placement
        self.local_experts = [len(placement.local(rank)) for rank in range(placement.ranks)]
        self.calls = 0

    @property
    def count(self) -> int:
        """How many ranks share a batch."""
        return self.experts.ranks * (self.data.ranks if self.data else 1)

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place, the sum over all ranks that share the batch."""
        for transport in (self.experts, self.data):
            if transport is not None and transport.ranks > 1:
                transport.sum_(tensor, f"adding up loads and losses in layer {self.layer}")
        return tensor

    def total(self, tensor: Tensor) -> Tensor:
        """`TokenInfo.total` of a batch that is spread over ranks."""
        if tensor.is_floating_point():
            return _Total.apply(tensor, self)  # type: ignore[no-any-return]
        return self.sum_(tensor.clone())


NO_GRAPH = (
    "an expert-parallel layer compares what all ranks tell it before tokens move, and raises where they differ, which a graph cannot. "
    "Leave fullgraph=False: what is around the layer is compiled then"
)


class ExpertParallel:
    """What `parallelize` puts before a layer's own class: its loads and losses are those of all ranks, and its experts are everywhere.

    Tokens, groups, capacity and drops are this rank's; aux.loss, aux.losses, load and importance are those of the whole batch.
    Soft MoE's slots, made where their group is, go to their experts like tokens. Experts without a network live on every rank.
    A router of a backend's own is passed over: it counts the tokens of one rank.
    """

    config: MoEConfig
    training: bool
    parallel: Ranks

    @torch.compiler.disable(reason=NO_GRAPH)
    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The layer's own forward; `torch.compile` compiles what is around it."""
        return super().forward(*arguments, **named)  # type: ignore[misc]

    def route_tokens(self, x_TD: Tensor, tokens: TokenInfo, replay: Any = None, **more: Any) -> tuple[Routing, dict[str, Tensor]]:
        """The first seam, with totals over all ranks; more: what else `route_forward` takes."""
        agree_on_pass(self._pass(x_TD, replay), self.parallel.experts)
        self.parallel.calls += 1
        spread = tokens._replace(total=self.parallel.total)
        return route_forward(x_TD, self.tensors(), self.config, spread, training=self.training, replay=replay, **more)  # type: ignore[attr-defined]

    def apply_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The second seam: y [T, D] of the routed experts, wherever they live."""
        journey, ticket = self._depart(x_TD, routing)
        return self._with_own(self._return(ticket, journey), x_TD, routing)

    def apply_all_experts(self, x_TD: Tensor, routing: Routing, real_T: Tensor) -> Tensor:
        """The routed and the shared experts together; the shared ones are computed while tokens travel."""
        if not self.config.experts.shared:
            return self.apply_experts(x_TD, routing)
        journey, ticket = self._depart(x_TD, routing)
        shared = self.apply_shared(x_TD)  # type: ignore[attr-defined]
        y_TD = self._with_own(self._return(ticket, journey), x_TD, routing)
        return self.add_shared(y_TD, shared, real_T)  # type: ignore[attr-defined]

    def _with_own(self, y_TD: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        """y with the answers of experts that have no network: their tokens have never left."""
        if not self.config.experts.zero_computation:
            return y_TD
        return add_zero_computation(y_TD, x_TD, routing, self.tensors(), self.config.experts)  # type: ignore[attr-defined]

    def _depart(self, x_TD: Tensor, routing: Routing) -> tuple[Journey, Tensor]:
        """Agree with all ranks on what travels, and send it."""
        ranks = self.parallel
        going = outgoing(routing.expert, routing.keep, ranks.placement)
        coming = agree_on_counts(going, ranks.local_experts, routing.expert.shape[1], ranks.experts, ranks.layer)
        journey = Journey(going, coming, x_TD, routing.gate, ranks.experts, ranks.layer)
        return journey, send(x_TD, routing.gate, journey)

    def _pass(self, x_TD: Tensor, replay: Any) -> Pass:
        tensors: dict[str, Tensor] = self.tensors()  # type: ignore[attr-defined]
        held = [tensor for name, tensor in tensors.items() if not is_spread(name, self.config) and not isinstance(tensor, DTensor)]
        bits = 0
        for tensor in held:
            bits = (31 * bits + fingerprint(tensor)) % (1 << 62)
        router, experts = (
            any(tensor.requires_grad for name, tensor in tensors.items() if name.startswith(part)) for part in ("router.", "experts.")
        )
        return Pass(
            layer=self.parallel.layer,
            call=self.parallel.calls,
            training=self.training,
            grad_enabled=torch.is_grad_enabled(),
            x_requires_grad=x_TD.requires_grad,
            router_requires_grad=router,
            experts_require_grad=experts,
            replayed=replay is not None,
            dtype=DTYPES.index(x_TD.dtype),
            width=x_TD.shape[1],
            fingerprint=bits,
        )

    def _return(self, ticket: Tensor, journey: Journey) -> Tensor:
        """Receive tokens, run the experts that live here, and send the sums back."""
        rows_QD, gate_N, code_N = receive(ticket, journey)
        local = self.parallel.local_experts[self.parallel.experts.rank]
        params = self._local_params()
        if local == 0:
            # Nothing comes here; the sum ties the parameters to the graph, so that this rank too takes part in the backward pass.
            partial_QD = rows_QD + sum(tensor.sum() for tensor in params.values()).to(rows_QD.dtype)  # type: ignore[union-attr]
            return combine(partial_QD, journey)
        expert, gate, keep = arrange(code_N, gate_N, len(rows_QD), local)
        config = _local_config(self.config, local, expert.shape[1], self.parallel.placement.parts)
        nothing = gate.new_zeros(0)
        routing = Routing(expert, gate, keep, nothing, nothing, nothing, nothing, {})
        seam = self._resolve(rows_QD).apply_experts if isinstance(self, MoE) else apply_experts_forward
        return combine(seam(rows_QD, routing, params, config), journey)

    def _local_params(self) -> dict[str, Tensor]:
        """The experts that live here, [L, …] each, with gradients of the mean over their ranks; that over `data` comes later."""
        tensors: dict[str, Tensor] = self.tensors()  # type: ignore[attr-defined]
        spread = {name: tensor for name, tensor in tensors.items() if is_spread(name, self.config)}
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in spread.items()}
        local = {name: _MeanGradient.apply(tensor, self.parallel.experts.ranks) for name, tensor in local.items()}
        parts, rank = self.parallel.placement.parts, self.parallel.experts.rank
        return {n: padded_bias(t, self.config.d_model, rank % parts, parts) if is_down_bias(n) else t for n, t in local.items()}


def _local_config(config: MoEConfig, local: int, slots: int, parts: int) -> MoEConfig:
    """The layer of one rank, as far as the second seam looks at it."""
    width = config.experts.width // parts
    experts = ExpertsConfig(local, width, config.experts.activation, config.experts.bias, config.experts.gate_inputs)
    return MoEConfig(config.d_model, gating=GatingConfig(top_k=min(slots, local)), experts=experts)


def is_spread(name: str, config: MoEConfig) -> bool:
    """Whether a parameter of a layer belongs to experts that live on one rank: networks do, what the others learn is on every rank."""
    return name.startswith("experts.") and name not in zero_computation_shapes(config.d_model, config.experts)


_CLASSES: dict[type, type] = {}


def _parallel_class(layer_class: type) -> type:
    if layer_class not in _CLASSES:
        _CLASSES[layer_class] = type(f"ExpertParallel{layer_class.__name__}", (ExpertParallel, layer_class), {})
    return _CLASSES[layer_class]


@contract(
    equals="reference.layer.moe_forward",
    backend=AUTO,
    grads=("x", "gate", "params"),
    dtypes=("float64", "float32", "bfloat16"),
    limits="configs of `limits.check_supported`; noise has other draws on every rank, unless a routing is replayed",
    of_module=True,
)
def parallelize(module: nn.Module, mesh: DeviceMesh, *, data: DeviceMesh | None = None) -> nn.Module:
    """Spread the experts of every MoE inside a module over the ranks of a mesh dimension, in place, and return the module.

    mesh   `mesh["ep"]`: rank r keeps the experts of `Placement.contiguous`, ⌈E/R⌉ of them, fewer on the last ranks; or two dimensions,
           `mesh["ep", "etp"]`: the second cuts the width of every expert (expert tensor parallelism)
    data   one-dimensional: the ranks that hold the same experts and see other tokens, where there are more than those of `mesh`; loads
           and losses are then those of both together
    All ranks must hold equal parameters, which is checked; make the optimizer afterwards, and wrap in DDP or FSDP2 afterwards.
    Every call then takes this rank's own tokens, on the ranks of "etp" too: results are those of one process that sees the tokens of all
    ranks, on any number of them, up to the rounding of sums. A group lives on one rank.
    Raises: ValueError for a module without MoE, one that is parallel already, a config that cannot be spread, a width that cannot be cut,
    or a mesh of too many dimensions; DisagreementError where ranks differ in layers, configs or parameters; RankLostError where a rank
    does not answer.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, ReferenceMoE)]
    require(bool(layers), f"{type(module).__name__} holds no MoE")
    _check_meshes(mesh, data)
    parts = mesh.size(1) if mesh.ndim == 2 else 1
    for name, layer in layers:
        called = name or type(layer).__name__
        require(not isinstance(layer, ExpertParallel), f"the layer {called} is parallel already")
        check_supported(layer.config, called, parts)
    transports = Transport(mesh), None if data is None else Transport(data)
    for transport in transports:
        if transport is not None:
            _check_equal_start(layers, transport)
    for number, (_, layer) in enumerate(layers):
        placement = Placement.contiguous(layer.config.experts.networks, transports[0].ranks // parts, parts)
        _shard(layer, mesh, placement, transports[0].rank)
        layer.parallel = Ranks(transports[0], transports[1], number, placement)  # type: ignore[assignment]
        layer.__class__ = _parallel_class(type(layer))
    # DistributedDataParallel reads this: averaging one rank's experts with another's would mix different experts.
    module._ddp_params_and_buffers_to_ignore = [n for n, p in module.named_parameters() if isinstance(p, DTensor)]  # type: ignore[assignment]
    return module


def _check_meshes(mesh: DeviceMesh, data: DeviceMesh | None) -> None:
    require(mesh.ndim <= 2, f"mesh has {mesh.ndim} dimensions; take one of them, as in mesh['ep'], or two of them, as in mesh['ep', 'etp']")
    dimensions = 1 if data is None else data.ndim
    require(dimensions == 1, f"data has {dimensions} dimensions; take one of them, as in mesh['dp']")


def _check_equal_start(layers: list[tuple[str, ReferenceMoE]], transport: Transport) -> None:
    """DisagreementError unless all ranks brought the same layers, configs, shapes, dtypes and bits."""
    mine = [
        (name, layer.config.to_dict(), {key: (tuple(t.shape), str(t.dtype), fingerprint(t)) for key, t in layer.tensors().items()})
        for name, layer in layers
    ]
    theirs = transport.gather_objects(mine, "comparing the layers of all ranks")
    require_agreement("the layers", [[name for name, _, _ in one] for one in theirs], transport.members)
    for number, (name, config, tensors) in enumerate(mine):
        where = f" of layer {name}" if name else ""
        configs, params = ([one[number][part] for one in theirs] for part in (1, 2))
        for section in config:
            require_agreement(f"the config{where}, {section}", [one.get(section) for one in configs], transport.members)
        for key in tensors:
            require_agreement(f"{key}{where} (shape, dtype, fingerprint of its bits)", [one.get(key) for one in params], transport.members)


def _shard(layer: ReferenceMoE, mesh: DeviceMesh, placement: Placement, rank: int) -> None:
    """Replace the experts' stacks by DTensors that hold this rank's rows, and of these its part."""
    part: nn.Module = layer.get_submodule("experts")
    own = list(placement.local(rank))
    stacks = {name: stack for name, stack in part.named_parameters(recurse=False) if is_spread(f"experts.{name}", layer.config)}
    for name, stack in stacks.items():
        rows = stack.detach()[own] if own else stack.detach()[:0]
        local = cut(rows, name, layer.config.experts, rank % placement.parts, placement.parts).clone()
        spread = DTensor.from_local(
            local, mesh, placements(name, layer.config.experts, mesh.ndim), run_check=False, shape=stack.shape, stride=stack.stride()
        )
        part.register_parameter(name, nn.Parameter(spread, requires_grad=stack.requires_grad))


def parallel_layers(module: nn.Module) -> Sequence[ExpertParallel]:
    """The layers of a module that `parallelize` has changed. Raises ValueError where there is none."""
    found = [layer for layer in module.modules() if isinstance(layer, ExpertParallel)]
    require(bool(found), f"{type(module).__name__} holds no expert-parallel layer: call parallelize first")
    return found


def groups_of(module: nn.Module) -> tuple[Transport, ...]:
    """The transports that the layers of a module share: that of the experts, and that of the data where there is one."""
    ranks = parallel_layers(module)[0].parallel
    return (ranks.experts,) if ranks.data is None else (ranks.experts, ranks.data)
