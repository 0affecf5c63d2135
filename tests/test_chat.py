"""The terminal chat: history, commands, streaming, what is forgotten."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pandallm import prompt, tokenizer
from pandallm.config import UserError
from pandallm.model import generate, load
from pandallm.serve.chat import Talk


@pytest.fixture(scope="module")
def parts() -> tuple:
    folder = load.resolve("tiny")
    words = tokenizer.load(folder)
    prompt.set_format(words, "chatml")
    return load.load(folder, torch.float32).eval(), words


def sampling(**keys: int) -> generate.Sampling:
    return generate.Sampling(**{"temperature": 0, "max_new_tokens": 12, **keys})


def test_history_is_what_was_said(parts: tuple) -> None:
    """Each answer is the one to all turns before it, rendered as in training; /reset forgets them."""
    talk = Talk(*parts, sampling(), system="你是助手。")
    first = "".join(talk.answer("你好"))
    second = "".join(talk.answer("再见"))
    turns = [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": "你好"}]
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "再见"}]
    model, words = parts
    ids = prompt.render_prompt(words, turns)
    assert second == "".join(
        generate.stream(model, words, ids, sampling(), generate.stop_ids(model.generation_config, words))
    )
    talk.reset()
    assert "".join(talk.answer("你好")) == first


def test_broken_off_answer_stays(parts: tuple) -> None:
    talk = Talk(*parts, sampling())
    answer = talk.answer("你好")
    said = next(answer)
    answer.close()
    assert talk.turns == [{"role": "user", "content": "你好"}, {"role": "assistant", "content": said}]


def test_oldest_exchanges_are_forgotten(parts: tuple, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(*parts, sampling(max_new_tokens=3500))
    talk.turns = [{"role": role, "content": "很长的话。" * 60} for _ in range(3) for role in ("user", "assistant")]
    next(talk.answer("你好"))
    assert "forgotten" in capsys.readouterr().err
    assert talk.turns[0] == {"role": "user", "content": "你好"}


def test_question_that_never_fits(parts: tuple) -> None:
    talk = Talk(*parts, sampling())
    with pytest.raises(UserError, match="shorten"):
        list(talk.answer("很长的话。" * 2000))
    assert talk.turns == []


def test_a_piped_talk() -> None:
    """The command itself: a transcript of both sides, the same for the same seed; commands; no half characters."""
    command = [sys.executable, "-m", "pandallm.cli", "chat", "tiny", "--chat-format", "chatml", "--seed", "1"]
    lines = "你好\n/reset\n你好\n/nonsense\n/exit\nnot reached\n"
    runs = [
        subprocess.run([*command, "--max-new-tokens", "20"], input=lines, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "你> 你好" in runs[0].stdout and "no such command" in runs[0].stdout and "not reached" not in runs[0].stdout


def test_a_piped_talk_in_another_encoding() -> None:
    command = [sys.executable, "-m", "pandallm.cli", "chat", "tiny", "--chat-format", "chatml"]
    done = subprocess.run(command, input="你好\n".encode("gb18030"), capture_output=True)
    assert done.returncode == 2 and done.stderr.decode() == "panda: stdin: not UTF-8 at byte 0: send it as UTF-8\n"
