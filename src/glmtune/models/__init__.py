"""The native models. Importing this registers them with transformers' Auto classes.

After `import glmtune.models`, `AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` load a
published ChatGLM-6B folder as downloaded, and `AutoModel` the same without the head; no code from
the folder is run.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMModel
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer

__all__ = ["ChatGLMConfig", "ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMTokenizer"]

AutoConfig.register("chatglm", ChatGLMConfig)
AutoTokenizer.register(ChatGLMConfig, ChatGLMTokenizer)
AutoModel.register(ChatGLMConfig, ChatGLMModel)
# The published auto_map offers the language model under both names.
for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
    auto_class.register(ChatGLMConfig, ChatGLMForConditionalGeneration)
# Those find classes by configuration. Where transformers asks by name whether a model is a causal
# one, whose labels are to be shifted (Trainer's label smoothing, pipelines), it reads these lists.
MODEL_MAPPING_NAMES[ChatGLMConfig.model_type] = ChatGLMModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ChatGLMConfig.model_type] = (
    ChatGLMForConditionalGeneration.__name__
)
