"""Token merging on the transformers library's DINOv2, asked by tools/peers/tome.py.

Written from Token Merging: Your ViT But Faster (Bolya et al., 2023), Sec. 3, arXiv:2210.09461: in
each layer, between attention and MLP, the r most similar pairs of even and odd tokens by the mean
of their keys over heads become one, weighted by how many patches each stands for; attention counts
a token as often.

Axes: B batch, N tokens, H heads, D width, d features a head.
"""

from __future__ import annotations

import numpy as np
import torch
import transformers
from serving import serve
from torch import Tensor
from torch.nn import functional


def merge(x: Tensor, size: Tensor, owner: Tensor | None, keys: Tensor,
          count: int) -> tuple[Tensor, Tensor, Tensor | None]:
  """Merges pairs of even and odd tokens; the first token takes no part.

  Args:
    x: float[B, N, D].
    size: float[B, N, 1], the patches that each stands for.
    owner: int[B, patches], which token each is part of, or None.
    keys: float[B, N, d].
    count: of pairs, at most half of the tokens.

  Returns:
    The same three, of N - count tokens.
  """
  count = min(count, (x.shape[1] - 1) // 2)
  keys = functional.normalize(keys, dim=2)
  similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
  similarity[:, 0] = -torch.inf
  best, partner = similarity.max(dim=2)
  ranked = best.argsort(dim=1, descending=True)
  leaving, staying = ranked[:, :count], ranked[:, count:].sort(dim=1).values
  sums = torch.cat([x * size, size], dim=2)

  def picked(index: Tensor) -> Tensor:
    return sums[:, ::2].gather(1, index[..., None].expand(-1, -1, sums.shape[2]))

  target = partner.gather(1, leaving)
  odd = sums[:, 1::2].scatter_add(1, target[..., None].expand(-1, -1, sums.shape[2]),
                                  picked(leaving))
  sums = torch.cat([picked(staying), odd], dim=1)
  if owner is not None:
    left = staying.shape[1]
    place = torch.empty(keys.shape[:2], dtype=torch.long)
    place[:, 1::2] = left + torch.arange(odd.shape[1])
    place[:, ::2] = torch.empty_like(ranked).scatter(
        1, staying, torch.arange(left).expand(len(x), -1)).scatter(1, leaving, left + target)
    owner = place.gather(1, owner)
  size = sums[..., -1:]
  return sums[..., :-1] / size, size, owner


class Tower:
  """Holds a vision transformer, and images."""

  def load(self, folder: str, images: str, threads: int) -> None:
    """Loads a checkpoint, and float32[B, height, width, 3], normalised."""
    torch.set_num_threads(threads)
    self.vit = transformers.AutoModel.from_pretrained(folder, attn_implementation='sdpa').eval()
    self.images = torch.from_numpy(np.load(images)).permute(0, 3, 1, 2).contiguous()

  @torch.no_grad()
  def features(self, count: int, out: str) -> None:
    """Writes the [CLS] features of all images, and which token owns each patch in the end."""
    if count:
      x, owner = self._merged(self.images, count, owned=True)
      np.savez(out, features=x[:, 0].numpy(), owner=owner.numpy())
    else:
      np.savez(out, features=self.vit(self.images).pooler_output.numpy())

  @torch.no_grad()
  def run(self, count: int, batch: int) -> None:
    """Runs the first images."""
    images = self.images[:batch]
    if count:
      self._merged(images, count)
    else:
      self.vit(images)

  def _merged(self, images: Tensor, count: int, *,
              owned: bool = False) -> tuple[Tensor, Tensor | None]:
    x = self.vit.embeddings(images)
    size = torch.ones(*x.shape[:2], 1)
    owner = torch.arange(x.shape[1]).expand(len(x), -1) if owned else None
    for layer in self.vit.encoder.layer:
      hidden, own = layer.norm1(x), layer.attention.attention
      q, k, v = (product(hidden).unflatten(2, (own.num_attention_heads, -1)).transpose(1, 2)
                 for product in (own.query, own.key, own.value))
      mixed = functional.scaled_dot_product_attention(
          q, k, v, attn_mask=size.log().transpose(1, 2)[:, None])
      x = x + layer.layer_scale1(layer.attention.output.dense(mixed.transpose(1, 2).flatten(2)))
      x, size, owner = merge(x, size, owner, k.mean(dim=1), count)
      x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
    return self.vit.layernorm(x), owner


if __name__ == '__main__':
  tower = Tower()
  serve({'transformers': transformers.__version__, 'torch': torch.__version__},
        {name: getattr(tower, name) for name in ('load', 'features', 'run')})
