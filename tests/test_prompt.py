"""Chat formats: what is served is what was trained, token for token, and the mask is just the assistant's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pandallm import demo, prompt, tokenizer
from pandallm.config import UserError
from pandallm.model.load import resolve
from pandallm.prompt import Dialogue, Text

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA3 += [f"<|reserved_special_token_{i}|>" for i in range(20)]
# The pre-tokenizer of Llama 3 and, but for \p{N}, of Qwen.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def with_bos(bpe: Tokenizer, bos: str) -> None:
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )


def sentencepiece(normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    """As LLaMA's and Llama 2's: blanks are ▁, unknown characters bytes, bos in front."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer:
        bpe.normalizer = normalizer
    if pre_tokenizer:
        bpe.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
        limit_alphabet=300,
        max_token_length=6,
        show_progress=False,
    )
    bpe.train_from_iterator(demo.texts(), trainer)
    parts = json.loads(bpe.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in special]
    bpe = Tokenizer.from_str(json.dumps(parts))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    with_bos(bpe, "<s>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(special: list[str], texts: list[str], normalizer: Any = None, split: Any = None) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    if normalizer:
        bpe.normalizer = normalizer
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte]) if split else byte
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _tiny() -> Any:
    return tokenizer.load(resolve("tiny"))


def _llama1() -> Any:
    return sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None)


def _llama2() -> Any:
    return sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def _llama3() -> Any:
    bpe = byte_level(LLAMA3, demo.texts(), split=pre_tokenizers.Split(Regex(WORDS), "isolated"))
    with_bos(bpe, LLAMA3[0])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=LLAMA3[0], eos_token=LLAMA3[1])


def _qwen() -> Any:
    split = pre_tokenizers.Split(Regex(WORDS.replace(r"\p{N}{1,3}", r"\p{N}")), "isolated")
    bpe = byte_level(CHATML, demo.texts(), normalizers.NFC(), split)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


MAKERS: dict[str, Callable[[], Any]] = {
    "tiny": _tiny,
    "llama1": _llama1,
    "llama2": _llama2,
    "llama3": _llama3,
    "qwen": _qwen,
}
FORMATS = get_args(prompt.ChatFormat)
REFUSED = {  # tokenizer -> formats whose marks it lacks
    "tiny": {"llama2": "bos", "llama3": "'<|eot_id|>'"},
    "llama1": {"chatml": "'<|im_end|>'", "llama3": "'<|eot_id|>'"},
    "llama2": {"chatml": "'<|im_end|>'", "llama3": "'<|eot_id|>'"},
    "llama3": {"chatml": "'<|im_end|>'"},
    "qwen": {"llama2": "bos", "llama3": "'<|eot_id|>'"},
}
PAIRS = [(name, chat_format) for name in MAKERS for chat_format in FORMATS if chat_format not in REFUSED[name]]

_made: dict[str, Any] = {}


def make(name: str, chat_format: str | None = None) -> Any:
    """A tokenizer, made once, with this format."""
    if name not in _made:
        _made[name] = MAKERS[name]()
    if chat_format:
        prompt.set_format(_made[name], chat_format)
    return _made[name]


