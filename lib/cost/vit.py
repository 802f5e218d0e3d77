"""The cost of a vision transformer, or an encoder of texts, under given cuts, run nowhere.

Counted exactly, layer by layer: tokens, multiply-accumulates of every matrix product, bytes of
weights and activations. Papers disagree on what a FLOP is; `CONVENTIONS` names their ways, and
lib/cost/published.py holds their figures. lib/cost/jaxpr.py counts the same products in the traced
program, and the tests hold the two equal.

Not counted, as in the papers: softmax, norms, activations, and the method's own scores and matching
(lib/cost/explain.py shows those from the traced program).

Axes: N tokens of a layer before a cut, M after it, C width, F MLP width, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from models.backbones.bert import Bert
from models.backbones.qwen_vision import QwenVision
from models.backbones.segmenter import SegmentViT
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.backbones.windows import Windows
from models.plans.events import Tokens, profile
from models.reduction import Event

Tower = ViT | Text | Bert | QwenVision

MAP_BYTES = 4  # A map that a method inside attention sees is float32.


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Holds the sizes that the cost of a transformer depends on, beside its cuts.

  Attributes:
    width, depth, mlp, heads: of the blocks.
    kv_heads: heads of keys and values; equals `heads` unless queries share them.
    slots: tokens that enter layer 0, special ones included.
    patches: tokens that are made of the image.
    patch: side of a patch in pixels.
    channels: of the image.
    classes: outputs of a classifier, 0 for none.
    classifiers: how many there are (2 with a distillation token).
    pooled: features that a classifier or the projection reads.
    projection: features that a product after pooling makes, 0 for none.
    attention_pool: whether a learned query pools the last tokens, with an MLP behind it.
    mlp_products: of width x mlp in an MLP: 2, or 3 where one half gates the other.
    loose_parameters: numbers in special tokens, learned positions and what else stands alone.
    layer_extra: numbers in a block beside its products and norms (layer scales).
    windows: of an image, in which its patches attend (models/backbones/windows.py); 1 for none.
    special: tokens that join every window.
    whole_layers: layers whose attention sees all windows together.
    runs: (start, stop) of the layers that run; None for all. A model that stops early has nothing
      behind its blocks.
    norm_vectors: learned vectors of a norm: 2, scale and shift, or 1.
    merge: neighbouring tokens that a merger behind the blocks joins into one by an MLP of two
      products (Qwen2-VL); 0 for none.
    merged: features of a token behind the merger.
    parameter_bytes, activation_bytes: of one number.
  """

  width: int
  depth: int
  mlp: int
  heads: int
  kv_heads: int
  slots: int
  patches: int
  patch: int
  channels: int
  classes: int
  classifiers: int = 1
  pooled: int = 0
  projection: int = 0
  attention_pool: bool = False
  mlp_products: int = 2
  loose_parameters: int = 0
  layer_extra: int = 0
  windows: int = 1
  special: int = 0
  whole_layers: tuple[int, ...] = ()
  runs: tuple[int, int] | None = None
  norm_vectors: int = 2
  merge: int = 0
  merged: int = 0
  parameter_bytes: int = 4
  activation_bytes: int = 4

  @property
  def kv_width(self) -> int:
    """Features of the keys, and of the values."""
    return self.width // self.heads * self.kv_heads

  @property
  def layer_parameters(self) -> int:
    """Numbers in one block: products, their biases, and two norms."""
    attention = 2 * (self.width + self.kv_width) * self.width
    mlp = self.mlp_products * self.mlp * self.width
    biases = 3 * self.width + 2 * self.kv_width + (self.mlp_products - 1) * self.mlp
    norms = 2 * self.norm_vectors * self.width
    return attention + mlp + biases + norms + self.layer_extra

  @property
  def starts(self) -> bool:
    """True if the first layer runs, and the embedding before it."""
    return self.runs is None or self.runs[0] == 0

  @property
  def ends(self) -> bool:
    """True if the last layer runs, and the head behind it."""
    return self.runs is None or self.runs[1] == self.depth

  @property
  def merger_parameters(self) -> int:
    """Numbers of the merger's two products, with their biases."""
    inner = self.merge * self.width
    return bool(self.merge) * (inner * (inner + 1) + (inner + 1) * self.merged)

  @property
  def pooling_parameters(self) -> int:
    """Numbers of the learned query's attention and MLP: a block without its first norm."""
    block = self.layer_parameters - self.layer_extra - self.norm_vectors * self.width
    return self.attention_pool * (block + self.width)

  @property
  def parameters(self) -> int:
    """Number of parameters of the whole model, without those of learned reductions."""
    embed = self.channels * self.patch ** 2 * self.width + self.loose_parameters
    ends = self.norm_vectors * self.width + self.pooling_parameters
    ends += self.pooled * self.projection + self.merger_parameters
    ends += self.classifiers * self.classes * (self.classified + 1)
    return embed + self.depth * self.layer_parameters + self.ends * ends

  @property
  def classified(self) -> int:
    """Features that a classifier reads."""
    return self.projection or self.pooled or self.width


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer, for one image.

  Attributes:
    index: which layer.
    attention_in: N, tokens whose queries and keys are made.
    keys: tokens whose values are made, and over which the rows of the map sum.
    attention_out: tokens that attention returns.
    mlp_in: tokens that enter the MLP.
    left: tokens after the layer.
    qkv, scores, values, out, mlp: MACs of the projections to queries, keys and values; of Q Kᵀ; of
      the map times the values; of the output projection; of the MLP.
    weight_bytes: of all parameters that the layer reads.
    activation_bytes: of what its products read and write, each once. Attention is taken as fused,
      except where a method sees its map.
  """

  index: int
  attention_in: int
  keys: int
  attention_out: int
  mlp_in: int
  left: int
  qkv: int
  scores: int
  values: int
  out: int
  mlp: int
  weight_bytes: int
  activation_bytes: int

  @property
  def macs(self) -> int:
    """MACs of all its products."""
    return self.qkv + self.scores + self.values + self.out + self.mlp


@dataclasses.dataclass(frozen=True)
class Cost:
  """A model's cost for one image.

  Attributes:
    architecture: of the model.
    layers: one Layer each.
  """

  architecture: Architecture
  layers: tuple[Layer, ...]

  @property
  def embed(self) -> int:
    """MACs of the patch embedding."""
    arch = self.architecture
    return arch.starts * arch.patches * arch.channels * arch.patch ** 2 * arch.width

  @property
  def pooling(self) -> int:
    """MACs of a learned query over the last tokens, and of the MLP behind it."""
    arch, slots = self.architecture, self.layers[-1].left
    products = (2 + 2 * slots) * arch.width ** 2 + 2 * slots * arch.width
    return arch.attention_pool * (products + arch.mlp_products * arch.width * arch.mlp)

  @property
  def merger(self) -> int:
    """MACs of the merger, which reads every patch whatever was reduced before it."""
    arch = self.architecture
    if not arch.merge:
      return 0
    return arch.patches * arch.width * (arch.merge * arch.width + arch.merged)

  @property
  def head(self) -> int:
    """MACs of the layers behind the blocks: attention pooling, projection, classifiers, merger."""
    arch = self.architecture
    classes = arch.classifiers * arch.classes * arch.classified
    return arch.ends * (self.pooling + arch.pooled * arch.projection + classes + self.merger)

  @property
  def macs(self) -> int:
    """MACs of one forward pass."""
    return self.embed + sum(layer.macs for layer in self.layers) + self.head

  @property
  def training_macs(self) -> int:
    """MACs of a forward and a backward pass, without recomputation.

    Every product needs two more for its gradients, but images need none.
    """
    return 3 * self.macs - self.embed

  @property
  def weight_bytes(self) -> int:
    """Bytes of all parameters, read once a batch."""
    return self.architecture.parameters * self.architecture.parameter_bytes

  @property
  def activation_bytes(self) -> int:
    """Bytes that the products read and write beside the parameters, for one image."""
    arch = self.architecture
    moved = arch.starts * arch.patches * (arch.channels * arch.patch ** 2 + arch.width)
    if arch.ends:
      moved += arch.classifiers * (arch.classified + arch.classes)
      moved += bool(arch.projection) * (arch.pooled + arch.projection)
      if arch.attention_pool:
        slots = self.layers[-1].left
        moved += (5 * slots + 8) * arch.width + arch.mlp_products * arch.mlp
      if arch.merge:
        moved += 3 * arch.patches * arch.width + arch.patches // arch.merge * arch.merged
    return moved * arch.activation_bytes + sum(layer.activation_bytes for layer in self.layers)

  @property
  def attention_mean(self) -> float:
    """Tokens that enter attention, averaged over the layers."""
    return sum(layer.attention_in for layer in self.layers) / len(self.layers)

  @property
  def mlp_mean(self) -> float:
    """Tokens that enter the MLP, averaged over the layers."""
    return sum(layer.mlp_in for layer in self.layers) / len(self.layers)


def architecture(vit: Tower) -> Architecture:
  """Returns the architecture of a tower from its settings.

  Causal attention counts as whole: that is what runs, whatever the mask hides. A BERT's slots are
  its context: `dataclasses.replace(..., slots=...)` says how long texts are.
  """
  if isinstance(vit, Bert):
    return _bert_architecture(vit)
  if isinstance(vit, Text):
    return _text_architecture(vit)
  if isinstance(vit, QwenVision):
    return _qwen_architecture(vit)
  rows, columns = vit.grid
  leading = vit.class_token + vit.distilled
  positions = vit.special_positions * leading + rows * columns
  pooled = (1 + (vit.pool == 'cls_mean')) * vit.width
  loose = vit.special + (vit.positions == 'learned') * positions + vit.patch_bias
  loose = (loose + 2 * vit.pre_norm) * vit.width
  if vit.last_norm == 'pooled':
    loose += 2 * (pooled - vit.width)
  return Architecture(
      width=vit.width, depth=vit.depth, mlp=vit.mlp, heads=vit.heads, kv_heads=vit.heads,
      slots=vit.host.slots, patches=rows * columns, patch=vit.patch, channels=vit.channels,
      classes=vit.num_classes, classifiers=1 + vit.distilled, pooled=pooled,
      projection=vit.projection, attention_pool=vit.pool == 'map',
      mlp_products=2 + (vit.activation == 'swiglu'), loose_parameters=loose,
      layer_extra=2 * vit.width * (vit.layer_scale is not None),
      windows=Windows(vit.grid, vit.window).count if vit.window else 1, special=vit.special,
      whole_layers=vit.whole_layers, runs=vit.layers,
      activation_bytes=jnp.dtype(vit.dtype).itemsize)


def _text_architecture(text: Text) -> Architecture:
  loose = (text.vocabulary + text.context) * text.width
  return Architecture(
      width=text.width, depth=text.depth, mlp=text.mlp, heads=text.heads, kv_heads=text.heads,
      slots=text.context, patches=0, patch=0, channels=0, classes=0, pooled=text.width,
      projection=text.projection, mlp_products=2 + (text.activation == 'swiglu'),
      loose_parameters=loose + (text.projection if text.projection_bias else 0),
      activation_bytes=jnp.dtype(text.dtype).itemsize)


def _bert_architecture(bert: Bert) -> Architecture:
  # The norm that other towers have behind their blocks stands behind the embedding.
  loose = (bert.vocabulary + bert.context + bert.types) * bert.width
  return Architecture(
      width=bert.width, depth=bert.depth, mlp=bert.mlp, heads=bert.heads, kv_heads=bert.heads,
      slots=bert.context, patches=0, patch=0, channels=0, classes=0, loose_parameters=loose,
      activation_bytes=jnp.dtype(bert.dtype).itemsize)


def _qwen_architecture(tower: QwenVision) -> Architecture:
  patches = tower.grid[0] * tower.grid[1]
  windows = Windows(tower.grid, (tower.window, tower.window)).count if tower.window else 1
  return Architecture(
      width=tower.width, depth=tower.depth, mlp=tower.mlp, heads=tower.heads, kv_heads=tower.heads,
      slots=patches, patches=patches, patch=tower.patch, channels=tower.channels * tower.temporal,
      classes=0, mlp_products=2 + (tower.activation == 'swiglu'), windows=windows,
      whole_layers=tower.whole_layers, norm_vectors=1 if tower.norm == 'rms' else 2,
      merge=tower.merge ** 2, merged=tower.projection,
      activation_bytes=jnp.dtype(tower.dtype).itemsize)


def compute(arch: Architecture, events: Sequence[Event] = ()) -> Cost:
  """Returns the cost of an architecture under a plan's events.

  A cut from N to M tokens leaves, in its layer, for each site:
    before   attention at M, MLP at M
    between  attention at N, MLP at M (ToMe, EViT, DiffRate)
    after    attention at N, MLP at N
    inside   queries and keys at N, the map N x N. Where slots are joined, values and output at M,
             the map M x M (MCTF, arXiv:2403.10030); where they are picked, values at N, output at
             M, the map M x N (ATS, arXiv:2111.15667). MLP at M. As their own cost, methods that
             join pay (N² - M²)C more, for rows that read before they are joined
             (`ops.tokens.attend_after_cut`), and NC² where they ask for the values of all N tokens.
    branch   its parts at M, the rest at N; of 'core' the map alone, M x M

  Args:
    arch: the architecture.
    events: in the order in which they happen, each starting from what the one before it left.

  Raises:
    ValueError: for events that do not follow from each other.
  """
  layers = [_in_windows(arch, index, tokens)
            for index, tokens in enumerate(profile(events, arch.depth, arch.slots))]
  return Cost(arch, tuple(layers[slice(*(arch.runs or (0, arch.depth)))]))


def _in_windows(arch: Architecture, index: int, tokens: Tokens) -> Layer:
  """A layer of an image, attention in windows where there are any.

  Each window has the special tokens beside its patches, and its MLP runs on both.
  """
  whole = _layer(arch, index, tokens)
  if arch.windows == 1:
    return whole

  def each(count: int) -> int:
    return arch.special + (count - arch.special) // arch.windows

  part = _layer(arch, index, tokens.map_counts(each))
  if index in arch.whole_layers:
    return dataclasses.replace(whole, mlp_in=arch.windows * part.mlp_in,
                               mlp=arch.windows * part.mlp)
  once = ('index', 'weight_bytes')
  return dataclasses.replace(part, **{
      field.name: arch.windows * getattr(part, field.name)
      for field in dataclasses.fields(Layer) if field.name not in once})


def _layer(arch: Architecture, index: int, tokens: Tokens) -> Layer:
  attention_in, keys, attention_out = tokens.queries, tokens.values, tokens.attended
  mlp_in, width, kv_width = tokens.mlp, arch.width, arch.kv_width
  project = attention_in * (width + kv_width) + keys * kv_width
  moved = attention_in * width + project  # into and out of the projections
  moved += project + attention_out * width  # attention
  moved += 2 * attention_out * width + mlp_in * (2 * width + arch.mlp_products * arch.mlp)
  entries = arch.heads * (tokens.logits + tokens.weights)
  return Layer(
      index, attention_in, keys, attention_out, mlp_in, tokens.left,
      qkv=width * project, scores=tokens.logits * width,
      values=tokens.weights * width, out=attention_out * width ** 2,
      mlp=arch.mlp_products * mlp_in * width * arch.mlp,
      weight_bytes=arch.layer_parameters * arch.parameter_bytes,
      activation_bytes=moved * arch.activation_bytes + tokens.map_seen * 2 * entries * MAP_BYTES)


def of(vit: Tower, arch: Architecture | None = None) -> Cost:
  """Returns the cost of a model under its plan.

  A plan in mode 'mask' keeps every slot to the end, so it costs what no plan costs.

  Args:
    vit: the model.
    arch: its architecture where that differs from `architecture(vit)`, as in bytes of a number.
  """
  plan, arch = vit.plan, arch or architecture(vit)
  return compute(arch, plan.events if plan else ())


def in_training(vit: ViT) -> Cost:
  """Returns the cost of an image in training, where patch dropout may leave some patches alone.

  Cuts that would leave more than those are not made.
  """
  if not vit.training_patches:
    return of(vit)
  arch = dataclasses.replace(architecture(vit), slots=vit.special + vit.training_patches)
  events, slots = [], arch.slots
  before: dict[int, int] = {}
  for event in vit.plan.events if vit.plan else ():
    if event.since is not None:
      if event.since in before:
        events.append(dataclasses.replace(event, slots_in=slots, slots_out=before[event.since]))
        slots = before[event.since]
    elif event.slots_out < slots:
      before.setdefault(event.layer, slots)
      events.append(dataclasses.replace(event, slots_in=slots))
      slots = slots if event.kind == 'branch' else event.slots_out
  return compute(arch, events)


def decoder(vit: SegmentViT) -> tuple[int, int]:
  """Returns MACs and parameters of a segmenter's decoder, which `of` leaves out.

  Filling in the features of dropped patches is not counted.
  """
  outputs = vit.cells ** 2 * vit.pixel_classes
  each, biases = vit.width * outputs, outputs
  if vit.decoder == 'conv':
    each, biases = each + 9 * vit.width ** 2, biases + vit.width
  return vit.grid[0] * vit.grid[1] * each, each + biases


def solver(vit: Tower) -> Callable[[Sequence[Event]], int]:
  """Returns MACs as a function of events, which `make_plan(macs=...)` solves budgets with.

  Args:
    vit: the model that will be reduced.
  """
  arch = architecture(vit)
  return lambda events: compute(arch, events).macs


# -- what papers count ---------------------------------------------------------------------------


def macs(cost: Cost) -> int:
  """Multiply-accumulates of all products; papers on ViTs call them FLOPs."""
  return cost.macs


def flops(cost: Cost) -> int:
  """Two FLOPs for each multiply-accumulate, the unit of device peaks."""
  return 2 * cost.macs


def fvcore(cost: Cost) -> int:
  """MACs, and 5 for each value that a norm reads: fvcore's counter, used by many model tables."""
  arch, normed = cost.architecture, cost.layers[-1].left
  for layer in cost.layers:
    # Joined inside attention, tokens are normed again before their values are made.
    again = layer.keys if layer.keys < layer.attention_in else 0
    normed += layer.attention_in + again + layer.mlp_in
  return cost.macs + 5 * normed * arch.width


