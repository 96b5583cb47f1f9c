"""The models that are served, found by the name that a request gives. Apart: every dialect asks it."""

from dataclasses import dataclass

from slimoe.server.api.served_model import ServedModel
from slimoe.server.process.supervisor import Supervisor


@dataclass(frozen=True, slots=True)
class Backend:
    """A model, and whoever runs its engine."""

    model: ServedModel
    supervisor: Supervisor


class Backends:
    """One model, which answers to every name."""

    def __init__(self, backend: Backend) -> None:
        self.default = backend

    @property
    def current(self) -> Backend:
        """The model that is told of where none is named."""
        return self.default

    def all(self) -> list[Backend]:
        """Every model that is offered."""
        return [self.default]

    def named(self, name: str | None) -> Backend:
        """The model that a request asks for; raises ApiError for one that is not served."""
        return self.default
