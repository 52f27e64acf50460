"""The language model: against models that others wrote, and what must hold of any causal decoder with experts inside."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY, needs_tool
from language_models import ATTENTION, model_config, random_bytes, random_model
from tracer import traced

from reference import AttentionConfig, ExpertsConfig, GatingConfig, ModelConfig, MoEConfig, presets
from reference.autograd import MoE, transformer
from reference.autograd.transformer import KVCache, LanguageModel, cross_entropy
from reference.cost import model_parameters, sum_parameters

EXACT = dict(rtol=1e-10, atol=1e-11)


def close(found: torch.Tensor, expected: torch.Tensor, **limits: float) -> None:
    torch.testing.assert_close(found, expected, **{**EXACT, **limits})


def rename(name: str) -> str:
    name = name.removeprefix("model.").replace("mlp.gate.", "mlp.router.").replace("_proj.weight", "_proj")
    return f"{name}.weight" if "self_attn" in name and name.endswith("_proj") else name


def dense_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' dense layers keep the two halves of a gated FFN apart."""
    joined = {}
    for name, tensor in state.items():
        if name.endswith("mlp.gate_proj"):
            up = state[name.replace("gate_proj", "up_proj")]
            joined[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, up])
        elif not name.endswith("mlp.up_proj"):
            joined[name] = tensor
    return joined


SIZES = dict(
    vocab_size=256, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=10,
    max_position_embeddings=64, rms_norm_eps=1e-6, attn_implementation="eager",
)  # fmt: skip
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, eos_token_id=0, experts_implementation="eager")
MOE = MoEConfig(16, gating=GatingConfig(top_k=3, normalize="sum"), experts=ExpertsConfig(8, 10))
# Name → (their class, its further fields, further fields of our config).
MODELS = {
    "llama": ("Llama", {}, dict(moe_every=0)),
    "qwen2-biases": ("Qwen2", {}, dict(moe_every=0, attention=replace(ATTENTION, bias=True))),
    "qwen3-tied": (
        "Qwen3",
        dict(head_dim=4, tie_word_embeddings=True),
        dict(moe_every=0, tied_embeddings=True, attention=replace(ATTENTION, qk_norm=True)),
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        dict(head_dim=4, moe_intermediate_size=10, mlp_only_layers=[0], **EXPERTS),
        dict(attention=replace(ATTENTION, qk_norm=True)),
    ),
    "olmoe": ("Olmoe", EXPERTS, dict(first_dense=0, attention=replace(ATTENTION, qk_norm=True, qk_norm_joint=True))),
}


def oracle(name: str, fields: dict[str, object]) -> torch.nn.Module:
    """A model of transformers with random weights, its norms and biases too."""
    import transformers

    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **fields)).double().eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + ("norm" in key))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_one_of_transformers(name: str) -> None:
    needs_tool("transformers")
    kind, theirs, ours = MODELS[name]
    other = oracle(kind, theirs)
    model = LanguageModel(model_config(MOE, dense_width=10, **ours), dtype=torch.float64).eval()
    state = dense_weights({rename(key): value for key, value in other.state_dict().items()})
    model.load_state_dict({key: value for key, value in state.items() if key != "lm_head.weight" or not model.config.tied_embeddings})
    tokens = random_bytes(2, 17)
    with torch.no_grad():
        expected = other(tokens).logits
        limit = 2e-5 * expected.square().mean().sqrt()  # their norms, rotary tables and routers round to float32
        assert (model(tokens)[0] - expected).abs().max() < limit
        model.layers[1].self_attn.o_proj.weight.mul_(1.02)
        assert (model(tokens)[0] - expected).abs().max() > 10 * limit


