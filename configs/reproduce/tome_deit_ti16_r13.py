"""ToMe on a DeiT-Ti/16 trained with it, 13 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_deit_ti16_r13.py

Cost: not measured here; 50,000 images.
Published: 71.27 % of 71.8 %, 2558 to 3980 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_ti16', dict(method='tome', remove=13), weights='deit_ti16_tome_r13.safetensors',
      made_by='DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
              'release to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=71.27, unreduced_top1=71.8, images_per_second=(2558, 3980),
                    source='ToMe, README, V100 (arXiv:2210.09461)',
                    mismatch='ours 1.715 times fewer MACs: of all these models the smallest gains '
                             'least of it'))
