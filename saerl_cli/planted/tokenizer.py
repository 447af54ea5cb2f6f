"""A word-level tokenizer: every word and every punctuation mark is one token."""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from saerl_cli.planted.language import EOS

PAD, UNKNOWN = "<pad>", "<unk>"
SPECIALS = (PAD, EOS, UNKNOWN)
"""Ids 0, 1, 2. The end token also separates documents and may start one; as with Pythia, nothing is added to a text."""


def build_tokenizer(words: Iterable[str], context_size: int | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words, numbered after `<pad>` 0, `<eos>` 1 and `<unk>` 2 in the given order.

    Decoding writes no space before punctuation. Padding is on the left, as generation needs it.

    Args:
        words: distinct words and punctuation marks.
        context_size: longest sequence the model reads, in tokens.
    """
    ids = {word: index for index, word in enumerate((*SPECIALS, *words))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("’", "'"), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+(?:'\w+)*|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **({"model_max_length": context_size} if context_size else {}),
    )


def frequent_words(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str], limit: int) -> list[str]:
    """The words that occur most often, at most `limit`; among equals in alphabetical order.

    Args:
        tokenizer: any of `build_tokenizer`; it says what a word is.
        documents: texts.
        limit: size of the list.
    """
    backend = tokenizer.backend_tokenizer
    assert backend.normalizer is not None and backend.pre_tokenizer is not None
    counts: Counter[str] = Counter()
    for document in documents:
        pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(document))
        counts.update(word for word, _ in pieces)
    return sorted(sorted(counts), key=lambda word: -counts[word])[:limit]
