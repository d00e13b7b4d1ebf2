"""What a method computes, counted beforehand: what the time and memory it takes are told from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arithmetic:
    """Of a method on some calibration tokens.

    Args:
        float64: operations of its closed forms, in float64.
        products: operations of its sums over tokens, in the precision of matrix products.
        passes: of all calibration tokens through the blocks of the model that it is given.
        heads: the same from the last hidden states to logits.
        streams: models whose hidden states, and sums over them, it holds beside one another.
    """

    float64: float = 0.0
    products: float = 0.0
    passes: float = 0.0
    heads: float = 0.0
    streams: int = 0

    def __add__(self, other: "Arithmetic") -> "Arithmetic":
        """That of one after the other."""
        return Arithmetic(
            self.float64 + other.float64,
            self.products + other.products,
            self.passes + other.passes,
            self.heads + other.heads,
            max(self.streams, other.streams),
        )
