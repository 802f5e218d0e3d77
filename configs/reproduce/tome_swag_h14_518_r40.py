"""ToMe on SWAG's ViT-H/14 at 518 pixels as it is, 40 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_swag_h14_518_r40.py

Cost: not measured here; 50,000 images.
Published: 88.25 % of 88.55 %, 4.7 to 9.8 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import DEIT_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'H/14', dict(method='tome', remove=40), image_size=518, weights='swag_h14_518.safetensors',
      pixels=DEIT_PIXELS | {'test_crop': 1.0},
      made_by='SWAG (arXiv:2201.08371), fine-tuned on ImageNet-1k at 518 pixels, is released as '
              'a pickle: convert it to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=88.25, unreduced_top1=88.55, images_per_second=(4.7, 9.8),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
