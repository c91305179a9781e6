"""One export: what is written, from what, and what all targets need of it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from glmtune.adapters.formats import Adapter, read_adapter
from glmtune.adapters.merge import Merged, merge_in_memory
from glmtune.adapters.naming import in_own_names
from glmtune.data.row_rule import as_ids
from glmtune.errors import UserError, note
from glmtune.export.source import Source
from glmtune.models.base_files import fetch_base
from glmtune.models.families import Family
from glmtune.models.loading import load_config, load_tokenizer


class Job:
    """An export that is being made.

    Args:
        source: what is exported.
    """

    def __init__(self, source: Source):
        self.source = source

    @property
    def family(self) -> Family:
        """The family of the base."""
        return self.source.family

    @cached_property
    def base_folder(self) -> Path:
        """The base's files."""
        return fetch_base(self.source.base)

    @cached_property
    def config(self) -> Any:
        """The base's configuration."""
        return load_config(self.source.base)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The base's tokenizer; None, with a note, where its folder has none."""
        try:
            return load_tokenizer(self.source.base)
        except UserError as error:
            note(f"exported without a tokenizer ({error})")
            return None

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter, in the names of the family's model class."""
        assert self.source.adapter, "of targets that need one"
        adapter = read_adapter(self.source.adapter)
        adapter.check_effect()
        return in_own_names(adapter, self.family.adapter_names, self.config)

    def merge(self) -> Merged:
        """Base and adapter as one model in memory; each call loads them."""
        return merge_in_memory(self.source.base, self.source.adapter)

    @property
    def stop_ids(self) -> list[int]:
        """All ids that end an answer, of the base's files and of its layout; the end first."""
        found = tuple(as_ids(self.config.eos_token_id))
        if self.tokenizer is not None:
            rule = self.tokenizer.row_rule
            found = (*found, *(end.id for end in rule.end), *rule.stops)
        return [id_ for id_ in dict.fromkeys(found) if id_ < self.config.vocab_size]

    def set_stops(self, model: Any) -> None:
        """Let generation_config.json name every id that ends an answer."""
        settings = model.generation_config
        stops = list(dict.fromkeys([*as_ids(settings.eos_token_id), *self.stop_ids]))
        if stops:
            settings.eos_token_id = stops if len(stops) > 1 else stops[0]
        settings._from_model_config = False  # so that nothing is taken from config.json instead
        if settings.pad_token_id is None:
            settings.pad_token_id = self.config.pad_token_id
