"""Text on the cost of a model: every layer, totals beside the unreduced model, published figures.

  print(describe(make_vit('deit_s16'), reduce={'vision': {'method': 'tome', 'remove': 13}}))
  print(describe(make_vlm('llava1.5_7b'), prompt=36, layout=(1, 1, 576), reduce={
      'language': {'method': 'fastv', 'token_kinds': 'visual', 'layers': 2, 'keep_ratio': 0.5}}))

Nothing is compiled and no parameters are made. What is printed is counted in vit.py, lm.py and
vlm.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn

from lib.cost import jaxpr as jaxpr_cost
from lib.cost import lm as lm_cost
from lib.cost import published
from lib.cost import vit as vit_cost
from lib.cost import vlm as vlm_cost
from lib.cost.lm import LMCost
from lib.cost.vlm import VLMCost
from models.backbones.clip import Clip
from models.backbones.images import Layout
from models.backbones.lm import LM
from models.backbones.qwen_vision import QwenVision
from models.backbones.segmenter import SegmentViT
from models.backbones.text_tower import Text
from models.backbones.vit import ViT
from models.backbones.vlm import VLM
from models.plan import make_plan
from models.plans.events import Plan
from models.projectors import name_of
from models.reduce_config import check_components, with_plans, without_plans
from models.reduction import Event

# Tokens that are decoded, and ids of a prompt with and without images, where nobody says.
NEW_TOKENS, PROMPT, PROMPT_BESIDE_IMAGES = 64, 1024, 64
NOTHING_PUBLISHED = 'published: nothing known for this model and budget'

Reduce = Mapping[str, Any]
# Name, and figures of the reduced and the unreduced model.
Total = tuple[str, float, float]


def describe(model: nn.Module, *, reduce: Reduce | None = None, prompt: int | None = None,
             new_tokens: int | None = None, layout: Layout | None = None,
             trace: bool = False) -> str:
  """Returns the whole text on one model.

  Args:
    model: a ViT (a SegmentViT too), a Text, a Clip, an LM or a VLM, with its plans or without.
    reduce: reductions by place, as `config.reduce`; they replace the plans of the model. None
      leaves these as they are.
    prompt: of an LM or a VLM, ids of the prompt beside visual tokens; by default what the plans of
      the model are for, else 1,024, or 64 beside images. An image's placeholder, and padding to
      the length of a program, count only where they are counted here.
    new_tokens: of an LM or a VLM, tokens that may be decoded; by default 64, or what fits.
    layout: of a VLM, (C, I, V) of its images (`models.backbones.images.Images.layout`); by default
      one image of one crop.
    trace: of a tower, whether to count the products of the method itself, from the traced program,
      which takes seconds for deep models.

  Raises:
    ValueError: another kind of model; an unknown place, or one that the model does not have; a
      prompt that exceeds the context; or what `make_plan` and `with_plans` raise.
  """
  check_components(reduce or ())
  if isinstance(model, LM | VLM):
    return _describe_language(model, reduce, prompt, new_tokens, layout)
  if isinstance(model, Clip):
    image = describe(model.image, reduce=reduce, trace=trace)
    return f'{image}\n\n{describe(model.text, trace=trace)}'
  if isinstance(model, ViT | Text):
    return _describe_tower(_with_vision(model, reduce), trace)
  raise ValueError(f'a {type(model).__name__} cannot be explained: give a ViT, Text, Clip, LM or '
                   'VLM')


# -- towers --------------------------------------------------------------------------------------


def _with_vision(vit: ViT | Text, reduce: Reduce | None) -> ViT | Text:
  """A tower under `reduce`, with its own plan where that is None."""
  if reduce is None:
    return vit
  settings = {component: chosen for component, config in reduce.items()
              if (chosen := _settings(config))}
  for component in settings:
    if component != 'vision':
      raise ValueError(f"reduce.{component} is not a place of this model: it has 'vision' alone")
  vit, vision = vit.clone(plan=None), settings.get('vision')
  if not vision:
    return vit
  return vit.clone(plan=make_plan(vision, vit.host, macs=vit_cost.solver(vit)))


def _settings(config: Mapping[str, Any] | None) -> dict[str, Any]:
  """The keys of a reduction that are set; none where the method is 'none'."""
  settings = {name: value for name, value in (config or {}).items() if value is not None}
  return settings if settings.get('method', 'none') != 'none' else {}


def _describe_tower(vit: ViT | Text, trace: bool) -> str:
  parts = [tower_table(vit), tower_totals(vit)]
  if isinstance(vit, SegmentViT):
    macs, parameters = vit_cost.decoder(vit)
    prefix, scale = unit(macs)
    parts.append(f'decoder, not among the MACs above: {macs / scale:.3f} {prefix}MACs, '
                 f'{parameters:,} parameters')
  if trace:
    parts.append(traced(vit))
  if isinstance(vit, ViT):
    parts.append(papers(vit))
  return '\n\n'.join(parts)


def unit(macs: float) -> tuple[str, float]:
  """Returns the prefix that suits a number of MACs, and what it stands for."""
  return ('G', 1e9) if macs >= 1e9 else ('M', 1e6)


def _macs_total(name: str, reduced: float, unreduced: float) -> Total:
  prefix, scale = unit(unreduced)
  return f'{name} ({prefix}MACs)', reduced / scale, unreduced / scale


def tower_table(vit: vit_cost.Tower) -> str:
  """Returns a tower's tokens, MACs and bytes, a line a layer, for one image."""
  cost = vit_cost.of(vit)
  prefix, scale = unit(cost.macs)
  lines = [summary(vit), '',
           f'layer  attention  keys    MLP  left      {prefix}MACs   so far  weights MB  '
           'activations MB']

  def end(name: str, macs: int) -> None:
    lines.append(f'{name:33}{macs / scale:11.3f} {done / cost.macs:8.1%}')

  done = cost.embed
  end('embed', cost.embed)
  for layer in cost.layers:
    done += layer.macs
    lines.append(
        f'{layer.index:5d} {layer.attention_in:10d} {layer.keys:5d} {layer.mlp_in:6d} '
        f'{layer.left:5d}{layer.macs / scale:10.3f} {done / cost.macs:8.1%} '
        f'{layer.weight_bytes / 1e6:11.2f} {layer.activation_bytes / 1e6:15.2f}')
  done += cost.head
  end('head', cost.head)
  lines.append(
      f'all   {cost.attention_mean:10.1f} {"":5} {cost.mlp_mean:6.1f} {cost.layers[-1].left:5d}'
      f'{cost.macs / scale:10.3f} {"":8} {cost.weight_bytes / 1e6:11.2f} '
      f'{cost.activation_bytes / 1e6:15.2f}')
  return '\n'.join(lines)


