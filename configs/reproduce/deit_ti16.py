"""DeiT-Ti/16 without reduction.

  python -m tools.reproduce --config=configs/reproduce/deit_ti16.py

Cost: not measured here; 50,000 images.
Published: 72.2 % at 1.26 GMACs. MCTF, README (arXiv:2403.10030).
"""

import ml_collections

from configs.common import reproduction


def get_config() -> ml_collections.ConfigDict:
  """The model, its weights, and what was published."""
  return reproduction(
      'deit_ti16', weights='deit_ti16.safetensors',
      made_by='timm/deit_tiny_patch16_224.fb_in1k on the hub: its model.safetensors',
      expected=dict(top1=72.2, gmacs=1.26, convention='fvcore',
                    source='MCTF, README (arXiv:2403.10030)'))
