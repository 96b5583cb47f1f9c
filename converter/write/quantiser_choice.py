"""Which way of fitting a plan asks for."""

from slimoe.converter.layout.plan import SlimPlan
from slimoe.converter.source.model_source import ModelSource
from slimoe.converter.stats.statistics import Statistics
from slimoe.converter.write.quantiser import Fit, PlainFit
from slimoe.offload.errors import UsageError


def chosen_fit(source: ModelSource, plan: SlimPlan, statistics: Statistics | None, n_threads: int) -> Fit:
    """The fit that carries the plan out; raises UsageError for one that needs statistics without them."""
    plain = PlainFit(statistics if plan.importance else None, is_tied=plan.output_type is None, n_threads=n_threads)
    if not plan.feedback and not plan.refit:
        return plain
    if statistics is None:
        raise UsageError(
            "Feedback and refitted routers need calibration tokens. Run slimoe calibrate, give --stats FILE."
        )
    # torch is heavy, and all other ways of converting do without.
    from slimoe.converter.write.error_feedback import FeedbackFit

    return FeedbackFit(source, plan, statistics, plain, n_threads=n_threads)
