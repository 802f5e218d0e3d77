"""EViT without its fused token on DeiT-S/16, 80 % kept in layers 3, 6 and 9.

  python -m tools.reproduce --config=configs/reproduce/evit_unfused_deit_s16_k80.py

Cost: not measured here; 50,000 images.
Published: 79.7 % at 3.5 GMACs. EViT, README (arXiv:2202.07800).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='topk', keep_ratio=0.8, layers=(3, 6, 9)),
      weights='deit_s16_evit_unfused_k80.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=79.7, gmacs=3.5,
                    source='EViT, README (arXiv:2202.07800)',
                    mismatch='ours 3.444 GMACs: printed for the variant with a fused token, 3.477'))
