"""`--to gguf`: a model for llama.cpp and Ollama, or the adapter alone for llama.cpp's --lora."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glmtune.adapters.formats import write_adapter
from glmtune.adapters.merge import probe
from glmtune.adapters.naming import check_plain, in_names
from glmtune.data.files import new_file
from glmtune.errors import UserError
from glmtune.export import llama_cpp
from glmtune.export.adapter_names import USE_HF
from glmtune.export.gguf_file import Reader, read_tensors, write_adapter_file, write_model
from glmtune.export.job import Job
from glmtune.export.reopening import CHAT, OURS, TEXTS, Reopened, reopen_adapter
from glmtune.models.gguf_form import GgufForm
from glmtune.ops.lora import LowRank

MODELFILE = "Modelfile"
ADAPTER_FILE = "adapter.gguf"
MOST_POSITIONS = 8192
"""What a Modelfile asks for of a longer context, whose memory Ollama would take at once."""
_ROUNDING = {"f32": 1e-3, "f16": 2e-2, "q8_0": 2e-1}
"""Number type -> the share of the largest logit that rounding the weights may move one by."""
_NO_LLAMA_CPP = "llama.cpp is not installed here (pip install xllamacpp), so it did not read it"


def write(job: Job, folder: Path) -> Reopened:
    """Write a GGUF file, a Modelfile beside it, and open it with llama.cpp where that is there.

    Raises:
        UserError: there is no tokenizer, llama.cpp has no such model, or it answers otherwise.
    """
    if job.tokenizer is None:
        raise UserError(
            f"--to gguf: {job.source.base} has no tokenizer, which a GGUF file holds; put the "
            "published tokenizer's files into that folder"
        )
    if job.source.settings.adapter_alone:
        return _write_adapter(job, folder)
    merged = job.merge()
    model, form = merged.model, _form(job)
    quant = job.source.quant
    path = folder / f"{job.source.name}-{quant}.gguf"
    write_model(path, job.source.name, form, model.config, _tensors(model), quant)
    _write_modelfile(job, folder, path.name, form)
    difference = _read_back(model, path, form, merged.expected, quant)
    if not llama_cpp.is_installed():
        return Reopened(f"{OURS} with the gguf package", False, difference, (_NO_LLAMA_CPP,))
    told = llama_cpp.ask(path, _rows(job), texts=TEXTS, chat=CHAT)
    found = llama_cpp.compare_answers(model, _rows(job), told, job.stop_ids, quant)
    ids, notes = _compare_ids(job, told)
    return Reopened(told.by, True, f"{found}; {ids}; {difference}", notes)


def _form(job: Job) -> GgufForm:
    make = job.family.exports.gguf
    assert make, "refused before"
    return make(job.config, job.tokenizer)


def _tensors(model: Any) -> dict[str, Tensor]:
    """A model's tensors, each once: a head that is the embedding is left out."""
    found: dict[str, Tensor] = {}
    places = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in places:
            places.add(tensor.data_ptr())
            found[name] = tensor
    return found


def _read_back(model: Any, path: Path, form: GgufForm, expected: Tensor, quant: str) -> str:
    """Let a model have the weights that a file holds, and compare its logits.

    Raises:
        UserError: the file lacks a weight, or they differ by more than the file's rounding.
    """
    names, tied = {}, model.state_dict().keys() - _tensors(model).keys()
    for key in _tensors(model):
        module, _, kind = key.rpartition(".")
        names[f"{form.name_of(module)}.{kind}"] = key
    state = {names[name]: torch.from_numpy(values.copy()) for name, values in read_tensors(path)}
    missing, extra = model.load_state_dict(state, strict=False)
    model.tie_weights()
    if {*missing} - tied or extra or len(state) < len(names):
        raise UserError(f"--to gguf: {path.name} lacks {[*missing, *extra][:3]}; report this")
    found = probe(model)
    share = float((found - expected).abs().max() / expected.abs().max())
    if share > _ROUNDING[quant]:
        raise UserError(
            f"--to gguf: the weights in {path.name} give other logits, by {share:.1e} of the "
            f"largest, more than {quant} rounds; use --quant f32, or report this"
        )
    return f"as {quant} the weights move a logit by {share:.1e} of the largest at most"


