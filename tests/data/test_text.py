"""What is tokenised, what is supervised, what is held out, and what the cache gives back."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainwright.data import text
from trainwright.data.packing import Documents
from trainwright.recipe import Fields, InputError, TextData

if TYPE_CHECKING:
    from collections.abc import Callable

BOS, EOS, END = "<s>", "</s>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A token a byte; adds <s> in front, and </s> at the end as some tokenizers do; quick to make and to read."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS, END])
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        **({"tokenizer_object": backend, "bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATE} | options)
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., TextData]:
    """Writes rows to a file and makes the section that reads it, with a cache of its own."""
    numbers = itertools.count()

    def make(rows: list[dict[str, Any]], **settings: Any) -> TextData:
        path = tmp_path / f"data{next(numbers)}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return TextData(**({"source": str(path), "held_out": None, "cache": str(tmp_path / "cache")} | settings))

    return make


def prepare(section: TextData, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> text.TextSplits:
    return text.prepare(section, tokenizer, model_length=None, seed=seed)


def shown(documents: Documents, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """(everything, what is supervised) of each document, as text."""
    pairs = []
    for first, end in itertools.pairwise(documents.offsets):
        tokens, supervised = documents.tokens[first:end], documents.supervised[first:end]
        pairs.append((str(tokenizer.decode(tokens)), str(tokenizer.decode(tokens[supervised]))))
    return pairs


def test_a_prompt_is_masked_and_its_completion_ends(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "é"}]
    assert shown(prepare(section(rows), tokenizer).train, tokenizer) == [
        ("<s>2+2=4</s>", "4</s>"),
        ("<s>é</s>", "é</s>"),
    ]


def test_the_prompt_is_tokenised_as_for_generating(section: Any, smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    """Together " wor" and "ld" would be one token, which a model that is given the prompt never sees."""
    train = prepare(section([{"prompt": "hello wor", "completion": "ld"}]), smollm2_tokenizer).train
    prompt = smollm2_tokenizer("hello wor")["input_ids"]
    assert train.tokens[: len(prompt)].tolist() == prompt
    assert shown(train, smollm2_tokenizer) == [("hello world<|im_end|>", "ld<|im_end|>")]


def test_raw_text_is_supervised_whole(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(prepare(section([{"text": "ab c"}]), tokenizer).train, tokenizer) == [("<s>ab c</s>", "ab c</s>")]


def test_supervise_all(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    pair = section([{"prompt": "a", "completion": "b"}], supervise="all")
    assert shown(prepare(pair, tokenizer).train, tokenizer) == [("<s>ab</s>", "ab</s>")]
    chat = section([{"messages": [{"role": "user", "content": "a"}]}], supervise="all")
    assert shown(prepare(chat, tokenizer).train, tokenizer) == [("<s><user>a<|end|>\n", "<user>a<|end|>\n")]


def test_named_columns_are_used(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "no", "question": "a", "answer": "b"}]
    named = section(rows, fields=Fields(prompt="question", completion="answer"))
    assert shown(prepare(named, tokenizer).train, tokenizer) == [("<s>ab</s>", "b</s>")]


CHATS = [
    [("user", "hi"), ("assistant", "Hello.")],
    [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", " leading space"),
        ("user", "more"),
        ("assistant", "é🎉\n"),
    ],
    [("user", "a"), ("assistant", "one"), ("assistant", "two"), ("user", "never answered")],
    [("user", "write code"), ("assistant", "```python\ndef f():\n\treturn  1\n```"), ("user", "ok"), ("assistant", "")],
]


def as_messages(chat: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in chat]}


@pytest.mark.parametrize("chat", CHATS)
def test_in_a_chat_exactly_the_answers_and_their_ends_are_supervised(
    section: Any, smollm2_tokenizer: PreTrainedTokenizerFast, chat: list[tuple[str, str]]
) -> None:
    row = as_messages(chat)
    ((whole, supervised),) = shown(prepare(section([row]), smollm2_tokenizer).train, smollm2_tokenizer)
    assert whole == smollm2_tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert supervised == "".join(f"{content}<|im_end|>" for role, content in chat if role == "assistant")


def test_a_chat_has_the_tokens_that_generating_sees(section: Any, smollm2_tokenizer: PreTrainedTokenizerFast) -> None:
    row = as_messages(CHATS[0])
    train = prepare(section([row]), smollm2_tokenizer).train
    prompt: Any = smollm2_tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert train.tokens[: len(prompt)].tolist() == prompt
    assert train.supervised.tolist().index(True) == len(prompt)


def test_a_template_without_end_of_turn_token(section: Any) -> None:
    plain = byte_tokenizer(chat_template=TEMPLATE.replace(END, ""))
    row = as_messages([("user", "a"), ("assistant", "b"), ("user", "c")])
    assert shown(prepare(section([row]), plain).train, plain) == [("<s><user>a\n<assistant>b\n<user>c\n", "b\n")]


def test_the_date_that_llama_writes_is_fixed(section: Any) -> None:
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    dated = byte_tokenizer(chat_template=date + "{{ date_string }}" + TEMPLATE)
    ((whole, _),) = shown(prepare(section([as_messages(CHATS[0])]), dated).train, dated)
    assert whole.startswith("26 Jul 2024<s>")


def test_a_chat_that_begins_with_the_assistant_is_told(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"line 1: the chat begins with the assistant"):
        prepare(section([as_messages([("assistant", "a")])]), tokenizer)


def test_tokenizers_that_do_not_fit_are_told(section: Any) -> None:
    chat = section([as_messages(CHATS[0])])
    with pytest.raises(InputError, match=r"line 1.*no chat template; set model\.tokenizer"):
        prepare(chat, byte_tokenizer(chat_template=None))
    with pytest.raises(InputError, match=r"line 1: .*refuses the messages: roles must alternate"):
        prepare(chat, byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match=r"no end-of-sequence token; set eos_token"):
        prepare(section([{"text": "a"}]), byte_tokenizer(eos_token=None))


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("<assistant>{% endif", "<think>{% endif"),  # not how the answer begins later
        TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'cut' }}"),
    ],
)
def test_a_template_that_rewrites_the_past_is_told(section: Any, template: str) -> None:
    row = as_messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    with pytest.raises(InputError, match=r"line 1: message 2: .*chat template writes what precedes.*differently"):
        prepare(section([row]), byte_tokenizer(chat_template=template))


def test_length_policies(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "abcdefg"}, {"text": "xy"}, {"text": " "}]

    def result(policy: str) -> tuple[list[str], dict[str, int]]:
        train = prepare(section(rows, sequence_length=4, too_long=policy), tokenizer).train
        counts = {name: value for name, value in vars(train.counts).items() if value}
        return [whole for whole, _ in shown(train, tokenizer)], counts

    assert result("truncate") == (
        ["<s>abc", "<s>xy</s>"],
        {"documents": 3, "empty": 1, "truncated": 1, "tokens": 8, "supervised_tokens": 6},
    )
    assert result("drop") == (
        ["<s>xy</s>"],
        {"documents": 3, "empty": 1, "dropped": 1, "tokens": 4, "supervised_tokens": 3},
    )
    assert result("split") == (
        ["<s>abc", "cdef", "fg</s>", "<s>xy</s>"],
        {"documents": 3, "empty": 1, "split": 1, "tokens": 15, "supervised_tokens": 11},
    )


def test_documents_without_supervised_tokens_are_left_out_and_counted(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "long prompt", "completion": "a"}, {"prompt": "p", "completion": "b"}]
    train = prepare(section(rows, sequence_length=6), tokenizer).train
    assert shown(train, tokenizer) == [("<s>pb</s>", "b</s>")]
    assert (train.counts.masked, train.counts.truncated, train.counts.supervised_tokens) == (1, 1, 2)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([as_messages([("user", "a"), ("human", "b")])], {}),
        ([{"prompt": "long prompt", "completion": "a"}], {"sequence_length": 6}),
        ([{"prompt": "long prompt", "completion": "a"}], {"sequence_length": 6, "too_long": "drop"}),
        ([{"text": ""}], {}),
        ([{"text": "a"}], {"sequence_length": 1}),
        ([{"text": "a"}], {"sequence_length": 1, "too_long": "split"}),
    ],
)
def test_nothing_supervised_is_an_error(
    section: Any, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=r"every label of the training data is masked.*sequence_length.*supervise: all"):
        prepare(section(rows, **settings), tokenizer)


def test_a_held_out_part_without_supervised_tokens_is_an_error(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    other = section([as_messages([("user", "a")])]).source
    with pytest.raises(InputError, match="every label of the held-out data is masked"):
        prepare(section([as_messages(CHATS[0])], held_out=other), tokenizer)


def test_a_sequence_longer_than_the_model_is_an_error(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"data\.sequence_length is 512, but the model has 256 positions; set it to 256"):
        text.prepare(section([{"text": "a"}]), tokenizer, model_length=256, seed=0)


def test_the_fault_of_a_later_row_is_told(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"line 2: no column 'text'.*the columns are txt"):
        prepare(section([{"text": "a"}, {"txt": "b"}]), tokenizer)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"text": f"document {number}"} for number in range(count)]


def test_a_fraction_is_held_out_by_document(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = section(numbered(40), held_out=0.1, sequence_length=5, too_long="split")
    splits = prepare(settings, tokenizer)
    assert splits.held_out is not None
    assert (splits.train.counts.documents, splits.held_out.counts.documents) == (36, 4)
    assert splits.train.origins is not None
    assert splits.held_out.origins is not None
    assert set(splits.train.origins) | set(splits.held_out.origins) == set(range(40))
    assert not set(splits.train.origins) & set(splits.held_out.origins)
    other = prepare(settings, tokenizer, seed=1).held_out
    assert other is not None
    assert other.tokens.tobytes() != splits.held_out.tokens.tobytes()


def test_a_file_is_held_out(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    other = section(numbered(3)[2:]).source
    splits = prepare(section(numbered(2), held_out=other), tokenizer)
    assert splits.held_out is not None
    assert [whole for whole, _ in shown(splits.train, tokenizer)] == ["<s>document 0</s>", "<s>document 1</s>"]
    assert [whole for whole, _ in shown(splits.held_out, tokenizer)] == ["<s>document 2</s>"]


def test_the_training_data_cannot_be_held_out(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    copy = section(numbered(3)).source
    with pytest.raises(InputError, match=r"held_out .* holds the same as data\.source"):
        prepare(section(numbered(3), held_out=copy), tokenizer)


def test_one_document_cannot_be_divided(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="only one sample or document, which can't be divided"):
        prepare(section(numbered(1), held_out=0.05), tokenizer)


def test_the_limit_and_the_progress(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[int] = []
    settings = section(numbered(1500), limit=1200)
    splits = text.prepare(settings, tokenizer, model_length=None, seed=0, progress=told.append)
    assert splits.train.counts.documents == 1200
    assert told[-1] == 1200
    assert len(told) > 1
    assert told == sorted(told)


def arrays(splits: text.TextSplits) -> list[Any]:
    parts = [splits.train, *([splits.held_out] if splits.held_out else [])]
    return [value.tolist() if isinstance(value, np.ndarray) else value for part in parts for value in vars(part).values()]


def cache_files(settings: TextData) -> list[Path]:
    assert settings.cache
    return sorted(Path(settings.cache).iterdir())


def test_the_cache_gives_the_same_and_leaves_nothing_else_behind(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = section(numbered(30), held_out=0.2)
    made, read = prepare(settings, tokenizer), prepare(settings, tokenizer)
    assert (made.cached, read.cached) == (False, True)
    assert arrays(made) == arrays(read)
    assert [file.suffix for file in cache_files(settings)] == [".npz"]


def test_the_cache_knows_data_by_content_and_tokenizers_by_what_they_do(section: Any) -> None:
    prepare(section(numbered(5)), byte_tokenizer())
    used = byte_tokenizer()
    used(["a", "bcd"], truncation=True, max_length=3)
    used.backend_tokenizer.enable_padding(length=7)
    assert prepare(section(numbered(5)), used).cached


@pytest.mark.parametrize(
    "settings",
    [{"sequence_length": 5}, {"too_long": "split"}, {"supervise": "all"}, {"limit": 3}, {"held_out": 0.5}],
)
def test_a_setting_that_matters_makes_it_anew(
    section: Any, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]
) -> None:
    prepare(section(numbered(5)), tokenizer)
    assert not prepare(section(numbered(5), **settings), tokenizer).cached


def test_other_data_tokenizers_and_seeds_make_it_anew(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = section(numbered(5), held_out=0.5)
    prepare(settings, tokenizer)
    assert not prepare(settings, tokenizer, seed=1).cached
    assert not prepare(settings, byte_tokenizer(chat_template="{{ messages }}")).cached
    assert not prepare(settings, byte_tokenizer(eos_token=END)).cached
    Path(settings.source).write_text('{"text": "changed"}\n{"text": "as well"}\n')
    assert not prepare(settings, tokenizer).cached


def test_the_same_bytes_under_another_suffix_are_other_data(
    section: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = section(numbered(2))
    prepare(settings, tokenizer)
    renamed = tmp_path / "data.txt"
    renamed.write_bytes(Path(settings.source).read_bytes())
    assert prepare(settings.model_copy(update={"source": str(renamed)}), tokenizer).train.counts.documents == 1


def test_a_damaged_cache_is_made_anew(section: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = section(numbered(20), held_out=0.2)
    made = arrays(prepare(settings, tokenizer))
    (file,) = cache_files(settings)
    good = file.read_bytes()
    damages = [b"", b"PK", b"\x93NUMPY", good[: len(good) // 2], good[:-1]]
    damages += [good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :] for place in range(0, len(good), 97)]
    for damaged in damages:
        file.write_bytes(damaged)
        assert arrays(prepare(settings, tokenizer)) == made
    assert cache_files(settings) == [file]


def test_a_cache_that_cannot_be_written_is_told(section: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot make the cache folder.*set data\.cache to another"):
        prepare(section(numbered(2), cache=str(tmp_path / "file")), tokenizer)


def test_the_default_cache_follows_the_platform(
    section: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(section(numbered(2), cache=None), tokenizer)
    assert len(list((tmp_path / "xdg" / "trainwright").iterdir())) == 1


def test_the_built_in_source(smollm2_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    settings = TextData(source="python-docstrings", limit=60, cache=str(tmp_path))
    splits = prepare(settings, smollm2_tokenizer)
    assert splits.held_out is not None
    assert (splits.train.counts.documents, splits.held_out.counts.documents) == (57, 3)
    for whole, supervised in shown(splits.train, smollm2_tokenizer):
        if len(smollm2_tokenizer(whole)["input_ids"]) < 512:
            assert whole.endswith(f"```<|im_end|>\n<|im_start|>assistant\n{supervised}\n")
