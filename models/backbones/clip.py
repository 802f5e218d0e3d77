"""Image and text towers side by side: zero-shot classification by CLIP and SigLIP.

Axes: I images, K texts (classes), T tokens of a text, P features that both towers end with.
"""

from __future__ import annotations

from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.backbones.text_tower import Text
from models.backbones.vit import ViT, make_vit
from models.families import PAIRS, Settings
from models.stack import Outputs
from ops import choices
from ops.primitives.match import l2_normalize

Array = jax.Array


class Clip(nn.Module):
  """Two towers, and how alike an image and a text are.

  CLIP (Radford et al., 2021), Fig. 3, arXiv:2103.00020; with a bias SigLIP (Zhai et al., 2023),
  Alg. 1, arXiv:2303.15343. Either tower may be reduced: `clip.clone(image=vit.clone(plan=...))`.

  Attributes:
    image: a ViT without classes.
    text: a Text that ends with as many features.
    bias: whether a learned number is added to all logits (SigLIP).
  """

  image: ViT
  text: Text
  bias: bool = False

  def setup(self) -> None:
    """Initializes the scale and bias that turn cosines into logits, as in released training."""
    start, shift = (jnp.log(10.0), -10.0) if self.bias else (jnp.log(1 / 0.07), 0.0)
    self.logit_scale = self.param('logit_scale', nn.initializers.constant(start), ())
    if self.bias:
      self.logit_bias = self.param('logit_bias', nn.initializers.constant(shift), ())

  def __call__(self, images: Array, ids: Array) -> tuple[Array, Outputs]:
    """Scores every image with every text.

    Args:
      images: float[I, S, S, C], normalised.
      ids: int32[K, T].

    Returns:
      Logits float32[I, K], and a dict: 'image', 'text' (what each tower returns beside), and
      'image_features' float32[I, P], 'text_features' float32[K, P], of unit length.
    """
    image, image_out = cast(tuple[Array, Outputs], self.image(images))
    text, text_out = self.text(ids)
    image, text = l2_normalize(image), l2_normalize(text)
    return self._logits(image, text), {'image': image_out, 'text': text_out,
                                       'image_features': image, 'text_features': text}

  def encode_image(self, images: Array) -> Array:
    """float32[I, P], of unit length."""
    return l2_normalize(cast(Array, self.image(images)[0]))

  def encode_text(self, ids: Array) -> Array:
    """float32[K, P], of unit length."""
    return l2_normalize(self.text(ids)[0])

  def classify(self, images: Array, texts: Array) -> Array:
    """Logits float32[I, K] against texts float32[K, P] that `encode_text` made before."""
    return self._logits(self.encode_image(images), texts)

  def _logits(self, image: Array, text: Array) -> Array:
    cosine = jnp.einsum('ip,kp->ik', image, text, precision='highest')
    logits = cosine * jnp.exp(self.logit_scale)
    return logits + self.logit_bias if self.bias else logits


def make_clip(variant: str, *, image: Settings | None = None,
              text: Settings | None = None) -> Clip:
  """A pair of towers by name, as 'clip_b32' or 'siglip_b16_224' (models/families.py).

  Args:
    variant: the name.
    image, text: fields of ViT and Text that differ.

  Raises:
    ValueError: for an unknown name.
  """
  choices.check('pair ', variant, PAIRS)
  pair = PAIRS[variant]
  return Clip(make_vit(variant, **(image or {})), Text(**(pair['text'] | (text or {}))),
              pair['bias'])
