"""The known errors: recognised within other text, and explained."""

import re
import types

import pytest

from glmtune import cli
from glmtune.config.flags import split_arguments
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS, DoctorSettings
from glmtune.doctor import run
from glmtune.doctor.errors import KNOWN_ERRORS
from glmtune.doctor.explain import errors_page, explain, find_known
from glmtune.errors import UserError

SHORT_FORMS = [
    ("AttributeError: 'ChatGLMTokenizer' object has no attribute 'tokenizer'", 0),
    ("ValueError: 130000 is not in list", 4),
    ("ValueError: 130004 is not in list", 4),
    ("Target modules {'v_proj', 'q_proj'} not found in the base model.", 6),
    ("AttributeError: property 'eos_token' of 'ChatGLMTokenizer' object has no setter", 7),
    ("JSON parse error: Column(/instruction) changed from string to array in row 7", 8),
    ("ModuleNotFoundError: No module named 'cpm_kernels'", 11),
    ("ImportError: This modeling file requires the following packages that were not found in your"
     " environment: icetk. Run `pip install icetk`", 11),
    ("_pickle.UnpicklingError: invalid load key, 'v'.", 13),
    ("SafetensorError: Error while deserializing header: HeaderTooLarge", 13),
    ("size mismatch for lm_head.weight: copying a param with shape torch.Size([150528, 4096])", 14),
    ("\"LayerNormKernelImpl\" not implemented for 'Half'", 15),
    ("{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 9e-05, 'epoch': 0.1}", 16),
    ("(MaxRetryError(\"HTTPSConnectionPool(host='huggingface.co', port=443): Max retries", 18),
    ("The repository for chatglm3-6b contains custom code which must be executed to correctly", 19),
]  # fmt: skip


def test_known_errors_are_as_many_as_the_readme_says(root):
    assert len({known.message for known in KNOWN_ERRORS}) == len(KNOWN_ERRORS)
    for name in ("README.md", "README.zh.md"):
        assert f" {len(KNOWN_ERRORS)} " in (root / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.message[:30])
def test_a_message_is_known_and_no_other(known):
    assert find_known(known.message) == [known]
    log = f"Traceback (most recent call last):\n  File 'x.py', line 1\n{known.message}\n\nbye"
    assert find_known(log) == [known]
    wrapped = re.sub(r"(.{30,}?) ", r"\1\n    ", known.message)
    assert find_known(wrapped) == [known]


@pytest.mark.parametrize("text, number", SHORT_FORMS)
def test_other_forms_of_a_message(text, number):
    assert find_known(text) == [KNOWN_ERRORS[number]]


