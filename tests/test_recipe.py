"""Recipes: reading, overrides, writing, the schema, and what is said about every kind of fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainwright.recipe import AdamW, InputError, Lora, Recipe, Section, nearest
from trainwright.recipe import yaml as recipe_yaml
from trainwright.recipe.file import dump, load, parse, schema
from trainwright.recipe.names import ALIASES
from trainwright.recipe.types import known_paths

DATA = {"source": "python-docstrings"}
quick = settings(max_examples=150, deadline=None)


def faults(mapping: dict[str, Any]) -> list[str]:
    """The lines about a faulty mapping, without the heading."""
    with pytest.raises(InputError) as caught:
        parse(mapping, "r.yaml")
    lines = str(caught.value).splitlines()
    return [line.strip() for line in lines[1:]] if len(lines) > 1 else [lines[0].removeprefix("r.yaml: ")]


def numbered(items: list[str]) -> dict[str, str]:
    """The items under keys of their own."""
    return {f"item{number}": item for number, item in enumerate(items)}


def fault(mapping: dict[str, Any]) -> str:
    """The only line about a mapping that gets its data from here."""
    lines = faults({"data": DATA, **mapping})
    assert len(lines) == 1, lines
    return lines[0]


def refusal(work: Callable[[], object]) -> str | None:
    """What an InputError says, if there is one; any other exception is the test's failure."""
    try:
        work()
    except InputError as error:
        return str(error)
    return None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("data: {source: python-docstrings}\n")
    return path


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("off", "off"),
        ("yes", "yes"),
        ("010", 10),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("10_000", 10000),
        ("1_0", "1_0"),
        ("1e", "1e"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("'1e-4'", "1e-4"),
        ("0x1F", "0x1F"),
    ],
)
def test_words_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = recipe_yaml.read(f"key: {text}", "f")["key"]
    assert found == value
    assert type(found) is type(value)
    if not text.startswith("'"):
        assert recipe_yaml.read_word(text) == value


@pytest.mark.parametrize("text", ["*norm*", "a: b", "x #y", "<<", "-", "", "[", "9" * 5000])
def test_a_word_on_the_command_line_is_never_an_error(text: str) -> None:
    assert recipe_yaml.read_word(text) == (text or None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "f: line 1, column 6: expected ',' or ']'"),
        ("a: 1\nb: 1: 2", "f: line 2, column 5: mapping values are not allowed here; text that holds ': '"),
        ("a: *norm*", "must be in quotes, such as '*norm*'"),
        ("a:\n\tb: 1", "f: line 2, column 1: found character '\\t' that cannot start any token; indent with spaces"),
        ("a: &a [*a]", "line 1, column 4: found unconstructable recursive node"),
        ("a: !!python/object:os.system x", "a recipe holds plain values, without tags"),
        ("a: !!set {b}", "without tags"),
        ("a: 1\n---\nb: 1", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("a: " + "9" * 5000, "line 1, column 4: a number of 5000 digits"),
        ("a: \x00", "special characters are not allowed"),
        ("[" * 2000, "nested too deeply"),
        ("{a: 1}: 2", "line 1, column 1: found unhashable key"),
    ],
)
def test_what_is_not_yaml_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        recipe_yaml.read(text, "f")
    assert "\n" not in str(caught.value)


def test_repeated_keys_are_all_told_with_their_lines() -> None:
    with pytest.raises(InputError) as caught:
        recipe_yaml.read("a: 1\nb: {c: 1, c: 2}\nd: 3\na: 4\n", "f")
    assert str(caught.value).splitlines() == [
        "f: a key may stand once only",
        "  line 2: key 'c' is there already, in line 2",
        "  line 4: key 'a' is there already, in line 1",
    ]


def test_a_merged_key_is_not_a_repeated_one() -> None:
    text = "x: &x {a: 1, b: 2}\nz: &z {c: 4}\ny: {<<: *x, <<: *z, a: 3}"
    assert recipe_yaml.read(text, "f")["y"] == {"a": 3, "b": 2, "c": 4}


@given(st.text(alphabet="ab1.e-_:[]{}*&!<'\"#,|>%@?~ \n\t\\"))
@quick
def test_any_text_is_read_or_refused(text: str) -> None:
    message = refusal(lambda: recipe_yaml.read(text, "f"))
    assert message is None or message.startswith("f: ")


# ---------------------------------------------------------------- reading


