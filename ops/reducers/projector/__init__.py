"""Reductions of the output of a vision tower, before a language model reads it."""

from ops.reducers.method import Method
from ops.reducers.projector.aim_merge import AIMMerge
from ops.reducers.projector.cdpruner import CDPruner
from ops.reducers.projector.dc2 import DC2
from ops.reducers.projector.divprune import DivPrune
from ops.reducers.projector.duet_zip import DUETZip
from ops.reducers.projector.dycoke import DyCoke
from ops.reducers.projector.evs import EVS
from ops.reducers.projector.fastervlm import FasterVLM
from ops.reducers.projector.fastvid import FastVID
from ops.reducers.projector.flashvlm import FlashVLM
from ops.reducers.projector.flowcut import FlowCut
from ops.reducers.projector.fopru import FoPru
from ops.reducers.projector.framefusion import FrameFusion
from ops.reducers.projector.globalcom2 import GlobalCom2
from ops.reducers.projector.gprune import GPrune
from ops.reducers.projector.hiprune import HiPrune
from ops.reducers.projector.hired import HiRED
from ops.reducers.projector.holitom import HoliTom
from ops.reducers.projector.holov import HoloV
from ops.reducers.projector.mmtok import MMTok
from ops.reducers.projector.mustdrop_merge import MustDropMerge
from ops.reducers.projector.ppe import PPE
from ops.reducers.projector.prumerge import PruMerge
from ops.reducers.projector.prunevid import PruneVid
from ops.reducers.projector.recoverable import Recoverable
from ops.reducers.projector.textmonkey import TextMonkey
from ops.reducers.projector.todre import ToDRE
from ops.reducers.projector.token_corr import TokenCorr
from ops.reducers.projector.vflowopt import VFlowOpt
from ops.reducers.projector.vidcom2 import VidCom2
from ops.reducers.projector.visiontrim import VisionTrim
from ops.reducers.projector.visionzip import VisionZip
from ops.reducers.projector.vispruner import VisPruner
from ops.reducers.projector.vmtc import VMTC
from ops.reducers.projector.vtc_cls import VTCCLS
from ops.reducers.projector.zoo_prune import ZOOPrune

PROJECTOR: dict[str, type[Method]] = {
    'flowcut': FlowCut,
    'textmonkey': TextMonkey,
    'divprune': DivPrune,
    'fastervlm': FasterVLM,
    'vispruner': VisPruner,
    'visionzip': VisionZip,
    'duet_zip': DUETZip,
    'aim_merge': AIMMerge,
    'prumerge': PruMerge,
    'vtc_cls': VTCCLS,
    'hiprune': HiPrune,
    'cdpruner': CDPruner,
    'flashvlm': FlashVLM,
    'mmtok': MMTok,
    'visiontrim': VisionTrim,
    'gprune': GPrune,
    'recoverable': Recoverable,
    'zoo_prune': ZOOPrune,
    'holov': HoloV,
    'fopru': FoPru,
    'todre': ToDRE,
    'vmtc': VMTC,
    'token_corr': TokenCorr,
    'vflowopt': VFlowOpt,
    'ppe': PPE,
    'hired': HiRED,
    'globalcom2': GlobalCom2,
    'evs': EVS,
    'vidcom2': VidCom2,
    'dycoke': DyCoke,
    'fastvid': FastVID,
    'holitom': HoliTom,
    'prunevid': PruneVid,
    'framefusion': FrameFusion,
    'mustdrop_merge': MustDropMerge,
    'dc2': DC2,
}
