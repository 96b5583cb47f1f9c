"""The form `WEATHER` as a class, for the clients that take one."""

from typing import Literal

from pydantic import BaseModel, Field


class Weather(BaseModel):
    """Tells the weather of some days in a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)
