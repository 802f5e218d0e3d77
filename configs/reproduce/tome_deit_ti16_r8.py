"""ToMe on a DeiT-Ti/16 trained with it, 8 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_deit_ti16_r8.py

Cost: not measured here; 50,000 images.
Published: 71.7 % at 0.9 GMACs. ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-
faster.
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_ti16', dict(method='tome', remove=8), weights='deit_ti16_tome_r8.safetensors',
      made_by='DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=71.7, gmacs=0.9,
                    source='ToMe on DeiT, '
                           'paperswithcode.com/paper/token-merging-your-vit-but-faster'))