def test_the_shortest_recipe(file: Path) -> None:
    recipe = load(file)
    assert recipe.data.source == "python-docstrings"
    assert recipe.run.folder == "runs/small"
    assert isinstance(recipe.optimizer, AdamW)


def test_a_named_run_folder_stays(file: Path) -> None:
    assert load(file, ["run.folder=elsewhere"]).run.folder == "elsewhere"


def test_a_section_without_its_kind_is_the_default_kind() -> None:
    recipe = parse({"data": DATA, "optimizer": {"learning_rate": 1e-3}})
    assert recipe.optimizer == AdamW(learning_rate=1e-3)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("optimizer.betas=[0.8, 0.95]", "optimizer.betas", (0.8, 0.95)),
        ("adapt={method: lora, rank: 4}", "adapt.rank", 4),
        ("data.fields.prompt=question", "data.fields.prompt", "question"),
        ("data.held_out=null", "data.held_out", None),
        ("data.packing=false", "data.packing", False),
        ("data.source=a=b: c #d", "data.source", "a=b: c #d"),
        ("data.source='1e-4'", "data.source", "1e-4"),
        ("run.compile=off", "run.compile", "off"),
        ("training.clip_norm=null", "training.clip_norm", None),
    ],
)
def test_overrides(file: Path, override: str, path: str, value: object) -> None:
    found: Any = load(file, [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


def test_overrides_together(file: Path) -> None:
    recipe = load(file, ["adapt.method=lora", "adapt.targets=*q_proj", "model.options.hidden_size=64", "adapt.rank=2"])
    assert recipe.adapt == Lora(method="lora", targets="*q_proj", rank=2)
    assert recipe.model.options == {"hidden_size": 64}


def test_an_override_of_an_anchored_section_stays_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("data: {source: a}\nmodel: {options: {x: &s {k: 1}, y: *s}}\n")
    assert load(path, ["model.options.x.k=2"]).model.options == {"x": {"k": 2}, "y": {"k": 1}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rank", "'rank' isn't key=value"),
        ("=3", "'=3' isn't key=value"),
        ("a..b=3", "'a..b=3' isn't key=value"),
        ("run.folder=", "run.folder= has no value; write run.folder=null"),
        ("precision.kind=bf16", "precision.kind: precision is the text 'fp32', which has no keys"),
        ("adapt.train=[*a]", "must be in quotes"),
        ("adapt.rank=8", "adapt.rank: needs adapt.method: lora (it is 'full' unless you say so)"),
        ("lr=1e-3", "lr: unknown key (did you mean 'optimizer.learning_rate'?)"),
    ],
)
def test_faulty_overrides(file: Path, override: str, said: str) -> None:
    file.write_text(file.read_text() + "precision: fp32\n")
    with pytest.raises(InputError, match=re.escape(said)):
        load(file, [override])


def test_faults_of_file_and_overrides_come_together(file: Path) -> None:
    file.write_text("data: {sorce: x}\n")
    with pytest.raises(InputError) as caught:
        load(file, ["what", "run.seed=-1"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{file} with overrides has 4 faults:"
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["data.source", "data.sorce", "run.seed"]


@given(st.lists(st.text(alphabet="adpt.rnk=[]{}'*: 1e-"), max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_override_is_taken_or_refused(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("data: {source: python-docstrings}\n")
    message = refusal(lambda: load(path, overrides))
    assert message is None or str(path) in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty; the shortest recipe is"),
        (b"# nothing\n", "empty; the shortest recipe is"),
        (b"- 1\n- 2\n", "a recipe is a mapping (key: value), found [1, 2]"),
        (b"hello\n", "found the text 'hello'"),
        (b"a: \xff\n", "not text in UTF-8 (byte 3)"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(said)):
        load(path)


def test_a_missing_file_names_the_nearest(file: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"no such file (did you mean {str(file)!r}?)")):
        load(file.with_name("smal.yaml"))


def test_a_run_folder_is_not_a_recipe(file: Path) -> None:
    file.rename(file.with_name("recipe.yaml"))
    with pytest.raises(InputError, match=r"is a folder, not a recipe; its recipe is .*recipe\.yaml"):
        load(file.parent)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        (
            {"precision": "bf61"},
            "precision: found the text 'bf61'; must be 'auto', 'fp32', 'bf16', 'pure_bf16', 'fp16' or 'fp64' (did you mean",
        ),
        ({"parallel": {"zero": "two"}}, "parallel.zero: found the text 'two'; must be 0, 1, 2 or 3"),
        (
            {"precision": "BF16"},
            "precision: found the text 'BF16'; must be 'auto', 'fp32', 'bf16', 'pure_bf16', 'fp16' or 'fp64' (did you mean",
        ),
        ({"training": {"steps": 0}}, "training.steps: found 0; must be a whole number of at least 1 or null"),
        ({"training": {"steps": True}}, "training.steps: found true; must be a whole number of at least 1 or null"),
        ({"training": {"steps": 1.5}}, "training.steps: found 1.5; must be a whole number of at least 1 or null"),
        (
            {"training": {"batch_size": "8"}},
            "training.batch_size: found the text '8'; must be a whole number of at least 1",
        ),
        ({"run": {"seed": -1}}, "run.seed: found -1; must be a whole number from 0 to 2147483647"),
        ({"run": {"device": None}}, "run.device: found nothing (null); must be text"),
        ({"schedule": {"final": 2}}, "schedule.final: found 2; must be a number from 0 to 1"),
        ({"schedule": {"warmup": float("nan")}}, "schedule.warmup: found nan; must be a number of at least 0"),
        ({"loss": {"label_smoothing": 1}}, "loss.label_smoothing: found 1; must be a number of at least 0 and below 1"),
        ({"tracking": None}, "tracking: found nothing (null); must be a section with the keys tensorboard"),
        ({"tracking": {"tensorboard": 1}}, "tracking.tensorboard: found 1; must be true or false"),
        (
            {"schedule": "cosine"},
            "schedule: found the text 'cosine'; must be a section with name: 'cosine', 'linear', 'constant'",
        ),
        ({"model": {"options": 3}}, "model.options: found 3; must be a section of keys and values"),
        ({"model": {"options": {1: 2}}}, "model.options.1: a key must be text: put it in quotes"),
        ({1: 2}, "1: a key must be text: put it in quotes"),
        (
            {"data": {**DATA, "held_out": 2}},
            "data.held_out: found 2; must be a number above 0 and below 1, text or null",
        ),
        (
            {"evaluation": {"best": {"metric": "loss"}}},
            "evaluation.best.direction: missing; give 'minimize' or 'maximize'",
        ),
        ({"adapt": "lora"}, "adapt: found the text 'lora'; must be a section with method: 'full', 'partial' or 'lora'"),
        (
            {"adapt": {"method": "lorra"}},
            "adapt.method: found the text 'lorra'; must be 'full', 'partial' or 'lora' (did you mean 'lora'?)",
        ),
        ({"adapt": {"method": ["lora"]}}, "adapt.method: found ['lora']; must be 'full', 'partial' or 'lora'"),
        ({"adapt": {"method": "lora", "rank": 0}}, "adapt.rank: found 0; must be a whole number of at least 1"),
        ({"adapt": {"method": "lora", "targets": [1]}}, "adapt.targets: found [1]; must be text or a list of text"),
        ({"adapt": {"method": "partial", "train": []}}, "adapt.train: found []; must be a list of text, and not empty"),
        ({"adapt": {"method": "partial", "train": ["a", 3]}}, "adapt.train[1]: found 3; must be text"),
        (
            {"adapt": {"method": "partial"}},
            "adapt.train: missing; give a list of text, and not empty: name patterns such as",
        ),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas[1]: missing; give a number of at least 0 and below 1"),
        (
            {"optimizer": {"betas": [0.9, 0.9, 0.9]}},
            "optimizer.betas: found [0.9, 0.9, 0.9]; must be a list of 2, each a number",
        ),
        ({"training": {"epochs": 1, "steps": 2}}, "training: give epochs or steps, not both"),
        ({"training": {"micro_batch_size": 3}}, "training: batch_size 8 is not a multiple of micro_batch_size 3"),
        (
            {"optimizer": {"name": "sgd", "nesterov": True, "momentum": 0}},
            "optimizer: nesterov needs a momentum above 0",
        ),
        (
            {"data": {**DATA, "held_out": None}, "evaluation": {"every": 5}},
            "evaluation.every, best and stop need held-out data",
        ),
    ],
)
def test_values(mapping: dict[str, Any], said: str) -> None:
    assert fault(mapping).startswith(said)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat: unknown key (did you mean 'learning_rate'?)"),
        ({"optimizer": {"lr": 1}}, "optimizer.lr: unknown key (did you mean 'learning_rate'?)"),
        ({"learning_rate": 1}, "learning_rate: unknown key here; it belongs to optimizer.learning_rate"),
        ({"learning_rte": 1}, "learning_rte: unknown key (did you mean 'optimizer.learning_rate'?)"),
        ({"optimiser": {}}, "optimiser: unknown key (did you mean 'optimizer'?)"),
        ({"lr": 1}, "lr: unknown key (did you mean 'optimizer.learning_rate'?)"),
        ({"bf16": True}, "bf16: unknown key (did you mean 'precision: bf16'?)"),
        ({"num-train-epochs": 3}, "num-train-epochs: unknown key (did you mean 'training.epochs'?)"),
        (
            {"training": {"every": 1}},
            "training.every: unknown key here; it belongs to memory.every, evaluation.every or checkpoint.every",
        ),
        (
            {"evaluation": {"best": {"metric": "loss", "direction": "minimize", "greater_is_better": True}}},
            "evaluation.best.greater_is_better: unknown key (did you mean 'direction'?)",
        ),
        ({"optimizer.name": "sgd"}, "'optimizer.name': unknown key (in a file, write 'name' inside 'optimizer')"),
        ({"tracking": {"zzz": 1}}, "tracking.zzz: unknown key; known here: tensorboard"),
        ({"": 1}, "'': unknown key; known here: model, adapt"),
        ({"adapt": {"method": "full", "rank": 8}}, "adapt.rank: needs adapt.method: lora (found 'full')"),
        ({"adapt": {"rank": 8}}, "adapt.rank: needs adapt.method: lora (it is 'full' unless you say so)"),
        (
            {"adapt": {"method": "full", "start": "x"}},
            "adapt.start: needs adapt.method: partial or lora (found 'full')",
        ),
        ({"adapt": {"method": "lora", "r": 8}}, "adapt.r: unknown key (did you mean 'rank'?)"),
        (
            {"optimizer": {"momentum": 0.9}},
            "optimizer.momentum: needs optimizer.name: sgd or rmsprop (it is 'adamw' unless you say so)",
        ),
        (
            {"per_device_train_batch_size": 4},
            "per_device_train_batch_size: unknown key (did you mean 'training.micro_batch_size'? training.batch_size",
        ),
    ],
)
def test_unknown_keys(mapping: dict[str, Any], said: str) -> None:
    assert fault(mapping).startswith(said)


@pytest.mark.parametrize("mapping", [{}, {"data": {}}])
def test_a_missing_section_names_the_key_inside(mapping: dict[str, Any]) -> None:
    assert faults(mapping)[0].startswith("data.source: missing; give text: python-docstrings, or a .jsonl")


def test_every_fault_is_told_at_once() -> None:
    lines = faults({"data": {"sorce": "x"}, "precision": "half", "adapt": {"method": "lora", "rank": -1}, "lr": 1})
    assert [line.split(":")[0] for line in lines] == ["adapt.rank", "data.source", "data.sorce", "precision", "lr"]


def test_messages_are_a_persons() -> None:
    lines = faults({"data": {"limit": "x", "source": 3}, "adapt": {"method": "lora", "rank": None}, "run": 3, "x": 1})
    for word in ("pydantic", "Input", "discriminator", "constrained", "extra", "NoneType", "int", "str"):
        assert not any(re.search(rf"\b{word}\b", line) for line in lines), (word, lines)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_lead_to_keys_that_exist(alias: str) -> None:
    target = re.match(r"[a-z_.]+", ALIASES[alias])
    assert target is not None
    assert target.group() in known_paths()
    assert alias not in {path.rpartition(".")[2] for path in known_paths()}, "a key of ours is no alias"


# Keys that nothing here could take for one of its own.
unknown = st.text(min_size=1).filter(lambda key: key not in {p.rpartition(".")[2] for p in known_paths()})
sections = st.sampled_from([name for name in Recipe.model_fields if name not in ("precision", "metrics")])


@given(
    unknown,
    sections,
    st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.dictionaries(st.text(), st.text()),
)
@quick
def test_unknown_keys_are_always_named(key: str, section: str, value: object) -> None:
    for mapping in (
        {"data": DATA, key: value},
        {"data": DATA, section: {**(DATA if section == "data" else {}), key: value}},
    ):
        (line,) = faults(mapping)
        assert key in line or repr(key) in line


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(known_paths()), values)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere_is_taken_or_refused_by_name(path: str, value: object) -> None:
    mapping: dict[str, Any] = {"data": dict(DATA)}
    *parents, last = path.split(".")
    inner = mapping
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    message = refusal(lambda: parse(mapping))
    assert message is None or path.split(".")[0] in message


