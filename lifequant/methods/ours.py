"""LifeQuant (ICCV 2023): ProxQ's projection and penalty, BaLL's loss and sampler, replay. Each part is a flag of its own."""

from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "ours")
class Ours(LifelongMethod):
    help = "LifeQuant: ProxQ + BaLL + replay (ICCV 2023)"
    defaults = LifelongMethod.defaults | {
        "quantizer": "proxq",
        "loss": "ball_prior",
        "sampler": "ball",
        "penalty": "proxq",
        "replay": True,
    }
