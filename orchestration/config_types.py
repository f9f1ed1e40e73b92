"""Types of sweep.yaml's values that stand in several keys."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from search_spaces.values import MAX_POINTS


class LogRange(BaseModel):
    """`num` log-spaced values from `low` to `high`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    low: float = Field(gt=0)
    """The smallest value."""
    high: float = Field(gt=0)
    """The largest value."""
    num: int = Field(ge=1, le=MAX_POINTS)
    """How many values."""


class CarriedFrom(BaseModel):
    """{from: runs/SMALL}: the learning rate that was best there, carried to this model's width."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: str = Field(alias="from")
    """Folder of the run, or its URL."""

    @model_serializer
    def _as_written(self) -> dict[str, str]:
        return {"from": self.folder}


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction01 = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
