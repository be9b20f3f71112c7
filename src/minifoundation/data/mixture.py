"""Which source a sample of a mixture comes from: a closed form, so that the place in the data stays one integer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Fork:
    """Samples that are shared between two halves of the sources: ``share`` of them go left."""

    share: Fraction
    left: _Fork | int
    right: _Fork | int

    def lefts(self, samples: int) -> int:
        """Return how many of the first ``samples`` go left: their exact share, rounded to the nearest."""
        above, below = self.share.numerator, self.share.denominator
        return (2 * above * samples + below) // (2 * below)


class Mixture:
    """Samples dealt out to sources in proportion to their weights.

    The sources are halved again and again; at each fork the number of samples gone left is the rounded share of those that came. So
    every source gets its samples in order, none is left out or given twice, and of the first n samples a source with share w has
    w n to within half a sample for each fork above it: ceil(log2(sources)) / 2 at most, however large n is.

    Args:
        weights: one for each source, above 0; their sum does not matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]  # the number as it is written: 0.8 is 4/5
        self.shares = [weight / sum(exact) for weight in exact]
        self._root = self._tree(0, len(exact))

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first ``samples`` each source has."""
        found: list[int] = []

        def deal(node: _Fork | int, here: int) -> None:
            if isinstance(node, int):
                found.append(here)
            else:
                lefts = node.lefts(here)
                deal(node.left, lefts)
                deal(node.right, here - lefts)

        deal(self._root, samples)
        return found

    def place(self, sample: int) -> tuple[int, int]:
        """Return the source of a sample (its index in ``weights``) and the number of the sample within that source."""
        node, number = self._root, sample
        while not isinstance(node, int):
            lefts = node.lefts(number)
            node, number = (node.left, lefts) if node.lefts(number + 1) > lefts else (node.right, number - lefts)
        return node, number

    def _tree(self, first: int, end: int) -> _Fork | int:
        if end - first == 1:
            return first
        middle = (first + end) // 2
        share = sum(self.shares[first:middle], Fraction(0)) / sum(self.shares[first:end], Fraction(0))
        return _Fork(share, self._tree(first, middle), self._tree(middle, end))
