"""Which systems of the field are here, and what holds each of them to its paper.

A system is covered by a test in tests/golden that names one of its methods: against outputs of its
authors' code, or of a claim that its paper makes; or by a test elsewhere that is listed.
"""

import ast
import functools
import pathlib

import pytest

from models.plan import branch_methods, methods
from ops.reducers import join
from ops.reducers.cache import CACHE_REDUCERS
from ops.reducers.insert import INSERTS

HERE = pathlib.Path(__file__).parent
# Methods by system, of those that reduce tokens before or inside of a language model, or in a tower
# alone. Few of them have something to train: a gate, or a router.
SYSTEMS = {
    'AdaToken-3D': ('adatoken_3d',), 'AIM': ('aim', 'aim_merge'), 'CATP': ('catp', 'catp_images'),
    'CenterCLIP': ('centerclip',), 'CoreMatching': ('corematching', 'corematching_cache'),
    'CrossGET': ('crossget',), 'DC2': ('dc2',), 'DivPrune': ('divprune',), 'DToP': ('dtop',),
    'DUET-VLM': ('duet_vlm', 'duet_zip'), 'DyMU': ('dymu',), 'DyVTE': ('dyvte',),
    'Expediting ViT': ('expedit',), 'Explainability': ('relevance_rank', 'explained'),
    'FasterVLM': ('fastervlm',), 'FlashVLM': ('flashvlm',), 'FlowCut': ('flowcut',),
    'FoPru': ('fopru',), 'gamma-MoD': ('gamma_mod',),
    'GemFilter': ('gemfilter',), 'GlobalCom2': ('globalcom2',),
    'HiDrop': ('hidrop', 'late_injection'), 'HiPrune': ('hiprune',), 'HiRED': ('hired',),
    'HoloV': ('holov',), 'LeMo': ('lemo',), 'LLaVolta': ('llavolta',),
    'LVLM_CSP': ('lvlm_csp',), 'MCTF': ('mctf',),
    'MMTok': ('mmtok',), 'p-MoD': ('pmod',), 'PiToMe': ('pitome',), 'PPE': ('ppe',),
    'Recoverable Compression': ('recoverable',), 'SkipDecode': ('skip_decode',),
    'STILL': ('still',), 'TextMonkey': ('textmonkey',), 'ToDRE': ('todre', 'todre_exit'),
    'Token Sparse Attention': ('token_sparse_attention',),
    'Token merging for models of code': ('subtoken_merge',),
    'Token Transforming': ('token_transforming',), 'TokenCorr': ('token_corr',),
    'TransPrune': ('transprune',), 'VFlowOpt': ('vflowopt',), 'VisionDrop': ('visiondrop',),
    'VoCo-LLaMA': ('voco',),
    'VMTC and CMAI': ('vmtc', 'cmai'), 'VTC-CLS': ('vtc_cls',), 'YOPO': ('yopo',),
    'ZOO-Prune': ('zoo_prune',)}
# Of methods that no test in this folder names, where they are tested.
ELSEWHERE = {
    'cam': 'ops/test_wrappers.py', 'finch': 'contract/test_contract_cache.py',
    'hidrop': 'cost/test_lm_cost.py', 'late_injection': 'contract/test_exits.py',
    'quest': 'ops/test_best_pages.py', 'rkv': 'contract/test_living_cache.py',
    'skip_decode': 'contract/test_branches.py', 'think': 'ops/test_wrappers.py',
    'two_stage': 'ops/test_wrappers.py', 'voco': 'decoding/test_summaries.py',
    'vtw': 'contract/test_exits.py'}
# Systems that are no method: where they are.
OTHERWISE = {'TTF-VLA': 'ops/test_temporal.py',
             'G-Search and P-Sigmoid': 'search/test_schedules.py',
             **dict.fromkeys(('TokenPacker', 'QueCC', 'MQT', 'M3', 'SliME', 'HICom', 'LLaVA-SP',
                              'VLoRA'), 'golden/test_golden_projector.py'),
             'TokenFLEX': 'projectors/test_projectors.py',
             **dict.fromkeys(('TimeSuite', 'DocVLM', 'AIM-ICL'), 'projectors/test_neighbours.py'),
             **dict.fromkeys(('EE-MLLM', 'TC-LLaVA'), 'decoding/test_visual_masks.py')}
BASELINES = {'none', 'random', 'stride', 'pool', 'radial'}


@functools.cache
def registered():
  return join(methods(), branch_methods(), CACHE_REDUCERS, INSERTS)


@functools.cache
def words(path):
  """Names and strings in the tests of a file, or in what their parameters are."""
  tree = ast.parse(path.read_text())
  assert any(isinstance(node, ast.FunctionDef) and node.name.startswith('test')
             for node in ast.walk(tree)), path
  return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} | {
      node.value for node in ast.walk(tree)
      if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def is_named(name, path):
  return bool({name, registered()[name].__name__} & words(path))


def covered(name):
  files = set(HERE.glob('test_*.py')) - {pathlib.Path(__file__)}
  if any(is_named(name, path) for path in files):
    return True
  return name in ELSEWHERE and is_named(name, HERE.parent / ELSEWHERE[name])


@pytest.mark.parametrize('system', SYSTEMS)
def test_every_system_is_held_to_its_paper(system):
  for name in SYSTEMS[system]:
    assert name in registered(), f'{system} has no method {name!r}'
    assert covered(name), f'no test against released code, and of no claim, names {name!r}'


def test_every_method_is_held_to_something():
  assert not [name for name in registered().keys() - BASELINES if not covered(name)]
  for system, path in OTHERWISE.items():
    assert words(HERE.parent / path), system


def test_a_method_that_no_test_names_is_told(monkeypatch):
  class Unheard:
    pass

  monkeypatch.setitem(registered(), 'unheard', Unheard)
  assert not covered('unheard')
  # A place that does not name it is no test of it.
  monkeypatch.setitem(ELSEWHERE, 'unheard', ELSEWHERE['cam'])
  assert not covered('unheard')
