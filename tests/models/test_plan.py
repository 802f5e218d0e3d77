"""Plans: what a config may say, and what a wrong one is told."""

import dataclasses

import ml_collections
import pytest

from lib.cost import vit as vit_cost
from models.backbones.vit import make_vit
from models.checkpoints.lm_config import make_lm
from models.compressors import COMPRESSORS
from models.plan import branch_methods, make_plan, methods
from models.reduction import Event, Reduction
from ops.reducers import REDUCERS
from ops.reducers.base import Reducer
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.insert import INSERTS
from ops.tokens import identity

HOST = make_vit('S/16').host


def plan(host=HOST, **config):
  return make_plan(config, host)


@pytest.mark.parametrize('name', methods(HOST))
def test_every_method_can_be_planned_on_a_vit(name):
  made = plan(method=name, remove=5, layers=(2, 4))
  method = made.only.method
  assert method == methods()[name]()
  assert [(event.layer, event.site) for event in made.events] == [
      (layer, method.site) for layer in (2, 4) if name != 'none']
  for event in made.events:
    assert method.min_slots(event.slots_in, HOST.protected) <= event.slots_out
    assert event.slots_out == event.slots_in - 5
    assert made.at(event.layer) == made.at(event.layer, method.site) == (event,)
  assert made.at(3) == ()
  assert hash(made) == hash(plan(method=name, remove=5, layers=(2, 4)))


def test_methods_of_a_host_are_those_that_it_has_signals_for():
  missing = {name: sorted(methods()[name]().needs - HOST.offers)
             for name in methods().keys() - methods(HOST).keys()}
  frames, crops = ['crop', 'num_crops'], ['crop', 'crop_grid']
  of_crops = dict.fromkeys(('evs', 'vidcom2', 'dycoke', 'framefusion'), frames)
  of_crops |= {name: [*crops, 'num_crops'] for name in ('fastvid', 'holitom', 'prunevid')}
  of_crops |= {name: [*crops, 'patch', 'tiling'] for name in ('hired', 'globalcom2')}
  of_crops |= {'dc2': [*crops, 'num_crops', 'patch', 'tiling']}
  assert missing == {'fastv': ['last_attention'], 'pyramiddrop': ['next_last_attention'],
                     'duet_vlm': ['next_row_attention'], 'transprune': ['next_row_attention'],
                     'corematching': ['mlp_hidden'], 'vtw': ['rope'], 'fitprune': ['rope'],
                     'catp': ['last_attention'], 'todre_exit': ['rope'], 'mustdrop': ['rope'],
                     'pact': ['next_keys', 'next_queries', 'rope'],
                     'adatoken_3d': ['projected_norms', 'row_attention'],
                     'hidrop': ['next_last_attention'], 'aim': ['rope'], 'dyvte': ['rope'],
                     'sparsevlm': ['row_attention'],
                     'visiondrop': ['next_keys', 'next_row_attention'],
                     'cdpruner': ['text', 'text_valid'], 'recoverable': ['text', 'text_valid'],
                     'flashvlm': ['text', 'text_valid', 'vision_features'],
                     'mmtok': ['text', 'text_valid', 'vision_features'],
                     'zoo_prune': ['project', 'vision_features'],
                     'gemfilter': [],  # It runs the model again, which only a language model can.
                     'llavolta': [],  # Its means stand where they would be numbered there alone.
                     'holitom_merge': ['last_attention'],
                     'explained': ['next_row_attention'], 'relevance_rank': ['rope'],
                     'subtoken_merge': ['rope'], **of_crops}
  every = [*methods(), *branch_methods(), *CACHE_REDUCERS, *INSERTS]
  assert len(set(every)) == len(every), 'names are unique'
  assert {name: method.site for name, method in CACHE_REDUCERS.items()} == dict.fromkeys(
      CACHE_REDUCERS, 'cache')


def test_none_keeps_everything():
  assert plan(method='none', remove=8).events == ()


def test_a_plan_from_a_config_of_lists_and_unset_keys():
  config = ml_collections.ConfigDict({
      'method': 'topk', 'args': {'order': 'slot'}, 'site': None, 'mode': None, 'layers': [6, 3],
      'keep_ratio': [0.7, 0.5], 'rounding': None, 'ratio_of': None, 'gmacs': None})
  made = make_plan(config, HOST)
  topk = Reduction('topk', REDUCERS['topk'](order='slot'))
  events = tuple(dataclasses.replace(event, step=None) for event in made.events)
  assert events == (Event(3, 'between', 197, 139, topk), Event(6, 'between', 139, 70, topk))
  assert made.reductions == (topk,)
  assert make_plan(ml_collections.FrozenConfigDict(config), HOST) == made


