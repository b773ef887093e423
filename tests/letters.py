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


def sentence_pieces(before):
    """As Llama 2's, of a few letters; `before` is what puts a space before a text.

    That is the normalizer `'prepend'` of Llama 2's and Mistral's `tokenizer.json`, or one of the
    pre-tokenizer's schemes, `'first'` and `'always'`.
    """
    import tokenizers

    words = ["▁Paris", "▁to", "Paris", "to", ":)", "▁▁"]
    parts = [(word[:cut], word[cut]) for word in words for cut in range(1, len(word))]
    letters = sorted(set("▁\n:)?[]</>aioprstP"))
    tokens = ["<unk>", "<s>", "</s>", *letters, *(left + right for left, right in parts)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, list(dict.fromkeys(parts)), unk_token="<unk>")
    )
    if before == "prepend":
        steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        made.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            "▁", prepend_scheme=before, split=False
        )
    after = tokenizers.decoders
    made.decoder = after.Sequence([after.Replace("▁", " "), after.Fuse(), after.Strip(" ", 1, 0)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made
