"""Compares published costs, with their sources, with our cost model's.

Only figures that need no weights. Where ours is not the published one, the row says why.
`UNREPRODUCED` lists figures that cannot be had from what is here. How schedules and conventions
were read off the releases:

* EViT, DiffRate and ToMe cut between attention and MLP, DynamicViT before a layer, MCTF inside.
* EViT keeps ceil(n r) of the n tokens there are, the fused one among them; DynamicViT
  int(196 r^k) of those at the start. Its 2.9 leaves out the predictors, which add 0.10.
* MCTF's four figures come out as fvcore counts: norms at 5 a value, and in each cut the product
  that compares even with odd tokens, N²C / 4, which is the method's own and not in our total.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lib.cost import lm as lm_cost
from lib.cost import vit as vit_cost
from lib.cost.lm import LMCost
from lib.cost.vit import Cost
from models.backbones.lm import LM
from models.backbones.vit import ViT, make_vit
from models.checkpoints.lm_config import make_lm
from models.plan import make_plan
from models.plans.events import Plan
from ops.tokens import VISUAL

QUANTITIES = ('gmacs', 'parameters', 'speedup')


@dataclasses.dataclass(frozen=True)
class Published:
  """Holds one published figure of a vision transformer.

  Attributes:
    variant, image_size: the model, as `make_vit` takes them.
    quantity: 'gmacs' (billions, whatever the paper calls them); 'parameters'; or 'speedup', images
      a second over those of the unreduced model, which our ratio of MACs is held against.
    value: the figure.
    tolerance: how far ours may be, in the figure's own unit.
    source: where it is printed.
    method, budget: the reduction as a config writes it; no method for the model itself.
    convention: which of `cost.CONVENTIONS` the source counts by.
    mismatch: why ours lies outside the tolerance; empty where it does not.
  """

  variant: str
  quantity: str
  value: float
  tolerance: float
  source: str
  method: str = 'none'
  budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  image_size: int = 224
  convention: str = 'macs'
  mismatch: str = ''

  def model(self) -> ViT:
    """Returns the model that the figure is about, with its plan."""
    vit = make_vit(self.variant, image_size=self.image_size)
    if self.method == 'none':
      return vit
    return vit.clone(plan=make_plan({'method': self.method, **self.budget}, vit.host))

  def ours(self, cost: Cost) -> float:
    """Returns our figure for a model of this cost."""
    if self.quantity == 'parameters':
      return cost.architecture.parameters
    if self.quantity == 'speedup':
      return vit_cost.compute(cost.architecture).macs / cost.macs
    return vit_cost.CONVENTIONS[self.convention](cost) / 1e9


def find(vit: ViT) -> list[tuple[Published, float]]:
  """Returns the figures published for exactly this model and these cuts, each with ours."""
  plan, ours = vit.plan, vit_cost.of(vit)
  name, rows = plan.name if plan else 'none', []
  arch = dataclasses.replace(ours.architecture, activation_bytes=4)
  for row in TABLE:
    if row.method != name:
      continue
    other = row.model()
    same_cuts = not plan or (other.plan is not None and _counts(plan) == _counts(other.plan))
    if same_cuts and arch == vit_cost.architecture(other):
      rows.append((row, row.ours(ours)))
  return rows


def _counts(plan: Plan) -> tuple[Any, ...]:
  """Returns what a plan leaves where, whatever its methods' arguments."""
  return plan.masked, [(event.layer, event.site, event.slots_in, event.slots_out)
                       for event in plan.events]


_TORCHVISION = 'torchvision, ViT_{}_Weights'
_TOME_README = 'ToMe, README, V100 (arXiv:2210.09461)'
_TOME_TABLE = 'ToMe on DeiT, paperswithcode.com/paper/token-merging-your-vit-but-faster'
_EVIT = 'EViT, README (arXiv:2202.07800)'
_MCTF = 'MCTF, README (arXiv:2403.10030)'

