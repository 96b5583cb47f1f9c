"""What a server offers: one model, or those of a folder beside it, and how many of them are loaded at once."""

from dataclasses import dataclass
from pathlib import Path

from slimoe.offload.errors import UsageError
from slimoe.offload.plan.budget import AUTO
from slimoe.offload.plan.engine_config import EngineConfig, changed
from slimoe.server.api.backends import Backend, Backends
from slimoe.server.api.served_model import ServedModel, model_id
from slimoe.server.models.folder import FoundModel, models_in
from slimoe.server.models.plans import PlannedModel, plan_models
from slimoe.server.options.serving_memory import TEMPLATE_BYTES, serving_bytes
from slimoe.server.process.pool import Pool
from slimoe.server.process.supervisor import DEFAULT_N_QUEUE, Supervisor
from slimoe.server.telling import tell


@dataclass(frozen=True, slots=True)
class Offer:
    """What to serve: `engine` says how to open a model, and which, unless only those of `folder` are offered.

    At most `n_most` are loaded at once. `alias` is another name of the model that `engine` says. `chat_template` is
    used in place of the models' own, and `thinks` says whether answers begin with reasoning where a request does not.
    """

    engine: EngineConfig
    version: str
    alias: str | None = None
    folder: Path | None = None
    has_model: bool = True
    n_most: int = 1
    idle_seconds: float | None = None
    n_queue: int = DEFAULT_N_QUEUE
    chat_template: str | None = None
    thinks: bool | None = None

    def check(self) -> None:
        """Raises UsageError for what does not go together."""
        if self.folder is None:
            if self.n_most > 1:
                raise UsageError("--models-max is for several models. Name a folder with --models.")
            return
        if self.alias is not None and not self.has_model:
            raise UsageError("--alias names one model, and none is given. Models of a folder go by their files' names.")
        if self.engine.trace is not None:
            raise UsageError("--trace records one model. Leave --models out.")
        if self.n_most > 1 and self.engine.memory.ram in (None, AUTO):
            raise UsageError(
                f"--models-max {self.n_most} divides a budget between models. Say how large it is with --ram."
            )

    async def backends(self) -> Backends:
        """The models, which are planned first if there are several; raises UsageError."""
        self.check()
        own = self.engine.model
        if self.folder is None:
            supervisor = self._supervisor(self.engine)
            backend = Backend(ServedModel(model_id(own, self.alias), own, self.version), supervisor)
            return Backends([backend], Pool({supervisor: 0}, idle_seconds=self.idle_seconds))
        found = [model for model in models_in(self.folder) if not (self.has_model and model.path == own)]
        if self.has_model:
            n_bytes = own.stat().st_size if own.is_file() else 0
            found = [FoundModel(model_id(own, self.alias), own, n_bytes), *found]
        plans = await plan_models([changed(self.engine, {"model": model.path}) for model in found])
        rows = list(zip(found, plans, strict=True))
        for model, plan in rows:
            if plan is not None and plan.problem is not None:
                tell(f"{model.name} cannot be loaded now, and requests for it will fail: {plan.problem}")
        if not self.has_model:
            # Where nobody says which, it is one that can be opened.
            rows.sort(key=lambda row: row[1] is None or not row[1].fits)
        served, needs = [], {}
        for model, plan in rows:
            config = changed(self.engine, {"model": model.path})
            supervisor = self._supervisor(config)
            needs[supervisor] = 0 if plan is None or not plan.fits else _own_bytes(plan)
            shown = ServedModel(model.name, model.path, self.version, n_bytes=model.n_bytes, plan=plan)
            served.append(Backend(shown, supervisor))
        budget = max((plan.available_bytes for plan in plans if plan is not None and plan.fits), default=None)
        pool = Pool(needs, self.n_most, self.idle_seconds, budget if self.n_most > 1 else None)
        return Backends(served, pool, are_named=True)

    def _supervisor(self, config: EngineConfig) -> Supervisor:
        return Supervisor(config, self.n_queue, chat_template=self.chat_template, thinks=self.thinks)


def _own_bytes(plan: PlannedModel) -> int:
    """What a loaded model takes with the process of its chat template, without the processes that all share."""
    return plan.required_bytes - serving_bytes() + TEMPLATE_BYTES