# Errors as users paste them, with other paths and numbers, and a word of the right explanation.
PASTED = [
    (
        "Traceback (most recent call last):\n"
        '  File "D:\\glm\\cli_demo.py", line 6, in <module>\n'
        "    tokenizer = AutoTokenizer.from_pretrained('..\\models\\chatglm-6b-v1.1')\n"
        "ModuleNotFoundError: No module named 'transformers_modules.models/chatglm2-6b'",
        "transformers_modules",
    ),
    ("KeyError: 'target'", "'context'"),
    ('│ ❱ 71 │   seq_len = feature["seq_len"] │\nKeyError: \'seq_len\'', "'seq_len'"),
    (
        "UnicodeDecodeError: 'gbk' codec can't decode byte 0xa4 in position 64: illegal multibyte",
        "'gbk'",
    ),
    ("UnicodeEncodeError: 'ascii' codec can't encode characters in position 0-3", "'gbk'"),
    ("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xb0 in position 17: invalid", "'utf-8'"),
    ("json.decoder.JSONDecodeError: Extra data: line 9 column 1 (char 2048)", "Extra data"),
    ("JSONDecodeError: Expecting ',' delimiter: line 3 column 5 (char 88)", "Expecting value"),
    (
        "Some weights of ChatGLMForConditionalGeneration were not initialized from the model "
        "checkpoint at THUDM/chatglm-6b and are newly initialized: "
        "['transformer.prefix_encoder.embedding.weight']",
        "'prefix_encoder'",
    ),
    (
        "RuntimeError: Error(s) in loading state_dict for PrefixEncoder:\n"
        '\tMissing key(s) in state_dict: "trans.0.weight", "trans.0.bias".\n'
        "\tsize mismatch for embedding.weight: copying a param with shape torch.Size([8, 229376])",
        "'prefix_encoder'",
    ),
    (
        "RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n"
        "\tsize mismatch for base_model.model.transformer.h.4.self_attention.query_key_value."
        "lora_A.default.weight: copying a param with shape torch.Size([16, 4096]) from checkpoint, "
        "the shape in current model is torch.Size([8, 4096]).\n"
        "\tsize mismatch for base_model.model.transformer.h.4.self_attention.query_key_value."
        "lora_B.default.weight: copying a param with shape torch.Size([8192, 8, 1]) from "
        "checkpoint, the shape in current model is torch.Size([12288, 8]).",
        "[8192, 8, 1]",
    ),
    (
        "size mismatch for base_model.model.transformer.encoder.layers.20.self_attention."
        "query_key_value.lora_B.default.weight: copying a param with shape torch.Size([0]) from "
        "checkpoint, the shape in current model is torch.Size([4608, 64]).",
        "[256, 4096]",
    ),
    (
        "size mismatch for transformer.word_embeddings.weight: copying a param with shape "
        "torch.Size([150528, 4096]) from checkpoint, the shape in current model is "
        "torch.Size([130528, 4096]).",
        "[150528, 4096]",
    ),
    ("AttributeError: 'NoneType' has no attribute 'int4WeightExtractionFloat'", "int4Weight"),
    ("RuntimeError: mat1 and mat2 must have the same dtype, but got Half and Float", "mat1"),
    ("RuntimeError: expected m1 and m2 to have the same dtype, but got: float", "mat1"),
    ("RuntimeError: self and mat2 must have the same dtype, but got BFloat16 and Half", "mat1"),
    ("RuntimeError: expected scalar type Half but found Float", "mat1"),
    ("main.py: error: unrecognized arguments: --local_rank=3", "local-rank"),
    (
        "ValueError: Some specified arguments are not used by the HfArgumentParser: "
        "['--local-rank=1']",
        "local-rank",
    ),
    ("ValueError: `temperature` has to be a strictly positive float, but is 2", "temperature"),
    (
        "ValueError: `temperature` (=0) has to be a strictly positive float, otherwise your next "
        "token scores will be invalid.",
        "temperature",
    ),
    ("TypeError: LoraConfig.__init__() got an unexpected keyword argument 'eva_config'", "corda"),
    (
        "OSError: Error no file named ['pytorch_model.bin', 'tf_model.h5', 'model.ckpt.index'] "
        "found in directory unilm_model/ or `from_tf` set to False",
        "pytorch_model.bin",
    ),
    (
        "OSError: Error no file named pytorch_model.bin, model.safetensors, tf_model.h5, "
        "model.ckpt.index or flax_model.msgpack found in directory D:\\models\\chatglm.",
        "pytorch_model.bin",
    ),
    ("Input length of input_ids is 11052, but `max_length` is set to 2048.", "Input length"),
    (
        "Indexing.cu:1146: indexSelectLargeIndex: block: [797,0,0], thread: [1,0,0] Assertion "
        "`srcIndex < srcSelectDimSize` failed.",
        "device-side",
    ),
    ("IndexError: index out of range in self", "device-side"),
    ("bin E:\\envs\\Lib\\site-packages\\bitsandbytes\\libbitsandbytes_cpu.dll", "bitsandbytes was"),
    ("TypeError: Descriptors cannot be created directly.\nIf this call came from", "Descriptors"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: "
     "MetadataIncompleteBuffer", "PytorchStreamReader"),
    ("OSError: [Errno 122] Disk quota exceeded: 'pytorch_model-00003-of-00008.bin'", "No space"),
    (
        "[rank1]:[E ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=8, OpType=ALLREDUCE, NumelIn=1) ran for 600071 milliseconds",
        "NCCL error",
    ),
    ("{'loss': nan, 'learning_rate': 1e-04, 'epoch': 0.02}", "probability tensor"),
    ("{'loss': 0.0, 'learning_rate': 1e-04, 'epoch': 0.02}", "probability tensor"),
    ("nvcc: command not found", "Compile parallel"),
    ("HFValidationError: Repo id must be in the form 'repo_name': '../chatglm-6b/x'", "Repository"),
    (
        "OSError: models/glm is not a local folder and is not a valid model identifier listed on",
        "Repository",
    ),
    ("TypeError: Trainer.__init__() got an unexpected keyword argument 'tokenizer'", "evaluation_"),
    ("ImportError: cannot import name 'LossKwargs' from 'transformers.utils' (x.py)", "Encoder"),
    ("ModuleNotFoundError: No module named 'yaml'", "'peft'"),
    ("ValueError: 150001 is not in list", "is not in list"),
    ("RuntimeError: \"LayerNormKernelImpl\" not implemented for 'Half'", "addmm_impl_cpu_"),
    ("httpx.ConnectError: [SSL: CERTIFICATE_VERIFY_FAILED]", "CERTIFICATE"),
    ("ValueError: check_hostname requires server_hostname", "ProxyError"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "CUBLAS"),
]  # fmt: skip