_BASES = tuple(
    Published(variant, 'gmacs', value, tolerance, _TORCHVISION.format(name), image_size=size)
    for variant, size, value, tolerance, name in (
        ('B/16', 224, 17.56, 0.005, 'B_16'), ('L/16', 224, 61.55, 0.005, 'L_16'),
        ('H/14', 224, 167.3, 0.05, 'H_14'), ('B/16', 384, 55.5, 0.05, 'B_16'),
        ('L/16', 512, 362.0, 0.05, 'L_16'), ('H/14', 518, 1016.72, 0.005, 'H_14'),
    )
) + tuple(
    Published(variant, 'gmacs', value, 0.005, _MCTF, convention='fvcore')
    for variant, value in (('Ti/16', 1.26), ('S/16', 4.61))
) + tuple(
    Published(variant, 'parameters', value, 0, _TORCHVISION.format(name), image_size=size)
    for variant, size, value, name in (
        ('B/16', 224, 86567656, 'B_16'), ('L/16', 224, 304326632, 'L_16'),
        ('H/14', 224, 632045800, 'H_14'), ('B/16', 384, 86859496, 'B_16'),
        ('L/16', 512, 305174504, 'L_16'), ('H/14', 518, 633470440, 'H_14'),
    )
)

_TOME = tuple(
    Published(variant, 'gmacs', value, 0.05, source, 'tome', {'remove': remove})
    for variant, remove, value, source in (
        ('S/16', 8, 3.4, _TOME_TABLE), ('S/16', 13, 2.7, _TOME_TABLE),
        ('S/16', 16, 2.3, _TOME_TABLE), ('Ti/16', 8, 0.9, _TOME_TABLE),
        ('Ti/16', 12, 0.8, _TOME_TABLE), ('Ti/16', 16, 0.6, _TOME_TABLE),
        ('L/16', 8, 31.0, 'ToMe, arXiv:2210.09461, quoted from memory'),
    )
)

# On a V100 ToMe's throughput rises as its MACs fall, to 6 % in all ten rows; a device that is not
# busy with so few tokens, or whose attention is fused, gains less.
_TOME_SPEED = tuple(
    Published(variant, 'speedup', after / before, 0.06 * (after / before), _TOME_README, 'tome',
              {'remove': remove}, image_size=size)
    for variant, size, remove, before, after in (
        ('S/16', 224, 13, 953, 1564), ('B/16', 224, 13, 309, 511), ('L/16', 224, 7, 95, 167),
        ('L/16', 384, 23, 28, 56), ('B/16', 384, 45, 85.7, 167.7), ('L/16', 512, 40, 12.8, 26.3),
        ('H/14', 518, 40, 4.7, 9.8), ('B/16', 224, 16, 309, 603), ('L/16', 224, 8, 93, 183),
        ('H/14', 224, 7, 35, 63),
    )
)

# The README prints one column of MACs for EViT and, without the fused token, for Top-K.
_EVIT_RATES = tuple(
    Published('S/16', 'gmacs', value, 0.05, _EVIT, method,
              {'keep_ratio': ratio, 'layers': (3, 6, 9)},
              mismatch='printed for the variant with a fused token: 3.48; without it 3.44'
              if (method, ratio) == ('topk', 0.8) else '')
    for method in ('evit', 'topk')
    for ratio, value in ((0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3))
)

_DYNAMICVIT = (
    Published('S/16', 'gmacs', 2.9, 0.05, 'DynamicViT, README (arXiv:2106.02034)', 'dynamicvit',
              {'keep_ratio': 0.7, 'ratio_of': 'start', 'rounding': 'floor', 'layers': (3, 6, 9)}),
)

_MATCHING = 'with the product that matches tokens, N²C / 4 a cut, which fvcore sees, ours is {}'
_MCTF_ROWS = tuple(
    Published(variant, 'gmacs', value, 0.005, _MCTF, 'mctf', budget, convention='fvcore',
              mismatch=_MATCHING.format(full) if full else '')
    for variant, budget, value, full in (
        ('Ti/16', {'remove': 16, 'layers': tuple(range(1, 12))}, 0.71, '0.709'),
        ('S/16', {'remove': 16, 'layers': tuple(range(1, 12))}, 2.60, '2.602'),
        ('Ti/16', {'keep_ratio': 0.65, 'layers': (3, 6, 9)}, 0.75, ''),
        ('S/16', {'keep_ratio': 0.65, 'layers': (3, 6, 9)}, 2.76, '2.756'),
    )
)

TABLE: tuple[Published, ...] = (
    _BASES + _TOME + _TOME_SPEED + _EVIT_RATES + _DYNAMICVIT + _MCTF_ROWS)

_RATES = ('needs the schedule in compression_rate.json of the release, which is not copied here; '
          'with that file the convention diffrate_paper gives the figure to its last digit')