def test_values_are_strict_from_python_too() -> None:
    with pytest.raises(ValueError, match="training"):
        parse({"data": DATA, "training": {"steps": True}})
    assert AdamW(betas=[0.5, 0.6]).betas == (0.5, 0.6)  # type: ignore[arg-type]


# ---------------------------------------------------------------- writing

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fractions = st.floats(0, 1, exclude_max=True)
rates = st.floats(0, 1e6)
counts = st.integers(1, 10**9)
optimizers = st.fixed_dictionaries(
    {"name": st.just("adamw")},
    optional={"learning_rate": rates, "betas": st.lists(fractions, min_size=2, max_size=2), "eps": st.floats(1e-12, 1)},
) | st.fixed_dictionaries({"name": st.just("sgd")}, optional={"learning_rate": rates, "momentum": fractions})
adapts = (
    st.just({"method": "full"})
    | st.fixed_dictionaries({"method": st.just("partial"), "train": st.lists(st.text(), min_size=1, max_size=3)})
    | st.fixed_dictionaries(
        {"method": st.just("lora")},
        optional={"rank": counts, "targets": st.text() | st.lists(st.text(), max_size=3), "dropout": fractions},
    )
)
mappings = st.fixed_dictionaries(
    {"data": st.fixed_dictionaries({"source": st.text()}, optional={"held_out": st.text(), "limit": counts})},
    optional={
        "model": st.fixed_dictionaries({"options": st.dictionaries(st.text(), plain, max_size=4)}),
        "optimizer": optimizers,
        "adapt": adapts,
        "precision": st.sampled_from(["auto", "fp32", "bf16"]),
        "run": st.fixed_dictionaries({"folder": st.none() | st.text(), "compile": st.sampled_from(["on", "off"])}),
    },
)


