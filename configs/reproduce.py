"""Published rows on ImageNet-1k: what to run, what it needs, and what was printed.

  python -m tools.reproduce
  python -m tools.reproduce --config=configs/reproduce.py:tome_deit_s16_r13

A row is named by its method, its model and its budget: r13 removes 13 tokens a layer, k70 keeps
70 % of them; '_trained' where the weights were trained under the reduction and a row as they are
stands beside it. Cost: not measured here; 50,000 images a row.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.parts import VIT_SHARDING, data, image_model, mesh, reduction
from ops import choices

# How evaluation images are made, of each family's release.
DEIT_PIXELS = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'test_crop': 0.875}
AUGREG_PIXELS = {'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'test_crop': 0.9}
SWAG_PIXELS = DEIT_PIXELS | {'test_crop': 1.0}

# Where figures were printed.
TOME = 'ToMe, README, V100 (arXiv:2210.09461)'
TOME_ON_DEIT = 'ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-faster'
EVIT = 'EViT, README (arXiv:2202.07800)'
MCTF = 'MCTF, README (arXiv:2403.10030)'
DYNAMICVIT = 'DynamicViT, README (arXiv:2106.02034)'

# Who made the weights, and how to come by their file.
CONVERT = 'to safetensors, in the names of timm, where you trust it'
TUNED_DEIT = ('DeiT fine-tuned with this reduction: train it, or convert the release ' + CONVERT)
TRAINED_DEIT = ('DeiT (arXiv:2012.12877) trained with this reduction: train it, or convert a '
                'release ' + CONVERT)
TUNED_MAE = ('MAE (arXiv:2111.06377) fine-tuned with this reduction: train it, or convert a '
             'release ' + CONVERT)
RELEASED_MAE = 'MAE (arXiv:2111.06377), ViT-L fine-tuned, is released as a pickle: convert it '
RELEASED_MAE += CONVERT
PREDICTORS = ('DynamicViT has predictors of its own, in a pickle as released: their names are not '
              'read here')


def _hub(name: str) -> str:
  return f'timm/{name} on the hub: its model.safetensors'


def _swag(side: int) -> str:
  return (f'SWAG (arXiv:2201.08371), fine-tuned on ImageNet-1k at {side} pixels, is released as a '
          f'pickle: convert it {CONVERT}')


def _row(variant: str, reduce: Mapping[str, Any] | None, weights: str, made_by: str, source: str,
         *, image_size: int = 224, pixels: Mapping[str, Any] = DEIT_PIXELS,
         **printed: Any) -> dict[str, Any]:
  """A row of `ROWS`.

  Args:
    variant: of models/backbones/vit.py.
    reduce: keywords of `reduction`; None for the unreduced model.
    weights: name of the safetensors file that it needs, in data/weights, without its ending.
    made_by: whose weights these are, and how to come by that file.
    source: where the figures were printed.
    image_size: side of the images in pixels.
    pixels: how evaluation images are made.
    **printed: the figures (tools/reproduce.py lists the keys), and a mismatch where ours differ.
  """
  return {'variant': variant, 'reduce': reduce, 'weights': f'{weights}.safetensors',
          'made_by': made_by, 'image_size': image_size, 'pixels': pixels,
          'expected': {'source': source, **printed}}


def _tome(remove: int, **settings: Any) -> dict[str, Any]:
  return {'method': 'tome', 'remove': remove, **settings}


def _share(method: str, keep_ratio: float, **settings: Any) -> dict[str, Any]:
  """A share of what is there, three times."""
  return {'method': method, 'keep_ratio': keep_ratio, 'layers': (3, 6, 9), **settings}


# MCTF removes nothing in its first layer.
_MCTF = {'method': 'mctf', 'remove': 16, 'layers': tuple(range(1, 12))}
_DYNAMICVIT = _share('dynamicvit', 0.7, ratio_of='start', rounding='floor')

ROWS: dict[str, dict[str, Any]] = {
    'deit_s16': _row(
        'deit_s16', None, 'deit_s16', _hub('deit_small_patch16_224.fb_in1k'), MCTF,
        top1=79.8, gmacs=4.61, convention='fvcore'),
    'deit_ti16': _row(
        'deit_ti16', None, 'deit_ti16', _hub('deit_tiny_patch16_224.fb_in1k'), MCTF,
        top1=72.2, gmacs=1.26, convention='fvcore'),

    'dynamicvit_deit_b16_k70': _row(
        'deit_b16', _DYNAMICVIT, 'deit_b16_dynamicvit_k70', PREDICTORS, DYNAMICVIT,
        top1=81.43, gmacs=11.4,
        mismatch='ours 11.064 GMACs: the predictors, not in our total, take 0.414'),
    'dynamicvit_deit_s16_k70': _row(
        'deit_s16', _DYNAMICVIT, 'deit_s16_dynamicvit_k70', PREDICTORS, DYNAMICVIT,
        top1=79.32, gmacs=2.9),

    **{f'evit_deit_s16_k{100 * share:.0f}': _row(
        'deit_s16', _share('evit', share), f'deit_s16_evit_k{100 * share:.0f}', TUNED_DEIT, EVIT,
        top1=top1, gmacs=gmacs)
       for share, top1, gmacs in ((0.5, 78.5, 2.3), (0.6, 78.9, 2.6), (0.7, 79.5, 3.0),
                                  (0.8, 79.8, 3.5), (0.9, 79.8, 4.0))},
    # EViT without its fused token.
    **{f'evit_unfused_deit_s16_k{100 * share:.0f}': _row(
        'deit_s16', _share('topk', share), f'deit_s16_evit_unfused_k{100 * share:.0f}', TUNED_DEIT,
        EVIT, top1=top1, gmacs=gmacs, **more)
       for share, top1, gmacs, more in (
           (0.5, 78.4, 2.3, {}), (0.6, 79.1, 2.6, {}), (0.7, 79.4, 3.0, {}),
           (0.8, 79.7, 3.5, {'mismatch': 'ours 3.444 GMACs: printed for the variant with a fused '
                                         'token, 3.477'}),
           (0.9, 79.9, 4.0, {}))},

    'mctf_deit_s16_r16': _row(
        'deit_s16', _MCTF, 'deit_s16_mctf_r16', TUNED_DEIT, MCTF,
        top1=80.1, gmacs=2.6, convention='fvcore'),
    'mctf_deit_ti16_r16': _row(
        'deit_ti16', _MCTF, 'deit_ti16_mctf_r16', TUNED_DEIT, MCTF,
        top1=72.7, gmacs=0.71, convention='fvcore',
        mismatch='ours 0.701 GMACs: with the product that matches tokens, N²C / 4 a cut, 0.709'),
    'mctf_fast_deit_s16_k65': _row(
        'deit_s16', _share('mctf', 0.65), 'deit_s16_mctf_fast', TUNED_DEIT, MCTF,
        top1=80.1, gmacs=2.76, convention='fvcore'),
    'mctf_fast_deit_ti16_k65': _row(
        'deit_ti16', _share('mctf', 0.65), 'deit_ti16_mctf_fast', TUNED_DEIT, MCTF,
        top1=72.7, gmacs=0.75, convention='fvcore'),

    # Trained under ToMe.
    'tome_deit_s16_r13': _row(
        'deit_s16', _tome(13), 'deit_s16_tome_r13', TRAINED_DEIT,
        f'{TOME}; GMACs: {TOME_ON_DEIT}',
        top1=79.36, gmacs=2.7, unreduced_top1=79.8, images_per_second=(930, 1550)),
    'tome_deit_ti16_r13': _row(
        'deit_ti16', _tome(13), 'deit_ti16_tome_r13', TRAINED_DEIT, TOME,
        top1=71.27, unreduced_top1=71.8, images_per_second=(2558, 3980),
        mismatch='ours 1.715 times fewer MACs: of all these models the smallest gains least of it'),
    **{f'tome_deit_{size}16_r{remove}': _row(
        f'deit_{size}16', _tome(remove), f'deit_{size}16_tome_r{remove}', TRAINED_DEIT,
        TOME_ON_DEIT, top1=top1, gmacs=gmacs)
       for size, remove, top1, gmacs in (('s', 8, 79.7, 3.4), ('s', 16, 79.1, 2.3),
                                         ('ti', 8, 71.7, 0.9), ('ti', 12, 71.4, 0.8),
                                         ('ti', 16, 70.7, 0.6))},
    **{f'tome_mae_{size}_r{remove}_trained': _row(
        f'mae_{size}_tuned', _tome(remove), f'mae_{size}_tome_r{remove}', TUNED_MAE, TOME,
        top1=top1, unreduced_top1=unreduced, images_per_second=speeds)
       for size, remove, top1, unreduced, speeds in (('b16', 16, 81.91, 83.62, (309, 603)),
                                                     ('l16', 8, 85.09, 85.66, (93, 183)),
                                                     ('h14', 7, 86.46, 86.88, (35, 63)))},

    # Weights as they are.
    'tome_mae_l16_r8': _row(
        'mae_l16_tuned', _tome(8, args={'proportional': False}), 'mae_l16_tuned', RELEASED_MAE,
        TOME, top1=84.22, unreduced_top1=85.96, images_per_second=(93, 183)),
    **{f'tome_swag_{variant[0].lower()}{variant[2:]}_{side}_r{remove}': _row(
        variant, _tome(remove), f'swag_{variant[0].lower()}{variant[2:]}_{side}', _swag(side),
        TOME, image_size=side, pixels=SWAG_PIXELS, top1=top1, unreduced_top1=unreduced,
        images_per_second=speeds)
       for variant, side, remove, top1, unreduced, speeds in (
           ('B/16', 384, 45, 84.59, 85.3, (85.7, 167.7)),
           ('L/16', 512, 40, 87.8, 88.06, (12.8, 26.3)),
           ('H/14', 518, 40, 88.25, 88.55, (4.7, 9.8)))},
    'tome_vit_s16_r13': _row(
        'S/16', _tome(13), 'vit_s16_augreg_224',
        _hub('vit_small_patch16_224.augreg_in21k_ft_in1k'), TOME, pixels=AUGREG_PIXELS,
        top1=79.3, unreduced_top1=81.41, images_per_second=(953, 1564)),
    'tome_vit_b16_r13': _row(
        'B/16', _tome(13), 'vit_b16_augreg_224',
        _hub('vit_base_patch16_224.augreg_in21k_ft_in1k'), TOME, pixels=AUGREG_PIXELS,
        top1=82.6, unreduced_top1=84.57, images_per_second=(309, 511)),
    'tome_vit_l16_r7': _row(
        'L/16', _tome(7), 'vit_l16_augreg_224',
        _hub('vit_large_patch16_224.augreg_in21k_ft_in1k'), TOME, pixels=AUGREG_PIXELS,
        top1=84.26, unreduced_top1=85.82, images_per_second=(95, 167)),
    'tome_vit_l16_384_r23': _row(
        'L/16', _tome(23), 'vit_l16_augreg_384',
        _hub('vit_large_patch16_384.augreg_in21k_ft_in1k'), TOME, image_size=384,
        pixels=AUGREG_PIXELS | {'test_crop': 1.0},
        top1=86.14, unreduced_top1=86.92, images_per_second=(28, 56)),
}


def get_config(row: str = '') -> ml_collections.ConfigDict:
  """The model of a row, its weights and data, and what was published.

  Raises:
    ValueError: an unknown name, or none.
  """
  if not row:
    raise ValueError('name a row of configs/reproduce.py, as --config=configs/reproduce.py:'
                     f'tome_deit_s16_r13: there are {", ".join(ROWS)}')
  choices.check('the row ', row, ROWS)
  entry = ROWS[row]
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = data(
      name='imagenet2012', data_dir='', image_size=entry['image_size'], channels=3, batch_size=64,
      train_split='train', test_split='validation', filter='bicubic', **entry['pixels'])
  size = {'image_size': entry['image_size']} if entry['image_size'] != 224 else {}
  config.model = image_model(entry['variant'], dtype='float32',
                             weights=f'data/weights/{entry["weights"]}', **size)
  config.reduce = dict(vision=reduction(**(entry['reduce'] or {})))
  config.mesh = mesh()
  config.sharding = VIT_SHARDING
  config.expected = entry['expected']
  config.needs = dict(weights=entry['weights'], made_by=entry['made_by'], data='imagenet2012')
  return config