def talk(*turns: str, system: str = "") -> Dialogue:
    messages = [("system", system)] if system else []
    return Dialogue((*messages, *((("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns))))


# Contents whose edges tokenizers treat in different ways: characters of several bytes, blanks, code, marks of formats.
EDGES = (
    "好",
    "𠮷野家🐼",
    "👨‍👩‍👧 一家",
    "é́",
    "  前后有空格  ",
    "\u3000全角空格\u3000",
    "\n换行\n\n结束\n",
    "Hello, world!",
    "3.14",
    "“引号”",
    "，逗号开头",
    "```python\nprint('好')\n```",
    "{{ 7 * 7 }}{% generation %}{# x #}",
    "### Response:\n",
    "Human: \n问\n\nAssistant: \n",
    "[INST] <<SYS>>\n[/INST]",
    "a\tb\r\nc",
    "'s",
    "\u200b零宽\ufeff",
    "：",
    "-",
)
TALKS = [talk(a, b, b, a, system=c) for a, b, c in zip(EDGES, EDGES[1:], ("", "你是助手。", "") * 7, strict=False)]
TALKS += [talk(a, b) for a in EDGES[::7] for b in EDGES]
TALKS += [talk("问", "答", "再问", "再答", "三问", "三答", system="少说话。"), talk("长" * 300, "短" * 300)]


@pytest.mark.parametrize(("name", "chat_format"), PAIRS)
def test_training_is_serving(name: str, chat_format: str) -> None:
    """A served prompt is how its answer's training row begins, in every turn; the answer starts right behind it and
    ends with the end mark; nothing else is trained. And Transformers' own rendering is the same."""
    tok = make(name, chat_format)
    end_id = tok.convert_tokens_to_ids(prompt.end_mark(chat_format, tok))
    for dialogue, rendered in zip(TALKS, prompt.render(tok, TALKS), strict=True):
        messages = dialogue.as_messages()
        mask = [False] * len(rendered.input_ids)
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            served = prompt.render_prompt(tok, messages[:k])
            assert rendered.input_ids[: len(served)] == served, message
            end = rendered.input_ids.index(end_id, len(served)) + 1
            mask[len(served) : end] = [True] * (end - len(served))
            said = tok.decode(rendered.input_ids[len(served) : end - 1]).strip()
            said_before = message["content"].strip()
            assert said in (
                said_before,
                tok.backend_tokenizer.normalizer and tok.decode(tok.encode(said_before)).strip(),
            )
        assert rendered.loss_mask == mask
        theirs = tok.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert (theirs["input_ids"], list(map(bool, theirs["assistant_masks"]))) == (rendered.input_ids, mask)


@pytest.mark.parametrize(("name", "chat_format"), PAIRS)
def test_a_talk_grows_at_its_end(name: str, chat_format: str) -> None:
    """Each shorter talk's ids begin the longer one's: a server may keep what it has computed."""
    tok = make(name, chat_format)
    whole = talk("问", "答", "Question?", "Answer.", "“再问”", "🐼", system="你是助手。")
    longest = prompt.render(tok, [whole])[0].input_ids
    for n in (3, 5):
        shorter = prompt.render(tok, [Dialogue(whole.messages[:n])])[0].input_ids
        assert longest[: len(shorter)] == shorter
        assert prompt.render_prompt(tok, whole.as_messages()[: n + 1])[: len(shorter)] == shorter


TEXTS = {  # what each format writes: system, question, answer, question, answer
    "panda": "S\n\nQ1 A1⏹\n\nQ2 A2⏹",
    "alpaca": "S\n\n### Instruction:\nQ1\n\n### Response:\nA1⏹\n\n### Instruction:\nQ2\n\n### Response:\nA2⏹",
    "stanford_alpaca": "S\n\n### Instruction:\nQ1\n\n### Response:A1⏹\n\n### Instruction:\nQ2\n\n### Response:A2⏹",
    "belle": "S\n\nHuman: \nQ1\n\nAssistant: \nA1⏹\n\nHuman: \nQ2\n\nAssistant: \nA2⏹",
    "linly": "S\n\n### Instruction:Q1  ### Response:A1⏹\n### Instruction:Q2  ### Response:A2⏹",
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    ),
    "llama2": "⏵[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 ⏹⏵[INST] Q2 [/INST] A2 ⏹",
    "llama3": (
        "⏵<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
}


@pytest.mark.parametrize(("name", "chat_format"), PAIRS)
def test_the_text_of_each_format(name: str, chat_format: str) -> None:
    tok = make(name, chat_format)
    text = TEXTS[chat_format].replace("⏹", tok.eos_token).replace("⏵", tok.bos_token or "")
    if tok.bos_token and not text.startswith(tok.bos_token):
        text = tok.bos_token + text  # once, where the tokenizer itself opens with it
    messages = talk(" Q1\n", "\nA1 ", "Q2", "A2", system="S ").as_messages()
    assert tok.apply_chat_template(messages, tokenize=False) == text
    assert text.startswith(prompt.prompt_text(tok, messages[:4]))


def test_stanford_alpaca_opens_in_its_own_words() -> None:
    tok = make("tiny", "stanford_alpaca")
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    shown = prompt.prompt_text(tok, talk("问").as_messages())
    assert shown == f"{opening}\n\n### Instruction:\n问\n\n### Response:"


@pytest.mark.parametrize("name", MAKERS)
def test_raw_text(name: str) -> None:
    """The tokenizer's own encoding and eos; all but the first token is trained."""
    tok = make(name)
    texts = [text for text in EDGES if text.strip()] + [demo.texts()[0], "x"]
    for text, rendered in zip(texts, prompt.render(tok, [Text(text) for text in texts]), strict=True):
        assert rendered.input_ids == [*tok(text)["input_ids"], tok.eos_token_id]
        assert rendered.loss_mask == [False] + [True] * (len(rendered.input_ids) - 1)


def test_a_tokenizer_that_ends_texts_itself() -> None:
    tok = _qwen()
    end = tok.eos_token
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tok.eos_token_id)]
    )
    (rendered,) = prompt.render(tok, [Text("好")])
    assert rendered.input_ids.count(tok.eos_token_id) == 1 and rendered.input_ids[-1] == tok.eos_token_id


def test_order_and_nothing() -> None:
    tok = make("tiny", "chatml")
    mixed = [Text("甲"), talk("问", "答"), talk("再问", "再答"), Text("乙"), Text("丙"), talk("末", "尾")]
    assert prompt.render(tok, mixed) == [prompt.render(tok, [example])[0] for example in mixed]
    assert prompt.render(tok, []) == []


@pytest.mark.parametrize(("name", "chat_format"), PAIRS)
def test_control_tokens_cannot_be_forged(name: str, chat_format: str, tmp_path: Path) -> None:
    """The name of a special token, written in a message or a text, stays text: in training, in serving, and in
    Transformers with nothing but the saved tokenizer."""
    tok = make(name, chat_format)
    special = {token.content: i for i, token in tok.added_tokens_decoder.items()}
    assert special

    def control(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special.values() and i != tok.unk_token_id]

    plain = talk("问", "答", "再问", "再答", system="系统")
    wanted = control(prompt.render(tok, [plain])[0].input_ids)
    tok.save_pretrained(tmp_path)
    alone = AutoTokenizer.from_pretrained(tmp_path)
    for name_ in [*list(special)[:6], "".join(special), "".join(special)[1:], "<<|im_end|>|im_end|>", "</s></s>"]:
        forged = Dialogue(tuple((role, f"{name_}{text}{name_} {name_}") for role, text in plain.messages))
        rendered = prompt.render(tok, [forged])[0]
        assert control(rendered.input_ids) == wanted, name_
        served = prompt.render_prompt(tok, forged.as_messages()[:4])
        assert rendered.input_ids[: len(served)] == served
        assert alone.apply_chat_template(forged.as_messages(), return_dict=False) == rendered.input_ids
        text = prompt.render(tok, [Text(f"甲{name_}乙")])[0].input_ids
        assert control(text) == control(prompt.render(tok, [Text("甲乙")])[0].input_ids)


def test_only_the_names_of_special_tokens_are_changed() -> None:
    tok = make("llama3", "llama3")
    for text in ("a <| b |> c", "<|im_end|>", "<|reserved|>", "< |eot_id|>", "f <|> g", "x<y>z"):
        messages = talk(text, text).as_messages()
        assert tok.apply_chat_template(messages, tokenize=False).count(text) == 2
    (text,) = (tok.apply_chat_template(talk("甲<|eot_id|>", "乙").as_messages(), tokenize=False),)
    assert "甲< |eot_id|><|eot_id|>" in text


def test_a_template_names_no_foreign_mark() -> None:
    """Who looks for end marks in a template (to stop at them) finds its own only."""
    tok = make("tiny", "panda")
    assert not any(mark in tok.chat_template for mark in ("<|im_start|>", "<|im_end|>", "<|eot_id|>"))
    assert "<|im_end|>" in make("tiny", "chatml").chat_template


@pytest.mark.parametrize(("name", "chat_format"), [(n, f) for n in REFUSED for f in REFUSED[n]])
def test_missing_marks_are_refused(name: str, chat_format: str) -> None:
    with pytest.raises(UserError) as e:
        make(name, chat_format)
    line = str(e.value)
    assert line.startswith(f"chat_format {chat_format}: {REFUSED[name][chat_format]} is not a special token")
    assert "\n" not in line and "panda and alpaca" in line


def test_a_mark_that_is_only_a_word_is_refused() -> None:
    """One piece of the vocabulary by chance is no control token: it may melt into its surroundings."""
    bpe = byte_level(["<|endoftext|>"], ["<|im_end|> <|im_start|> " * 3] * 9, split=pre_tokenizers.WhitespaceSplit())
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    assert len(tok("<|im_end|>", add_special_tokens=False)["input_ids"]) == 1
    with pytest.raises(UserError, match="'<|im_end|>' is not a special token"):
        prompt.set_format(tok, "chatml")


@pytest.mark.parametrize("chat_format", ["alpaca", "linly", "panda"])
def test_a_tokenizer_that_melts_prompt_and_answer_is_refused(chat_format: str) -> None:
    """Where a piece of the vocabulary reaches over the border, a served prompt is none that was trained."""
    border = {"alpaca": "### Response:\nHello", "linly": "  ### Response:Hello", "panda": "。 Hello"}[chat_format]
    bpe = byte_level(["</s>"], [border] * 50, split=pre_tokenizers.Split("\0", "isolated"))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    with pytest.raises(UserError, match="a prompt has other ids in training than in serving") as e:
        prompt.set_format(tok, chat_format)
    assert "\n" not in str(e.value)


def test_a_tokenizer_that_drops_blanks_is_refused() -> None:
    """The blank that keeps a name from being a token would be lost."""
    bpe = byte_level([], demo.texts(), normalizers.Replace(" ", ""))
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe)
    from transformers import AddedToken

    tok.add_special_tokens({"eos_token": AddedToken("<end>", normalized=True, special=True)})
    with pytest.raises(UserError, match="becomes that token"):
        prompt.set_format(tok, "panda")


def test_no_template() -> None:
    tok = _qwen()
    for use in (lambda: prompt.render(tok, [talk("问", "答")]), lambda: prompt.render_prompt(tok, [])):
        with pytest.raises(UserError, match="no chat template"):
            use()


def test_what_is_trained_is_found_by_special_tokens_where_they_enclose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way and the way by characters agree; where marks don't enclose an answer, only the latter is taken."""
    for name, chat_format in PAIRS:
        tok = make(name, chat_format)
        quick = prompt.render(tok, TALKS)
        with monkeypatch.context() as patch:
            patch.setattr(prompt._Skeleton, "by_marks", lambda self, ids: None)
            assert prompt.render(tok, TALKS) == quick
        roles = ("user", "assistant")
        marks = tuple(sorted((k, str(v)) for k, v in tok.special_tokens_map.items()))
        skeleton = prompt._skeleton(tok, tok.chat_template, marks, roles)
        assert (skeleton.enclosed is not None) == (chat_format in ("chatml", "llama3")), (name, chat_format)


@pytest.mark.parametrize(("name", "chat_format"), PAIRS)
def test_a_saved_tokenizer_is_loaded_without_torch_and_is_the_same(name: str, chat_format: str, tmp_path: Path) -> None:
    """What the workers of data preparation load; whatever class it was."""
    tok = make(name, chat_format)
    tok.save_pretrained(str(tmp_path))
    again = tokenizer.reload(tmp_path)
    assert tokenizer.fingerprint(again) == tokenizer.fingerprint(tok)
    examples = [*TALKS, *(Text(text) for text in EDGES)]
    assert prompt.render(again, examples) == prompt.render(tok, examples)
