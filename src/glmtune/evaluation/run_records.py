"""What `adapters dial` and `ledger` left beside an adapter, as far as a page shows it."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError

from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.evaluation.labels import Text

Measure = Literal["chrf", "log_prob"]


class Gain(BaseModel):
    """What the rows gain at a scale, over the base."""

    gain: float


class GeneralRight(BaseModel):
    """General questions that are right, of 100."""

    after: float


class Scale(BaseModel):
    """One scale of an adapter."""

    scale: float
    chrf: Gain | None = None
    log_prob: Gain | None = None
    price: dict[str, GeneralRight] | None = None


class DialRecord(BaseModel):
    """The scales of an adapter, and the one that is recommended."""

    measure: Measure
    recommended: float
    sentence: Text
    scales: list[Scale]

    def gains(self) -> list[tuple[float, float]]:
        """Scale and gain, by the measure that decides."""
        known = ((one.scale, getattr(one, self.measure)) for one in self.scales)
        return [(scale, found.gain) for scale, found in known if found]

    def general(self) -> list[tuple[float, float]]:
        """Scale and general questions right; empty where none were asked."""
        known = ((one.scale, (one.price or {}).get("all")) for one in self.scales)
        return [(scale, found.after) for scale, found in known if found]


class LedgerRow(BaseModel):
    """A training row that stands out, with its loss a token."""

    row: int
    question: str
    answer: str
    before: float
    after: float
    kind: str


class LedgerRecord(BaseModel):
    """The training rows that stand out; of very many the first ones are listed."""

    counts: dict[str, int]
    rows: list[LedgerRow]


Record = TypeVar("Record", DialRecord, LedgerRecord)


def read_record(file: Path, kind: type[Record]) -> Record:
    """Read a record; fields that are not shown are ignored.

    Raises:
        UserError: it is damaged.
    """
    content = read_json_object(file)
    if isinstance(sentence := content.get("sentence"), dict):
        content["sentence"] = tuple(sentence.get(language) for language in Text._fields)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: is damaged ({place}: {first['msg']}); make it again") from error
