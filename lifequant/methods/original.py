"""No protection against forgetting: the lower bound ("finetune" elsewhere)."""

from lifequant.methods.base import LifelongMethod
from lifequant.registry import register


@register("method", "original")
class Original(LifelongMethod):
    help = "no protection: the lower bound"