# What, the figure, and why it cannot be had from what is here.
UNREPRODUCED: tuple[tuple[str, str, str], ...] = (
    ('DiffRate, DeiT-S, README', '2.905 GMACs', _RATES),
    ('DiffRate, DeiT-B, README', '11.517 GMACs', _RATES),
    ('DiffRate, ViT-B (MAE), README', '11.517 GMACs', _RATES),
    ('DiffRate, ViT-L (MAE), README', '42.290 GMACs', _RATES),
    ('DiffRate, ViT-H (MAE), README', '103.337 GMACs', _RATES),
    ('DiffRate, CAFormer-S36, README', '5.604 GMACs', 'there is no CAFormer here'),
    ('DynamicViT on LV-ViT-S and -M, README', '3.7, 4.6, 8.5 GMACs', 'there is no LV-ViT here'),
    ('Expedit on Segmenter, arXiv:2210.01035', '309.4 GMACs',
     'counts a segmentation decoder; by our savings alone 318.6, and 530.7 and 445.2 for the '
     'published 529.81 and 443.84'),
    ('SegViT, ViT-B, arXiv:2308.01045', '109.9 GMACs', 'counts its heads; the backbone has 106.9'),
    ('SparseVLM in the table of TransPrune, arXiv:2507.20630', '1.57, 1.28 TMACs',
     'does not say which lists; those of the release for 192 and 128 give 1.353 and 0.954'),
)


# -- language models behind a tower --------------------------------------------------------------

LM_QUANTITIES = ('tmacs', 'share', 'gmacs_layer', 'tokens')


@dataclasses.dataclass(frozen=True)
class PublishedLM:
  """Holds one published figure of a language model that reads visual tokens.

  Attributes:
    family: the language model, a name of `models.families.LMS`; its vocabulary plays no part.
    method: the reduction in the language model, or what projects and leaves fewer tokens; 'none'
      for neither.
    runs: (visual tokens, layers) pairs, in the order of the layers.
    quantity: 'tmacs' (10^12, whatever the paper calls them), 'share' of the unreduced model's,
      'gmacs_layer' (10^9, of the first layer), or 'tokens', visual ones of a layer on average.
    value: the figure.
    tolerance: how far ours may be, in the figure's own unit.
    source: where it is printed.
    convention: which of `lm_cost.CONVENTIONS` the source counts by.
    text: tokens beside the visual ones that the source counts.
    whole: visual tokens of the unreduced model where the first layer already reads fewer.
    mismatch: why ours lies outside the tolerance; empty where it does not.
  """

  family: str
  method: str
  runs: tuple[tuple[int, int], ...]
  quantity: str
  value: float
  tolerance: float
  source: str
  convention: str = 'mac3'
  text: int = 0
  whole: int = 0
  mismatch: str = ''

  @property
  def counts(self) -> tuple[int, ...]:
    """Visual tokens of each layer."""
    return tuple(count for count, layers in self.runs for _ in range(layers))

  def ours(self, lm: LM, counts: Sequence[int]) -> float:
    """Returns our figure for a language model with so many visual tokens in each layer."""
    convention = lm_cost.CONVENTIONS[self.convention]
    read = [count + self.text for count in counts]
    if self.quantity == 'tokens':
      return sum(counts) / len(counts)
    if self.quantity == 'gmacs_layer':
      return convention(lm, read[:1]) / 1e9
    if self.quantity == 'share':
      whole = self.whole + self.text if self.whole else read[0]
      return convention(lm, read) / convention(lm, [whole] * len(read))
    return convention(lm, read) / 1e12


def whole_counts(cost: LMCost) -> list[int] | None:
  """Returns the slots that enter each layer's attention, None where the model runs twice."""
  plan = cost.lm.plan
  if plan and plan.events and plan.positions == 'restart':
    return None
  return [layer.attention for layer in cost.layers]


def visual_counts(cost: LMCost, visual: int) -> list[int] | None:
  """Returns the visual tokens of each layer, None where a plan touches others, or there are none.

  Args:
    cost: of the language model.
    visual: visual slots of its prompt.
  """
  counts, plan = whole_counts(cost), cost.lm.plan
  if not visual or counts is None or any(
      event.reduction.of != (VISUAL,) for event in (plan.events if plan else ())):
    return None
  return [count - (cost.slots - visual) for count in counts]


def find_lm(cost: LMCost, visual: int,
            projector: str = 'none') -> list[tuple[PublishedLM, float]]:
  """Returns the figures published for exactly these visual tokens a layer, each with ours.

  Args:
    cost: of the language model.
    visual: visual slots of its prompt.
    projector: a name of `models.projectors.PROJECTORS`, 'none' for an MLP.
  """
  counts, plan, rows = visual_counts(cost, visual), cost.lm.plan, []
  name = plan.name if plan and plan.events else projector
  for row in LM_TABLE:
    if counts is None or (row.method, row.counts) != (name, tuple(counts)):
      continue
    if _sizes(make_lm(row.family)) == _sizes(cost.lm):
      rows.append((row, row.ours(cost.lm, counts)))
  return rows