def summary(vit: vit_cost.Tower) -> str:
  """Returns one line: the tower, and what its plan does to it."""
  sizes = f'{vit.depth} layers, width {vit.width}, {vit.heads} heads'
  if isinstance(vit, Text):
    model = f'text tower of {sizes}, {vit.context} tokens'
  else:
    rows, columns = vit.grid
    special = 0 if isinstance(vit, QwenVision) else vit.special
    model = (f'ViT of {sizes}, {rows} x {columns} patches and {special} special '
             f'token{"s" * (special != 1)}')
  plan = vit.plan
  if plan is None or not plan.events:
    return f'{model}; nothing is reduced'
  line = model
  for events in _by_reduction(plan):
    line += _events_line(events, vit.depth)
    if events[0].reduction.mode == 'mask':
      line += '; masked, so that every slot is still computed'
    if events[0].method.adaptive:
      line += f'; at most, {events[0].method.adaptive}'
  return line


def _by_reduction(plan: Plan) -> list[list[Event]]:
  """A plan's events, those of each method together."""
  groups = ([event for event in plan.events if event.reduction == reduction]
            for reduction in plan.reductions)
  return [events for events in groups if events]


def _events_line(events: Sequence[Event], depth: int) -> str:
  """Says what the events of one method do."""
  back = ''.join(f', all back after layer {event.layer}' for event in events
                 if event.since is not None)
  events = [event for event in events if event.since is None]
  first, last = events[0], events[-1]
  return (f'; {first.reduction.name} ({first.site}) in {_layers_of(events, depth)}: '
          f'{first.slots_in - (first.protected or 0)} to {last.slots_out - (last.protected or 0)} '
          f'tokens{back}')