@pytest.mark.parametrize("name", presets.names())
def test_parameters_are_those_that_cost_counts(name: str) -> None:
    config = presets.model(name, tiny=True)
    model = LanguageModel(config, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == sum_parameters(model_parameters(config)).total
    assert sorted(model.moe_layers()) == [layer for layer in range(config.layers) if config.is_moe(layer)]


def test_start_is_scaled_and_even() -> None:
    torch.manual_seed(0)
    config = model_config(MoEConfig(64, experts=ExpertsConfig(4, 32)), layers=8)
    model = LanguageModel(config)
    by_end = {name: weight for name, weight in model.named_parameters() if name.startswith("layers.5.")}
    for end, fan_in, scale in (
        ("q_proj.weight", 64, 1),
        ("o_proj.weight", 16, 4),
        ("experts.down_proj", 32, 4),
        ("experts.gate_up_proj", 64, 1),
    ):
        weight = next(weight for name, weight in by_end.items() if name.endswith(end))
        assert weight.std().item() == pytest.approx(fan_in**-0.5 / scale, rel=0.06), end
    assert torch.equal(model.norm.weight, torch.ones(64))
    tokens = random_bytes(4, 33)
    loss = cross_entropy(model(tokens[:, :-1])[0], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(256) + 0.5, abs=0.3)  # logits are of unit variance, which costs 1/2 nat
    tied = LanguageModel(replace(config, tied_embeddings=True))
    assert cross_entropy(tied(tokens[:, :-1])[0], tokens[:, 1:]).item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("positions", [0, 16])
def test_a_token_changes_nothing_before_it(positions: int) -> None:
    model = random_model(model_config(max_positions=positions)).eval()
    tokens = random_bytes(2, 11)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    close(after[:, :6], before[:, :6])
    assert ((after[:, 6:] - before[:, 6:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("positions", [0, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, positions: int) -> None:
    model = random_model(model_config(max_positions=positions)).train()
    tokens, pads = random_bytes(2, 9), random_bytes(2, 4, seed=1)
    real = slice(4, None) if side == "left" else slice(0, 9)
    padded = torch.cat([pads, tokens] if side == "left" else [tokens, pads], 1)
    pad_mask = torch.ones(2, 13, dtype=torch.bool)
    pad_mask[:, real] = False
    (expected, plain), (found, aux) = model(tokens), model(padded, pad_mask=pad_mask)
    close(found[:, real], expected)
    close(aux.loss, plain.loss)
    assert found.isfinite().all()
    assert all(torch.equal(aux.layers[layer].routing.load, plain.layers[layer].routing.load) for layer in plain.layers)
    if side == "left":
        assert (model(padded)[0][:, real] - expected).abs().max() > 1e-6


def test_every_query_sees_a_key() -> None:
    pad_mask = torch.tensor([[True, True, False], [False, True, True]])
    allowed = transformer._allowed(3, 0, pad_mask, torch.device("cpu"))
    assert allowed.any(-1).all()
    assert not (allowed & pad_mask[:, None, None, :] & ~torch.eye(3, dtype=torch.bool)).any()


def test_cache_continues_the_pass() -> None:
    model = random_model(model_config()).eval()
    tokens = random_bytes(2, 12)
    expected, cache = model(tokens)[0], KVCache()
    parts = [model(part, cache=cache)[0] for part in tokens.split([5, 1, 1, 4, 1], 1)]
    close(torch.cat(parts, 1), expected)
    assert cache.length == 12


NOT_CAUSAL = {"expert_choice", "soft"}


def decodable() -> list[str]:
    """The presets whose tiny model can be built and whose routing of a token does not depend on others."""

    def fits(config: ModelConfig) -> bool:
        moe = config.moe
        return not config.encoder_layers and moe.capacity.formula == "none" and moe.gating.choice not in NOT_CAUSAL

    return [name for name in presets.names() if fits(presets.model(name, tiny=True))]


@pytest.mark.parametrize("name", decodable())
def test_cache_continues_the_pass_of_every_preset_that_drops_nothing(name: str) -> None:
    model = random_model(presets.model(name, tiny=True)).eval()
    tokens = random_bytes(1, 9)
    expected, cache = model(tokens)[0], KVCache()
    close(torch.cat([model(part, cache=cache)[0] for part in tokens.split([4, 1, 1, 1, 2], 1)], 1), expected)


@pytest.mark.parametrize("name", ["gshard", "deepseek-v3", "switch"])
def test_activation_checkpointing_changes_no_bit(name: str) -> None:
    model = random_model(model_config(name)).train()
    tokens, results = random_bytes(3, 8), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        logits, aux = model(tokens)
        (cross_entropy(logits, tokens) + aux.loss).backward()
        results.append((logits, aux.loss, *(aux.layers[n].routing.load for n in aux.layers), *(p.grad.clone() for p in model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert aux.loss > 0


def test_checkpointing_keeps_less() -> None:
    model = random_model(model_config()).train()
    tokens, kept = random_bytes(4, 32), []
    for model.activation_checkpointing in (False, True):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_replay_repeats_noise_and_choices() -> None:
    model = random_model(model_config("gshard")).train()
    tokens = random_bytes(2, 10)
    logits, aux = model(tokens)
    again, other = model(tokens, replay=aux.routing), model(tokens)
    close(again[0], logits)
    assert all(torch.equal(again[1].layers[n].routing.keep, aux.layers[n].routing.keep) for n in aux.layers)
    assert (other[0] - logits).abs().max() > 1e-6


def test_aux_belongs_to_the_moe_layers() -> None:
    config = model_config("deepseek-v3", layers=5, first_dense=1, moe_every=2)
    model = random_model(config).train()
    aux = model(random_bytes(2, 6))[1]
    assert list(aux.layers) == [2, 4] and type(model.layers[2].mlp) is MoE
    close(aux.loss, sum(layer.loss for layer in aux.layers.values()))
    assert aux.loss > 0 and model.eval()(random_bytes(2, 6))[1].loss == 0
    before = {n: moe.get_buffer("router.correction_bias").clone() for n, moe in model.moe_layers().items()}
    model.update_bias({n: layer.routing.load for n, layer in aux.layers.items()})
    for n, moe in model.moe_layers().items():
        load, moved = aux.layers[n].routing.load.double(), moe.get_buffer("router.correction_bias") - before[n]
        assert torch.equal(moved.sign(), (load.mean() - load).sign().float())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_empty_and_single_tokens(shape: tuple[int, int]) -> None:
    model = random_model(model_config()).train()
    logits, aux = model(random_bytes(*shape))
    assert logits.shape == (*shape, 256) and aux.loss.isfinite()
    (logits.sum() + aux.loss).backward()


def test_another_class_of_layer_is_used() -> None:
    class Other(MoE):
        pass

    model = LanguageModel(model_config(), moe_class=Other)
    assert [type(moe) for moe in model.moe_layers().values()] == [Other, Other]


MLA = AttentionConfig("mla", 2, 2, 4, kv_rank=4, rope_dim=2, v_head_dim=4)
BAD_CONFIGS = {
    "attention.kind is 'mla'": dict(attention=MLA),
    "encoder_layers is 2": dict(encoder_layers=2),
    "relative_buckets is 8": dict(attention=replace(ATTENTION, relative_buckets=8)),
    "head_dim is 5": dict(attention=replace(ATTENTION, head_dim=5)),
    "dense_activation is 'tanh'": dict(dense_activation="tanh"),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_config_that_cannot_be_trained(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(model_config(**BAD_CONFIGS[message]))


def test_bad_input() -> None:
    model = LanguageModel(model_config(max_positions=8))
    for tokens in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="tokens have shape"):
            model(tokens)
    tokens = random_bytes(2, 6)
    for pad_mask in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6)):
        with pytest.raises(ValueError, match=r"pad_mask must be bool of shape \(2, 6\)"):
            model(tokens, pad_mask=pad_mask)
    with pytest.raises(ValueError, match="9 positions, but max_positions is 8"):
        model(random_bytes(1, 9))
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, pad_mask=torch.zeros(2, 6, dtype=torch.bool), cache=KVCache())


def test_suffixes_are_shapes() -> None:
    model = random_model(model_config(layers=2)).train()
    with traced(REPOSITORY / "reference" / "autograd") as trace:
        model(random_bytes(3, 5), pad_mask=torch.zeros(3, 5, dtype=torch.bool))
        model.eval()(random_bytes(1, 4), cache=KVCache())
    assert not trace.errors, trace.errors[:5]
    assert "transformer.py:forward logits_BSV" in trace.seen
