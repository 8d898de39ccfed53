"""Generating: the same tokens as transformers, sampling that keeps its promises, and every kind of target."""

import io
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from trainwright import fit, generate
from trainwright.recipe import InputError
from trainwright.sampling import Sampling, pick

GREEDY = Sampling(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("trained")
    fit.train(tiny.recipe(tmp, adapt__method="lora", adapt__rank=4, training__steps=15), quiet=True)
    return tmp


def test_greedy_is_transformers_greedy(tmp_path):
    tiny.model(tmp_path / "base")
    speaker, base = generate.load(str(tmp_path / "base"))
    assert base is None
    prompt = speaker.tokenizer("the quick brown fox")["input_ids"]
    mine = list(speaker.tokens(prompt, GREEDY))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=next(speaker.model.parameters()).dtype)
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert mine == out[: len(mine)]
    assert len(mine) == len([t for t in out if t != 2])


def test_sampling():
    logits = torch.tensor([[5.0, 4.0, 3.0, -2.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = pick(logits, Sampling(temperature=1.0), generator).flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(drawn, logits[0].softmax(-1), atol=0.03, rtol=0)
    assert set(pick(logits, Sampling(temperature=1.0, top_k=2), generator).flatten().tolist()) == {0, 1}
    assert set(pick(logits, Sampling(temperature=1.0, top_p=0.7), generator).flatten().tolist()) == {0, 1}
    assert set(pick(logits, Sampling(temperature=1.0, top_p=0.1), generator).flatten().tolist()) == {0}
    assert set(pick(logits, Sampling(temperature=0.0), generator).flatten().tolist()) == {0}
    assert set(pick(logits, Sampling(temperature=0.01), generator).flatten().tolist()) == {0}


def test_same_seed_same_text(trained):
    tuned, _ = generate.load(str(trained / "run"))
    texts = [generate.answer(tuned, "the quick", Sampling(max_tokens=12, temperature=1.5, seed=s)) for s in (1, 1, 2, 3, 4)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", ["run", "run/model", "base"])
def test_targets(trained, name):
    result = generate.main(str(trained / name), prompt="the quick", chat=False, sampling=GREEDY, quiet=True)
    assert len(result["answers"]) == 1


def test_an_adapter_on_a_named_base_says_what_the_run_says(trained):
    texts = [
        generate.main(target, prompt="the quick", chat=False, sampling=GREEDY, adapter=adapter, quiet=True)["answers"][0][
            "text"
        ]
        for target, adapter in ((str(trained / "run"), None), (str(trained / "base"), str(trained / "run" / "model")))
    ]
    assert texts[0] == texts[1]


def test_compare_shows_base_and_tuned(trained, capsys):
    result = generate.main(str(trained / "run"), prompt="the quick", chat=False, sampling=GREEDY, compare=True)
    base, tuned = result["answers"]
    assert base["text"] != tuned["text"]
    assert capsys.readouterr().out.count("---") == 2


def test_chat_remembers(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\nbrown fox\n\n"))
    result = generate.main(str(trained / "run"), prompt=None, chat=True, sampling=GREEDY)
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"] * 2
    assert result["messages"][1]["content"].strip() in capsys.readouterr().out


def test_streaming_gives_the_whole_text_once(trained):
    tuned, _ = generate.load(str(trained / "run"))
    prompt = generate.encode(tuned, [{"role": "user", "content": "jugs"}], raw=False)
    pieces = list(generate.stream(tuned, prompt, GREEDY))
    assert "".join(pieces) == tuned.tokenizer.decode(list(tuned.tokens(prompt, GREEDY)), skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": "base", "compare": True}, "no base"),
        ({"target": "run", "prompt": None}, "--prompt"),
        ({"target": "run", "prompt": "word " * 400}, "tokens"),
        ({"target": "base", "adapter": "pairs.jsonl"}, "adapter"),
    ],
)
def test_refusals(trained, arguments, words):
    options = {"prompt": "the", "chat": False, "sampling": GREEDY, "quiet": True} | arguments
    for key in ("target", "adapter"):
        if options.get(key):
            options[key] = str(trained / options[key])
    with pytest.raises(InputError, match=words):
        generate.main(options.pop("target"), **options)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range(wrong):
    with pytest.raises(InputError):
        Sampling(**wrong)
