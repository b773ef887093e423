"""Tokenizers small enough to be read: one token a byte, and a few special ones."""

END, USER = 0, 1


def tokenizer(*special):
    """A `tokenizers.Tokenizer` of special tokens, by default two, and 256 bytes."""
    import tokenizers

    special = list(special or ("<|end|>", "<|user|>"))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(special)
    return made


def bert():
    """As BERT's, which marks the second text of a pair; it pads with token 0."""
    import tokenizers

    made = tokenizer("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made


def roberta():
    """As RoBERTa's, which puts two tokens between the texts of a pair; it pads with token 1."""
    import tokenizers

    made = tokenizer("<s>", "<pad>", "</s>", "<unk>")
    made.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return made
