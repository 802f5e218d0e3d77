"""ToMe on a DeiT-S/16 trained with it, 13 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_deit_s16_r13.py

Cost: not measured here; 50,000 images.
Published: 79.36 % of 79.8 % at 2.7 GMACs, 930 to 1550 images a second. ToMe, README, V100
(arXiv:2210.09461); GMACs: ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-faster.
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', dict(method='tome', remove=13), weights='deit_s16_tome_r13.safetensors',
      made_by='DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=79.36, gmacs=2.7, unreduced_top1=79.8, images_per_second=(930, 1550),
                    source='ToMe, README, V100 (arXiv:2210.09461); GMACs: ToMe on DeiT, '
                           'paperswithcode.com/paper/token-merging-your-vit-but-faster'))
