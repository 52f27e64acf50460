"""An opinion that is not ours: the MoE blocks of `transformers`, run on their own random weights, in the names of `reference`.

A block is built inside a tiny randomly initialised model of its family and its weights are renamed, never rearranged beyond stacking:
transformers keeps experts as [E, 2F, D] and [E, D, F], as we do. All blocks cast their router to float32; `_double` turns such a cast
into float64, so that two correct layers agree to the last digits and a small mistake cannot hide behind a rounding.

transformers is a test dependency: this module imports it, and torch, when a block is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from reference.capacity import group_capacity
from reference.config import MoEConfig, require
from reference.tokens import token_info

if TYPE_CHECKING:
    import torch

Pick = Callable[["torch.Tensor"], "torch.Tensor"]


class OracleResult(NamedTuple):
    """params: the block's weights under our names; y [T, D]; gradients: "dx" [T, D] and one array per parameter's name."""

    params: dict[str, np.ndarray]
    y: np.ndarray
    gradients: dict[str, np.ndarray]


def _base_settings(config: MoEConfig, tokens: int) -> dict[str, Any]:
    """Fields that the decoder families share: one layer, everything beside the MoE block as small as it goes."""
    return dict(
        hidden_size=config.d_model, num_experts_per_tok=config.gating.top_k, num_hidden_layers=1, vocab_size=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, num_attention_heads=1, num_key_value_heads=1, initializer_range=config.d_model**-0.5,
    )  # fmt: skip


def _mixtral(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _base_settings(config, tokens) | dict(intermediate_size=config.experts.width, num_local_experts=config.experts.count)


def _olmoe(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _base_settings(config, tokens) | dict(
        intermediate_size=config.experts.width, num_experts=config.experts.count, norm_topk_prob=config.gating.normalize == "sum"
    )


def _qwen3(config: MoEConfig, tokens: int) -> dict[str, Any]:
    # Without norm_topk_prob the configuration class would choose False, unlike the published models.
    return _olmoe(config, tokens) | dict(moe_intermediate_size=config.experts.width, head_dim=2)


def _qwen2(config: MoEConfig, tokens: int) -> dict[str, Any]:
    experts = config.experts
    return _olmoe(config, tokens) | dict(moe_intermediate_size=experts.width, shared_expert_intermediate_size=experts.total_shared_width)


def _gpt_oss(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _mixtral(config, tokens) | dict(head_dim=2)


def _llama4(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _mixtral(config, tokens) | dict(intermediate_size_mlp=config.experts.width, head_dim=2, interleave_moe_layer_step=1)


def _deepseek(config: MoEConfig, tokens: int) -> dict[str, Any]:
    experts, gating = config.experts, config.gating
    return _base_settings(config, tokens) | dict(
        intermediate_size=experts.width, moe_intermediate_size=experts.width, n_routed_experts=experts.count,
        n_shared_experts=experts.shared, first_k_dense_replace=0, routed_scaling_factor=gating.scale, n_group=gating.groups,
        topk_group=gating.top_groups, norm_topk_prob=gating.normalize == "sum", q_lora_rank=2, kv_lora_rank=2, qk_nope_head_dim=2,
        qk_rope_head_dim=2, v_head_dim=2,
    )  # fmt: skip


def _deepseek_v2(config: MoEConfig, tokens: int) -> dict[str, Any]:
    method = "greedy" if config.gating.top_groups == config.gating.groups else "group_limited_greedy"
    return _deepseek(config, tokens) | dict(topk_method=method)


def _deepseek_v3(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _deepseek(config, tokens) | dict(num_mtp_layers=0)


def _deepseek_v4(config: MoEConfig, tokens: int) -> dict[str, Any]:
    return _base_settings(config, tokens) | dict(
        moe_intermediate_size=config.experts.width, n_routed_experts=config.experts.count, n_shared_experts=config.experts.shared,
        routed_scaling_factor=config.gating.scale, mlp_layer_types=["moe"], layer_types=["sliding_attention"], head_dim=8, q_lora_rank=2,
        o_groups=1, o_lora_rank=2, index_n_heads=1, index_head_dim=8,
    )  # fmt: skip


def _switch(config: MoEConfig, tokens: int) -> dict[str, Any]:
    capacity = group_capacity(config.capacity, config.gating.top_k, config.experts.count, token_info(tokens), training=False)
    return dict(
        d_model=config.d_model, d_ff=config.experts.width, num_experts=config.experts.count, expert_capacity=int(capacity[0]),
        router_jitter_noise=config.scores.noise_scale, dropout_rate=0.0, num_layers=1, num_sparse_encoder_layers=1, num_decoder_layers=1,
        num_sparse_decoder_layers=0, num_heads=1, d_kv=2, vocab_size=8,
    )  # fmt: skip


def _gate_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of most families."""
    named = {
        "router.weight": pick(block.gate.weight),
        "experts.gate_up_proj": pick(block.experts.gate_up_proj),
        "experts.down_proj": pick(block.experts.down_proj),
    }
    if shared := getattr(block, "shared_experts", None):
        named |= _shared(shared, pick)
    return named