def _layers_of(events: Sequence[Event], depth: int) -> str:
  if len(events) == depth:
    return 'every layer'
  plural = 's' * (len(events) != 1)
  return f'layer{plural} {", ".join(str(event.layer) for event in events)}'


def tower_totals(vit: vit_cost.Tower) -> str:
  """Returns totals under every convention, and of a training step, beside the unreduced model."""
  ours, full = vit_cost.of(vit), vit_cost.compute(vit_cost.architecture(vit))
  prefix, scale = unit(ours.macs)
  totals = [(f'{name} ({prefix})', convention(ours) / scale, convention(full) / scale)
            for name, convention in vit_cost.CONVENTIONS.items()]
  totals += [
      (f'macs of a training step ({prefix})', ours.training_macs / scale,
       full.training_macs / scale),
      ('tokens into attention, layer mean', ours.attention_mean, full.attention_mean),
      ('tokens into the MLP, layer mean', ours.mlp_mean, full.mlp_mean),
      ('activations read and written (MB)', ours.activation_bytes / 1e6,
       full.activation_bytes / 1e6),
  ]
  text = _compared('one image', totals)
  if vit.mlp != 4 * vit.width:
    text += ('\n(diffrate_paper and pitome_repo take the MLP to be 4 times as wide as the model; '
             f'here it is {vit.mlp / vit.width:g})')
  return text


def _compared(title: str, totals: Iterable[Total]) -> str:
  """Figures of the reduced model beside those of the unreduced one, a line each."""
  lines = [f'{title:<36}{"reduced":>12}{"unreduced":>12}{"ratio":>8}{"saving":>9}']
  lines += [f'{name:<36}{reduced:12.3f}{unreduced:12.3f}{reduced / unreduced:8.3f}'
            f'{unreduced / reduced:8.2f}x' for name, reduced, unreduced in totals]
  return '\n'.join(lines)


def traced(vit: ViT | Text) -> str:
  """Returns what the traced program multiplies, and how much of it is the method's own work."""
  products, ours = jaxpr_cost.of_vit(vit), vit_cost.of(vit).macs
  backbone = products.macs.get('', 0)
  if isinstance(vit, SegmentViT):
    ours += vit_cost.decoder(vit)[0]
  difference = 'as above' if backbone == ours else f'{backbone - ours:+,} from above'
  lines = [f'traced program: {backbone:,} MACs in the backbone, {difference}']
  names = {'signals': 'score rows beside attention', 'reduction': "the method's own products"}
  for scope, name in names.items():
    macs = products.macs.get(scope, 0)
    lines.append(f'  {name}: {macs:,} MACs, {macs / products.total:.2%}')
  if products.uncounted:
    uncounted = ', '.join(sorted(f'{primitive} in {scope or "the backbone"}'
                                 for scope, primitive in products.uncounted))
    lines.append(f'  not counted: {uncounted}')
  return '\n'.join(lines)


def papers(vit: ViT) -> str:
  """Returns the published figures for this very model and budget, beside ours."""
  rows = published.find(vit)
  if not rows:
    return NOTHING_PUBLISHED
  lines = ['published']
  for row, ours in rows:
    figures = {
        'gmacs': f'{row.value:g} GMACs ({row.convention}), here {ours:.3f}',
        'parameters': f'{row.value:,} parameters, here {ours:,}',
        'speedup': f'{row.value:.2f}x as fast, here {ours:.2f}x fewer MACs',
    }
    lines.append(f'  {figures[row.quantity]}: {_verdict(row, ours)}. {row.source}')
  return '\n'.join(lines)


