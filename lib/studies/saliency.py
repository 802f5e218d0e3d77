"""Turns final features of patches into a map of saliency, by the decoder trained with a ViT-S/14.

Axes: B batch, D width.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

EPS = 1e-5  # Of its batch norms.


def saliency(decoder: Mapping[str, Any], features: jax.Array) -> jax.Array:
  """Computes how much each pixel matters, as the decoder was trained to.

  Args:
    decoder: of `load_decoder`.
    features: float[B, rows, columns, D], final features of all patches.

  Returns:
    float32[B, 14 rows, 14 columns], from 0 to 1.
  """
  x = features.astype(jnp.float32)
  for number in (1, 2, 3):
    # A transposed convolution: rows and columns apart by one, and the kernel turned round.
    kernel = jnp.asarray(decoder[f'upconv{number}.weight'])[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((2, 2), (2, 2)), lhs_dilation=(2, 2),
                                     dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    scale = decoder[f'bn{number}.weight'] / np.sqrt(decoder[f'bn{number}.running_var'] + EPS)
    shift = decoder[f'bn{number}.bias'] - decoder[f'bn{number}.running_mean'] * scale
    x = jax.nn.relu((x + decoder[f'upconv{number}.bias'][None, None, None])
                    * scale[None, None, None] + shift[None, None, None])
  weight = jnp.asarray(decoder['final_conv.weight'])[0, :, 0, 0]
  logits = x @ weight + decoder['final_conv.bias'][0]
  rows, columns = (14 * side for side in features.shape[1:3])
  return jax.nn.sigmoid(jax.image.resize(logits, (len(logits), rows, columns), 'bilinear'))


def load_decoder(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the decoder that `python -m tools.real.vit` wrote into a folder."""
  return dict(load_file(folder / 'decoder.safetensors'))
