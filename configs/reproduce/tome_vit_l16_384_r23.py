"""ToMe on ViT-L/16 (AugReg) at 384 pixels as it is, 23 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_vit_l16_384_r23.py

Cost: not measured here; 50,000 images.
Published: 86.14 % of 86.92 %, 28 to 56 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import AUGREG_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'L/16', dict(method='tome', remove=23),
      image_size=384, weights='vit_l16_augreg_384.safetensors',
      pixels=AUGREG_PIXELS | {'test_crop': 1.0},
      made_by='timm/vit_large_patch16_384.augreg_in21k_ft_in1k on the hub: its model.safetensors',
      expected=dict(top1=86.14, unreduced_top1=86.92, images_per_second=(28, 56),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
