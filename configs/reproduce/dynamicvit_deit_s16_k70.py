"""DynamicViT on DeiT-S/16, 70 % of the tokens kept before layers 3, 6 and 9.

  python -m tools.reproduce --config=configs/reproduce/dynamicvit_deit_s16_k70.py

Cost: not measured here; 50,000 images.
Published: 79.32 % at 2.9 GMACs. DynamicViT, README (arXiv:2106.02034).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='dynamicvit', keep_ratio=0.7, ratio_of='start', rounding='floor',
                       layers=(3, 6, 9)),
      weights='deit_s16_dynamicvit_k70.safetensors',
      made_by='DynamicViT has predictors of its own, in a pickle as released: their names are '
              'not read here',
      expected=dict(top1=79.32, gmacs=2.9,
                    source='DynamicViT, README (arXiv:2106.02034)'))
