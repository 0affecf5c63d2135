"""`panda chat`: a talk in the terminal, streamed, with its history."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import prompt
from pandallm import tokenizer as tokenizers
from pandallm.config import UserError
from pandallm.model import generate, load
from pandallm.prompt import Message

HELP = "/reset  forget the talk    /exit  leave    /help  this line"


class Talk:
    """A model and the turns so far."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: generate.Sampling,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.stop = generate.stop_ids(model.generation_config, tokenizer)
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []

    def reset(self) -> None:
        self.turns = []

    def answer(self, text: str) -> Iterator[str]:
        """Streams the answer to `text`. The turn joins the history when the answer is over or broken off."""
        self.turns.append({"role": "user", "content": text})
        said = ""
        try:
            for piece in generate.stream(self.model, self.tokenizer, self._fit(), self.sampling, self.stop):
                said += piece
                yield piece
        except BaseException:
            if not said:  # nothing was answered: the question leaves the history too
                self.turns.pop()
            raise
        finally:
            if said:
                self.turns.append({"role": "assistant", "content": said})
        if not said:
            self.turns.pop()

    def _fit(self) -> list[int]:
        """The prompt's ids; the oldest exchanges go when it and an answer don't fit into the model's window."""
        room = int(self.model.config.max_position_embeddings) - self.sampling.max_new_tokens
        forgotten = 0
        while True:
            ids = prompt.render_prompt(self.tokenizer, [*self.opening, *self.turns])
            if len(ids) <= room or len(self.turns) < 3:
                break
            self.turns = self.turns[2:]
            forgotten += 1
        if forgotten:
            print(f"[the oldest {forgotten} exchanges no longer fit and are forgotten]", file=sys.stderr)
        return ids


def open_talk(name: str, chat_format: str | None, system: str | None, sampling: generate.Sampling) -> Talk:
    """Loads a model for talking, with its own chat template unless a format is named."""
    folder = load.resolve(name)
    tokenizer = tokenizers.load(folder)
    if chat_format:
        if chat_format not in prompt.TEMPLATES:
            raise UserError(f"chat format '{chat_format}': unknown; known: {', '.join(prompt.TEMPLATES)}")
        prompt.set_format(tokenizer, chat_format)
    elif not tokenizer.chat_template:
        raise UserError(f"{name}: the model has no chat template; name its format with --chat-format")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load.load(folder, load.inference_dtype(device)).eval()
    model.to(torch.device(device))
    return Talk(model, tokenizer, sampling, system)


def run(name: str, chat_format: str | None, system: str | None, sampling: generate.Sampling) -> None:
    """The loop at the terminal: reads lines until /exit or the input's end. Ctrl-C breaks off an answer."""
    talk = open_talk(name, chat_format, system, sampling)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (line editing; deletes a whole Chinese character, not a byte)

        print(HELP)
    while True:
        try:
            line = input("你> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as e:
            raise UserError(f"stdin: not UTF-8 at byte {e.start}: send it as UTF-8") from None
        if not terminal:
            print(f"你> {line}")  # a transcript shows both sides
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
        elif line == "/help":
            print(HELP)
        elif line.startswith("/"):
            print(f"{line.split()[0]}: no such command. {HELP}")
        elif line:
            try:
                for piece in talk.answer(line):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            print()
