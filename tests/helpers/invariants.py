"""The contract's invariants: functions of a method's name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import contract
from helpers.contract import KEEP, KEEP_AGAIN, KEEP_TEXT, SLOTS, WIDE, base, random_case
from models.plans.events import SITES
from ops import tokens as tk
from ops.assignments import Gather, Mix
from ops.moves.rows import take
from ops.signals import NAMES
from ops.tokens import SPECIAL, VISUAL

TOLERANCE = 1e-5


def close(a, b):
  """Compares to 1e-5 of the largest value, since a sum is rounded as its largest terms are."""
  largest = np.abs(b).max(initial=1.0)
  np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * largest)


def same(a, b):
  np.testing.assert_array_equal(a, b)


def real_rows(tokens, row):
  """One row's real slots in order: {field: array}; owners are numbered by real slots."""
  real = np.ones(tokens.x.shape[1], bool) if tokens.valid is None else tokens.valid[row]
  number = np.append(np.cumsum(real) - 1, -1)
  size = np.ones(tokens.x.shape[:2]) if tokens.size is None else tokens.size
  owner = tokens.owner[row]
  assert (real[owner[owner >= 0]]).all(), 'an original token is owned by padding'
  return {'x': tokens.x[row][real], 'pos': tokens.pos[row][real], 'kind': tokens.kind[row][real],
          'size': size[row][real], 'owner': number[owner],
          **{name: value[row][real] for name, value in tokens.stats.items()}}


def same_tokens(a, b, *, exact=False, skip=()):
  """Compares what `real_rows` gives: features and sizes to 1e-5, the rest exactly."""
  for name in a.keys() - set(skip):
    (close if name in ('x', 'size') and not exact else same)(a[name], b[name])


def declares(name):
  """Its attributes make sense, and its docstring starts with a sentence."""
  method = contract.method(name)
  assert method.needs | method.watch_needs <= set(NAMES)
  assert hasattr(method, 'watch') or not method.watch_needs
  assert method.site in SITES
  assert 'attention' not in method.needs or method.site == 'inside'
  assert (type(method).__doc__ or '').split('\n')[0].endswith('.')
  if not contract.learned(name):
    again = type(method)(**contract.SETTINGS.get(name, {}))
    assert hash(method) == hash(again), 'equal settings must be equal methods'
  for slots in (SLOTS, WIDE, 60):
    min_slots = method.min_slots(slots, 1)
    assert 1 + method.extra_slots < min_slots <= slots
  return ''


def arrays(name, num_slots, params, tokens, signals):
  answer, _ = contract.ask(name, params, tokens, signals, num_slots=num_slots)
  return answer.src, answer.dst, answer.matrix()


