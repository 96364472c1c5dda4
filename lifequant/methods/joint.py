"""All tasks at once: the upper bound."""

from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "joint")
class Joint(LifelongMethod):
    help = "all tasks at once: the upper bound"
    joint = True