def _verdict(row: published.Published | published.PublishedLM, ours: float) -> str:
  return 'agrees' if abs(ours - row.value) <= row.tolerance else f'differs: {row.mismatch}'


# -- language models -----------------------------------------------------------------------------


def _describe_language(model: LM | VLM, reduce: Reduce | None, prompt: int | None,
                       new_tokens: int | None, layout: Layout | None) -> str:
  if isinstance(model, LM):
    layout = None
  elif layout is None:
    layout = (1, 1, 0)
  plain = _unreduced(model)
  visual = 0 if isinstance(model, LM) or layout is None else _visual(model, reduce, layout)
  if prompt is None:
    prompt = _default_prompt(model, reduce, visual)
  if new_tokens is None:
    new_tokens = max(1, min(NEW_TOKENS, model.context - visual - prompt))
  _check_length(model, prompt, visual, new_tokens)
  if reduce is not None:
    model = with_plans(plain, **reduce, macs=vlm_cost.macs_of,
                       kv_bytes=vlm_cost.kv_bytes_of)(prompt, layout)
  if isinstance(model, LM):
    assert isinstance(plain, LM)
    ours, full = (lm_cost.of(each, prompt, room=new_tokens) for each in (model, plain))
    parts = [lm_table(model, prompt, room=new_tokens),
             _compared('one prompt', [*_lm_totals(ours, full), *_conventions(ours, full, 0)])]
    return '\n\n'.join([*parts, language_papers(ours, 0)])
  assert layout is not None
  assert isinstance(plain, VLM)
  seen, whole = (vlm_cost.of(each, prompt, layout, room=new_tokens) for each in (model, plain))
  return '\n\n'.join([
      vlm_summary(seen), tower_table(model.tower), _projector(seen), *_memory(seen),
      lm_table(model.lm, prompt + seen.visual, room=new_tokens),
      _compared('one prompt and its images', _vlm_totals(seen, whole)),
      language_papers(seen.lm, seen.visual, name_of(seen.vlm.compressor))])


def _visual(model: VLM, reduce: Reduce | None, layout: Layout) -> int:
  """Visual slots that the language model reads."""
  if reduce is None:
    return model.visual_slots(layout)
  return with_plans(without_plans(model), **reduce).visual_slots(layout)


def _default_prompt(model: LM | VLM, reduce: Reduce | None, visual: int) -> int:
  """Ids of a prompt: those that the model's plans are for, or a usual number."""
  lm = model if isinstance(model, LM) else model.lm
  if reduce is None:
    if lm.plan and lm.plan.slots:
      return lm.plan.slots - visual
    if lm.cache_plan and lm.cache_plan.slots and lm.cache_plan.events[0].layer == 0:
      return lm.cache_plan.slots - visual
  usual = PROMPT_BESIDE_IMAGES if visual else PROMPT
  return max(1, min(usual, model.context - visual - NEW_TOKENS))


def _check_length(model: LM | VLM, prompt: int, visual: int, new_tokens: int) -> None:
  if prompt < 1 or new_tokens < 0:
    raise ValueError(f'prompt={prompt} and new_tokens={new_tokens} are too few: give a prompt of '
                     'one id or more, and no fewer than 0 tokens to come')
  if prompt + visual + new_tokens > model.context:
    raise ValueError(f'a prompt of {prompt} ids, {visual} visual tokens and {new_tokens} tokens to '
                     f'come exceed the context of {model.context}: ask for fewer')


