"""ARank: how many directions an attention map has, by which layers are chosen for routing.

Axes: B batch, N slots, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def attention_rank(attention: Array) -> Array:
  """Returns the rank of attention maps without their diagonals, a mean over heads, float32[B].

  γ-MoD (Luo et al., 2024), Sec. 3.2, arXiv:2410.13859, as released. A low rank says that a layer
  adds little to what its tokens know of each other.

  Args:
    attention: float[B, H, N, N], zero where a token does not see another.
  """
  off_diagonal = 1 - jnp.eye(attention.shape[-1])
  ranks = jnp.linalg.matrix_rank(attention.astype(jnp.float32) * off_diagonal[None, None])
  return jnp.mean(ranks.astype(jnp.float32), axis=1)


def lowest_ranks(ranks: Sequence[float] | np.ndarray, count: int, *,
                 never: Collection[int] = ()) -> tuple[int, ...]:
  """Returns the layers of the lowest ranks, in order; of equals the first.

  Args:
    ranks: [L], `attention_rank` of each layer, a mean over samples.
    count: layers to name.
    never: layers that are not named.

  Raises:
    ValueError: fewer layers than `count`.
  """
  layers = [layer for layer in np.argsort(np.asarray(ranks), kind='stable').tolist()
            if layer not in never]
  if len(layers) < count:
    raise ValueError(f'{count} layers of the lowest rank are too many: {len(layers)} may be named')
  return tuple(sorted(layers[:count]))
