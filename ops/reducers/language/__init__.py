"""Reductions between the layers of a language model."""

from ops.reducers.language.adatoken_3d import AdaToken3D
from ops.reducers.language.aim import AIM
from ops.reducers.language.catp import CATP
from ops.reducers.language.catp_images import CATPImages
from ops.reducers.language.corematching import CoreMatching
from ops.reducers.language.dart import DART
from ops.reducers.language.duet_vlm import DUETVLM
from ops.reducers.language.fastv import FastV
from ops.reducers.language.fitprune import FitPrune
from ops.reducers.language.framefusion_merge import FrameFusionMerge
from ops.reducers.language.framefusion_prune import FrameFusionPrune
from ops.reducers.language.gemfilter import GemFilter
from ops.reducers.language.hidrop import HiDrop
from ops.reducers.language.holitom_merge import HoliTomMerge
from ops.reducers.language.llavolta import LLaVolta
from ops.reducers.language.lvlm_csp import LVLMCSP
from ops.reducers.language.mustdrop import MustDrop
from ops.reducers.language.pact import PACT
from ops.reducers.language.pyramiddrop import PyramidDrop
from ops.reducers.language.relevance_rank import RelevanceRank
from ops.reducers.language.sparsevlm import SparseVLM
from ops.reducers.language.subtoken_merge import SubtokenMerge
from ops.reducers.language.todre_exit import ToDREExit
from ops.reducers.language.transprune import TransPrune
from ops.reducers.language.visiondrop import VisionDrop
from ops.reducers.language.vtw import VTW
from ops.reducers.method import Method

LANGUAGE: dict[str, type[Method]] = {
    'fastv': FastV,
    'holitom_merge': HoliTomMerge,
    'pyramiddrop': PyramidDrop,
    'duet_vlm': DUETVLM,
    'aim': AIM,
    'hidrop': HiDrop,
    'transprune': TransPrune,
    'gemfilter': GemFilter,
    'sparsevlm': SparseVLM,
    'visiondrop': VisionDrop,
    'corematching': CoreMatching,
    'dart': DART,
    'vtw': VTW,
    'fitprune': FitPrune,
    'catp': CATP,
    'catp_images': CATPImages,
    'todre_exit': ToDREExit,
    'lvlm_csp': LVLMCSP,
    'adatoken_3d': AdaToken3D,
    'mustdrop': MustDrop,
    'pact': PACT,
    'subtoken_merge': SubtokenMerge,
    'relevance_rank': RelevanceRank,
    'framefusion_merge': FrameFusionMerge,
    'framefusion_prune': FrameFusionPrune,
    'llavolta': LLaVolta,
}
