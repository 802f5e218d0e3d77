"""ViT-S/16 at 224 pixels with ToMe in every layer, 13 tokens fewer in each: only to be explained.

  python -m tools.explain --config=configs/vit_s16_tome.py
  python -m tools.explain --config=configs/vit_s16_tome.py --config.reduce.vision.remove=8
  python -m tools.explain --config=configs/vit_s16_tome.py \\
      --config.reduce.vision.method=evit --config.reduce.vision.layers='(3, 6, 9)' \\
      --config.reduce.vision.remove=None --config.reduce.vision.keep_ratio=0.7

Cost: seconds on a CPU; nothing runs and no parameters are made.
Expected: 2.703 GMACs of 4.599 (ToMe, arXiv:2210.09461, gives 2.7 and 1.64 times the throughput).
"""

import ml_collections

from configs.parts import image_model, reduction


def get_config() -> ml_collections.ConfigDict:
  """The model and its reduction; no data, so nothing to train or evaluate."""
  config = ml_collections.ConfigDict()
  config.model = image_model('S/16', image_size=224, num_classes=1000, dtype='float32')
  config.reduce = dict(vision=reduction('tome', remove=13))
  return config
