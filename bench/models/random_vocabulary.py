"""A made-up SentencePiece-style vocabulary, so that a random model can be served as text."""

from gguf import GGUFWriter, TokenType

SPECIAL = (("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL))
BYTES = tuple((f"<0x{byte:02X}>", TokenType.BYTE) for byte in range(256))


def add_random_vocabulary(writer: GGUFWriter, n_vocab: int) -> None:
    """Adds `n_vocab` tokens: three special ones, the 256 bytes, and numbered words."""
    words = ((f"▁w{number}", TokenType.NORMAL) for number in range(n_vocab - len(SPECIAL) - len(BYTES)))
    tokens, types = zip(*SPECIAL, *BYTES, *words, strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