def _rows(job: Job) -> list[list[int]]:
    """Ids that both are asked to continue: a conversation, and a text."""
    tokenizer = job.tokenizer
    assert tokenizer is not None
    chat = tokenizer.apply_chat_template([*CHAT], add_generation_prompt=True)["input_ids"]
    return [list(chat), tokenizer.encode_plain([TEXTS[0]])[0]]


def _compare_ids(job: Job, told: llama_cpp.Told) -> tuple[str, tuple[str, ...]]:
    """Compare llama.cpp's ids of texts and of a conversation with ours.

    Raises:
        UserError: those of a text differ.
    """
    assert job.tokenizer is not None
    for text, ours, theirs in zip(
        TEXTS, job.tokenizer.encode_plain([*TEXTS]), told.texts, strict=True
    ):
        if ours != theirs:
            raise UserError(
                f"--to gguf: {told.by} reads {text!r} as {theirs[:8]}, we as {ours[:8]}; report "
                "this with the vocabulary"
            )
    found = f"the ids of {len(TEXTS)} texts"
    if told.chat == _rows(job)[0]:
        return f"{found} and of a conversation by the chat template are the same", ()
    return f"{found} are the same", (
        "llama.cpp writes a conversation by the chat template otherwise than it was trained with",
    )


def _write_modelfile(job: Job, folder: Path, file: str, form: GgufForm) -> None:
    """Write how Ollama runs the file."""
    lines = [
        f"# Of glmtune: {job.family.name}",
        f"FROM ./{file}",
        f'TEMPLATE """{form.ollama_template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in form.stops),
        f"PARAMETER num_ctx {min(job.config.max_position_embeddings, MOST_POSITIONS)}",
    ]
    with new_file(str(folder / MODELFILE)) as output:
        output.write("\n".join(lines) + "\n")


def _write_adapter(job: Job, folder: Path) -> Reopened:
    check_plain(job.adapter, "--to gguf --adapter_alone", USE_HF)
    form, path = _form(job), folder / ADAPTER_FILE
    quant = job.source.settings.quant or "f32"
    write_adapter_file(path, job.source.name, form, job.adapter, quant)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as place:
        again = Path(place, "adapter")
        adapter = in_names(job.adapter, lambda updates, _: _updates(path, form, updates), None)
        write_adapter(adapter.config, adapter.weights, again, None)
        found = reopen_adapter(job.source.base, str(job.source.adapter), str(again))
        if not llama_cpp.is_installed():
            return Reopened(f"{OURS} with the gguf package", False, found, (_NO_LLAMA_CPP,))
        return _ask_with_adapter(job, form, path, Path(place, "base.gguf"), found)


def _updates(path: Path, form: GgufForm, modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The updates that a file holds, by our modules."""
    tensors = {name: torch.from_numpy(values.copy()) for name, values in read_tensors(path)}
    stems = {module: f"{form.name_of(module)}.weight" for module in modules}
    alpha = _alpha(path)
    found = {}
    for module, stem in stems.items():
        a_RI, b_OR = tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"]
        found[module] = LowRank(a_RI, b_OR, alpha / len(a_RI))
    return found


def _alpha(path: Path) -> float:
    return float(Reader(str(path)).fields["adapter.lora.alpha"].contents())


def _ask_with_adapter(job: Job, form: GgufForm, path: Path, base: Path, found: str) -> Reopened:
    """Let llama.cpp put the adapter on the base, of which a file is made for the time being."""
    from glmtune.adapters.lora import load_adapter
    from glmtune.models.loading import load_base_model

    assert job.source.adapter, "of a whole model it is refused"
    plain = load_base_model(job.source.base, dtype=torch.float32)
    write_model(base, "base", form, plain.config, _tensors(plain), "f32")
    model = load_adapter(plain, job.source.adapter)
    rows: Sequence[Sequence[int]] = _rows(job)
    told = llama_cpp.ask(base, rows, adapter=path)
    answers = llama_cpp.compare_answers(model, rows, told, job.stop_ids, "f32")
    return Reopened(told.by, True, f"on a file of the base, {answers}; {found}")
