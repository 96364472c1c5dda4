"""Experience replay (ER): stored images of former tasks join the training pool, plain loss."""

from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "replay")
class Replay(LifelongMethod):
    help = "experience replay with the plain loss"
    defaults = LifelongMethod.defaults | {"replay": True}