def _shared(network: Any, pick: Pick) -> dict[str, torch.Tensor]:
    import torch

    return {
        "shared.gate_up_proj": torch.cat([pick(network.gate_proj.weight), pick(network.up_proj.weight)]),
        "shared.down_proj": pick(network.down_proj.weight),
    }


def _qwen2_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of Qwen2-MoE, whose shared experts have a gate."""
    return _gate_block(block, pick) | _shared(block.shared_expert, pick) | {"shared.gate": pick(block.shared_expert_gate.weight)}


def _gpt_oss_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of gpt-oss: its matrices are [in, out], its gate and up columns alternate, everything has a bias."""
    from reference.autograd.experts import concatenate_gate_up

    router, experts = block.router, block.experts
    return {
        "router.weight": pick(router.weight),
        "router.bias": pick(router.bias),
        "experts.gate_up_proj": concatenate_gate_up(pick(experts.gate_up_proj).transpose(1, 2)),
        "experts.gate_up_proj_bias": concatenate_gate_up(pick(experts.gate_up_proj_bias)),
        "experts.down_proj": pick(experts.down_proj).transpose(1, 2),
        "experts.down_proj_bias": pick(experts.down_proj_bias),
    }


def _llama4_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of Llama 4, whose experts' matrices are [in, out]."""
    return {
        "router.weight": pick(block.router.weight),
        "experts.gate_up_proj": pick(block.experts.gate_up_proj).transpose(1, 2),
        "experts.down_proj": pick(block.experts.down_proj).transpose(1, 2),
        **_shared(block.shared_expert, pick),
    }


def _longcat_flash(config: MoEConfig, tokens: int) -> dict[str, Any]:
    experts = config.experts
    return _base_settings(config, tokens) | dict(
        num_hidden_layers=2, num_layers=1, moe_topk=config.gating.top_k, n_routed_experts=experts.networks,
        zero_expert_num=experts.count - experts.networks, expert_ffn_hidden_size=experts.width, ffn_hidden_size=experts.width,
        routed_scaling_factor=config.gating.scale, q_lora_rank=2, kv_lora_rank=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2,
    )  # fmt: skip


