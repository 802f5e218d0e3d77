"""Reductions of the output of a vision tower, before a language model reads it."""

from ops.reducers.method import Method
from ops.reducers.projector.aim_merge import AIMMerge
from ops.reducers.projector.divprune import DivPrune
from ops.reducers.projector.duet_zip import DUETZip
from ops.reducers.projector.dycoke import DyCoke
from ops.reducers.projector.evs import EVS
from ops.reducers.projector.fastervlm import FasterVLM
from ops.reducers.projector.fastvid import FastVID
from ops.reducers.projector.flowcut import FlowCut
from ops.reducers.projector.framefusion import FrameFusion
from ops.reducers.projector.globalcom2 import GlobalCom2
from ops.reducers.projector.hiprune import HiPrune
from ops.reducers.projector.hired import HiRED
from ops.reducers.projector.holitom import HoliTom
from ops.reducers.projector.mustdrop import MustDrop
from ops.reducers.projector.prumerge import PruMerge
from ops.reducers.projector.prunevid import PruneVid
from ops.reducers.projector.textmonkey import TextMonkey
from ops.reducers.projector.vidcom2 import VidCom2
from ops.reducers.projector.visionzip import VisionZip
from ops.reducers.projector.vtc_cls import VTCCLS

PROJECTOR: dict[str, type[Method]] = {
    'flowcut': FlowCut,
    'textmonkey': TextMonkey,
    'divprune': DivPrune,
    'fastervlm': FasterVLM,
    'visionzip': VisionZip,
    'duet_zip': DUETZip,
    'aim_merge': AIMMerge,
    'prumerge': PruMerge,
    'vtc_cls': VTCCLS,
    'hiprune': HiPrune,
    'hired': HiRED,
    'globalcom2': GlobalCom2,
    'evs': EVS,
    'vidcom2': VidCom2,
    'dycoke': DyCoke,
    'fastvid': FastVID,
    'holitom': HoliTom,
    'prunevid': PruneVid,
    'framefusion': FrameFusion,
    'mustdrop': MustDrop,
}
