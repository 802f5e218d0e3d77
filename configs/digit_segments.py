"""A small ViT that tells the digit of every pixel, on canvases of real handwritten digits.

  python -m train --config=configs/digit_segments.py --workdir=runs/segments
  python -m train --config=configs/digit_segments.py --workdir=runs/segments_tome \\
      --config.reduce.vision.method=tome --config.reduce.vision.layers='(1, 2, 3)' \\
      --config.reduce.vision.flops_ratio=0.6
"""

import ml_collections

from configs.parts import VIT_SHARDING, data, image_model, mesh, reduction


def get_config() -> ml_collections.ConfigDict:
  """Depth 5, width 96, 100 patches and [CLS], a prediction a pixel."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 1500
  config.log_steps = 20
  config.eval_steps = 300
  config.checkpoint_steps = 300
  config.start = ''  # The workdir of a run to take parameters from.

  config.data = data(
      name='digit_segments', data_dir='data', image_size=40, channels=1, batch_size=32,
      train_split='train', test_split='test', mean=(0.5,), std=(0.5,),
      augment=dict(method='none'),
  )
  config.model = image_model(
      'Ti/4', width=96, depth=5, heads=3, mlp=192, image_size=40, channels=1,
      num_classes=0, positions='sincos', dropout=0.1, dtype='float32', remat='none',
  )
  config.task = dict(name='segment', pixel_classes=11, fill='restore', decoder='linear', cells=4)
  config.reduce = dict(vision=reduction())

  config.optimizer = dict(
      peak_lr=3e-3, warmup_steps=60, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.0,
      ema_decay=0.98, accumulate=1,
      # The workdir of a trained, unreduced model to hold a reduced one to; empty for none.
      distill=dict(teacher='', logit_weight=0.5, token_weight=0.5),
      # How many plans that remove less a second one is drawn from in each step, 0 for none.
      consistency=dict(levels=0, weight=3.0),
  )
  # From no reduction at start_step to all of it at stop_step, in so many phases; 0 for at once.
  config.anneal = dict(start_step=0, stop_step=0, phases=0)
  config.mesh = mesh()
  config.sharding = (*VIT_SHARDING, (r'(^|/)(pixels|conv)/(kernel|bias)$', ()))
  return config