def test_the_site_is_the_methods_unless_the_config_says():
  assert {event.site for event in plan(method='tome', remove=8).events} == {'between'}
  event, = plan(method='tome', remove=8, layers=(1,), site='before').events
  assert event.site == 'before'


def test_budgets_in_macs_get_the_hosts_cost():
  made = make_plan({'method': 'tome', 'gmacs': 1.0}, HOST, macs=lambda cuts: 2e9 - 2e7 * sum(
      cut.slots_in - cut.slots_out for cut in cuts))
  assert sum(cut.slots_in - cut.slots_out for cut in made.events) == 50


@pytest.mark.parametrize(('config', 'message'), [
    ({'methd': 'tome'}, "a reduction has no key 'methd' (did you mean 'method'?): choose from "
                        'method, args, site, layers'),
    ({'method': 'tom'}, "method 'tom' is unknown (did you mean 'tome'?): choose one of "
                        f'{", ".join(sorted(methods() | branch_methods() | INSERTS))}'),
    ({'method': 'zzz'}, "method 'zzz' is unknown: choose one of"),
    ({'remove': 8}, "method None is unknown (did you mean 'none'?): choose one of"),
    ({'method': 'topk', 'args': {'ordr': 'slot'}},
     "topk has no argument 'ordr' (did you mean 'order'?): it takes by, order"),
    ({'method': 'pool', 'args': {'zzz': 1}}, "pool has no argument 'zzz': it takes none"),
    ({'method': 'evit', 'args': {'by': 'cls'}},
     "by='cls' is unknown: choose one of cls_attention, received_attention"),
    ({'method': 'tome', 'site': 'betwen'},
     "site 'betwen' is unknown (did you mean 'between'?): choose one of before, branch, inside, "
     'between, after'),
    ({'method': 'tome', 'mode': 'maks'},
     "mode 'maks' is unknown (did you mean 'mask'?): choose one of gather, mask"),
    ({'method': 'tome', 'remove': 8, 'layers': 12}, 'layer 12 is out of range: the model has '
                                                    'layers 0 to 11'),
    ({'method': 'tome'}, 'exactly one budget, got none'),
    ({'method': 'topk', 'keep': 0}, 'keep=0 leaves no token in layer 0, but this method'),
    ({'method': 'topk', 'keep': 300}, 'keep=300 in layer 0 is impossible: 196 tokens are there'),
    ({'method': 'topk', 'keep_ratio': 0.001, 'rounding': 'floor'}, 'leaves 1 of 197 slots'),
    ({'method': 'tome', 'keep_ratio': 0.3}, 'can leave no fewer than 99 (1 protected)'),
    ({'method': 'topk', 'gmacs': 2.0}, 'gmacs=2.0 needs a cost model'),
    ({'method': 'topk', 'site': 'before', 'remove': 8},
     'topk before layer 0 has no earlier layer to read cls_attention from: start at layer 1'),
    ({'method': 'topk', 'site': 'inside', 'mode': 'mask', 'remove': 8},
     "use mode='gather', or topk at another site"),
], ids=str)
def test_errors_name_the_value_the_choices_and_the_nearest(config, message):
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    make_plan(config, HOST)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_method_that_needs_what_the_host_lacks():
  host = make_vit('S/16', class_token=False, pool='mean').host
  with pytest.raises(ValueError, match=r'topk needs cls_attention, which this host does not offer: '
                                       r'it offers attention, depth, grid, hidden.*values; set '
                                       r"args\.by='received_attention'$"):
    plan(host, method='topk', remove=8)
  assert plan(host, method='topk', args={'by': 'received_attention'}, remove=8).events
  first = plan(host, method='tome', remove=8).events[0]
  assert (first.layer, first.slots_in, first.slots_out) == (0, 196, 188)
  with pytest.raises(ValueError, match='it offers nothing'):
    plan(dataclasses.replace(host, offers=frozenset()), method='tome', remove=8)


@dataclasses.dataclass(frozen=True)
class Wanting(Reducer):
  """Needs whatever a test says."""

  def __call__(self, tokens, signals, *, num_slots):
    return identity(tokens)


