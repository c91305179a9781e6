"""`glmtune chat` on a CUDA device, a process of its own; run by name: pytest -m gpu tests/gpu."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from glmtune.models.resolve import GLM_TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
QUESTION = "What is the colour of the apple?"
COMMAND = [sys.executable, "-m", "glmtune", "chat", "--base", GLM_TINY]


@pytest.mark.parametrize("bits", ["16", "8", "4"])
def test_base_tuned_and_both(strange_adapter, tmp_path, bits):
    lines = [QUESTION, "/base", "/new", QUESTION, "/new", "/both", QUESTION, "你好", "/save said"]
    arguments = ["--adapter", strange_adapter, "--do_sample", "false", "--max_new_tokens", "12"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--decode_bits", bits], cwd=tmp_path, check=True,
        input="\n".join([*lines, "/exit"]), capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert "written: said, 2 rounds" in done.stdout
    first, second = json.loads((tmp_path / "said").read_text(encoding="utf-8"))["rounds"]
    assert first["base"] != first["tuned"]
    # Each side answers to itself in /both as it does alone.
    for side in ("base", "tuned"):
        assert done.stdout.count(first[side]) >= 2
        assert second[side]


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path):
    arguments = ["--max_new_tokens", "1900", "--temperature", "9", "--top_p", "none"]
    talk = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, encoding="utf-8", bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        talk.stdout.readline()  # what the commands are
        talk.stdin.write(f"{QUESTION}\n")
        assert talk.stdout.read(len("> ") + 1)[2:], "the answer has begun"
        talk.send_signal(signal.SIGINT)
        assert talk.stdout.readline().endswith(" [stopped]\n")
        talk.stdin.write("/save said\n/exit\n")
        out, _ = talk.communicate(timeout=60)
        assert "written: said, 1 rounds" in out
        assert talk.returncode == 0
    finally:
        talk.kill()