def lm_table(lm: LM, slots: int, *, room: int = 0) -> str:
  """Returns tokens, MACs and bytes of a language model, a line a layer, for one row.

  Args:
    lm: with its plans.
    slots: N of the prompt.
    room: tokens that may be decoded after it.
  """
  cost = lm_cost.of(lm, slots, room=room)
  prefix, scale = unit(cost.macs)
  lines = [f'language model of {lm.depth} layers, width {lm.width}, {lm.heads} heads, '
           f'{lm.kv_heads} kv heads; a prompt of {slots} slots, room for {room}'
           + _language_plans(lm), '',
           f'layer  attention    MLP  cached     {prefix}MACs      KV MB  allocated MB  '
           'weights MB  activations MB']
  for layer in cost.layers:
    lines.append(f'{layer.index:5d} {layer.attention:10d} {layer.mlp:6d} {layer.cached:7d} '
                 f'{layer.macs / scale:9.3f} {layer.kv_bytes / 1e6:10.3f} '
                 f'{layer.allocated_bytes / 1e6:13.3f} {layer.weight_bytes / 1e6:11.2f} '
                 f'{layer.activation_bytes / 1e6:15.2f}')
  lines.append(f'all   {cost.attention_mean:10.1f} {"":6} {"":7} {cost.macs / scale:9.3f} '
               f'{cost.kv_bytes / 1e6:10.3f} {cost.allocated_bytes / 1e6:13.3f} '
               f'{cost.weight_bytes / 1e6:11.2f} {cost.activation_bytes / 1e6:15.2f}')
  return '\n'.join(lines)


def _language_plans(lm: LM) -> str:
  """Describes the plans of a language model, '' if it has none."""
  text = ''
  for events in _by_reduction(lm.plan) if lm.plan else ():
    text += _events_line(events, lm.depth)
    if events[0].reduction.positions == 'restart':
      text += ', on which the model runs again'
  if lm.cache_plan and not lm.cache_plan.events:
    text += f'; {lm.cache_plan.name} keeps every slot of the cache'
  elif lm.cache_plan:
    counts = [event.slots_out for event in lm.cache_plan.events]
    text += (f'; {lm.cache_plan.name} keeps '
             + (f'{counts[0]}' if min(counts) == max(counts) else f'{min(counts)} to {max(counts)}')
             + f' slots of the cache in {_layers_of(lm.cache_plan.events, lm.depth)}')
    if capacity := lm.cache_plan.only.capacity:
      text += f', and {capacity} entries of a head while the model decodes'
  return text


def vlm_summary(cost: VLMCost) -> str:
  """Returns one line: how many tokens go from the images to the language model."""
  images = f'{cost.crops} crop{"s" * (cost.crops != 1)} through the tower'
  apart = cost.projected == cost.crops * cost.passed
  passed = (f'{cost.passed} tokens passed on of each' if apart else
            f'{cost.projected} tokens made of all of them')
  line = f'{images}, {passed}, {cost.visual_in} laid out'
  reduction = cost.vlm.projector_reduction
  if reduction and reduction.plan.events:
    line += f'; {reduction.plan.name} at the projector leaves {cost.visual}'
  return f'{line}; {cost.lm.slots - cost.visual} of text'


def _projector(cost: VLMCost) -> str:
  size = cost.lm.weight_bytes / lm_cost.parameters(cost.vlm.lm)
  prefix, scale = unit(cost.projector_macs)
  return (f'projector: {cost.projected} tokens, {cost.projector_macs / scale:.3f} '
          f'{prefix}MACs, '
          f'weights {cost.projector_parameters * size / 1e6:.2f} MB, activations '
          f'{cost.projector_activation_bytes / 1e6:.2f} MB')


def _memory(cost: VLMCost) -> list[str]:
  """Says what layers read of a memory, nothing where there is none."""
  reader, memory = cost.vlm.lm.reader, cost.memory
  if reader is None:
    return []
  size = cost.lm.weight_bytes / lm_cost.parameters(cost.vlm.lm)
  (prefix, scale), (own, step) = unit(memory.macs), unit(memory.decode_macs)
  layers = ', '.join(map(str, reader.layers))
  return [f'memory, beside the language model: layers {layers} read it, '
          f'{memory.macs / scale:.3f} {prefix}MACs of the prompt, {memory.decode_macs / step:.3f} '
          f'{own}MACs of a decode step, weights {memory.parameters * size / 1e6:.2f} MB, in the '
          f'cache {memory.kept_bytes / 1e6:.2f} MB']