# Text that a reader would take for something else, and values that JSON has no word for.
PITFALLS = [
    "1e-4",
    "10_000",
    "off",
    "010",
    "12:30",
    "null",
    "~",
    "",
    "<<",
    "a\x85b",
    "\u2028",
    "\ufeff",
    "- a",
    "#",
    " ",
]


@given(mappings)
@example({"data": DATA, "model": {"options": numbered(PITFALLS)}})
@example({"data": DATA, "model": {"options": {text: float("inf") for text in PITFALLS}}})
@settings(max_examples=120, deadline=None)
def test_what_is_written_reads_as_the_same_recipe(mapping: dict[str, Any]) -> None:
    recipe = parse(mapping)
    text = dump(recipe)
    assert parse(recipe_yaml.read(text, "f")) == recipe
    assert dump(parse(recipe_yaml.read(text, "f"))) == text


def test_other_readers_of_yaml_find_the_same_words() -> None:
    recipe = parse({"data": {"source": "1e-4"}, "run": {"compile": "off"}, "optimizer": {"learning_rate": 1e-5}})
    found = yaml.safe_load(dump(recipe))
    assert (found["data"]["source"], found["run"]["compile"], found["optimizer"]["learning_rate"]) == (
        "1e-4",
        "off",
        1e-5,
    )


