"""Names of the files of a checkpoint: what transformers writes, what hubs add, and what secateur adds."""

from __future__ import annotations

METADATA, RECIPE_FILE, REPORT_FILE = "secateur.json", "recipe.yaml", "report.html"
CARD = "README.md"  # of a model

# Nothing else looks for packed files, so they have a name of their kind.
DENSE_STEM, PACKED_STEM = "model", "packed"
DENSE_WEIGHTS, PACKED_WEIGHTS, PICKLED_WEIGHTS = "model.safetensors", "packed.safetensors", "pytorch_model.bin"
DENSE_INDEX, PACKED_INDEX = f"{DENSE_WEIGHTS}.index.json", f"{PACKED_WEIGHTS}.index.json"
INDEX_FILES = (DENSE_INDEX, PACKED_INDEX, f"{PICKLED_WEIGHTS}.index.json")
# Patterns, as `fnmatch` takes them.
WEIGHT_FILES = (
    DENSE_WEIGHTS, "model-?????-of-?????.safetensors", PACKED_WEIGHTS, "packed-?????-of-?????.safetensors",
    PICKLED_WEIGHTS, "pytorch_model-*-of-*.bin",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tiktoken.model",
)  # fmt: skip
CHECKPOINT_FILES = (
    *WEIGHT_FILES, *INDEX_FILES, *TOKENIZER_FILES, "config.json", "generation_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
    "NOTICE.txt", ".gitattributes", CARD, METADATA, RECIPE_FILE, REPORT_FILE,
)  # fmt: skip
