"""The former name of ``lifequant.qat.scales``, for training loops that were written against it."""

from lifequant.qat.scales import Scales, param_groups

__all__ = ["StepSizes", "param_groups"]


class StepSizes(Scales):
    """``Scales`` under its former name."""

    bounded = Scales.limit_scale_updates
