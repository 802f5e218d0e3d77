"""Reductions between the layers of a language model."""

from ops.reducers.language.aim import AIM
from ops.reducers.language.duet_vlm import DUETVLM
from ops.reducers.language.fastv import FastV
from ops.reducers.language.gemfilter import GemFilter
from ops.reducers.language.hidrop import HiDrop
from ops.reducers.language.holitom_merge import HoliTomMerge
from ops.reducers.language.pyramiddrop import PyramidDrop
from ops.reducers.language.transprune import TransPrune
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
}