@pytest.mark.parametrize("text, meant", PASTED)
def test_what_users_paste_is_known_for_what_it_is(text, meant):
    (known,) = find_known(text)
    assert meant in known.message
    log = f'step 7\nTraceback (most recent call last):\n  File "a.py", line 3\n{text}\n\n(glm) $ '
    assert find_known(log) == [known]


@pytest.mark.parametrize(
    "text",
    [
        *["", "ValueError: 7 is not in list", "No module named 'x'", "can't set attribute 'x'"],
        *["{'loss': 0.05, 'grad_norm': 0.8}", "FileNotFoundError: 'config.json'"],
        "ModuleNotFoundError: No module named 'torchvision'",
        "KeyError: 'epoch'",
        "AttributeError: 'NoneType' object has no attribute 'shape'",
        "size mismatch for classifier.weight: copying a param with shape torch.Size([2, 768])",
        "RuntimeError: The size of tensor a (4) must match the size of tensor b (8)",
        "TypeError: fit() got an unexpected keyword argument 'local_rank'",
        "main.py: error: unrecognized arguments: --batch",
        "the temperature is 21 degrees, a strictly positive answer",
        "please compile the report; the disk is fine and the proxy answers",
        "Loading checkpoint shards: 100%|██████████| 8/8 [00:10<00:00,  1.48s/it]",
        "The context of this prompt is the target of the response",
        "Downloading pytorch_model.bin: 100%",
        "ice_text.model: 100%|██████████| 2.71M/2.71M",
        "NCCL version 2.21.5+cuda12.4",
        "Some weights of BertModel were not used when initializing",
        "glmtune validate data.json",
        "error: data.json:3: broken JSON; correct it",
    ],
)
def test_unknown_messages(text):
    assert find_known(text) == []


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.message[:30])
def test_an_explanation_is_in_both_languages_with_a_command_that_exists(known):
    text = explain(known)
    assert re.search(r"[a-z]{3} [a-z]+ ", known.cause)
    assert len(re.findall(r"[\u4e00-\u9fff]", known.cause_zh)) > 10
    assert known.cause in text
    assert known.cause_zh in text
    assert known.command in text
    assert re.fullmatch(r"(|[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*)", known.threads)
    for line in re.findall(r"(?<![\w/])glmtune (.+?)(?: &&|$)", known.command):
        words = line.split()
        verb = " ".join(words[:2]) if " ".join(words[:2]) in cli.VERBS else words[0]
        assert verb in cli.VERBS, line
        if words[1:] != ["--help"]:
            recipe, flags = split_arguments(verb, words[len(verb.split()) :])
            assert set(flags) <= set(SETTINGS[verb].model_fields)  # no name of others, either
            if recipe is None:
                read_config(SETTINGS[verb], None, flags)  # nothing is missing or wrong


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.message[:30])
def test_a_flag_that_an_explanation_names_is_one(known):
    ours = set().union(*(settings.model_fields for settings in SETTINGS.values()))
    # A message names the flags of others.
    for text in (known.cause, known.cause_zh):
        assert set(re.findall(r"--(\w+)", text)) <= ours | {"standalone"}


def test_the_page_is_in_step(root):
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == errors_page(), "run: glmtune doctor --errors > docs/errors.md"


def test_explain_takes_text_a_file_or_stdin(tmp_path, monkeypatch, capsys):
    known = KNOWN_ERRORS[4]
    (tmp_path / "log.txt").write_text(f"step 1\n{known.message}\n")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: known.message))
    for text in (known.message, str(tmp_path / "log.txt"), "-"):
        assert cli.main(["doctor", "--explain", text]) == 0
        out = capsys.readouterr().out
        assert known.cause in out
        assert known.cause_zh in out
    assert cli.main(["doctor", "--explain", "nothing known"]) == 2
    assert "none of the errors known" in capsys.readouterr().err


def test_errors_are_listed(capsys):
    assert cli.main(["doctor", "--errors"]) == 0
    assert capsys.readouterr().out == errors_page()


def test_a_verb_that_meets_a_known_error_says_what_mends_it(monkeypatch, capsys):
    def fail(settings):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setitem(cli.VERBS, "validate", fail)
    assert cli.main(["validate", "x.json"]) == 1
    trace, _, err = capsys.readouterr().err.partition("RuntimeError: CUDA out of memory")
    assert trace.startswith("Traceback")
    assert "--gradient_checkpointing true" in err
    assert "显存" in err
    monkeypatch.setitem(cli.VERBS, "validate", lambda _: {}["unknown"])
    with pytest.raises(KeyError):
        cli.main(["validate", "x.json"])
    assert capsys.readouterr().err == ""


def test_an_error_text_that_is_a_name_too_long_for_a_file():
    with pytest.raises(UserError, match="none of the errors known"):
        run.doctor(DoctorSettings(explain="x" * 5000))
