"""The models that are served, found by the name that a request gives. Apart: every dialect asks it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slimoe.server.api.served_model import ServedModel
from slimoe.server.api_error import ApiError, from_failure, not_found
from slimoe.server.messages import Answer, Failure, Order, Question
from slimoe.server.process.pool import Pool
from slimoe.server.process.request_handle import EngineFailure
from slimoe.server.process.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Backend:
    """A model, and whoever runs its engine, for `keep` seconds after the request: see `Hold`."""

    model: ServedModel
    supervisor: Supervisor
    keep: float | None = None

    async def ask(self, question: Callable[[int], Question | Order], param: str) -> Answer:
        """The engine's answer about what the field `param` holds; raises ApiError."""
        try:
            return await self.supervisor.ask(question)
        except EngineFailure as error:
            raise from_failure(error.failure, param) from None


class Backends:
    """The models, of which `pool` loads those that are asked for; a single one answers to every name."""

    def __init__(self, backends: Sequence[Backend], pool: Pool | None = None, *, are_named: bool = False) -> None:
        """The first is the one that is loaded where none is named; with `are_named` unknown names are refused."""
        self.default = backends[0]
        self.pool = Pool({backend.supervisor: 0 for backend in backends}) if pool is None else pool
        self._by_name = {backend.model.id: backend for backend in backends}
        self._are_named = are_named

    @property
    def current(self) -> Backend:
        """The model for those who name none: of the loaded ones that which was used last."""
        loaded = self.pool.loaded
        return next((one for one in self.all() if loaded and one.supervisor is loaded[0]), self.default)

    def all(self) -> list[Backend]:
        """Every model that is offered."""
        return list(self._by_name.values())

    def named(self, name: str | None, keep: float | None = None) -> Backend:
        """The model that a request asks for; raises ApiError for one that is not served or cannot be opened."""
        if self._are_named and name and name not in self._by_name:
            raise self.unknown(name)
        backend = self._by_name[name] if self._are_named and name else self.current
        plan = backend.model.plan
        if plan is not None and not plan.fits and backend is not self.default:
            # Told before another model has to go for it.
            raise from_failure(
                Failure(
                    0,
                    "does_not_fit" if plan.required_bytes else "model",
                    f"The model {backend.model.id!r} could not be opened when the server was started: {plan.problem}",
                    required_bytes=plan.required_bytes,
                    available_bytes=plan.available_bytes,
                )
            )
        return replace(backend, keep=keep)

    def unknown(self, name: str) -> ApiError:
        """The answer to who asks for a model that is not served."""
        offered = ", ".join(map(repr, self._by_name))
        return not_found(f"The model {name!r} does not exist. This server offers {offered}.", "model_not_found")
