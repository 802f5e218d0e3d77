"""ToMe on ViT-L/16 (AugReg) as it is, 7 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_vit_l16_r7.py

Cost: not measured here; 50,000 images.
Published: 84.26 % of 85.82 %, 95 to 167 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import AUGREG_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'L/16', dict(method='tome', remove=7), weights='vit_l16_augreg_224.safetensors',
      pixels=AUGREG_PIXELS,
      made_by='timm/vit_large_patch16_224.augreg_in21k_ft_in1k on the hub: its model.safetensors',
      expected=dict(top1=84.26, unreduced_top1=85.82, images_per_second=(95, 167),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