def shapes(name):
  """Every count it claims to reach is a static shape, and calls of one shape trace once."""
  case = random_case()
  tokens, signals = case.tokens(), case.signals(contract.method(name).needs)
  min_slots = contract.budget(name, SLOTS, 2)
  for keep in {min_slots, min(min_slots + 1, SLOTS), (min_slots + SLOTS) // 2, SLOTS}:
    params = contract.parameters(name, tokens, signals, num_slots=keep)
    answer = jax.eval_shape(functools.partial(arrays, name, keep), params, tokens, signals)
    assert [leaf.shape for leaf in answer] == [
        (contract.BATCH, keep), (contract.BATCH, SLOTS), (contract.BATCH, keep, SLOTS)]
    assert [leaf.dtype for leaf in answer] == [jnp.int32, jnp.int32, jnp.float32]
  for seed in range(3):
    base(name, seed)
  keep = contract.budget(name, SLOTS, KEEP)
  key = (name, keep, *tokens.x.shape, True, False, contract.PROTECTED)
  assert contract.TRACES.get(key, 1) == 1
  return ''


def identity(name):
  """With as many slots to keep as there are, the method is not asked and nothing changes."""
  case = random_case()
  tokens, signals = case.tokens(), case.signals(contract.method(name).needs)
  for keep in (SLOTS, SLOTS + 3):
    answer = tk.decide(contract.method(name), tokens, signals, num_slots=keep)
    jax.tree.map(same, tokens, tk.reduce(tokens, answer))
  return ''


def matrix(name):
  """Applying is multiplying by the matrix, whose rows and columns are what the kind promises."""
  case, out = random_case(), base(name)
  answer, weights = out.assignment, out.matrix
  close(out.applied, weights @ case.x)
  features = answer.features
  close(out.reduced.x, weights @ (case.x if features is None else features))
  assert np.isfinite(weights).all()
  valid = np.ones(out.src.shape, bool) if answer.valid is None else answer.valid
  assert (weights[~valid] == 0).all()
  outputs = out.src.shape[1]
  for row in range(contract.BATCH):
    anchors = out.src[row][valid[row]]
    if isinstance(answer, Mix):
      assert (np.abs(weights[row]).max(1)[valid[row]] > 0).all(), 'an output of nothing'
      continue
    assert len(set(anchors)) == len(anchors), 'two outputs share an anchor'
    same(out.dst[row][anchors], np.flatnonzero(valid[row]))
    assert ((weights[row] != 0).sum(0) <= 1).all(), 'a slot joins two outputs'
    assert (weights[row].sum(0)[out.dst[row] == outputs] == 0).all()
    if isinstance(answer, Gather):
      same(weights[row][valid[row]], np.eye(SLOTS)[anchors])
  return ''


def mass(name):
  """Sizes count the original tokens a slot owns, by `size_weights`, and add up to all of them."""
  case, out = random_case(), base(name)
  reason, reduced = contract.method(name).drops, out.reduced
  real = np.ones(reduced.x.shape[:2], bool) if reduced.valid is None else reduced.valid
  before, after = case.size.sum(1), np.where(real, reduced.size, 0).sum(1)
  if not isinstance(out.assignment, Mix):
    size_weights = out.assignment.size_weights
    size_weights = np.ones(case.x.shape[:2]) if size_weights is None else size_weights
    for row, size in enumerate(np.where(real, reduced.size, 0)):
      owner, part = reduced.owner[row], size_weights[row][case.owner[row]]
      count = np.bincount(owner[owner >= 0], weights=part[owner >= 0], minlength=len(size))
      (same if (size_weights == 1).all() else close)(count, size)
  if reason:
    if contract.learned(name):
      # What a softmax leaves out it leaves out for certain only where parameters are extreme.
      after = contract.run(name, case, KEEP, scale=100.0).reduced.size.sum(1)
    assert (after < before - 0.5).all(), f'mass is conserved, although {reason!r}'
    return reason
  close(after, before)
  assert (reduced.owner >= 0).all()
  return ''


def bits(name):
  """A token that stays by itself keeps its features bit for bit."""
  case, out = random_case(), base(name)
  if isinstance(out.assignment, Mix):
    inner = out.matrix[:, 1:, 1:]
    several = (inner > 0).sum(2) > 1
    if name in contract.MIX_SOME:
      copies = (inner == 1).any(2) & ~several
      assert several.any()
      assert copies.any()
      same(out.reduced.x[:, 1:][copies], take(case.x, out.src)[:, 1:][copies])
      return 'mixes some tokens'
    if contract.method(name).adaptive:
      # Some outputs may be tokens as they were, and some of nothing.
      single = (inner > 0).sum(2) == 1
      assert several.any(axis=1).all(), 'mixes nothing: should be a Gather or a Merge'
      same(out.applied[:, 1:][single], take(case.x, out.src)[:, 1:][single])
      return 'mixes some tokens'
    assert several.all(), 'mixes nothing: should be a Gather or a Merge'
    return 'mixes all tokens'
  valid = np.ones(out.src.shape, bool) if out.reduced.valid is None else out.reduced.valid
  if out.assignment.features is not None:
    assert (out.reduced.x[:, 1:] != take(case.x, out.src)[:, 1:]).any(axis=2).all()
    return 'refines what it keeps'
  count = 0
  for row, col in zip(*np.nonzero(valid), strict=True):
    if (out.dst[row] == col).sum() == 1:
      same(out.reduced.x[row, col], case.x[row, out.src[row, col]])
      count += 1
  assert count > contract.BATCH
  assert not isinstance(out.assignment, Gather) or count == valid.sum()
  return ''


def protect(name):
  """The special token stays, first and untouched."""
  case, out = random_case(), base(name)
  for tokens in (out.reduced, out.masked):
    same(tokens.x[:, 0], case.x[:, 0])
    same(tokens.pos[:, 0], case.pos[:, 0])
    same(tokens.kind[:, 0], SPECIAL)
    same(tokens.size[:, 0], case.size[:, 0])
    real = np.ones(tokens.x.shape[:2], bool) if tokens.valid is None else tokens.valid
    assert real[:, 0].all()
    same(tokens.kind[:, 1:][real[:, 1:]], VISUAL)
  return ''


TEXT_PLACES = {
    'together': [np.arange(start, start + contract.TEXTS) for start in (1, 9, SLOTS)],
    'even': [np.array(place) for place in ([2, 4, 6], [2, 12, 22], [18, 20, 22])],
    'odd': [np.array(place) for place in ([1, 3, 5], [1, 11, 23], [19, 21, 23])],
}


def other_kinds(name):
  """Text among the patches stays, bit for bit and in order, and only patches make room for it."""
  for places in TEXT_PLACES.values():
    case = contract.with_text(random_case(), places)
    out = contract.run(name, case, KEEP_TEXT)
    for row in range(contract.BATCH):
      before, after = real_rows(case.tokens(), row), real_rows(out.reduced, row)
      was, now = before['kind'] != VISUAL, after['kind'] != VISUAL
      assert now.sum() == contract.TEXTS + contract.PROTECTED
      for field in after.keys() - {'owner'}:
        same(after[field][now], before[field][was])
      if not contract.method(name).adaptive:
        assert len(now) == out.src.shape[1]
    if not (isinstance(out.assignment, Mix) or contract.method(name).drops):
      close(out.reduced.size.sum(1), case.size.sum(1))
  return ''


LEFT, RIGHT = np.arange(WIDE - SLOTS, WIDE), np.arange(SLOTS)
HOLES = np.setdiff1d(np.arange(WIDE), [4, 5, 13])
EVEN_HOLES = np.setdiff1d(np.arange(WIDE), [2, 6, 12])


def padding(name):
  """Padding full of 1e3 changes nothing: left, right or between, with text or without."""
  text = contract.with_text(random_case(), TEXT_PLACES['even'])
  wider = [np.concatenate([place, [WIDE, WIDE + 1, WIDE + 2]]) for place in (HOLES, EVEN_HOLES)]
  for case, keep, layouts in (
      (random_case(), KEEP, ([LEFT, RIGHT, HOLES], [RIGHT, EVEN_HOLES, LEFT])),
      (text, KEEP_TEXT, ([np.arange(3, WIDE + 3), *wider],))):
    without = contract.run(name, case, keep)
    for places in layouts:
      padded = contract.spread(case, places, slots=case.x.shape[1] + WIDE - SLOTS)
      out = contract.run(name, padded, keep)
      for row in range(contract.BATCH):
        same_tokens(real_rows(out.reduced, row), real_rows(without.reduced, row))
        same_tokens(real_rows(out.masked, row), real_rows(without.masked, row))
  return ''


def short(name):
  """A row with fewer real tokens than slots to keep loses none of them."""
  case = random_case()
  places = [LEFT[:9], RIGHT[:1], HOLES[:11]]
  spread = contract.spread(case, places)
  out = contract.run(name, spread, KEEP)
  for row, place in enumerate(places):
    after, before = real_rows(out.reduced, row), real_rows(spread.tokens(), row)
    if contract.method(name).adaptive:
      assert 1 <= len(after['pos']) <= len(place)
      continue
    assert len(after['pos']) == len(place)
    if isinstance(out.assignment, Mix):
      continue
    if out.assignment.features is not None:
      same(np.sort(after['pos']), np.sort(before['pos']))
    else:
      order_after, order_before = np.argsort(after['pos']), np.argsort(before['pos'])
      for field in after.keys() - {'owner'}:
        same(after[field][order_after], before[field][order_before])
  return contract.method(name).adaptive


def alone(name):
  """A row alone, with no sizes, gives what it gives in a batch, with sizes of one."""
  case = random_case(1).change(size=np.ones((contract.BATCH, SLOTS), np.float32))
  together = contract.run(name, case, KEEP)
  for row in range(contract.BATCH):
    single = contract.run(name, case.rows([row]).change(size=None), KEEP)
    same_tokens(real_rows(single.reduced, 0), real_rows(together.reduced, row))
  return ''


def own_budgets(name):
  """Rows of unequal lengths, each with its own budget, give what each gives alone."""
  case, counts = random_case(), (SLOTS, 15, 9)
  places = [LEFT, HOLES[:counts[1]], RIGHT[:counts[2]]]

  def left(slots):
    keep = contract.PROTECTED + -(-(slots - contract.PROTECTED) // 2)
    return contract.budget(name, slots, keep)

  # What has a parameter for each output keeps the same number everywhere.
  shapes = [contract.parameters(name, case.tokens(), case.signals(contract.method(name).needs),
                                num_slots=keep) for keep in (KEEP, KEEP - 1)]
  by_count = jax.tree.map(np.shape, shapes[0]) != jax.tree.map(np.shape, shapes[1])
  kept = [min(7, slots) if by_count else left(slots) for slots in counts]
  budget = np.array(kept, np.int32) - contract.PROTECTED
  spread = contract.spread(case, places).change(budget=budget)
  together = contract.run(name, spread, kept[0])
  # Whole rows are compared with themselves alone by `alone` and `padding`.
  for row, slots in list(enumerate(counts))[1:]:
    single = contract.spread(case, [np.arange(slots)] * contract.BATCH, slots=slots)
    single = contract.run(name, single.change(valid=None).rows([row]), kept[row])
    same_tokens(real_rows(together.reduced, row), real_rows(single.reduced, 0))
    same_tokens(real_rows(together.masked, row), real_rows(single.masked, 0))
  return ''


def permuted(name):
  """Rows in another order give their results in that order."""
  order = [1, 0, 2]
  out, moved = base(name), contract.run(name, random_case().rows(order), KEEP)
  same(moved.src, out.src[order])
  same(moved.dst, out.dst[order])
  close(moved.reduced.x, out.reduced.x[order])
  close(moved.reduced.size, out.reduced.size[order])
  return ''


def mask_mode(name):
  """Masking slots leaves the same real tokens as removing them, in slots of their own."""
  out = base(name)
  assert out.masked.x.shape == (contract.BATCH, SLOTS, contract.WIDTH)
  for row in range(contract.BATCH):
    less, masked = real_rows(out.reduced, row), real_rows(out.masked, row)
    order, place = np.argsort(less['pos'], kind='stable'), np.argsort(masked['pos'], kind='stable')
    for field in less.keys() - {'owner'}:
      same(masked[field][place], less[field][order])
    owned = less['owner'] >= 0
    same(masked['owner'] >= 0, owned)
    same(masked['pos'][masked['owner'][owned]], less['pos'][less['owner'][owned]])
  return ''


def finite(name):
  """Zero vectors, equal tokens and padding give finite results and gradients, f32 and bf16."""
  for dtype in (jnp.float32, jnp.bfloat16):
    call = contract.gradients(name, dtype)
    wide = contract.spread(random_case(), [LEFT, RIGHT[:1], HOLES])
    real = wide.real[..., None]
    for case in (wide, contract.alike(wide, 0.0), contract.alike(wide, 1.0)):
      case = case.change(x=np.where(real, case.x, contract.GARBAGE))
      results, grads = call(case)
      for leaf in jax.tree.leaves(results):
        assert jnp.isfinite(leaf).all(), f'{dtype.__name__} output'
      for path, leaf in jax.tree.leaves_with_path(grads):
        assert jnp.isfinite(leaf).all(), f'{dtype.__name__} gradient {jax.tree_util.keystr(path)}'
  return ''


def ties(name):
  """Among equals the lowest slot comes first."""
  case = random_case()
  runs = [base(name, seed) for seed in range(3)]
  if all((r.src == runs[0].src).all() and (r.dst == runs[0].dst).all() for r in runs):
    return 'looks at no content'
  out = contract.run(name, contract.alike(case, 1.0), KEEP)
  method = contract.method(name)
  if isinstance(out.assignment, Mix):
    return 'picks nothing: soft'
  if method.adaptive:
    return method.adaptive
  keep = out.src.shape[1]
  counts = [np.bincount(dst, minlength=keep + 1)[:keep] for run in runs for dst in run.dst]
  taking = min((np.flatnonzero(count > 1).min() for count in counts if (count > 1).any()),
               default=keep)
  for row in range(contract.BATCH):
    anchors, members = np.sort(out.src[row]), np.bincount(out.dst[row], minlength=keep + 1)[:keep]
    if name in contract.PARTED:
      # Equals of unlike parts: the same ones in every row, the first of all among them.
      same(np.sort(out.src[row]), np.sort(out.src[0]))
      assert {0, 1} <= set(anchors)
      continue
    if 'crop' in method.needs or 'frame' in method.reads:
      # Each crop, or frame, has a budget of its own.
      crop, place = np.divmod(case.pos[row][anchors[1:]], np.prod(contract.CROP_GRID))
      same(place, np.concatenate([np.arange(count) for count in np.bincount(crop)]))
      continue
    if isinstance(out.assignment, Gather) or method.extra_slots:
      # Whoever keeps the last slot whatever its content takes it for no equal of the others.
      last = [SLOTS - 1] * all((r.src == SLOTS - 1).any(axis=1).all() for r in runs)
      same(anchors, [*range(keep - len(last)), *last])
      continue
    # Everything that moves joins the first of the equally good targets: the lowest slot that
    # stays, of all or of one side of a bipartite matching, or the first output that ever takes in.
    groups = np.flatnonzero(members > 1)
    assert len(groups) == 1
    assert out.src[row][groups[0]] in anchors[1:3] or groups[0] == taking
  return contract.PARTED.get(name, '')


def compose(name):
  """Two cuts in a row equal their composition, and the product of their matrices."""
  case, first = random_case(), base(name)
  slots = first.reduced.x.shape[1]
  keep = contract.budget(name, slots, KEEP_AGAIN)
  again = random_case(5, slots=slots).change(
      x=first.reduced.x, pos=first.reduced.pos, kind=first.reduced.kind, owner=first.reduced.owner,
      size=first.reduced.size, valid=first.reduced.valid)
  second = contract.run(name, again, KEEP_AGAIN)
  assert second.reduced.x.shape[1] == keep
  if second.assignment.features is not None:
    with pytest.raises(ValueError, match='features of its own'):
      tk.compose(first.assignment, second.assignment)
    return 'mixes other features than it gets'
  both, weights, x, once = contract.composed(case.tokens(), first.assignment, second.assignment)
  product = second.matrix @ first.matrix
  close(weights, product)
  close(x, product @ case.x)
  if not isinstance(both, Mix):
    same(once.owner, second.reduced.owner)
    same(once.pos, second.reduced.pos)
    same(once.stats['pair'], second.reduced.stats['pair'])
    close(once.size, second.reduced.size)
    close(once.x, second.reduced.x)
  valid = np.ones(both.src.shape, bool) if both.valid is None else both.valid
  same(valid, np.ones_like(valid) if second.reduced.valid is None else second.reduced.valid)
  return ''


def restore(name):
  """A token gets the value of its slot back, a constant where weights add up to one."""
  out = base(name)
  rows = out.matrix.sum(2)
  outputs = rows.shape[1]
  if isinstance(out.assignment, Mix):
    shares = np.abs(out.matrix) / np.maximum(np.abs(out.matrix).sum(1, keepdims=True), 1e-20)
    close(out.restored, 2.5 * np.einsum('bmn,bm->bn', shares, rows))
  else:
    padded = np.concatenate([rows, np.zeros((contract.BATCH, 1))], axis=1)
    close(out.restored, 2.5 * np.take_along_axis(padded, out.dst, axis=1))
    same(out.restored == 0, out.dst == outputs)
  # The same, from the original tokens' side.
  back = np.asarray(tk.restore(out.reduced, out.reduced.pos, fill=-7))
  for row in range(contract.BATCH):
    owner = out.reduced.owner[row]
    same(back[row], np.where(owner >= 0, out.reduced.pos[row][owner], -7))
  return '' if np.allclose(rows[rows != 0], 1, atol=TOLERANCE) else 'a weighted sum, not a mean'


def filled(name):
  """Every slot it leaves holds a token, or fewer do and it says what decides how many."""
  reason = contract.method(name).adaptive
  outs = [base(name, seed) for seed in range(3)]
  counts = [out.reduced.valid.sum(1) if out.reduced.valid is not None
            else np.full(contract.BATCH, out.src.shape[1]) for out in outs]
  if not reason:
    same(counts, outs[0].src.shape[1])
    return ''
  counts = np.concatenate(counts)
  assert counts.min() >= 1 + contract.PROTECTED
  assert counts.max() <= outs[0].src.shape[1]
  assert len(set(counts)) > 1, f'the count never varies, although {reason!r}'
  return reason


def stats(name):
  """Memory and position travel with the anchor."""
  case, out = random_case(), base(name)
  for row in range(contract.BATCH):
    after = real_rows(out.reduced, row)
    same(after['memo'], after['pos'])
    same(after['pair'], np.stack([after['pos'], -after['pos']], axis=-1))
    valid = slice(None) if out.reduced.valid is None else out.reduced.valid[row]
    same(after['pos'], case.pos[row][out.src[row][valid]])
  return ''


INVARIANTS = {
    'declares': declares, 'shapes': shapes, 'identity': identity, 'matrix': matrix, 'mass': mass,
    'bits': bits, 'protect': protect, 'kinds': other_kinds, 'padding': padding, 'short': short,
    'alone': alone, 'budgets': own_budgets, 'permute': permuted, 'mask': mask_mode,
    'finite': finite, 'ties': ties, 'compose': compose, 'restore': restore, 'filled': filled,
    'stats': stats,
}
