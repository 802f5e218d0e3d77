"""A small ViT on scikit-learn's handwritten digits (1,797 real 8 x 8 images), on a laptop.

  python -m train --config=configs/digits.py --workdir=runs/digits
  python -m train --config=configs/digits.py --workdir=runs/tome \\
      --config.reduce.vision.method=tome --config.reduce.vision.remove=8
  python -m train --config=configs/digits.py --workdir=runs/evit \\
      --config.reduce.vision.method=evit --config.reduce.vision.layers='(1, 2)' \\
      --config.reduce.vision.keep_ratio=0.7 --config.anneal.start_step=60 \\
      --config.anneal.stop_step=300 --config.anneal.phases=4
  python -m train --config=configs/digits.py --workdir=runs/dropped \\
      --config.model.training_patches=32
"""

import ml_collections

from configs.parts import VIT_SHARDING, data, image_model, mesh, reduction


def get_config() -> ml_collections.ConfigDict:
  """Depth 6, width 96, 64 patches and [CLS]."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 400
  config.log_steps = 20
  config.eval_steps = 100
  config.checkpoint_steps = 100
  config.start = ''  # The workdir of a run to take parameters from.

  config.data = data(
      name='digits', data_dir='data', image_size=32, channels=1, batch_size=64,
      train_split='train', test_split='test', mean=(0.5,), std=(0.5,),
      augment=dict(method='affine', shift=0.08, degrees=10.0, scale=(0.9, 1.1)),
  )
  config.model = image_model(
      'Ti/4', width=96, depth=6, heads=3, mlp=192, image_size=32, channels=1,
      num_classes=10, positions='sincos', dropout=0.0, dtype='float32', remat='none',
      training_patches=0,
  )
  config.reduce = dict(vision=reduction())

  config.optimizer = dict(
      peak_lr=2e-3, warmup_steps=60, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1,
      ema_decay=0.98, accumulate=1,
      # The workdir of a trained, unreduced model to hold a reduced one to; empty for none.
      distill=dict(teacher='', logit_weight=0.5, token_weight=0.5),
      # How many plans that remove less a second one is drawn from in each step, 0 for none.
      consistency=dict(levels=0, weight=3.0),
  )
  # From no reduction at start_step to all of it at stop_step, in so many phases; 0 for at once.
  config.anneal = dict(start_step=0, stop_step=0, phases=0)
  config.mesh = mesh()
  config.sharding = VIT_SHARDING
  return config
