"""Configurations of transformers' `Glm` and `Glm4`, read from either layout of config.json.

Their names are not transformers': it looks some classes up by a configuration's name, and those
would leave the weights of the publisher's layout unread and random.
"""

from typing import Any

import transformers

from glmtune.models.glm.settings import as_glm, check_sizes


class _OfEitherLayout:
    """What both configurations add to transformers'.

    Raises:
        UserError: see `settings.as_glm` and `settings.check_sizes`.
    """

    published_as: str | None = None
    """Which published model it is, see `settings.VARIANTS`: its chat layout follows from that."""
    quantization_bit: int = 0
    """8 or 4 where the layers' linears are the packed integers of a published folder."""
    # What AutoTokenizer takes where no tokenizer_config.json names a class; it is not saved.
    tokenizer_class = "GLMTokenizer"

    def __post_init__(self, **kwargs: Any):
        kwargs.pop("auto_map", None)  # it names code that a published folder has and we do not run
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.quantization_bit = self.quantization_bit or 0
        check_sizes(vars(self))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a config.json of either layout means."""
        return super().from_dict(as_glm(config_dict), **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The configuration of a folder or a hub id; see `from_dict`."""
        settings, kwargs = cls.get_config_dict(  # type: ignore[attr-defined]
            pretrained_model_name_or_path, **kwargs
        )
        return cls.from_dict(settings, **kwargs)


class MappedGlmConfig(_OfEitherLayout, transformers.GlmConfig):
    """The configuration of ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B or GLM-Edge."""

    published_as: str | None = None
    quantization_bit: int = 0


class MappedGlm4Config(_OfEitherLayout, transformers.Glm4Config):
    """The configuration of GLM-4-0414 or GLM-Z1."""

    published_as: str | None = None
    quantization_bit: int = 0
