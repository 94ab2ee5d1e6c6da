"""Text in any form that a user has, to token batches; and the one reader of rows that tasks use too.

From a path to rows of a table (`reading`), from rows to documents and mixtures of them (`documents`), from documents
to rows of tokens and batches (`batches`).
"""

from __future__ import annotations

from layerpeel.data.batches import Rows, cycle_batches, labels_within, load_rows, positions_of
from layerpeel.data.documents import mix_documents, read_documents
from layerpeel.data.reading import column_of, expand, read_rows, text_of

__all__ = [
    "Rows",
    "column_of",
    "cycle_batches",
    "expand",
    "labels_within",
    "load_rows",
    "mix_documents",
    "positions_of",
    "read_documents",
    "read_rows",
    "text_of",
]