def _sizes(lm: LM) -> tuple[int, ...]:
  return lm.width, lm.depth, lm.mlp, lm.heads, lm.kv_heads


_PDROP = 'PyramidDrop, project page (arXiv:2410.17247)'
_FASTV = 'FastV, README (arXiv:2403.06764)'
_MEMORY = ', quoted from memory'
_LLAVA = ((576, 32),)
_NEXT = ((2880, 32),)
_VIDEO = ((2048, 32),)
# TransPrune prints its own figures beside those of others.
_TRANSPRUNE = 'TransPrune (arXiv:2507.20630)'
_PMOD = (486, 464, 440, 414, 388, 360, 331, 302, 273, 244, 215, 187, 161, 135, 111, 89)
_AIM = 'AIM (arXiv:2412.03248)' + _MEMORY
_LISTS = 'SparseVLM, lists of its release (arXiv:2410.04417)'
_OUTPUTS = 'counts what leaves a layer, and without recycled tokens; {} enter one'

_LM_FIGURES = (
    PublishedLM('vicuna_7b', 'none', _LLAVA, 'tmacs', 3.82, 0.005, _PDROP),
    PublishedLM('vicuna_7b', 'pyramiddrop', ((576, 8), (288, 8), (144, 8), (72, 8)), 'tmacs', 1.78,
                0.005, _PDROP),
    PublishedLM('vicuna_7b', 'none', _NEXT, 'tmacs', 20.8, 0.05, 'PyramidDrop (arXiv:2410.17247)'
                + _MEMORY),
    PublishedLM('vicuna_7b', 'pyramiddrop', ((2880, 8), (1440, 8), (720, 8), (360, 8)), 'tmacs',
                9.46, 0.0055, 'PyramidDrop (arXiv:2410.17247)' + _MEMORY),
    PublishedLM('vicuna_7b', 'fastv', ((576, 3), (288, 29)), 'share', 0.57, 0.005, _FASTV, 'mac2',
                36),
    PublishedLM('vicuna_7b', 'fastv', ((576, 2), (288, 30)), 'share', 0.55, 0.005, _FASTV, 'mac2',
                36),
    PublishedLM('vicuna_13b', 'fastv', ((576, 2), (288, 38)), 'share', 0.55, 0.005, _FASTV, 'mac2',
                36),
    PublishedLM('vicuna_7b', 'fastv', ((576, 2), (144, 30)), 'share', 0.33, 0.005,
                'FastV (arXiv:2403.06764)' + _MEMORY, 'mac2', 36),
    PublishedLM('vicuna_7b', 'none', _LLAVA, 'gmacs_layer', 99.3, 0.05,
                'FastV (arXiv:2403.06764)' + _MEMORY, 'mac2', 36),
    PublishedLM('vicuna_13b', 'none', ((576, 40),), 'gmacs_layer', 154.6, 0.05,
                'FastV (arXiv:2403.06764)' + _MEMORY, 'mac2', 36),
    # Where a page says in how many stages and not behind which layers, these come nearest.
    PublishedLM('vicuna_7b', 'pyramiddrop', ((576, 10), (288, 10), (144, 12)), 'tmacs', 2.13, 0.005,
                _PDROP),
    PublishedLM('vicuna_7b', 'pyramiddrop', ((576, 6), (288, 6), (144, 6), (72, 6), (36, 8)),
                'tmacs', 1.38, 0.005, _PDROP,
                mismatch='1.391 with cuts before layers 6, 12, 18 and 24; the layers are not said'),
    PublishedLM('vicuna_7b', 'fastv', ((576, 2), (288, 30)), 'tmacs', 2.01, 0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'fastv', ((576, 2), (144, 30)), 'tmacs', 1.12, 0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'transprune', ((576, 7), (504, 2), (360, 3), (72, 20)), 'tmacs', 1.56,
                0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'fastv', ((2880, 2), (1440, 30)), 'tmacs', 10.55, 0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'fastv', ((2880, 2), (720, 30)), 'tmacs', 5.80, 0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'transprune', ((2880, 7), (2520, 2), (1800, 3), (360, 20)), 'tmacs',
                8.33, 0.005, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'none', _VIDEO, 'tmacs', 14.4, 0.05, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'fastv', ((2048, 2), (1024, 30)), 'tmacs', 7.4, 0.05, _TRANSPRUNE),
    PublishedLM('vicuna_7b', 'pyramiddrop', ((2048, 8), (1024, 8), (512, 8), (256, 8)), 'tmacs',
                6.6, 0.05, _TRANSPRUNE),
    PublishedLM('qwen2_7b', 'none', ((6272, 28),), 'tmacs', 99.63, 0.005, _AIM, 'viewer', 100),
    PublishedLM('qwen2_7b', 'aim',
                ((1568, 14), *((count, 1) for count in range(1372, 0, -196)), (0, 7)), 'tmacs',
                14.76, 0.005, _AIM, 'viewer', 100),
    PublishedLM('vicuna_7b', 'fastv', ((576, 2), (144, 30)), 'tokens', 171, 0.5,
                'a user of SparseVLM, in its issues'),
    PublishedLM('vicuna_7b', 'fastv', ((576, 3), (288, 29)), 'tokens', 315, 0.5,
                'a user of DyMU, in its issues'),
    PublishedLM('vicuna_7b', 'duet_vlm', ((307, 16), (153, 8), (0, 8)), 'tokens', 192, 0.5,
                'DUET-VLM (arXiv:2602.18846)'),
    PublishedLM('vicuna_7b', 'pmod', ((576, 8), *((count, 1) for count in _PMOD), (86, 8)), 'share',
                0.556, 0.005, 'p-MoD (arXiv:2412.04449)',
                mismatch='0.534 of 576 tokens, 0.564 with 40 words; what it counts is not said'),
    # How long the text is that they count with is not said: these lengths fit.
    PublishedLM('vicuna_7b', 'voco', ((1, 32),), 'share', 0.052, 0.0005,
                'VoCo-LLaMA, abstract (arXiv:2406.12275)', text=31, whole=576),
    PublishedLM('vicuna_7b', 'mqt', ((16, 32),), 'share', 0.125, 0.0005,
                'MQT-LLaVA, abstract (arXiv:2405.19315)', text=66, whole=576),
)

