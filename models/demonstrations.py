"""AIM: a demonstration's text, once it has read its image, stands for both.

Axes: B batch, T ids of a row, K demonstrations of a row, S ids of a demonstration, I images of a
row, V most tokens of an image or a demonstration, D width of the language model.
"""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from models.backbones.images import Images
from models.backbones.vlm import VLM
from models.projectors.base import Array, identity
from models.stack import Outputs
from ops.moves.rows import take
from ops.splice import Visual, splice
from ops.tokens import TokenSet
from ops.values import CountOrZero, check_fields


class Demonstrations(struct.PyTreeNode):
  """Holds what a model is shown before it is asked.

  Attributes:
    ids: int[B, K, S], each demonstration's prompt and answer, with a placeholder for its image.
    valid: bool[B, K, S], False for padding; a demonstration of nothing else is none.
    images: of B * K rows, row by row of the batch.
  """

  ids: Array
  valid: Array
  images: Images


class AIM(nn.Module):
  """Shows a model demonstrations as what it makes of their text, and drops their images.

  AIM (Gao et al., 2024), arXiv:2406.07588, after its abstract; no code was released. The frozen
  model reads each demonstration by itself, the features of its text are taken, and one trained
  product makes tokens of them that the model reads in the demonstration's place; so a demonstration
  is as long as its text, and can be kept (`aggregate`) for all prompts that show it. Ours: which
  layers read, that their features are normed as in front of the head, and that the product starts
  as the identity. A reduction in the language model does not act on demonstrations while they are
  read; afterwards they are visual tokens to it, as all that is spliced in.

  Attributes:
    vlm: the model, whose gradient passes through what reads demonstrations not at all.
    layers: of the language model that read a demonstration, the first so many; 0 for all.
  """

  vlm: VLM
  layers: CountOrZero = 0

  def __post_init__(self) -> None:
    check_fields(self)
    lm = self.vlm.lm
    if self.layers > lm.depth:
      raise ValueError(f'layers={self.layers} is more than the {lm.depth} of the language model: '
                       'choose at most these')
    if lm.rope.sections or lm.unmerging != 'none' or lm.mask != 'causal':
      raise ValueError('AIM shows a causal model tokens that have one place each, and this one '
                       f'has mask={lm.mask!r}, unmerging={lm.unmerging!r} and '
                       f'rope.sections={lm.rope.sections}: leave these out')
    super().__post_init__()

  def setup(self) -> None:
    """Makes the product."""
    self.projection = nn.Dense(self.vlm.lm.width, dtype=self.vlm.lm.dtype, kernel_init=identity)

  def __call__(self, ids: Array, valid: Array, images: Images | None,
               shown: Demonstrations) -> tuple[Array, Outputs]:
    """Returns scores of the next token after every token that is left.

    Args:
      ids: int[B, T], with a placeholder for each demonstration, and behind these one an image.
      valid: bool[B, T], False for padding.
      images: of the prompt itself, None for none.
      shown: the demonstrations, in the order of their placeholders.

    Returns:
      As `VLM.__call__`, with 'sequence' alone beside what the language model tells.
    """
    tokens = self.sequence(ids, valid, images, self.aggregate(shown))
    read, out = self.vlm.lm.read(tokens)
    return self.vlm.logits(read.x), out | {'sequence': tokens}

  def aggregate(self, shown: Demonstrations) -> Visual:
    """Returns a token for each id of text of demonstrations, [B, K, S, D]."""
    batch, number = shown.ids.shape[:2]
    ids, valid = (x.reshape(batch * number, -1) for x in (shown.ids, shown.valid))
    tokens, aux = self.vlm.sequence(ids, valid, shown.images)
    x = jax.lax.stop_gradient(self._read(tokens))
    x = take(x, jnp.minimum(aux['slot'], tokens.slots - 1))
    text = valid & (ids != self.vlm.image_token)
    x = jnp.where(text[..., None], self.projection(x), 0)
    return Visual(x.reshape(*shown.ids.shape, -1), text.reshape(shown.ids.shape))

  def sequence(self, ids: Array, valid: Array, images: Images | None, shown: Visual) -> TokenSet:
    """Returns the tokens that the language model reads: arguments as of `__call__`.

    Args:
      ids, valid, images: as there.
      shown: what `aggregate` returned.
    """
    visual = shown
    if images is not None:
      seen, slots, _ = self.vlm.encode_images(images)
      if slots is not None:
        raise ValueError('AIM reads images that have slots of their own, and this model pools '
                         "them: set reduce.projector.across='image'")
      visual = _joined(shown, seen)
    embedded = self.vlm.lm.embed(ids).x
    return splice(embedded, valid, ids == self.vlm.image_token, visual, side=self.vlm.pad_side)[0]

  def _read(self, tokens: TokenSet) -> Array:
    """Returns what the first layers make of sequences, normed: float[B, N, D]."""
    lm = self.vlm.lm
    if self.is_initializing():
      return tokens.x
    params = dict(lm.variables['params'])
    blocks, depth = params['stack']['blocks'], self.layers or lm.depth
    first = (blocks[:depth] if isinstance(blocks, tuple) else
             jax.tree.map(lambda leaf: leaf[:depth], blocks))
    params['stack'] = params['stack'] | {'blocks': first}
    reader = lm.clone(parent=None, name=None, plan=None, cache_plan=None, depth=depth)
    read = reader.apply({'params': params}, tokens, method='read')
    return cast(tuple[TokenSet, Outputs], read)[0].x


def _joined(first: Visual, second: Visual) -> Visual:
  """Puts images behind others, padded to one length."""
  longest = max(first.x.shape[2], second.x.shape[2])

  def padded(visual: Visual) -> tuple[Array, Array]:
    valid = jnp.ones(visual.x.shape[:3], bool) if visual.valid is None else visual.valid
    more = (0, 0), (0, 0), (0, longest - visual.x.shape[2])
    return jnp.pad(visual.x, (*more, (0, 0))), jnp.pad(valid, more)

  x, valid = (jnp.concatenate(parts, axis=1) for parts in zip(
      padded(first), padded(second), strict=True))
  return Visual(x, valid)
