"""How to run an export: the commands on its card."""

from collections.abc import Callable
from pathlib import Path

from glmtune.data.files import read_json_object
from glmtune.export.job import Job
from glmtune.models.resolve import base_name
from glmtune.run_files import ADAPTER_CONFIG_FILE


def usage_of(job: Job, folder: Path) -> str:
    """The commands for what was written, as Markdown.

    Args:
        job: what was exported.
        folder: what was written.
    """
    return _USAGES[job.source.settings.to](job, folder)


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _hf(job: Job, folder: Path) -> str:
    if job.family.native().in_transformers:
        imports, trust = "from transformers import AutoModelForCausalLM, AutoTokenizer", ""
    else:
        imports = "import glmtune.models  # pip install glmtune\n"
        imports += "from transformers import AutoModelForCausalLM, AutoTokenizer"
        trust = ""
    name = job.source.out.name
    return _block(
        "python",
        imports,
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    )


def _published(job: Job, folder: Path) -> str:
    return (
        "The folder is in the publisher's layout (config.json with rope_ratio, seq_length and "
        "padded_vocab_size), for programs that read that. "
        f"`glmtune chat --base {job.source.out.name}` opens it as well."
    )


def _gguf(job: Job, folder: Path) -> str:
    (file,) = sorted(path.name for path in folder.glob("*.gguf"))
    if job.source.settings.adapter_alone:
        return _block("sh", f"llama-cli -m BASE.gguf --lora {file}")
    return _block(
        "sh",
        f"llama-server -m {file} --jinja",
        f"ollama create {job.source.name.lower()} -f Modelfile",
        f"ollama run {job.source.name.lower()}",
    )


def _vllm(job: Job, folder: Path) -> str:
    from glmtune.adapters.for_vllm import largest_rank

    rank = largest_rank(read_json_object(folder / ADAPTER_CONFIG_FILE)["r"])
    out = job.source.out.name
    return _block(
        "sh",
        f"vllm serve {base_name(job.source.base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules tuned={out}",
    )


def _peft(job: Job, folder: Path) -> str:
    return _block(
        "python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base, "{job.source.out.name}")',
    )


_USAGES: dict[str, Callable[[Job, Path], str]] = {
    "hf": _hf,
    "chatglm": _published,
    "gguf": _gguf,
    "vllm-adapter": _vllm,
    "peft-old": _peft,
}