_SPARSEVLM = tuple(
    PublishedLM('vicuna_7b', 'sparsevlm', tuple(zip((576, *left), (3, 4, 9, 16), strict=True)),
                'tokens', value, 0.5, _LISTS, mismatch=_OUTPUTS.format(enter))
    for value, left, enter in (
        (192, (309, 204, 113), '206.5'), (128, (312, 117, 39), '145.4'),
        (96, (249, 55, 27), '114.1'), (64, (82, 32, 18), '82.3'), (192, (300, 200, 118), '206.8'),
        (128, (238, 108, 60), '144.1'), (96, (246, 54, 28), '113.9'), (64, (66, 34, 20), '81.8'))
) + tuple(
    # What leaves each layer, as its users have worked out.
    PublishedLM('vicuna_7b', 'sparsevlm', tuple(zip((576, *left), (2, 4, 10, 16), strict=True)),
                'tokens', value, 0.005, 'a user of SparseVLM, in its issues')
    for value, left in ((191.0, (300, 200, 110)), (204.06, (328, 213, 121)))
)

LM_TABLE: tuple[PublishedLM, ...] = _LM_FIGURES + _SPARSEVLM


# -- visual tokens of an image -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PublishedImage:
  """Holds a published number of the visual tokens that an image becomes, cut into crops.

  Attributes:
    family: the model that reads them.
    size: (height, width) in pixels that the crops make up; the whole in small is one crop more.
    tile, patch: sides of a crop, and of its patches.
    merge: patches each way that become one token.
    value: the figure: patches alone, without the ends of lines that some models add.
    source: where it is printed.
  """

  family: str
  size: tuple[int, int]
  tile: int
  patch: int
  merge: int
  value: int
  source: str

  @property
  def ours(self) -> int:
    """Tokens of all crops."""
    crops = 1 + self.size[0] // self.tile * (self.size[1] // self.tile)
    return crops * (self.tile // self.patch // self.merge) ** 2


IMAGE_TABLE: tuple[PublishedImage, ...] = (
    PublishedImage('llava_next', (672, 672), 336, 14, 1, 2880, 'VScan, in its issues'),
    PublishedImage('llava_next', (672, 336), 336, 14, 1, 1728, 'VScan, in its issues'),
    PublishedImage('internvl3', (896, 896), 448, 14, 2, 1280, 'CDPruner, in its issues'),
)
