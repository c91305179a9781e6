"""Damaged and made-up files: recipes, checkpoints, adapters, base models.

Whatever stands in them, a reader gives what it reads or refuses in one line: never a traceback, a
hang, or memory that the file's size does not explain. hypothesis draws the damage: bytes cut out
and put in, settings of other types and sizes, values in place of tensors. For a long run, by name:
GLMTUNE_FUZZ_SECONDS=600 python -m pytest -m slow tests/unit/test_fuzz_readers.py -k adapter
"""

import json
import os
import random
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from accelerate import Accelerator
from hypothesis import strategies as st
from torch.optim import AdamW
from transformers import get_scheduler

from glmtune.adapters import attach_lora, load_adapter, save_adapter
from glmtune.config.flags import split_arguments
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.loading import check_pair, load_base_model, load_tokenizer
from glmtune.models.resolve import resolve_base
from glmtune.training.gradients import GradientSums
from glmtune.training.saving import checkpoints
from glmtune.training.saving.manifest import MANIFEST_FILE
from glmtune.training.saving.run_folder import find_checkpoint
from glmtune.training.state import TrainingState
from glmtune.training.watch import Watch

MAX_CPU_SECONDS = 10
MAX_GROWTH_MIB = 400
PIECES = [
    *[
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\n",
        b":",
    ],
    *[b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"1e999", b"NaN", b"null", b"-1", b"\\ud800"],
    *[
        b"&a ",
        b"*a",
        b"!!python/object/apply:os.system [id]",
        b"!!set",
        b"- ",
        b"? ",
        b"<<: ",
        b"%",
    ],
    *[b"../", b"/etc/passwd", b"\x80\x04c", b"cos\nsystem\n(S'id'\ntR.", b"PK\x03\x04", b"\t"],
    *["中文".encode("gbk"), b"version https://git-lfs.github.com/spec/v1\n", b" " * 999],
]
TEXTS = ["", "true", "../x", "/dev/zero", "a\0b", "\ud800", "(a+)+$", "os", "1", "x" * 5000, "中"]
SCALARS = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 7, 10**6, 10**9, 10**18, 10**400, 0.5, 1e300]),
    st.sampled_from([float("nan"), float("inf")]),
    st.sampled_from(TEXTS),
    st.integers(),
    st.text(max_size=9),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes with one to three places cut out, put in or written over."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, min(len(content), 2000)) | st.integers(0, len(content)))
        cut = draw(st.sampled_from([0, 0, 1, 1, 4, 60, len(content)]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=12))
        content = content[:start] + piece + content[start + cut :]
    return content


@st.composite
def changed(draw, settings: dict) -> dict:
    """Settings with one to three of them changed, left out or invented, at any depth."""
    settings = dict(settings)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from([*map(str, settings), "invented"]))
        if isinstance(settings.get(key), dict) and settings[key] and draw(st.booleans()):
            settings[key] = draw(changed(settings[key]))
        elif draw(st.integers(0, 4)):
            settings[key] = draw(VALUES)
        else:
            settings.pop(key, None)
    return settings


TENSORS = st.one_of(
    st.builds(torch.zeros, st.lists(st.integers(0, 5), max_size=3)),
    st.builds(lambda n: torch.zeros(1).expand(n), st.sampled_from([10**6, 10**12])),
    st.sampled_from(
        [
            torch.zeros(2, 3, dtype=torch.int8),
            torch.tensor([float("nan")]),
            torch.zeros(2, dtype=torch.complex64),
            torch.eye(2).to_sparse(),
        ]
    ),
)


