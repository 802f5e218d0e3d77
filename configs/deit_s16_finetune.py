"""Trains a pretrained DeiT-S/16 further under a reduction, on any set of image classes.

  python -m tools.prepare --name=imagenet2012
  python -m train --config=configs/deit_s16_finetune.py --workdir=runs/deit_s16_tome \\
      --config.model.weights=path/to/folder

For a set of other classes the head starts anew:

  python -m train --config=configs/deit_s16_finetune.py --workdir=runs/cifar \\
      --config.data.name=cifar10 --config.data.test_split=test --config.model.num_classes=10 \\
      --config.model.fresh="('head',)"

Cost: not measured here; 30 epochs of ImageNet-1k. Expected: not measured here; ToMe
(arXiv:2210.09461) prints 79.4 % for a DeiT-S trained with 13 tokens fewer in every layer.
"""

import ml_collections

from configs.parts import VIT_SHARDING, data, image_model, mesh, reduction


def get_config() -> ml_collections.ConfigDict:
  """The released weights, ToMe in every layer, and a short training at a low learning rate."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.total_steps = 37_500
  config.log_steps = 100
  config.eval_steps = 1250
  config.checkpoint_steps = 1250
  config.start = ''  # The workdir of a run to take parameters from.

  config.data = data(
      name='imagenet2012', image_size=224, channels=3, batch_size=1024, train_split='train',
      test_split='validation', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
      test_crop=0.875, filter='bicubic', augment=dict(method='crop'), threads=16)
  config.model = image_model(
      'deit_s16', image_size=224, num_classes=1000, dtype='bfloat16', remat='none', dropout=0.0,
      weights='timm/deit_small_patch16_224.fb_in1k')
  config.reduce = dict(vision=reduction('tome', remove=13))

  config.optimizer = dict(
      peak_lr=1e-4, warmup_steps=1250, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1,
      ema_decay=0.999, accumulate=1,
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