def _longcat_flash_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of LongCat-Flash, which also keeps a first matrix, never read, for each expert that has no network."""
    experts = block.experts
    return {
        "router.weight": pick(block.router.classifier.weight),
        "experts.gate_up_proj": pick(experts.gate_up_proj)[: experts.num_routed_experts],
        "experts.down_proj": pick(experts.down_proj),
    }


def _switch_block(block: Any, pick: Pick) -> dict[str, torch.Tensor]:
    """Our names for the weights of Switch, which keeps a module for each expert."""
    import torch

    return {
        "router.weight": pick(block.router.classifier.weight),
        "experts.up_proj": torch.stack([pick(expert.wi.weight) for expert in block.experts.values()]),
        "experts.down_proj": torch.stack([pick(expert.wo.weight) for expert in block.experts.values()]),
    }


class Oracle(NamedTuple):
    """model_type, block: family and class of the MoE block; settings: (config, S) → its configuration; named: weights under our names."""

    model_type: str
    block: str
    settings: Callable[[MoEConfig, int], dict[str, Any]]
    named: Callable[[Any, Pick], dict[str, Any]]


MIXTRAL = Oracle("mixtral", "MixtralSparseMoeBlock", _mixtral, _gate_block)
OLMOE = Oracle("olmoe", "OlmoeSparseMoeBlock", _olmoe, _gate_block)
QWEN2_MOE = Oracle("qwen2_moe", "Qwen2MoeSparseMoeBlock", _qwen2, _qwen2_block)
GPT_OSS = Oracle("gpt_oss", "GptOssMLP", _gpt_oss, _gpt_oss_block)
LLAMA4 = Oracle("llama4_text", "Llama4TextMoe", _llama4, _llama4_block)
LONGCAT_FLASH = Oracle("longcat_flash", "LongcatFlashMoE", _longcat_flash, _longcat_flash_block)
QWEN3_MOE = Oracle("qwen3_moe", "Qwen3MoeSparseMoeBlock", _qwen3, _gate_block)
DEEPSEEK_V2 = Oracle("deepseek_v2", "DeepseekV2Moe", _deepseek_v2, _gate_block)
DEEPSEEK_V3 = Oracle("deepseek_v3", "DeepseekV3MoE", _deepseek_v3, _gate_block)
DEEPSEEK_V4 = Oracle("deepseek_v4", "DeepseekV4SparseMoeBlock", _deepseek_v4, _gate_block)
SWITCH = Oracle("switch_transformers", "SwitchTransformersSparseMLP", _switch, _switch_block)

# DeepSeekMoE has no class in transformers; DeepSeek-V2's without its device limit is the same layer. GShard and dense have none, and
# that of Switch knows no GEGLU.
ORACLES: Mapping[str, Oracle] = {
    "switch-base-128": SWITCH,
    "switch-c-2048": SWITCH,
    "mixtral-8x7b": MIXTRAL,
    "mixtral-8x22b": MIXTRAL,
    "olmoe-1b-7b": OLMOE,
    "qwen3-30b-a3b": QWEN3_MOE,
    "qwen3-235b-a22b": QWEN3_MOE,
    "deepseek-moe-2b": DEEPSEEK_V2,
    "deepseek-moe-16b": DEEPSEEK_V2,
    "deepseek-moe-145b": DEEPSEEK_V2,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v2-lite": DEEPSEEK_V2,
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-r1": DEEPSEEK_V3,
    "qwen1.5-moe-a2.7b": QWEN2_MOE,
    "qwen2-57b-a14b": QWEN2_MOE,
    "gpt-oss-120b": GPT_OSS,
    "gpt-oss-20b": GPT_OSS,
    "llama4-scout": LLAMA4,
    "llama4-maverick": LLAMA4,
    "deepseek-v4-flash": DEEPSEEK_V4,
    "longcat-flash": LONGCAT_FLASH,
}


def build(name: str, config: MoEConfig, *, sequence: int, seed: int) -> Any:
    """The MoE block of the preset's family for `config`, in evaluation, with the random weights of its own model's initialisation.

    sequence: S, from which Switch's fixed capacity follows. The global generator of torch is left as it was.
    Raises: ValueError for a preset without an oracle; ModuleNotFoundError that names the extra where transformers is missing.
    """
    require(name in ORACLES, f"preset {name!r} has no block in transformers to compare with; those that have one: {', '.join(ORACLES)}")
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the oracles need {error.name}: install the extra `test` of this project", name=error.name) from error
    oracle = ORACLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = transformers.AutoConfig.for_model(oracle.model_type, **oracle.settings(config, sequence))
        model = transformers.AutoModel.from_config(settings, experts_implementation="eager")
    return next(module for module in model.modules() if type(module).__name__ == oracle.block).eval()


def _double() -> Any:
    """A context in which a cast to float32 is a cast to float64, and nothing else changes."""
    import torch
    from torch.overrides import TorchFunctionMode

    class _Double(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            call: Any = torch.Tensor.double if func is torch.Tensor.float else func
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
            return call(*args, **kwargs)

    return _Double()


def run(
    name: str, config: MoEConfig, x_BSD: np.ndarray, dy_BSD: np.ndarray, *,
    seed: int = 0, correction_bias: np.ndarray | None = None, native_router: bool = False,
) -> OracleResult:  # fmt: skip
    """Forward and backward of the block, float64 in and out; each of the B sequences is a group.

    correction_bias [E] fills the buffer that the initialisation leaves at 0. native_router keeps the block's own casts to float32.
    Raises: as `build` does.
    """
    import torch

    block = build(name, config, sequence=x_BSD.shape[1], seed=seed).double()
    _fill_biases(block, seed)
    if correction_bias is not None:
        router = block.gate if hasattr(block, "gate") else block.router
        router.e_score_correction_bias.copy_(torch.from_numpy(correction_bias))
    x = torch.from_numpy(x_BSD).requires_grad_()
    with nullcontext() if native_router else _double():
        y = block(x)
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)  # some blocks return their router's results too
    y.backward(torch.from_numpy(dy_BSD))
    named = ORACLES[name].named
    params = {key: value.numpy().astype(np.float64) for key, value in named(block, lambda w: w.detach()).items()}
    if correction_bias is not None:
        params["router.correction_bias"] = correction_bias
    # A module whose expert got no token has no gradient at all, which is a gradient of 0.
    gradients = {key: value.numpy().astype(np.float64) for key, value in named(block, _gradient).items()}
    assert x.grad is not None
    rows = x_BSD.shape[0] * x_BSD.shape[1]
    gradients["dx"] = x.grad.numpy().reshape(rows, config.d_model)
    return OracleResult(params, y.detach().numpy().reshape(rows, config.d_model), gradients)


def _fill_biases(block: Any, seed: int) -> None:
    """Normal biases where the initialisation leaves zeros, so that a forgotten one is seen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.zeros_like(weight) if weight.grad is None else weight.grad