def _lm_totals(ours: LMCost, full: LMCost) -> list[Total]:
  def of(name: str, scale: float, attribute: str) -> Total:
    return name, getattr(ours, attribute) / scale, getattr(full, attribute) / scale

  return [
      _macs_total('language model, prompt', ours.macs, full.macs),
      _macs_total('a decode step', ours.decode_macs, full.decode_macs),
      of('slots into attention, layer mean', 1, 'attention_mean'),
      of('KV cache, what is kept (MB)', 1e6, 'kv_bytes'),
      of('KV cache, as allocated (MB)', 1e6, 'allocated_bytes'),
      ('weights and cache, decode step (MB)', (ours.decode_weight_bytes + ours.kv_bytes) / 1e6,
       (full.decode_weight_bytes + full.kv_bytes) / 1e6),
      of('language model, weights (MB)', 1e6, 'weight_bytes'),
      of('language model, activations (MB)', 1e6, 'activation_bytes')]


def _vlm_totals(ours: VLMCost, full: VLMCost) -> list[Total]:
  def of(name: str, scale: float, attribute: str) -> Total:
    return name, getattr(ours, attribute) / scale, getattr(full, attribute) / scale

  totals = [_macs_total('tower', ours.tower_macs, full.tower_macs)]
  if ours.projector_macs:
    totals.append(_macs_total('projector', ours.projector_macs, full.projector_macs))
  totals += [*_lm_totals(ours.lm, full.lm), _macs_total('all, prompt', ours.macs, full.macs),
             of('all, weights (MB)', 1e6, 'weight_bytes'),
             of('all, activations (MB)', 1e6, 'activation_bytes')]
  return totals + _conventions(ours.lm, full.lm, ours.visual, full.visual)


def _conventions(ours: LMCost, full: LMCost, visual: int, full_visual: int = 0) -> list[Total]:
  """Totals as papers count, of the whole prompt, and of visual tokens alone where there are any."""
  totals: list[Total] = []
  whole = published.whole_counts(ours), published.whole_counts(full)
  alone = (published.visual_counts(ours, visual), published.visual_counts(full, full_visual))
  for name, convention in lm_cost.CONVENTIONS.items():
    counted = [('', whole)] if name in ('exact', 'viewer') else [('', whole), (', visual', alone)]
    for of_which, (reduced, unreduced) in counted:
      if reduced and unreduced:
        whole_count = convention(full.lm, unreduced)
        prefix, scale = ('T', 1e12) if whole_count >= 1e12 else unit(whole_count)
        totals.append((f'{name}{of_which} ({prefix})', convention(ours.lm, reduced) / scale,
                       whole_count / scale))
  return totals


def _unreduced(model: LM | VLM) -> LM | VLM:
  """The model without reductions, and with an MLP where a compressor is."""
  plain = without_plans(model)
  if isinstance(plain, VLM) and plain.compressor:
    plain = plain.clone(projection='gelu', compressor=None, lm=plain.lm.clone(reader=None))
  return plain


def language_papers(cost: LMCost, visual: int, projector: str = 'none') -> str:
  """Returns the published figures for this language model and these tokens a layer, beside ours.

  Args:
    cost: of the language model.
    visual: visual slots of its prompt.
    projector: as of `published.find_lm`.
  """
  rows: Sequence[tuple[published.PublishedLM, float]] = published.find_lm(cost, visual, projector)
  if not rows:
    return NOTHING_PUBLISHED
  lines = ['published']
  for row, ours in rows:
    beside = f'{row.text} tokens beside the image' if row.text else 'visual tokens alone'
    figures = {
        'tmacs': f'{row.value:g} T ({row.convention}, {beside}), here {ours:.3f}',
        'share': f'{row.value:.0%} of the unreduced ({row.convention}, {beside}), here {ours:.1%}',
        'gmacs_layer': f'{row.value:g} G a layer ({row.convention}, {beside}), here {ours:.2f}',
        'tokens': f'{row.value:g} visual tokens a layer, here {ours:.1f}'}
    lines.append(f'  {figures[row.quantity]}: {_verdict(row, ours)}. {row.source}')
  return '\n'.join(lines)
