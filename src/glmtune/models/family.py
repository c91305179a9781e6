"""What a model family provides, as data and plain functions; `families` has the list of them.

To add one: a folder of its own with a configuration, classes of model and tokenizer (its own or
transformers'), the functions named below, and one entry in the list.

An entry itself needs no torch, so that rows are encoded and runs are planned without it; `native`
imports what does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from glmtune.data.dataset import RowTokenizer
from glmtune.data.row_rule import RowRule
from glmtune.models.shape import Shape, find_targets

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from glmtune.models.decoding import DecodingBlock
    from glmtune.ops.lora import LowRank


class PackedBlock(NamedTuple):
    """How a family's layer is computed on packed rows: see `models.packed`.

    Shapes: T tokens of a pack, L supervised tokens, H hidden, X position streams.
    """

    num_linears: int
    """Linears of a layer that can have an adapter; each gets a seed of dropout of its own."""
    weights_of: Callable[[nn.Module], tuple]
    """A layer's weights, as `block` takes them. The tensors are shared, not copied."""
    block: Callable[..., Tensor]
    """``(hidden_TH, weights, attention, cos, sin, dropout, wanted_L) -> hidden_TH``; see
    `models.packed.PackedModel.loss`."""
    angles: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    """Float32 cosines and sines ``(T, ...)`` of positions ``(X, T)``, given the configuration."""
    final_norm: Callable[[PreTrainedModel], Any]
    """The norm before the head, to be called."""
    together: tuple[tuple[str, ...], ...] = ()
    """Names, within a layer, of linears that read one input and that `block` computes as one."""


class ChatFormat(NamedTuple):
    """The words around a conversation that the family's chat models were taught."""

    describe: str
    """Description for the list of formats in a chat."""
    write: Callable[[list[tuple[str, str]], str], str]
    """Earlier rounds of question and answer, and a question, to what the model reads."""
    polish: Callable[[str], str]
    """An answer as it is shown."""
    marks: tuple[str, ...]
    """What `polish` replaces: the beginning of one at an answer's end may go on to be one."""
    unsettled: str
    """Characters that `polish` writes otherwise, depending on the character after them."""
    read_calls: Callable[[str, Collection[str]], list[tuple[str, str]] | None] = (
        lambda text, names: None
    )
    """An answer, given the names of the tools that may be called, to its calls: each with the name
    of a tool and its arguments as JSON. None where the answer is no call."""


class AdapterNames(NamedTuple):
    """What the family's linears are called in adapters, and how updates in other names fit them.

    Updates are by module of the base model. The last two functions raise UserError without the
    adapter's path where sizes cannot be.
    """

    is_own: Callable[[str], bool]
    """Whether a module is a linear of the family's model class, by its whole name."""
    is_foreign: Callable[[str], bool] = lambda module: False
    """Whether it is one of the family's linears, or several, as other code has them."""
    to_own: Callable[[Mapping[str, LowRank], Any], dict[str, LowRank]] = lambda updates, _: dict(
        updates
    )
    """``(updates, config)``: the same in the names and shapes of the model class. The configuration
    may be None; sizes are then read off the tensors."""
    to_published: Callable[[Mapping[str, LowRank], Any], dict[str, LowRank]] | None = None
    """The reverse, into the names of the publisher's own code; None where it has no others."""
    to_apart: Callable[[Mapping[str, LowRank], Any], dict[str, LowRank]] | None = None
    """Linears that are one in the model class, and apart in engines that serve it, as those have
    them; None where there are none."""


class Exports(NamedTuple):
    """What a family's models can be written as for other programs; see `glmtune.export`."""

    refused: Mapping[str, str] = MappingProxyType({})
    """Target to why the family cannot be written for it and what to do instead: the rest of a
    sentence that begins with the target."""
    as_published: Callable[[Mapping[str, Tensor], Any], tuple[dict[str, Any], Iterator]] | None = (
        None
    )
    """``(tensors, config)`` to the config.json and the ``(name, tensor)`` pairs of the publisher's
    own layout. Raises UserError where that cannot say what the configuration does."""
    is_published: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    """Whether a config.json is of that layout, so that an engine has the publisher's names."""
    plain_tokenizer: Callable[[Any], Any] | None = None
    """The family's tokenizer as one of the tokenizers library's; None where it has none."""
    vllm_has_own_names_since: tuple[int, int] | None = None
    """The version of vLLM that serves transformers' layout by transformers' own class, so that it
    has the model class's names; earlier ones, or all where None, have linears apart."""
    gguf: Callable[[Any, Any], Any] | None = None
    """``(config, tokenizer)`` to a `models.gguf_form.GgufForm`."""


