"""DeiT-S/16 without reduction.

  python -m tools.reproduce --config=configs/reproduce/deit_s16.py

Cost: not measured here; 50,000 images.
Published: 79.8 % at 4.61 GMACs. MCTF, README (arXiv:2403.10030).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_s16', weights='deit_s16.safetensors',
      made_by='timm/deit_small_patch16_224.fb_in1k on the hub: its model.safetensors',
      expected=dict(top1=79.8, gmacs=4.61, convention='fvcore',
                    source='MCTF, README (arXiv:2403.10030)'))
