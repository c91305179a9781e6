"""The chat: its commands, its history, and that Ctrl+C ends an answer and nothing else."""

import json
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from glmtune.cli import main
from glmtune.config.settings import ChatSettings
from glmtune.data.files import write_json
from glmtune.data.templates import alpaca
from glmtune.evaluation import chat as room
from glmtune.evaluation.chat import chat
from glmtune.generation import Decoder
from glmtune.models.resolve import GLM_TINY
from glmtune.training.saving.manifest import our_part

QUESTION = "What is the colour of the apple?"


@pytest.fixture
def talk(monkeypatch, capsys):
    """Type some lines; returns what was printed, and the prompts that the model was given."""
    prompts = []
    write_prompt = room.write_prompt
    monkeypatch.setattr(
        room, "write_prompt", lambda *given: prompts.append(write_prompt(*given)) or prompts[-1]
    )

    def run(*lines, **settings):
        left = list(lines)

        def type_line(_):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", type_line)
        asked = {"base": GLM_TINY, "max_new_tokens": 12, "do_sample": False}
        chat(ChatSettings(**(asked | {"use_cpu": True} | settings)))
        assert not left or lines[-1] == "never", "it ended early"
        return capsys.readouterr().out.splitlines()[1:], prompts

    return run


def saved(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_what_was_said_is_the_next_question_s_beginning(talk, tmp_path):
    path = str(tmp_path / "said.json")
    printed, prompts = talk(QUESTION, "  你好 ", f"/save {path}")
    rounds = saved(path)["rounds"]
    assert [round["question"] for round in rounds] == [QUESTION, "你好"]
    answers = [round["base"] for round in rounds]
    assert printed[:2] == answers
    assert all(answers)
    beginning = f"[Round 0]\n问：{QUESTION}\n答：{answers[0]}\n[Round 1]\n问：你好\n答："
    assert prompts == [QUESTION, beginning]


def test_new_and_undo_forget(talk):
    printed, prompts = talk(QUESTION, "/undo", "/undo", "你好", "a", "/new", "b")
    assert printed[1] == f"forgotten: {QUESTION}"
    assert printed[2].startswith("error: /undo")
    assert prompts[1] == "你好"
    assert prompts[2].startswith("[Round 0]\n问：你好")
    assert prompts[3] == "b"


def test_base_tuned_and_both(talk, strange_adapter, tmp_path):
    path = str(tmp_path / "said.json")
    lines = [
        QUESTION,
        "/new",
        "/base",
        QUESTION,
        "/new",
        "/both",
        QUESTION,
        "你好",
        f"/save {path}",
    ]
    printed, prompts = talk(*lines, adapter=strange_adapter)
    tuned, _, _, base, _, _, *both = printed
    assert base != tuned
    assert both[:4] == ["[base]", base, "[tuned]", tuned]
    content = saved(path)
    assert content["rounds"][0] == {"question": QUESTION, "base": base, "tuned": tuned}
    assert content["adapter"] == "adapter"
    assert f"答：{base}\n" in prompts[-2], "each side goes on from its own answer"
    assert f"答：{tuned}\n" in prompts[-1]


def test_there_is_no_tuned_side_without_an_adapter(talk):
    for word in ("/tuned", "/both"):
        assert "--adapter" in talk(word)[0][0]


@pytest.fixture
def alpaca_adapter(strange_adapter, tmp_path):
    """That adapter with the record of a run that taught it alpaca's template."""
    folder = shutil.copytree(strange_adapter, tmp_path / "run")
    state = {"global_step": 1, "num_input_tokens_seen": 1, "log_history": []}
    write_json(state | our_part({"template": "alpaca"}), folder / "trainer_state.json")
    return str(folder)


def test_each_side_is_asked_in_its_own_format(talk, alpaca_adapter, tmp_path):
    path = str(tmp_path / "said.json")
    _, prompts = talk("/both", QUESTION, "你好", f"/save {path}", adapter=alpaca_adapter)
    assert prompts[:2] == [QUESTION, alpaca(QUESTION)]
    assert prompts[2].endswith("\n[Round 1]\n问：你好\n答：")
    assert prompts[3] == alpaca("你好"), "each question stands alone in that template"
    assert saved(path)["formats"] == {"base": "chat", "tuned": "alpaca"}


def test_the_format_changes(talk, alpaca_adapter):
    lines = ["/format", "/format chat", QUESTION, "你好", "/format alpca", "/format Alpaca"]
    printed, prompts = talk(*lines, "/format alpaca", "你好", adapter=alpaca_adapter)
    assert [line.split()[0] for line in printed[:3]] == ["formats", "alpaca", "chat"]
    assert printed[3] == "tuned is asked in the format alpaca, each question alone"
    assert printed[4] == "tuned is asked in the format chat"
    assert prompts[:2][0] == QUESTION
    assert prompts[1].startswith(f"[Round 0]\n问：{QUESTION}\n")
    assert printed[7] == "error: /format: there is no format alpca; did you mean alpaca?"
    assert prompts[2] == alpaca("你好")


def test_a_merged_model_may_be_asked_in_the_template_that_it_was_taught(talk):
    printed, prompts = talk("/format alpaca", QUESTION)
    assert printed[0] == "base is asked in the format alpaca, each question alone"
    assert prompts == [alpaca(QUESTION)]


@pytest.mark.parametrize(
    ("form", "format", "why"),
    [
        ("today", "chat", "the model's own, since nothing beside the adapter says"),
        ("damaged", "chat", "the model's own, since nothing beside the adapter says"),
        ("2023", "alpaca", "as the scripts of 2023 taught"),
        ("checkpoint", "alpaca", "as its run taught"),
    ],
)
def test_the_format_of_an_adapter(alpaca_adapter, form, format, why):
    folder = Path(alpaca_adapter)
    state = folder / "trainer_state.json"
    if form == "checkpoint":
        folder = folder / "checkpoint-1"
        folder.mkdir()
        shutil.copy(Path(alpaca_adapter, "adapter_model.safetensors"), folder)
    elif form == "damaged":
        state.write_text("[]", encoding="utf-8")
    else:
        state.unlink()
    if form == "2023":
        Path(folder, "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    found, because = room.taught_format(folder)
    assert found == format
    assert because.startswith(why)


def test_settings_change_and_mistakes_take_one_line(talk):
    printed, _ = talk(
        "/set max_new_tokens 2",
        QUESTION,
        "/set temperture 3",
        "/set top_p 3",
        "/set top_p",
        "/set stop_strings <n>",
        "/set decode_bits 8",
        "/set use-cpu false",
        "/sett",
        "/set stop_strings .,a\\nb",
        "/set",
    )
    assert printed[0] == "max_new_tokens 2"
    assert len(printed[1].split()) <= 3
    errors = printed[2:9]
    assert all(line.startswith("error: ") for line in errors)
    for line, part in zip(
        errors,
        (
            "did you mean temperature?",
            "top_p '3' should be a number, above 0, at most 1",
            "top_p '' should be",
            "stop string '<n>' cannot occur",
            "start another chat with --decode_bits 8",
            "--use_cpu false",
            "did you mean /set?",
        ),
        strict=True,
    ):
        assert part in line
    assert printed[9] == "stop_strings .,a\\nb"
    assert any(line.split() == ["max_new_tokens", "2"] for line in printed[10:])
    assert not any("decode_bits" in line for line in printed[10:])


def test_answers_end_before_a_stop_string(talk):
    whole, _ = talk(QUESTION)
    stop = whole[0].split()[1]
    cut, _ = talk(QUESTION, stop_strings=stop)
    assert cut[0] == whole[0].partition(stop)[0].strip()


def test_a_temperature_of_nothing_is_greedy(talk, tmp_path):
    greedy, _ = talk(QUESTION)
    path = str(tmp_path / "said.json")
    lines = ["/set do_sample true", "/set temperature 0", QUESTION, "/undo", QUESTION]
    printed, _ = talk(*lines, f"/save {path}")
    assert printed[1] == "temperature 0.0"
    assert printed[2] == printed[4] == greedy[0]
    settings = {"max_new_tokens": 12, "num_beams": 1, "do_sample": False}
    assert saved(path)["settings"] == settings


def test_a_drawn_answer_is_another_one_the_next_time(talk):
    draw = {"do_sample": True, "temperature": 5.0, "top_p": None}
    printed, _ = talk(QUESTION, "/undo", QUESTION, **draw)
    assert printed[0] != printed[2]
    assert talk(QUESTION, "/undo", QUESTION, **draw)[0] == printed, "the seed says which"


def test_a_conversation_beyond_the_positions_is_told_and_not_kept(talk):
    printed, prompts = talk("apple " * 2100, "你好")
    assert "the conversation: the prompt has 2" in printed[0]
    assert "2048 positions" in printed[0]
    assert prompts[-1] == "你好"


def test_a_conversation_that_grows_too_long_forgets_its_oldest_rounds(talk, tmp_path):
    path = str(tmp_path / "said.json")
    long = ["apple " * 500 + f"{n}?" for n in range(6)]
    printed, prompts = talk(*long, "/undo", f"/save {path}", max_new_tokens=4)
    told = [line for line in printed if "forgotten: the model holds 2,048 tokens" in line]
    assert told[0].startswith("[the oldest round is ")
    assert all(line.startswith("[the oldest ") for line in told)
    assert not any("error" in line for line in printed)
    assert prompts[-1].startswith("[Round 0]\n问：apple")
    assert long[0] not in prompts[-1]
    assert prompts[-1].endswith(f"问：{long[-1]}\n答：")
    assert [round["question"] for round in saved(path)["rounds"]] == [q.strip() for q in long[:-1]]


def test_no_more_is_forgotten_than_is_needed(talk):
    """No round is dropped if the question alone is too long; it is refused as before."""
    question = "apple " * 300
    lines = [question, question, "apple " * 2100, "你好"]
    printed, prompts = talk(*lines, max_new_tokens=4)
    assert "error: the conversation: the prompt has 2" in printed[2]
    assert prompts[-1].startswith(f"[Round 0]\n问：{question.strip()}\n")
    assert "[Round 2]" in prompts[-1]


def test_no_memory_is_told_and_the_chat_goes_on(talk, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("glmtune.generation.reading.prefill", no_memory)
    printed, _ = talk(QUESTION, "/help")
    assert printed[0].startswith("error: no memory for a conversation of ")
    assert printed[1] == "commands"


def test_files_are_not_overwritten(talk, tmp_path):
    path = tmp_path / "said.json"
    path.write_text("mine", encoding="utf-8")
    printed, _ = talk("/save", "你好", f"/save {path}", f"/save {path}/said.json")
    assert [line.startswith("error: ") for line in printed[:4]] == [True, False, True, True]
    assert path.read_text(encoding="utf-8") == "mine"


@pytest.fixture
def press_at_third_token(monkeypatch):
    """Let every answer be interrupted, as the test chooses, before its third token."""
    stream = Decoder.stream

    def arrange(act):
        def pressing(self, prompts, settings):
            for number, rows in enumerate(stream(self, prompts, settings)):
                if number == 2:
                    act()
                yield rows

        monkeypatch.setattr(Decoder, "stream", pressing)

    return arrange


def press():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk, press_at_third_token):
    press_at_third_token(press)
    earlier = signal.getsignal(signal.SIGINT)
    printed, prompts = talk(QUESTION, KeyboardInterrupt(), "你好")
    assert printed[0].endswith(" [stopped]")
    said = printed[0].removesuffix(" [stopped]")
    assert said
    assert printed[1:3] == ["", "/exit ends"]
    assert prompts[1].startswith(f"[Round 0]\n问：{QUESTION}\n答：{said}\n")
    assert signal.getsignal(signal.SIGINT) is earlier


def test_a_second_ctrl_c_waits_for_the_prompt(talk, press_at_third_token, monkeypatch):
    press_at_third_token(press)
    polish = room.polish
    monkeypatch.setattr(room, "polish", lambda *given: press() or polish(*given))
    printed, prompts = talk(QUESTION, "你好")
    said = printed[0].removesuffix(" [stopped]")
    assert said
    assert said != printed[0]
    assert printed[1:3] == ["", "/exit ends"]
    assert prompts[1].startswith(f"[Round 0]\n问：{QUESTION}\n答：{said}\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_is_not_lost_where_python_drops_exceptions(talk, press_at_third_token):
    class PressedAsItGoes:
        def __del__(self):
            press()

    press_at_third_token(lambda: PressedAsItGoes() and None)
    printed, _ = talk(QUESTION)
    assert printed[0].endswith(" [stopped]")


def test_ctrl_c_at_both_stops_both(talk, strange_adapter, monkeypatch):
    def broken_off(*_):
        yield [[]]
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", broken_off)
    printed, prompts = talk("/both", QUESTION, "/undo", adapter=strange_adapter)
    assert printed[1:3] == ["[base]", " [stopped]"]
    assert len(prompts) == 1
    assert printed[3] == "error: /undo: nothing was said yet"


def test_ctrl_c_before_the_first_token_does_not_end_the_chat(talk, monkeypatch):
    encode = room.encode_prompts
    interrupts = [KeyboardInterrupt()]

    def encode_prompts(*given):
        if interrupts:
            raise interrupts.pop()
        return encode(*given)

    monkeypatch.setattr(room, "encode_prompts", encode_prompts)
    printed, prompts = talk(QUESTION, "/undo", "你好")
    assert printed[:2] == [" [stopped]", "error: /undo: nothing was said yet"]
    assert prompts[-1] == "你好"


def test_exit_ends_and_help_names_every_command(talk):
    printed, prompts = talk("/help", "", "/exit", "never")
    for command in (
        "/new",
        "/base",
        "/tuned",
        "/both",
        "/save",
        "/undo",
        "/set",
        "/format",
        "/exit",
    ):
        assert any(command in line for line in printed)
    assert prompts == []


@pytest.mark.parametrize("word", ["exit", "quit", "stop", "Stop", " EXIT ", "退出"])
def test_words_that_end_other_chats_end_this_one(talk, word):
    printed, prompts = talk(word, "never")
    assert printed == ["the chat has ended"]
    assert prompts == []


@pytest.mark.parametrize("word", ["clear", "清空"])
def test_words_that_clear_other_chats_clear_this_one(talk, word):
    printed, prompts = talk(QUESTION, word, QUESTION)
    assert printed[1] == "a new conversation"
    assert prompts == [QUESTION, QUESTION]


def test_a_question_may_begin_with_a_word_that_ends_other_chats(talk):
    assert talk("stop that", "exit?")[1][0] == "stop that"


def test_help_names_the_words_of_other_chats(talk):
    text = "\n".join(talk("/help")[0])
    for word in room.WORDS:
        assert word in text


def test_broken_bytes_of_a_terminal_do_no_harm(talk):
    printed, _ = talk("a \udce4\udcbd b")
    assert not printed[0].startswith("error")


def test_mistakes_at_the_start(capsys):
    assert main(["chat", "--stop_strings", "<n>", "--base", GLM_TINY]) == 2
    assert "cannot occur" in capsys.readouterr().err.splitlines()[-1]
    assert main(["chat", "--adapter", "no_such_folder", "--base", GLM_TINY]) == 2
    assert main(["chat", "--max_new_tokens", "0"]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_wide_letters_are_edited_and_ctrl_c_works(tmp_path):
    import pty

    path = tmp_path / "said.json"
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script does for what it starts with `&`
        os.environ.update(LC_ALL="C.UTF-8", TERM="xterm", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
        arguments = ["chat", "--base", GLM_TINY, "--max_new_tokens", "1900"]
        arguments += ["--temperature", "9", "--top_p", "none"]  # so that the answer does not end
        os.execv(sys.executable, [sys.executable, "-m", "glmtune", *arguments])
    text = ""

    def read_until(has_come):
        nonlocal text
        deadline = time.monotonic() + 300
        while not has_come():
            assert time.monotonic() < deadline, text
            if select.select([terminal], [], [], 1)[0]:
                text += os.read(terminal, 65536).decode("utf-8", "replace")

    def wait_for(mark):
        nonlocal text
        read_until(lambda: mark in text)
        text = text[text.index(mark) + len(mark) :]

    try:
        wait_for("> ")
        # Two letters, the second deleted, one more inserted at the front.
        os.write(terminal, "苹好\x7f\x01红\n".encode())
        wait_for("\n")
        read_until(lambda: text.strip())  # long enough for a busy machine
        os.write(terminal, b"\x03")
        wait_for(" [stopped]")
        wait_for("> ")
        os.write(terminal, f"/save {path}\n".encode())
        wait_for("written")
        os.write(terminal, b"/exit\n")
        deadline = time.monotonic() + 300
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
    assert saved(path)["rounds"][0]["question"] == "红苹"
