"""EViT on a DeiT-S/16 trained with it, 90 % of the tokens kept in layers 3, 6 and 9.

  python -m tools.reproduce --config=configs/reproduce/evit_deit_s16_k90.py

Cost: not measured here; 50,000 images.
Published: 79.8 % at 4.0 GMACs. EViT, README (arXiv:2202.07800).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='evit', keep_ratio=0.9, layers=(3, 6, 9)),
      weights='deit_s16_evit_k90.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=79.8, gmacs=4.0,
                    source='EViT, README (arXiv:2202.07800)'))
