"""Clips whose frames are split over the mesh axis `sequence`: what the causal VAE needs of the neighbours.

1 + n frames do not divide, so the first frame stands by itself (spec 3.10):

    Split.first  (sequence x b, 1, h, w, c)   the first frame of each clip, the same in every device's rows
    Split.rest   (sequence x b, t, h, w, c)   row s x b + i: the s-th stretch of t frames of clip i

Stretches are rows of a batch, so whatever treats frames by themselves (activations, convolutions in space, pooling of pairs) is
single-device code, mapped over the two parts. What looks further is here: the two frames before a stretch (`before`), means
over whole clips (`frame_mean`, `clip_mean`), taking clips apart and putting them together (`split`, `join`).

Every device computes the first frame for itself: shard 0 would have to anyway, and the others would wait for it. Their
gradients of it are parts of a sum that is only taken where all sums over rows are, in the weights' gradients: no frame is
ever reduced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cogvideox_jax.parallel.sharding import BATCH, REPLICATED, ambient_axis


class Split(NamedTuple):
    """Frames split over `sequence` (see above). `first` is None in the later chunks of a clip."""

    first: Array | None
    rest: Array


Frames = Array | Split


def _placement(clips: int) -> tuple[P, P]:
    """Of whole clips and of rows. Clips that data x fsdp do not divide are computed by each of them."""
    if clips % (ambient_axis("data") * ambient_axis("fsdp")):
        return REPLICATED, P("sequence")
    return BATCH, P(("sequence", *BATCH[0]))


def divides(num_frames: int, unit: int, *, first: bool = True) -> bool:
    """Whether `split` splits this many frames: each device of `sequence`, if there are several, gets a multiple of `unit`."""
    ways, rest = ambient_axis("sequence"), num_frames - first
    return ways > 1 and rest > 0 and rest % (unit * ways) == 0


def split(x: Float[Array, "b f h w c"], unit: int, *, first: bool = True) -> Frames:
    """Split clips over `sequence`; where they do not divide (an image, say) they stay whole on each of its devices.

    Args:
      x: whole clips, the same on all devices of `sequence`.
      unit: the frames of a stretch must be a multiple of it: 4 for pixels, which are pooled in time twice; 1 for latents.
      first: whether the clips start here; False in their later chunks.
    """
    if not divides(x.shape[1], unit, first=first):
        return x
    whole, rows = _placement(x.shape[0])

    def local(x: Array) -> Split:
        x = jax.lax.pcast(x, "sequence", to="varying")
        length = (x.shape[1] - first) // ambient_axis("sequence")
        start = first + length * jax.lax.axis_index("sequence")
        return Split(x[:, :1] if first else None, jax.lax.dynamic_slice_in_dim(x, start, length, axis=1))

    return jax.shard_map(local, in_specs=whole, out_specs=rows)(x)


def join(x: Frames) -> Float[Array, "b f h w c"]:
    """Whole clips on every device of `sequence` again (all-gather): for results, not for what is computed on."""
    if not isinstance(x, Split):
        return x
    whole, rows = _placement(x.rest.shape[0] // ambient_axis("sequence"))

    def local(x: Split) -> Array:
        rest = jax.lax.all_gather(x.rest, "sequence", axis=1, tiled=True)
        return rest if x.first is None else jnp.concatenate([x.first, rest], axis=1)

    # jax cannot tell that the first frame and what was gathered are the same everywhere
    return jax.shard_map(local, in_specs=rows, out_specs=whole, check_vma=False)(x)


def before(x: Split, past: Float[Array, "rows 2 h w c"] | None) -> tuple[Array, Array]:
    """The two frames before each stretch: the last two of the stretch before it.

    Args:
      past: what the call for the chunk before this one returned; None at the start of clips, where the first frame stands for
        what was before it: it and itself again, of which the second is the first frame.

    Returns: (rows, 2, h, w, c), and the `past` of the next chunk: each row the frames that arrived from the row before it, in a
    ring, so that the rows of shard 0, the only ones that count, hold the last two frames of the chunk.
    """
    ways = ambient_axis("sequence")
    _, rows = _placement(x.rest.shape[0] // ways)
    if past is None:
        assert x.first is not None, "a later chunk needs the past of the one before it"
        past = jnp.repeat(x.first, 2, axis=1)
    ring = [(i, (i + 1) % ways) for i in range(ways)]

    def local(rest: Array, edge: Array) -> tuple[Array, Array]:
        start = jax.lax.axis_index("sequence") == 0
        if rest.shape[1] >= 2:
            came = jax.lax.ppermute(rest[:, -2:], "sequence", ring)
            return jnp.where(start, edge, came), came
        # a stretch of one frame: the one before it comes from the neighbour, and so does the neighbour's own one before
        last = jax.lax.ppermute(rest, "sequence", ring)
        nearest = jnp.where(start, edge[:, 1:], last)
        second = jax.lax.ppermute(nearest, "sequence", ring)
        return jnp.concatenate([jnp.where(start, edge[:, :1], second), nearest], axis=1), jnp.concatenate(
            [second, last], axis=1
        )

    return jax.shard_map(local, in_specs=(rows, rows), out_specs=(rows, rows))(x.rest, past)


def after_first(function: Callable[..., Array], *xs: Frames) -> Frames:
    """`function` of all frames but the first of a clip, which stands for itself (spec 3.4).

    In whole chunks it is known by the odd length of xs[0]. `function` may change the number of frames; of several arguments
    the first gives the first frame.
    """
    if isinstance(xs[0], Split):
        return xs[0]._replace(rest=function(*(x.rest for x in xs)))  # pyright: ignore[reportAttributeAccessIssue]
    if xs[0].shape[1] == 1:
        return xs[0]
    if xs[0].shape[1] % 2 == 0:
        return function(*xs)
    whole = [x for x in xs if not isinstance(x, Split)]
    return jnp.concatenate([whole[0][:, :1], function(*(x[:, 1:] for x in whole))], axis=1)


def frame_mean(function: Callable[..., Array], *xs: Frames) -> Array:
    """Mean over all frames: `function` is a mean over the frames of a part, and a part weighs as many frames as it has."""
    if not isinstance(xs[0], Split):
        return function(*xs)
    parts = list(zip(*(jax.tree.leaves(x) for x in xs), strict=True))  # [first], rest
    counts = [1] * (len(parts) - 1) + [xs[0].rest.shape[1] * ambient_axis("sequence")]
    return sum(function(*part) * (count / sum(counts)) for part, count in zip(parts, counts, strict=True))  # pyright: ignore[reportReturnType]


def clip_mean(function: Callable[..., Array], *xs: Frames) -> Float[Array, "rows ..."]:
    """Mean over all frames of each clip, in each of its rows: `function` maps (rows, t, ...) to means (rows, ...)."""
    means = frame_mean(function, *xs)
    if not isinstance(xs[0], Split):
        return means
    _, rows = _placement(means.shape[0] // ambient_axis("sequence"))

    def local(means: Array) -> Array:
        return jax.lax.pcast(jax.lax.pmean(means, "sequence"), "sequence", to="varying")

    return jax.shard_map(local, in_specs=rows, out_specs=rows)(means)


def draw(function: Callable[[tuple[int, ...]], Any], like: Frames) -> Frames:
    """What `function` draws for the shape of whole clips, split as `like` is: noise does not depend on the mesh."""
    if not isinstance(like, Split):
        return function(like.shape)
    ways = ambient_axis("sequence")
    rows, length, *size = like.rest.shape
    first = like.first is not None
    return split(function((rows // ways, first + length * ways, *size)), 1, first=first)