class NamingRule(NamedTuple):
    """What a licence asks of the names of models that are made of a base."""

    licence: str
    """The licence, for messages and cards."""
    begins: str
    """What a derived model's name begins with, in any case of letters."""
    notice: str
    """A sentence that its page shows."""
    bases: str
    """A pattern of the names of bases under this licence, in lower case."""


class Native(NamedTuple):
    """The part of a family that needs torch: its classes, and how its layers are computed."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    tokenizer_class: Any
    """Has `row_rule`, `encode_batch`, `decode`, `vocab_hash` and `revision`, see
    `data.dataset.RowTokenizer`."""
    check_folder: Callable[..., None]
    """``(folder, config, model_class)``: raises UserError in one line where a folder's weights,
    configuration and vocabulary are not of one model."""
    packed: PackedBlock
    """How its layer is computed on packed rows, for training."""
    decoding: DecodingBlock
    """How it is computed token by token, for answering."""
    read_tensors: Callable[[Path, Any], dict[str, Tensor] | None] = lambda folder, config: None
    """``(folder, config)`` to the tensors of a folder in a layout that transformers does not read,
    under the names of the model class; None for a folder that it does."""
    bare_class: type[PreTrainedModel] | None = None
    """The model without its head, of a family that has classes of its own."""
    in_transformers: bool = True
    """Whether transformers has classes for this model_type, too."""
    tokenizer_names: Mapping[str, Any] = {}
    """Further names of classes in a tokenizer_config.json, with the classes that are meant."""
    write_random: Callable[..., None] | None = None
    """``(folder, config, vocab_file, *, seed, num_shards, device)``: random weights, on disk as
    published."""
    bench_configs: Mapping[str, PreTrainedConfig] = {}
    """What `glmtune bench --shape` offers: name to configuration."""
    bench_peers: Mapping[str, str] = {}
    """For shapes of a model that transformers has not: the shape of its that is timed beside."""


class Family(NamedTuple):
    """A model family.

    Only these functions know its special ids, its linears, its norms and its positions.
    """

    name: str
    """The name that its users know."""
    owns: Callable[[Mapping[str, Any]], bool]
    """Whether a config.json is of this family."""
    model_type: str
    """The `model_type` in config.json."""
    native: Callable[[], Native]
    """What the family needs torch for; the first call imports it."""
    read_settings: Callable[[Mapping[str, Any]], Any]
    """A config.json's settings as a configuration, or as an object with the same attributes that
    needs no torch. What is missing has its default. Raises UserError as the configuration does."""
    published: tuple[str, ...]
    """Names of the float models on their hubs, the newest first."""
    shape: Callable[[Any], Shape]
    """The sizes of a model, of its configuration."""
    row_rule: Callable[[Any], RowRule]
    """How rows are laid out, of the configuration."""
    check_pair: Callable[[Any, Any], None]
    """``(config, tokenizer)``: raises UserError where the two name other ids."""
    lora_target: tuple[str, ...]
    """The linears that get an adapter where a run does not say which."""
    lora_rank: int
    """The rank of their updates where a run does not say which."""
    chat: ChatFormat
    probe_row: Callable[[Any], list[int]]
    """Ids of a short row from all over the vocabulary, of the configuration."""
    head_dims: tuple[int, ...]
    """Sizes of a head for which the packed block is compiled with the kernels of ops/."""
    adapter_names: AdapterNames | None = None
    """What adapters call the family's linears; None where only the model class's names count."""
    published_settings: Mapping[str, Any] = MappingProxyType({})
    """config.json of the model that `published` names, as far as `read_settings` has no default."""
    other_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    """What other code calls linears of a layer: a name to those that are meant."""
    row_tokenizer: Callable[[Path], RowTokenizer | None] = lambda folder: None
    """A folder's tokenizer without torch and transformers, for rows alone; None where only the
    tokenizer's class will do."""
    check_tokenizer: Callable[[Any], list[str]] = lambda tokenizer: []
    """In what a folder's own chat template and settings differ from how rows are laid out."""
    known_sha256: Callable[[str, str], set[str]] = lambda hub_id, name: set()
    """Hub id and file name to what the sha256 of a published file may be; empty if not known."""
    special_names: tuple[str, ...] = ()
    """Names of its special tokens that somebody may have typed into a text."""
    exports: Exports = Exports()
    """What its models can be written as for other programs."""
    naming_rule: NamingRule | None = None
    """What the licence asks of the names of derived models; None where it asks nothing."""
    new_model: Callable[[Any], Any] | None = None
    """What `glmtune new-model` does with its settings."""

    def targets(self, wanted: tuple[str, ...] | None, shape: Shape) -> tuple[str, ...]:
        """The linears that get an adapter.

        Raises:
            UserError: `wanted` names one that the family does not have.
        """
        return find_targets(
            wanted or self.lora_target, self.name, shape.linear_names, self.other_names
        )


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model of any family."""
    return cast("nn.ModuleList", model.base_model.layers)
