"""Why no tokens can be drafted for a model. Apart: what a trace and a lossy mode each have against it."""

from slimoe.offload.plan.engine_config import EngineConfig


def undraftable(config: EngineConfig) -> str | None:
    """What speaks against drafting tokens, as the end of a sentence; None where nothing does."""
    if config.loss.lossy is not None or config.loss.max_kl:
        return "what a lossy mode gives up is measured for one token at a time"
    if config.trace is not None:
        return "a recording of the selected experts is one of the answer's tokens alone"
    return None
