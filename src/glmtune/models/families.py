"""The list of model families, and which of them a model is of.

A family is known here by its entry alone; `family` says what an entry holds.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from glmtune.errors import UserError
from glmtune.models import chatglm, glm
from glmtune.models.chatglm.family import V1_0, V1_1
from glmtune.models.family import Family, NamingRule
from glmtune.models.glm.family import ENTRIES
from glmtune.models.shape import ALL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["DEFAULT", "FAMILIES", "Family", "family_of", "find_family"]
__all__ += [*chatglm.__all__, *glm.__all__]


def __getattr__(name: str) -> Any:
    return getattr(glm if name in glm.__all__ else chatglm, name)


FAMILIES: list[Family] = [V1_1, V1_0, *ENTRIES]
DEFAULT = FAMILIES[0]
"""What is meant where no model is named."""

# What a name says of a model where no config can be read; the first that fits counts.
_NOT_LOADED = {
    r"visualglm": "VisualGLM-6B",
    r"glm-?4\.?\d?v|glm-edge-v|cogvlm|glm-ocr|autoglm": "a GLM that sees pictures",
    r"glm-?4\.[5-9]": "GLM-4.5 or newer, a mixture of experts",
    r"glm-?5": "GLM-5, a mixture of experts",
    r"glm-(large|2b|10b|130b)": "an older GLM",
    r"llama|qwen|baichuan|internlm|mistral|deepseek|bloom|gemma|\b(yi|phi)-": "of another family",
}


# What a config.json's model_type says of a model that is not loaded.
_OTHER_TYPES = {
    "glm4_moe": "GLM-4.5, 4.6 or 4.7, a mixture of experts",
    "glm4_moe_lite": "GLM-4.7-Flash, a mixture of experts",
    "glm_moe_dsa": "GLM-5, a mixture of experts",
    "glm5_next": "GLM-5.3-Flash, a mixture of experts",
    "glm4v": "GLM-4.1V, which sees pictures",
    "glm4v_moe": "GLM-4.5V, which sees pictures",
    "glm46v": "GLM-4.6V, which sees pictures",
    "glm_ocr": "GLM-OCR, which sees pictures",
    "glm": "an older GLM or one in a layout of its own",
}


def what_is_not_loaded(settings: Mapping[str, Any]) -> str:
    """What a config.json that no family owns is of, in a few words."""
    kind = str(settings.get("model_type"))
    if "vision_config" in settings and kind == "chatglm":
        return "GLM-4V-9B, which sees pictures"
    if kind in _OTHER_TYPES:
        return _OTHER_TYPES[kind]
    return f"of model_type {kind!r}, no model that is known here"


def names_of_families() -> str:
    """The models that are loaded, as a list in a sentence."""
    names = list(dict.fromkeys(family.name for family in FAMILIES if "v1.0" not in family.name))
    return f"{', '.join(names[:-1])} or {names[-1]}"


def find_family(settings: Mapping[str, Any]) -> Family | None:
    """The family that a config.json is of; None where none of the list is."""
    return next((family for family in FAMILIES if family.owns(settings)), None)


def family_of(config: "PreTrainedConfig | Any") -> Family:
    """The family of a configuration, or of the settings that `Family.read_settings` returned."""
    family = find_family(config.to_dict())
    assert family is not None, f"no family owns a {type(config).__name__}"
    return family


def family_not_loaded(hub_id: str) -> str | None:
    """What a model is if its name says that it is not loaded here: "ChatGLM3-6B", for example."""
    name = hub_id.lower()
    return next((what for words, what in _NOT_LOADED.items() if re.search(words, name)), None)


def naming_rule_of(base: str, family: Family | None) -> NamingRule | None:
    """What the licence of a base asks of the names of models made of it; None if nothing.

    Args:
        base: its name on a hub, or that of its folder.
        family: of its config.json, where that is at hand.
    """
    if family is not None:
        return family.naming_rule
    rules = (family.naming_rule for family in FAMILIES)
    return next((rule for rule in rules if rule and re.search(rule.bases, base.lower())), None)


def published_names() -> tuple[str, ...]:
    """Names of all families' float models on their hubs."""
    return tuple(dict.fromkeys(name for family in FAMILIES for name in family.published))


def special_names() -> tuple[str, ...]:
    """Names of special tokens of any family."""
    return tuple(dict.fromkeys(name for family in FAMILIES for name in family.special_names))


def check_targets(wanted: tuple[str, ...] | None) -> None:
    """Make sure, before it is known which model is meant, that some family has all these linears.

    Raises:
        UserError: `lora_target` names one that none has.
    """
    shapes = [family.shape(family.read_settings(family.published_settings)) for family in FAMILIES]
    known = {name for shape in shapes for name in shape.linear_names} | {ALL}
    known |= {name for family in FAMILIES for name in family.other_names}
    if wanted and (unknown := [name for name in wanted if name not in known]):
        raise UserError(
            f"lora_target: no model has a linear {', '.join(map(repr, unknown))}; choose from "
            f"{', '.join(sorted(known - {ALL}))}, or {ALL} for every one of a layer"
        )


@lru_cache(maxsize=1)
def register() -> None:
    """Let transformers' Auto classes load the families that have classes of their own."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )
    from transformers.models.auto.tokenization_auto import (
        REGISTERED_TOKENIZER_CLASSES,
        TOKENIZER_MAPPING_NAMES,
    )

    for family in FAMILIES:
        native, name = family.native(), family.model_type
        if native.bare_class is None:
            continue
        AutoModel.register(native.config_class, native.bare_class, exist_ok=True)
        # Published folders offer the language model under both names.
        for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
            auto_class.register(native.config_class, native.model_class, exist_ok=True)
        REGISTERED_TOKENIZER_CLASSES.update(native.tokenizer_names)
        tokenizer_class = native.tokenizer_class
        if native.in_transformers:
            # transformers takes a tokenizer of its own wherever this list names that.
            TOKENIZER_MAPPING_NAMES[name] = tokenizer_class.__name__
            AutoTokenizer.register(CONFIG_MAPPING[name], tokenizer_class, exist_ok=True)
            continue
        AutoConfig.register(name, native.config_class, exist_ok=True)
        AutoTokenizer.register(native.config_class, tokenizer_class, exist_ok=True)
        # Those find classes by configuration. Where transformers asks by name whether a model is a
        # causal one, whose labels are to be shifted (Trainer's label smoothing, pipelines), it
        # reads these lists.
        MODEL_MAPPING_NAMES[name] = native.bare_class.__name__
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] = native.model_class.__name__
