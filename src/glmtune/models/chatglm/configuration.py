"""The configuration of ChatGLM-6B, both published revisions, as transformers knows it."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from glmtune.models.chatglm.settings import (
    NUM_IMAGE_TOKENS,
    VOCAB_SIZE_V1_0,
    VOCAB_SIZE_V1_1,
    ChatGLMSettings,
)

__all__ = ["NUM_IMAGE_TOKENS", "VOCAB_SIZE_V1_0", "VOCAB_SIZE_V1_1", "ChatGLMConfig"]


class ChatGLMConfig(ChatGLMSettings, PreTrainedConfig):
    """Shape and special ids of a ChatGLM-6B checkpoint, read from its published `config.json`.

    The special ids that the first revision leaves out of its file are filled in: `[MASK]`,
    `[gMASK]` and `<pad>` stand at fixed distances from `<sop>` (`bos_token_id`). The `auto_map` of
    the file, which names code that the publisher wrote, is neither followed nor saved.

    Raises:
        UserError: the file is of another family that calls itself "chatglm" too, states weights
            quantised in a way that is not the published one, asks for positions that this model
            does not have, or holds no possible size.
    """

    model_type = "chatglm"
    attribute_map = ChatGLMSettings.attribute_map
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (Trainer adds a list)

    # Clients look for it, TRL in every configuration.
    auto_map: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs):
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        PreTrainedConfig.__post_init__(self, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings under the names that config.json has."""
        return PreTrainedConfig.to_dict(self)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: what is registered so leaves a copy of its source in each saved folder."""
