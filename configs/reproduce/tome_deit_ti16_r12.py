"""ToMe on a DeiT-Ti/16 trained with it, 12 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_deit_ti16_r12.py

Cost: not measured here; 50,000 images.
Published: 71.4 % at 0.8 GMACs. ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-
faster.
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_ti16', dict(method='tome', remove=12), weights='deit_ti16_tome_r12.safetensors',
      made_by='DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=71.4, gmacs=0.8,
                    source='ToMe on DeiT, '
                           'paperswithcode.com/paper/token-merging-your-vit-but-faster'))
