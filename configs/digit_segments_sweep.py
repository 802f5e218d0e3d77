"""Methods at three budgets on the digit segmentation model: mIoU, tokens, cost, latency, pictures.

  python -m eval --config=configs/digit_segments_sweep.py --workdir=runs/segments

Budgets are shares of the unreduced backbone's MACs, so that methods, and the baselines random,
stride and pool, are compared at equal cost. --config.task.fill=bypass (or interpolate) brings
dropped patches back another way, with the same weights.
"""

import ml_collections

from configs import digit_segments


def get_config() -> ml_collections.ConfigDict:
  """The segmentation config with a sweep beside it."""
  config = digit_segments.get_config()
  config.data.batch_size = 50
  config.sweep = dict(
      title='Digits on a canvas, ViT of depth 5: cuts in layers 1 to 3',
      methods=('random', 'stride', 'pool', 'topk', 'evit', 'ats', 'tome', 'pitome', 'dpcknn'),
      budget='flops_ratio', budgets=(0.75, 0.6, 0.45), layers=(1, 2, 3), overrides=dict(),
      rounds=10, baselines=('random', 'stride', 'pool'),
      pictured=('random', 'topk', 'tome', 'dpcknn'), pictured_images=4,
  )
  return config
