"""EViT on a DeiT-S/16 trained with it, 50 % of the tokens kept in layers 3, 6 and 9.

  python -m tools.reproduce --config=configs/reproduce/evit_deit_s16_k50.py

Cost: not measured here; 50,000 images.
Published: 78.5 % at 2.3 GMACs. EViT, README (arXiv:2202.07800).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='evit', keep_ratio=0.5, layers=(3, 6, 9)),
      weights='deit_s16_evit_k50.safetensors',
      made_by='DeiT fine-tuned with this reduction: train it, or convert the release to '
              'safetensors, in the names of timm, where you trust it',
      expected=dict(top1=78.5, gmacs=2.3,
                    source='EViT, README (arXiv:2202.07800)'))