@pytest.mark.parametrize(('needs', 'site', 'layers', 'message'), [
    ('attention', 'between', 'all', "the whole attention map, which exists only inside attention: "
                                    "set site='inside' (got 'between')"),
    ('attention', 'inside', 'all', ''),
    ('next_received_attention', 'between', 'all', "needs site='before' or 'after' (got 'between')"),
    ('next_received_attention', 'before', 'all', ''),
    ('next_received_attention', 'after', (3, 11), 'after layer 11 has no next layer to look at: '
                                                  'end at layer 10'),
    ('next_received_attention', 'after', (3, 10), ''),
    ('grid', 'before', 'all', ''),
])
def test_signals_exist_only_at_some_sites(needs, site, layers, message, monkeypatch):
  wanting = type('Asks', (Wanting,), {'needs': frozenset({needs})})
  monkeypatch.setitem(REDUCERS, 'asks', wanting)
  if not message:
    assert plan(method='asks', site=site, layers=layers, remove=2).events[0].site == site
    return
  with pytest.raises(ValueError) as caught:  # noqa: PT011
    plan(method='asks', site=site, layers=layers, remove=2)
  assert message in str(caught.value)


def test_two_methods_of_one_name(monkeypatch):
  monkeypatch.setitem(COMPRESSORS, 'tome', Wanting)
  with pytest.raises(ValueError, match=r"methods named twice: \['tome'\]; rename one"):
    methods()


LANGUAGE = make_lm('llama2_7b', depth=8)


def counts_of(plan):
  return [(event.reduction.name, event.layer, event.site, event.slots_in, event.slots_out,
           event.protected) for event in plan.events]


def test_several_reductions_take_turns_by_layer_and_site():
  made = make_plan([{'method': 'evit', 'keep_ratio': 0.5, 'layers': (3, 6)},
                    {'method': 'tome', 'remove': 8, 'layers': (3, 4), 'site': 'after'}], HOST)
  assert counts_of(made) == [
      ('evit', 3, 'between', 197, 100, None), ('tome', 3, 'after', 100, 92, None),
      ('tome', 4, 'after', 92, 84, None), ('evit', 6, 'between', 84, 44, None)]
  assert made.name == 'evit+tome'
  assert [tokens.left for tokens in made.profile(12, 197)] == [
      197, 197, 197, 92, 84, 84, 44, 44, 44, 44, 44, 44]
  assert [tokens.mlp for tokens in made.profile(12, 197)][2:5] == [197, 100, 92]
  with pytest.raises(ValueError, match=r'a plan of evit\+tome has no single method'):
    made.only  # noqa: B018


def test_several_reductions_leave_each_others_kinds_alone():
  host = LANGUAGE.host(40, visual=24, special=1)
  made = make_plan([
      {'method': 'random', 'keep_ratio': 0.5, 'layers': (2, 5), 'token_kinds': 'visual'},
      {'method': 'stride', 'keep': 10, 'layers': 3, 'token_kinds': 'text'}], host)
  assert counts_of(made) == [
      ('random', 2, 'between', 40, 28, 16), ('stride', 3, 'between', 28, 23, 13),
      ('random', 5, 'between', 23, 17, 11)]
  both = {'method': 'random', 'keep_ratio': 0.5, 'layers': 2, 'token_kinds': ('visual', 'text')}
  with pytest.raises(ValueError, match='stride of text tokens comes after a reduction of visual '
                                       'and text tokens together, which does not tell how many'):
    make_plan([both, {'method': 'stride', 'keep': 4, 'layers': 3, 'token_kinds': 'text'}], host)


def test_one_budget_in_flops_counts_all_reductions():
  configs = [{'method': 'topk', 'keep': 120, 'layers': 2},
             {'method': 'tome', 'flops_ratio': 0.55, 'layers': (3, 5, 7)}]
  vit = make_vit('S/16')
  made = make_plan(configs, vit.host, macs=vit_cost.solver(vit))
  whole = vit_cost.of(vit).macs
  assert 0.545 < vit_cost.of(vit.clone(plan=made)).macs / whole <= 0.55
  assert made.events[0].slots_out == 121
  # What removes evenly, in every layer, leaves the other what it is to keep.
  even = make_plan([configs[0], {'method': 'tome', 'flops_ratio': 0.5}], vit.host,
                   macs=vit_cost.solver(vit))
  assert 0.49 < vit_cost.of(vit.clone(plan=even)).macs / whole <= 0.5
  assert [event.slots_out for event in even.events if event.reduction.name == 'topk'] == [121]
  with pytest.raises(ValueError, match='tome and topk both have a budget in FLOPs'):
    make_plan([configs[1], {'method': 'topk', 'gmacs': 2.0}], vit.host,
              macs=vit_cost.solver(vit))


def test_only_one_method_sees_a_layers_map():
  inside = {'site': 'inside', 'layers': 2, 'remove': 4}
  with pytest.raises(ValueError, match='tome and topk both cut inside the attention of layer 2'):
    make_plan([{'method': 'tome', **inside}, {'method': 'topk', **inside}], HOST)
