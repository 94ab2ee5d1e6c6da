"""Words and characters of any script, as metrics on text count them.

Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are counted by characters, each
with its marks; all others by words, with the vowel signs and marks that belong to their letters.
"""

from __future__ import annotations

import unicodedata

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
CHARACTER = rf"[{UNSPACED}][\p{{M}}\u200c\u200d]*"
WORDS = regex.compile(rf"{CHARACTER}|(?:[\w\p{{M}}\p{{N}}\u200c\u200d](?<![{UNSPACED}]))+")
CHUNKS = regex.compile(rf"{CHARACTER}|(?:[^\s](?<![{UNSPACED}]))+")


def words(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation (what ROUGE compares)."""
    return WORDS.findall(unicodedata.normalize("NFC", text).lower())


def chunks(text: str) -> list[str]:
    """The text between spaces, with punctuation and case (what copying is measured by)."""
    return CHUNKS.findall(unicodedata.normalize("NFC", text))
