"""What sampled text is like, and signs that it has degenerated: loops, one kind of document, no ends.

Loops are counted as repeated n-grams, after Welleck et al., arXiv 1908.04319 (seq-rep-n).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy

# A document with so many n-grams, or more, loops if less than this share of them is distinct.
NGRAM, LEAST_DISTINCT, LEAST_NGRAMS = 4, 1 / 3, 24
OPENING = 16  # tokens by which documents are called alike


@dataclass(frozen=True)
class TextSigns:
    """Shares of the documents, by what was written after their beginnings.

    Attributes:
        ended: with an end of text; the others were cut at the length.
        empty: with no token but an end of text.
        looping: repeating themselves over and over.
        alike: with the most frequent first `OPENING` tokens, of those that have as many.
    """

    ended: float
    empty: float
    looping: float
    alike: float


def signs_of(documents: Iterable[Sequence[int]], ends: Collection[int]) -> TextSigns:
    """Looks at documents without their beginnings.

    Args:
        ends: tokens that end a text.
    """
    count = ended = empty = looping = 0
    openings: Counter[tuple[int, ...]] = Counter()
    for document in documents:
        count += 1
        has_ended = len(document) > 0 and document[-1] in ends
        tokens = document[:-1] if has_ended else document
        ended += has_ended
        empty += not len(tokens)
        looping += loops(tokens)
        if len(tokens) >= OPENING:
            openings[tuple(tokens[:OPENING])] += 1
    most = max(openings.values(), default=0)
    count = max(count, 1)
    return TextSigns(ended / count, empty / count, looping / count, most / max(openings.total(), 1))


def loops(tokens: Sequence[int]) -> bool:
    """Whether few of a document's n-grams are distinct; short ones are not judged."""
    count = len(tokens) - NGRAM + 1
    if count < LEAST_NGRAMS:
        return False
    ngrams = numpy.lib.stride_tricks.sliding_window_view(numpy.asarray(tokens), NGRAM)
    return len(numpy.unique(ngrams, axis=0)) < LEAST_DISTINCT * count
