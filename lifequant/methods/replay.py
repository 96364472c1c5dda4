"""Experience replay (ER): half of each batch is stored images, as in Chaudhry et al. 2019 (alg. 1), plain loss."""

from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "replay")
class Replay(LifelongMethod):
    help = "experience replay with the plain loss"
    defaults = LifelongMethod.defaults | {"replay": True, "replay_batch": 0.5}
