"""A text in both languages of the pages."""

from typing import NamedTuple


class Text(NamedTuple):
    """A label in both languages of the report."""

    zh: str
    en: str

    def __str__(self) -> str:
        return self.en if self.zh == self.en else f"{self.zh} / {self.en}"