@st.composite
def changed_tensors(draw, tensors: dict) -> dict:
    """What torch.save is given, with some of it replaced by tensors and values of other kinds."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from([*tensors, "invented", 7]))
        if isinstance(tensors.get(key), dict) and tensors[key]:
            tensors[key] = draw(changed_tensors(tensors[key]))
        elif isinstance(tensors.get(key), list) and isinstance([*tensors[key], None][0], dict):
            tensors[key] = [draw(changed_tensors(tensors[key][0])), *tensors[key][1:]]
        else:
            tensors[key] = draw(TENSORS | VALUES)
    return tensors


def write_damaged(data: st.DataObject, path: Path) -> None:
    """Damage one file in a way that its kind suggests."""
    content = path.read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "content", "content", "gone", "link"]))
    if kind == "content" and path.suffix == ".json":
        path.write_text(json.dumps(data.draw(changed(json.loads(content)))))
    elif kind == "content" and path.suffix in (".bin", ".pt", ".pth"):
        tensors = torch.load(path, weights_only=True)
        torch.save(data.draw(changed_tensors(tensors)), path)
    elif kind == "gone":
        path.unlink()
    elif kind == "link":
        path.unlink()
        path.symlink_to(data.draw(st.sampled_from(["/etc/passwd", "/", "none", path.name])))
    else:
        path.write_bytes(data.draw(damaged(content)))


class Room:
    """A folder to read from, made anew from a whole one for each input."""

    def __init__(self, whole: Path, place: Path):
        self.whole, self.place = whole, place

    def damaged(self, data: st.DataObject) -> Path:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.whole, self.place)
        files = sorted(path for path in self.place.iterdir() if path.is_file())
        for path in data.draw(
            st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)
        ):
            write_damaged(data, path)
        return self.place


# --- the four kinds of reader: each reads one input, and may raise UserError alone ---


@pytest.fixture(scope="module")
def recipe(root, tmp_path_factory):
    published = [path.read_bytes() for path in sorted((root / "recipes").glob("*.yaml"))]
    laughs = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 110)
    )
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    names = sorted({name for cls in SETTINGS.values() for name in cls.model_fields})
    words = st.one_of(
        st.sampled_from([f"--{name}" for name in names]),
        st.builds("--{}={}".format, st.sampled_from(names), st.text(max_size=5)),
        st.sampled_from([*TEXTS, "--", "--=", "r.yml", "1e-4", "-1", "all", "none"]),
        st.text(max_size=9),
    )

    def read(data):
        start = data.draw(st.sampled_from([*published, laughs, b"seed: 1\n"]))
        path.write_bytes(data.draw(damaged(start) | st.binary(max_size=60)))
        verb = data.draw(st.sampled_from(sorted(SETTINGS)))
        given, flags = split_arguments(verb, data.draw(st.just([]) | st.lists(words, max_size=3)))
        read_config(SETTINGS[verb], str(path) if given is None else given, flags)

    return read


@pytest.fixture(scope="module")
def checkpoint(tiny_folder, tmp_path_factory):
    model = attach_lora(load_base_model(str(tiny_folder), dtype=torch.float32))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    accelerator = Accelerator(cpu=True)

    def fresh():
        optimizer = AdamW(weights, lr=1e-3)
        return TrainingState(
            model,
            optimizer,
            get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=9),
            loss_sum=torch.zeros(()),
            watch=Watch(weights, optimizer, None, torch.device("cpu")),
            gradients=GradientSums(weights, accelerator),
        )

    def step(state):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        state.optimizer.step()
        state.scheduler.step()
        state.global_step += 1

    run, state = tmp_path_factory.mktemp("run"), fresh()
    identity = {"seed": 42, "data sha256": "0"}
    step(state)
    described = checkpoints.describe(state, [{"step": 1, "loss": 2.0}], identity, epoch=0.5)
    whole = checkpoints.save_checkpoint(run, state, described, identity, accelerator, "tiny")
    room = Room(whole, tmp_path_factory.mktemp("damaged") / "checkpoint-1")

    def read(data):
        folder = room.damaged(data)
        if data.draw(st.booleans()):  # or else its hashes would tell of nearly everything
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
        folder, _ = find_checkpoint(folder)
        state = fresh()
        checkpoints.check_same_run(folder, identity)
        checkpoints.load_checkpoint(folder, state, accelerator)
        step(state)

    return read


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    base = load_base_model(str(tiny_folder), dtype=torch.float32)
    today = tmp_path_factory.mktemp("adapters") / "today"
    peft_model = load_adapter(base, tiny_folder / "adapter_peft_0_2_plain")
    save_adapter(peft_model, today, "tiny")
    base = peft_model.unload()
    names = [name for name, _ in base.named_modules()]
    place = tmp_path_factory.mktemp("damaged") / "adapter"
    sources = [today, *(tiny_folder / f"adapter_peft_0_2_{kind}" for kind in ("plain", "merged"))]

    def read(data):
        folder = Room(data.draw(st.sampled_from(sources)), place).damaged(data)
        try:
            load_adapter(base, folder).unload()
        finally:  # a base with parts of an adapter left on it would refuse all later ones
            assert [name for name, _ in base.named_modules()] == names

    return read


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    vocabulary = Path(resolve_base("glm-tiny"), "ice_text.model")
    tokenizer = load_tokenizer(resolve_base("glm-tiny"))
    ids = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    config = ChatGLMConfig(
        vocab_size=tokenizer.vocab_size + 10,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=2,
        inner_hidden_size=16,
        max_sequence_length=64,
        **{name: getattr(tokenizer, name) for name in ids},
    )
    sources = []
    for num_shards in (1, 2):
        sources.append(place / str(num_shards))
        sources[-1].mkdir()
        write_random_model(sources[-1], config, vocabulary, seed=0, num_shards=num_shards)
    safe = place / "safe"
    load_base_model(str(sources[0]), dtype=torch.float16).save_pretrained(safe)
    tokenizer.save_pretrained(safe)
    sources.append(safe)
    damaged_place = tmp_path_factory.mktemp("damaged") / "base"

    def read(data):
        folder = Room(data.draw(st.sampled_from(sources)), damaged_place).damaged(data)
        path = resolve_base(str(folder))
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode_batch(["a 中\n"])[0])
        check_pair(load_base_model(path, dtype=torch.float32), tokenizer)

    return read


READERS = ("recipe", "checkpoint", "adapter", "base")


def examine(read, num_inputs: int, seed: int, told: SimpleNamespace) -> None:
    """Let a reader read `num_inputs` inputs, and check each against the limits."""

    def one(data):
        began = time.process_time()  # other programs may use the cores
        refusal = ""
        try:
            read(data)
        except UserError as error:
            refusal = str(error)
        told.num_inputs += 1
        told.num_refused += bool(refusal)
        assert "\n" not in refusal
        assert len(refusal) < 20_000
        told.slowest = max(told.slowest, time.process_time() - began)
        assert told.slowest < MAX_CPU_SECONDS

    before = peak_mib()
    shorter = hypothesis.settings(
        max_examples=num_inputs,
        deadline=None,
        report_multiple_bugs=False,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    shorter(hypothesis.seed(seed)(hypothesis.given(st.data())(one)))()
    told.growth = max(told.growth, peak_mib() - before)
    assert told.growth < MAX_GROWTH_MIB


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def nothing_yet() -> SimpleNamespace:
    return SimpleNamespace(num_inputs=0, num_refused=0, slowest=0.0, growth=0.0)


@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_are_read_or_refused(name, request, capsys):
    told = nothing_yet()
    examine(request.getfixturevalue(name), 40, 6, told)
    assert told.num_refused


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_damaged_inputs_for_long(name, request, capsys):
    read, told = request.getfixturevalue(name), nothing_yet()
    seconds = float(os.environ.get("GLMTUNE_FUZZ_SECONDS", "60"))
    seed, end = random.randrange(2**32), time.monotonic() + seconds
    while time.monotonic() < end:
        examine(read, 200, seed, told)
        seed += 1
        capsys.readouterr()
    with capsys.disabled():
        print(
            f"\n{name}: {told.num_inputs} inputs in {seconds:.0f} s, "
            f"{told.num_refused} refused, the slowest in {told.slowest:.2f} s of CPU time, memory "
            f"grew by {told.growth:.0f} MiB"
        )
