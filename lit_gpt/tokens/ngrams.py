"""Unigram and bigram losses of a corpus: what a language model must beat to have learned anything."""

import numpy as np

from lit_gpt.tokens.corpus import Corpus

DISCOUNTS = (1, 4, 16, 64, 256, 1024)


def ngram_losses(train: Corpus, validation: Corpus, num_tokens: int) -> tuple[float, float]:
    """Cross entropy, in nats per token, of unigram and bigram counts of `train` on the first num_tokens targets of
    `validation`.

    The bigram backs off to the unigram, p(b | a) = (count(a, b) + d p(b)) / (count(a) + d), with the d of DISCOUNTS
    that is best on the validation tokens themselves: the baseline gets the benefit of the doubt. Every training token
    is counted.

    Needs memory for the training tokens and vocab_size^2 counts: meant for small corpora and vocabularies.
    """
    size = train.vocab_size
    seen = train.read(0, train.num_tokens)
    held_out = validation.read(0, num_tokens + 1)
    context, target = held_out[:-1], held_out[1:]

    counts = np.bincount(seen, minlength=size) + 1.0  # one more for each, so that none is impossible
    unigram = counts / counts.sum()
    pairs, pair_counts = np.unique(seen[:-1] * size + seen[1:], return_counts=True)
    held_out_pairs = context * size + target
    place = np.searchsorted(pairs, held_out_pairs).clip(max=len(pairs) - 1)
    together = np.where(pairs[place] == held_out_pairs, pair_counts[place], 0)
    alone = np.bincount(seen[:-1], minlength=size)[context]

    bigram = min(float(-np.log((together + d * unigram[target]) / (alone + d)).mean()) for d in DISCOUNTS)
    return float(-np.log(unigram[target]).mean()), bigram
