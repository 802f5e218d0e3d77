"""ToMe on a DeiT-S/16 trained with it, 16 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_deit_s16_r16.py

Cost: not measured here; 50,000 images.
Published: 79.1 % at 2.3 GMACs. ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-
faster.
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='tome', remove=16), weights='deit_s16_tome_r16.safetensors',
      made_by='DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=79.1, gmacs=2.3,
                    source='ToMe on DeiT, '
                           'paperswithcode.com/paper/token-merging-your-vit-but-faster'))
