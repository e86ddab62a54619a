"""Tiny random models of many families, made from their configurations: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 128
TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again.\n" * 60
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OWN_HEADS = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_OPT = _OWN_HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32}

# Family -> (configuration class, its arguments, matrices a block).
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", _COMMON, 7),
    "mistral": ("MistralConfig", _COMMON | {"sliding_window": 8}, 7),
    "qwen2": ("Qwen2Config", _COMMON, 7),
    "qwen3": ("Qwen3Config", _COMMON | {"head_dim": 8}, 7),
    "gemma2": ("Gemma2Config", _COMMON | {"head_dim": 8, "sliding_window": 8}, 7),
    "gemma3": ("Gemma3TextConfig", _COMMON | {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 3,
               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, 7),
    "phi3": ("Phi3Config", _COMMON, 4),
    "opt": ("OPTConfig", _OPT, 6),
    "bloom": ("BloomConfig", _BLOOM, 4),
    "gpt2": ("GPT2Config", _GPT2, 4),
    "gpt_neox": ("GPTNeoXConfig", _OWN_HEADS, 4),
    "falcon": ("FalconConfig", _OWN_HEADS | {"alibi": False, "multi_query": True}, 4),
    "stablelm": ("StableLmConfig", _COMMON, 7),
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of the family, in training mode as built."""
    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(arguments | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # weights as large as a trained model's: layers then change what they pass on
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def tokens(number: int = 8, length: int = 24, seed: int = 0) -> list[torch.Tensor]:
    """Calibration batches of random token ids, two sequences each."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY, (number, length), generator=generator).split(2))


def mixtral(**options: Any) -> Any:
    """A random Mixtral in evaluation mode, with fused experts."""
    torch.manual_seed(0)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**(sizes | heads | options))).eval()


def randomised(model: Any) -> Any:
    """The model in evaluation mode, with matrices as large as a trained model's."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def t5() -> tuple[Any, list[dict[str, torch.Tensor]], int]:
    """An encoder-decoder, batches for it, and the number of its matrices."""
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    pairs = zip(tokens(12), tokens(12, length=16, seed=1), strict=True)
    batches = [{"input_ids": source, "decoder_input_ids": target} for source, target in pairs]
    return transformers.T5ForConditionalGeneration(config), batches, 2 * 6 + 2 * 10


def character_tokenizer(bos: bool = False, chat: bool = False) -> Any:
    """One token a printable ASCII character; `<|end|>` is special; optionally BOS in front and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = ["<s>", "<unk>", "<|end|>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({text: index for index, text in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>"
    )
    if chat:
        fast.chat_template = "{% for message in messages %}{{ message['content'] + '<|end|>' }}{% endfor %}"
    return fast


class OneOfTwo(torch.nn.Module):
    """Each sequence goes through one of two experts, by its first hidden state."""

    def __init__(self, *experts: torch.nn.Module) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[:, 0, 0] > 0).tolist()
        return torch.stack([self.experts[number](row) for number, row in zip(chosen, x, strict=True)])


def save_checkpoint(folder: Any, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """A tiny checkpoint on disk with a tokenizer and the companions that must travel along; returns the model."""
    model = tiny_model(family, dtype, **options)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    character_tokenizer(chat=True).save_pretrained(folder)
    (folder / "LICENSE").write_text("the licence\n")
    (folder / "NOTICE").write_text("the notice\n")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: somebody/something\n---\n# theirs\n")
    return model


def save_gguf(
    path: Any,
    layers: int = 2,
    without: str = "",
    parts: int | None = None,
    extra: dict[str, tuple[int, ...]] | None = None,
    scaling: str | None = None,
) -> None:
    """Write a random Llama with the printable ASCII characters as its vocabulary, as a GGUF file in fp32.

    It may lack a tensor, say that it is one of several parts, hold more tensors (shapes by name), or scale its rotary
    positions.
    """
    import numpy as np
    from gguf import GGUFWriter

    characters = ["<s>", "</s>", *map(chr, range(33, 127)), "\u0120", "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(characters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(characters)
    writer.add_token_types([3, 3, *[1] * (len(characters) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if parts is not None:
        writer.add_uint16("split.count", parts)
    if scaling is not None:
        if scaling:
            writer.add_string("llama.rope.scaling.type", scaling)
        writer.add_float32("llama.rope.scaling.factor", 4.0)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(characters), 32), "output": (len(characters), 32), "output_norm": (32,)}
    for block in range(layers):
        shapes |= {
            f"blk.{block}.{name}": shape
            for name, shape in {
                "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
                "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
            }.items()
        }  # fmt: skip
    shapes |= extra or {}
    for name, shape in shapes.items():
        if name == without:
            continue
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) / 6).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
