"""How many keys a query of attention attends to, on average, from the lengths of the documents in a batch."""

from __future__ import annotations

import dataclasses

import numpy as np

# Keys that a kernel computes in vain for each query whose window begins inside its document: half a tile of 128, which
# the window's edge crosses. What the tile on the diagonal costs is in the ceilings, since every document has one.
EDGE_KEYS = 64


@dataclasses.dataclass(frozen=True)
class Context:
    """The lengths of documents, in tokens, as far as a batch holds them."""

    lengths: np.ndarray

    @classmethod
    def of_starts(cls, starts: np.ndarray) -> Context:
        """From the [B, T] starts of each token's document."""
        firsts = np.flatnonzero(starts == np.arange(starts.shape[1]))
        return cls(np.diff(firsts, append=starts.size).astype(float))

    def times(self, factor: float) -> Context:
        """The same with all lengths multiplied."""
        return Context(self.lengths * factor)

    def keys(self, window: int = 0) -> float:
        """Mean number of keys of a query, itself included; with a window, of itself, so many before it, and the edge.

        A window of 0 is none.
        """
        full = np.minimum(self.lengths, window + 1) if window else self.lengths
        past = self.lengths - full  # queries whose window begins inside the document
        total = full * (full + 1) / 2 + past * (window + 1 + EDGE_KEYS)
        return float(total.sum() / self.lengths.sum())
