"""GGUF keys of the tokenizer and of our own provenance; those of sizes are in `model.spec`."""

TOKENIZER_MODEL = "tokenizer.ggml.model"
TOKENIZER_PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
SCORES = "tokenizer.ggml.scores"
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
CHAT_TEMPLATE = "tokenizer.chat_template"
SENTENCEPIECE, BYTE_LEVEL, BYTE_FALLBACK = "llama", "gpt2", "gemma4"
"""The values of TOKENIZER_MODEL that this program knows."""

PREFIX_AFTER_SPECIAL = "slimoe.tokenizer.prefix_after_special"
"""False: the space prefix stands only at the start of a text, not after each special token. Absent: True."""
PREFIX_BEFORE_SPACE = "slimoe.tokenizer.prefix_before_space"
"""False: a text that begins with a space gets no further one as its prefix. Absent: True."""
NORMALIZER = "slimoe.tokenizer.normalizer"
"""With "nfc" a text is brought to Unicode's normal form C before it is split, which llama.cpp never does."""
END_TOKEN_IDS = "slimoe.tokenizer.end_token_ids"
"""i32: tokens that end an answer besides eos, eot and eom, of which llama.cpp knows only one each."""
OF_THE_TOKENIZER = (PREFIX_AFTER_SPECIAL, PREFIX_BEFORE_SPACE, NORMALIZER, END_TOKEN_IDS)
"""Our own keys of the tokenizer, which go where it goes."""

SLIMOE_VERSION = "slimoe.version"
RECIPE = "slimoe.recipe"
SOURCE_HASH = "slimoe.source.sha256"
"""What tells the converted model apart: sha256 of config.json, of the headers of its safetensors files (or of its GGUF
files alone), in name order, and of the first 4096 bytes of every tensor."""
SOURCE_BLOCKS = "slimoe.source.blocks"
"""i32: for each block the one of that model which it was made of; absent if it is the one of the same number."""
SPECIALISED = "slimoe.specialised"
"""The texts for whose task experts were merged, as JSON: by a text's name its `tokens` and `sha256`, the last one last.
What they do not use is lost."""
CALIBRATION_HASH = "slimoe.calibration.sha256"
CALIBRATION_TOKENS = "slimoe.calibration.tokens"
"""The text on which a converter measured: sha256 of its bytes, and how many tokens of it were read."""
IMATRIX_FILE = "quantize.imatrix.file"
IMATRIX_DATASET = "quantize.imatrix.dataset"
IMATRIX_ENTRIES = "quantize.imatrix.entries_count"
IMATRIX_CHUNKS = "quantize.imatrix.chunks_count"
"""The importance matrix that weights were fitted to, under llama.cpp's own keys: its file's name, the texts that it is
from, how many tensors it knows, and from how many chunks of text."""
RESERVED = "slimoe.reserved"
"""Spaces, in place of which keys are written that are known only once the file is there, such as its quality."""
QUALITY = "slimoe.quality"
"""What the file was measured to have lost against its source, as JSON."""
HEALED = "slimoe.healed"
"""What healing reached, as JSON: the KL divergence on held-out calibration text before and after it, or would have."""
IMATRIX = (IMATRIX_FILE, IMATRIX_DATASET, IMATRIX_ENTRIES, IMATRIX_CHUNKS)
PROVENANCE = (SLIMOE_VERSION, RECIPE, SOURCE_HASH, SOURCE_BLOCKS, CALIBRATION_HASH, CALIBRATION_TOKENS, *IMATRIX)
"""The keys that say where a file is from; those of tasks go on to what is made of it."""
CARRIED = (CALIBRATION_HASH, CALIBRATION_TOKENS, SPECIALISED)
"""The keys of what a model was measured on and made for, which a source hands on."""


def token_id_key(role: str) -> str:
    """The key of a special token's id; roles are bos, eos, eot, eom, unknown, padding."""
    return f"tokenizer.ggml.{role}_token_id"
