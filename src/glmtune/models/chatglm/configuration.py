"""The transformers configuration of ChatGLM-6B, both published revisions."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from glmtune.errors import UserError
from glmtune.models import families
from glmtune.models.chatglm.settings import (
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE_V1_0,
    VOCAB_SIZE_V1_1,
    ChatGLMSettings,
    has_later_keys,
)

__all__ = ["NUM_IMAGE_TOKENS", "VOCAB_SIZE_V1_0", "VOCAB_SIZE_V1_1", "ChatGLMConfig"]


class ChatGLMConfig(ChatGLMSettings, PreTrainedConfig):
    """Shape and special ids of a ChatGLM-6B checkpoint, read from its published `config.json`.

    The special ids that the first revision leaves out of its file are filled in: `[MASK]`,
    `[gMASK]` and `<pad>` are at fixed distances from `<sop>` (`bos_token_id`). The `auto_map` of
    the file, which names the publisher's code, is neither followed nor saved.

    Raises:
        UserError: the file is of another family that is named "chatglm" too, or has an unknown
            quantisation, one-dimensional positions, or an impossible size.
    """

    model_type = "chatglm"
    attribute_map = ChatGLMSettings.attribute_map
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (Trainer adds a list)

    # Some libraries read it from every configuration, TRL for one.
    auto_map: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        PreTrainedConfig.__post_init__(self, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a config.json; arguments as transformers' method.

        Later models say "chatglm" as well: theirs becomes their own family's, so that AutoConfig
        reads them.
        """
        if cls is ChatGLMConfig and has_later_keys(config_dict):
            if (family := families.find_family(config_dict)) is None:
                raise UserError(
                    f"config.json: is {families.what_is_not_loaded(config_dict)}, which is not "
                    f"loaded here; pass {families.names_of_families()}"
                )
            return family.native().config_class.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings under the names that config.json has."""
        return PreTrainedConfig.to_dict(self)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: transformers would copy the source of the class into each saved folder."""