def diffrate_paper(cost: Cost) -> int:
  """4NC² + 2N²C + 8MC² a layer, N before the cut and M after it, wherever it acts.

  DiffRate (arXiv:2305.17997), calculate_flop_inference of the release. It embeds [CLS] as if it
  were a patch, and takes the MLP to be 4C wide.
  """
  arch = cost.architecture
  embed = (arch.patches + 1) * arch.channels * arch.patch ** 2 * arch.width
  blocks = sum(4 * layer.attention_in * arch.width ** 2 + 2 * layer.attention_in ** 2 * arch.width
               + 8 * layer.mlp_in * arch.width ** 2 for layer in cost.layers)
  return embed + blocks + arch.classes * arch.width


def pitome_repo(cost: Cost) -> int:
  """12NC² + 2N²C a layer with N as it enters, blocks only: the MLP's saving shows a layer later.

  PiToMe (arXiv:2405.16148), calculate_block_flop of the release. It takes the MLP to be 4C wide.
  """
  width = cost.architecture.width
  return sum(12 * layer.attention_in * width ** 2 + 2 * layer.attention_in ** 2 * width
             for layer in cost.layers)


CONVENTIONS: dict[str, Callable[[Cost], int]] = {
    'macs': macs,
    'flops': flops,
    'fvcore': fvcore,
    'diffrate_paper': diffrate_paper,
    'pitome_repo': pitome_repo,
}
