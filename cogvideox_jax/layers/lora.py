"""A linear layer that takes a low-rank addition when one is given (LoRA; spec 4.9)."""

from flax import linen as nn
from jaxtyping import Array, Float


class LoraDense(nn.Dense):
    """nn.Dense, with its parameters; where the collection "lora" holds `a` and `b` at its path, y = x W + bias + (x a) b.

    a is (in, rank), b (rank, out), already scaled (models.lora.scaled). They are inputs: `init` makes none of them.
    """

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = super().__call__(x)
        a, b = self.get_variable("lora", "a"), self.get_variable("lora", "b")
        if a is None and b is None:
            return y
        shapes = [None if part is None else part.shape for part in (a, b)]
        if None in shapes or len(a.shape) != 2 or b.shape != (a.shape[1], y.shape[-1]) or a.shape[0] != x.shape[-1]:
            raise ValueError(
                f"the LoRA of {'/'.join(self.path)} has a {shapes[0]} and b {shapes[1]}, "
                f"expected ({x.shape[-1]}, rank) and (rank, {y.shape[-1]})"
            )
        x, a, b = nn.dtypes.promote_dtype(x, a, b, dtype=self.dtype)
        return y + (x @ a) @ b
