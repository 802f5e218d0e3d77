"""ToMe on ViT-S/16 (AugReg) as it is, 13 tokens fewer in every layer.

  python -m tools.reproduce --config=configs/reproduce/tome_vit_s16_r13.py

Cost: not measured here; 50,000 images.
Published: 79.3 % of 81.41 %, 953 to 1564 images a second. ToMe, README, V100 (arXiv:2210.09461).
"""

import ml_collections

from configs.common import AUGREG_PIXELS, reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'S/16', dict(method='tome', remove=13), weights='vit_s16_augreg_224.safetensors',
      pixels=AUGREG_PIXELS,
      made_by='timm/vit_small_patch16_224.augreg_in21k_ft_in1k on the hub: its model.safetensors',
      expected=dict(top1=79.3, unreduced_top1=81.41, images_per_second=(953, 1564),
                    source='ToMe, README, V100 (arXiv:2210.09461)'))