def test_written_order_is_that_of_the_recipe() -> None:
    text = dump(parse({"optimizer": {"learning_rate": 1e-3}, "data": DATA}))
    assert [line[:-1] for line in text.splitlines() if re.fullmatch(r"\w+:", line)] == [
        name for name in Recipe.model_fields if name not in ("precision", "metrics")
    ]
    assert "betas: [0.9, 0.999]" in text


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_read(path: Path) -> None:
    assert parse(recipe_yaml.read(dump(load(path)), "f")) == load(path)


# ---------------------------------------------------------------- schema


def test_schema_tells_editors_everything() -> None:
    found = schema()
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert found["title"] == "trainwright recipe"
    assert set(found["properties"]) == set(Recipe.model_fields)
    assert found["additionalProperties"] is False
    assert found["$defs"]["TextData"]["properties"]["source"]["description"].startswith("python-docstrings")
    assert found["$defs"]["Lora"]["required"] == ["method"]
    json.dumps(found, allow_nan=False)


def test_every_section_has_a_place_in_the_schema() -> None:
    defined = set(schema()["$defs"])
    assert {kind.__name__ for kind in Section.__subclasses__() if kind.__module__ == Section.__module__} <= {
        *defined,
        "Recipe",
    }


def test_nearest() -> None:
    assert nearest("learning_rat", ["learning_rate", "betas"]) == " (did you mean 'learning_rate'?)"
    assert nearest("zzz", ["learning_rate"]) == ""
