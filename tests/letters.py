"""A tokenizer small enough to be read: one token a byte, and two special ones."""

END, USER = 0, 1


def tokenizer():
    """A `tokenizers.Tokenizer` of `<|end|>`, `<|user|>` and 256 bytes."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "<|user|>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|end|>", "<|user|>"])
    return made
