"""ToMe on SWAG's ViT-L/16 at 512 pixels as it is, 40 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_swag_l16_512_r40.py

Cost: not measured here; 50,000 images.
Published: 87.8 % of 88.06 %, 12.8 to 26.3 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import DEIT_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'L/16', dict(method='tome', remove=40), image_size=512, weights='swag_l16_512.safetensors',
      pixels=DEIT_PIXELS | {'test_crop': 1.0},
      made_by='SWAG (arXiv:2201.08371), fine-tuned on ImageNet-1k at 512 pixels, is released as '
              'a pickle: convert it to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=87.8, unreduced_top1=88.06, images_per_second=(12.8, 26.3),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
