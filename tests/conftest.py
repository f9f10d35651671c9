"""Tiny random models of every architecture that we promise, and a tokenizer of bytes; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before torch is imported: small matrices run fastest on one thread, and a stray download must fail.
os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from activations.loading import load_model
from activations.models import Model

_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
_CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TOKENS = {"vocab_size": 272, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NEOX = {
    **_TOKENS,
    "max_position_embeddings": 256,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
}
_LLAMA = {**_NEOX, "num_key_value_heads": 2, "head_dim": 12}
_GPT2 = {**_TOKENS, "n_positions": 256, "n_embd": 48, "n_layer": 3, "n_head": 4}
_LOCAL = ["sliding_attention", "sliding_attention", "full_attention"]

# Different where layers, norms, attention, ties or names of weights could trip us.
_CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "llama-tied": lambda: hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**_LLAMA, sliding_window=8, layer_types=_LOCAL),
    "mistral": lambda: hf.MistralConfig(**_LLAMA, sliding_window=8),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_NEOX),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SHARED_HEADS = {**_NEOX, "num_key_value_heads": 2}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 10}

# For single tests: sizes that packed kernels can do, heads wider than the model, attention that is more than attention,
# and routers as transformers builds them; not all layers have one.
_FURTHER: dict[str, Callable[[], Any]] = {
    "llama-64": lambda: hf.LlamaConfig(**{**_LLAMA, "hidden_size": 64, "head_dim": 16}),
    "qwen3-wide": lambda: hf.Qwen3Config(**{**_LLAMA, "head_dim": 20}),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**_LLAMA, **_EXPERTS, moe_intermediate_size=32, mlp_only_layers=[1]),
    "olmoe": lambda: hf.OlmoeConfig(**_SHARED_HEADS, **_EXPERTS),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**_SHARED_HEADS, **_EXPERTS, moe_intermediate_size=32),
    "gpt-oss": lambda: hf.GptOssConfig(**_LLAMA, **_LOCAL_EXPERTS, sliding_window=8, layer_types=_LOCAL),
    "gemma2": lambda: hf.Gemma2Config(**_LLAMA, sliding_window=8),
    "llama4": lambda: hf.Llama4TextConfig(**_LLAMA, intermediate_size_mlp=64, num_local_experts=2),
    "phi3-longrope": lambda: hf.Phi3Config(
        **_LLAMA,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 6,
            "long_factor": [4.0] * 6,
        },
    ),
    "bloom": lambda: hf.BloomConfig(**_TOKENS, hidden_size=48, n_layer=3, n_head=4),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **_LLAMA,
        **_EXPERTS,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=12,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
    "jetmoe": lambda: hf.JetMoeConfig(
        **_TOKENS, **_LOCAL_EXPERTS, hidden_size=48, num_hidden_layers=3, num_key_value_heads=4, kv_channels=12
    ),
    "granite-moe": lambda: hf.GraniteMoeConfig(**_SHARED_HEADS, **_LOCAL_EXPERTS),
    "deepseek3": lambda: hf.DeepseekV3Config(
        **_NEOX,
        **_MLA,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
}


@pytest.fixture(params=list(_CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_network() -> Callable[..., Any]:
    """`tiny_network("qwen3", seed=1)`: a random Hugging Face model in float32, its weights as large as trained ones."""

    def network(architecture: str, *, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        made = hf.AutoModelForCausalLM.from_config((_CONFIGS | _FURTHER)[architecture](), dtype=torch.float32)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(5)
        return made.eval()

    return network


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """`byte_tokenizer(chat=False)`: one token a byte, <bos> before plain text and in the chat template."""

    def make(*, chat: bool = True) -> Any:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([*_SPECIAL.values(), *alphabet])}
        core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        core.add_special_tokens(list(_SPECIAL.values()))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
        )
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **_SPECIAL)
        tokenizer.chat_template = _CHAT if chat else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(byte_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The byte tokenizer as users have theirs: from a folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tiny_network: Callable[..., Any], tokenizer: Any) -> Callable[[str], Model]:
    """`tiny("qwen3")`: the model of an architecture, made once; tests must leave it as it was."""
    made: dict[str, Model] = {}

    def model(architecture: str) -> Model:
        if architecture not in made:
            made[architecture] = load_model(tiny_network(architecture), tokenizer=tokenizer)
        return made[architecture]

    return model


@pytest.fixture
def llama(tiny: Callable[[str], Model]) -> Model:
    """The plainest of them."""
    return tiny("llama")
