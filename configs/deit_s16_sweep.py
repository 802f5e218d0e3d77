"""Every method on a pretrained DeiT-S/16 as it is: ImageNet-1k, no training.

  python -m tools.prepare --name=imagenet2012
  python -m eval --config=configs/deit_s16_sweep.py --workdir=runs/deit_s16
  python -m eval --config=configs/deit_s16_sweep.py --workdir=runs/mine \\
      --config.model.weights=path/to/folder

Cost: not measured here; 50,000 images a method and budget.
Expected: 79.8 % without reduction, as published (DeiT, arXiv:2012.12877).
"""

import ml_collections

from configs.parts import VIT_SHARDING, data, image_model, mesh, reduction


def get_config() -> ml_collections.ConfigDict:
  """The released weights from the hub, its preprocessing, and a sweep of budgets."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = data(
      name='imagenet2012', data_dir='', image_size=224, channels=3, batch_size=64,
      train_split='train', test_split='validation', mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225), test_crop=0.875, filter='bicubic',
  )
  config.model = image_model('deit_s16', dtype='float32',
                             weights='timm/deit_small_patch16_224.fb_in1k')
  config.reduce = dict(vision=reduction())
  config.mesh = mesh()
  config.sharding = VIT_SHARDING
  config.sweep = dict(
      title='DeiT-S/16 on ImageNet-1k: cuts in layers 3, 6 and 9, no training',
      methods=(), budget='flops_ratio', budgets=(0.8, 0.65, 0.5), layers=(3, 6, 9),
      overrides=dict(), rounds=10, baselines=('random', 'stride', 'pool'),
      pictured=('topk', 'evit', 'tome'), pictured_images=4,
  )
  return config
