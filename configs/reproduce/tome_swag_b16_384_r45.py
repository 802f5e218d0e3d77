"""ToMe on SWAG's ViT-B/16 at 384 pixels as it is, 45 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_swag_b16_384_r45.py

Cost: not measured here; 50,000 images.
Published: 84.59 % of 85.3 %, 85.7 to 167.7 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import DEIT_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'B/16', dict(method='tome', remove=45), image_size=384, weights='swag_b16_384.safetensors',
      pixels=DEIT_PIXELS | {'test_crop': 1.0},
      made_by='SWAG (arXiv:2201.08371), fine-tuned on ImageNet-1k at 384 pixels, is released as '
              'a pickle: convert it to safetensors, in the names of timm, where you trust it',
      expected=dict(top1=84.59, unreduced_top1=85.3, images_per_second=(85.7, 167.7),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
