"""Loading: sources, `extends`, overrides, interpolation, what the result holds."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qdm_cli.engine.errors import InputError, RecipeError
from qdm_cli.engine.recipe import dump_resolved, load, load_recipe, recipe_digest

BASE = """
model: {id: tiny:ddpm}
sampler: {steps: 10, eta: 0.5}
quantize:
  rules:
    - {match: conv_in, bits: 8}
    - {match: conv_out, bits: 8}
finetune: {method: efficientdm, iterations: 50, lr: {weight_scale: 1e-6}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(BASE)
    return path


def lines(error: RecipeError) -> list[str]:
    return [f"{p.where} {p.path}: {p.message}" for p in error.problems]


def refusal(path: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return lines(caught.value)


def test_a_file_gives_a_complete_recipe(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.name == loaded.recipe.name == "r"
    assert loaded.text == BASE
    assert loaded.recipe.sampler.steps == 10
    assert loaded.recipe.finetune.lr.weight_scale == 1e-6
    assert loaded.where("sampler.eta") == f"{recipe}:3:22"
    assert loaded.where("quantize.rules.1.bits") == f"{recipe}:7:25"
    assert loaded.where("sampler.guidance") == f"{recipe}:3:1"


def test_the_name_in_the_recipe_wins(recipe: Path) -> None:
    assert load_recipe(recipe, ["name=other"]).name == "other"


def test_a_stem_that_is_no_folder_name_is_cleaned(tmp_path: Path) -> None:
    path = tmp_path / ".my recipe (1).yaml"
    path.write_text(BASE)
    assert load_recipe(path).name == "my-recipe-1-"


def test_yaml_is_1_2(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text('model: {id: yes, revision: 2020-01-01}\nseed: 010\nsampler: {eta: 1e-1}\nname: "12"\n')
    found = load_recipe(path).recipe
    assert (found.model.id, found.model.revision, found.seed, found.sampler.eta, found.name) == ("yes", "2020-01-01", 10, 0.1, "12")


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "empty": ("", "1:1 None: the recipe is empty"),
        "comment only": ("# nothing\n", "1:1 None: the recipe is empty"),
        "list": ("- a\n", "1:1 None: a recipe is a mapping"),
        "duplicate": ("model: {id: a}\nseed: 1\nseed: 2\n", "3:1 None: duplicate key 'seed'"),
        "nested duplicate": ("model:\n  id: a\n  id: b\n", "3:3 None: duplicate key 'id'"),
        "syntax": ("model: [a\nseed: 1\n", "2:5 None: expected ',' or ']'"),
        "tag": ("model: !!python/object/apply:os.system ls\n", "1:1 model: YAML tags"),
        "number as a key": ("model: {1: a}\n", "1:9 model: 1 is not a name"),
        "two documents": ("model: {id: a}\n---\nseed: 1\n", "2:1 None: but found another document"),
        "anchor in itself": ("model: &a {id: *a}\n", "1:12 model.id: must be text (got null)"),
        "bomb": (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(6)),
            "too many",
        ),
        "very deep": ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        "control character": ("model: {id: a\x00}\n", "special characters are not allowed"),
    }.values(),
    ids=lambda value: None,
)
def test_what_is_no_recipe_is_refused_with_its_position(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    (found,) = refusal(path)
    assert message in found
    assert found.startswith(str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "message"), [("x/r.yml", "there is no file"), ("nothing", "there is no recipe 'nothing'"), ("a/b", "there is no recipe")]
)
def test_a_missing_source_is_named(tmp_cwd: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(name)


def test_a_misspelt_file_is_suggested(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"Did you mean '.*r\.yaml'"):
        load_recipe(recipe.parent / "rr.yaml")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        load_recipe(tmp_path / "d.yaml")


def test_stdin(recipe: Path) -> None:
    loaded = load_recipe("-", ["seed=3"], stdin=io.StringIO(BASE))
    assert (loaded.name, loaded.recipe.seed, loaded.where("sampler")) == ("stdin", 3, "<stdin>:3:1")


def test_empty_stdin_names_the_step_before() -> None:
    with pytest.raises(InputError, match="the previous step produced nothing"):
        load_recipe("-", stdin=io.StringIO("\n"))


def test_a_terminal_never_hangs() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(InputError, match="is a terminal"):
        load_recipe("-", stdin=Terminal(BASE))


def test_bundled_names_and_the_refusal_of_ambiguous_ones(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "bundled_names", lambda: ["one", "unet/two"])
    monkeypatch.setattr(load, "bundled_text", lambda name: BASE)
    assert load_recipe("unet/two").name == "two"
    assert load_recipe("one").where("model") == "one.yaml:2:1"
    with pytest.raises(InputError, match="Did you mean 'unet/two'"):
        load_recipe("unet/too")
    (tmp_cwd / "one").write_text(BASE)
    with pytest.raises(InputError, match="is a bundled recipe and also a file"):
        load_recipe("one")
    assert load_recipe("./one").name == "one"


class TestExtends:
    def test_deep_merge_and_lists_replaced(self, recipe: Path) -> None:
        child = recipe.parent / "child.yaml"
        child.write_text("extends: [r.yaml]\nsampler: {steps: 5}\nquantize: {rules: [{match: x, bits: 4}]}\n")
        loaded = load_recipe(child)
        assert (loaded.name, loaded.recipe.sampler.steps, loaded.recipe.sampler.eta) == ("child", 5, 0.5)
        assert [rule.match for rule in loaded.recipe.quantize.rules] == ["x"]
        assert loaded.where("sampler.eta") == f"{recipe}:3:22"
        assert loaded.where("sampler.steps") == f"{child}:2:11"

    def test_left_to_right(self, recipe: Path) -> None:
        (recipe.parent / "more.yaml").write_text("sampler: {steps: 7, eta: 0.1}\nname: more\n")
        child = recipe.parent / "child.yaml"
        child.write_text("extends: [r.yaml, more.yaml]\nsampler: {eta: 0.2}\n")
        found = load_recipe(child).recipe
        assert (found.sampler.steps, found.sampler.eta, found.name) == (7, 0.2, "child")

    def test_null_drops_a_stage(self, recipe: Path) -> None:
        child = recipe.parent / "child.yaml"
        child.write_text("extends: r.yaml\nfinetune: null\n")
        assert load_recipe(child).recipe.finetune is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("extends: [r.yml]\n", "child.yaml:1:11 extends.0: there is no file"),
            ("extends: [nothing]\n", "extends.0: there is no recipe 'nothing'"),
            ("extends: [grandchild.yaml]\n", "one level"),
            ("extends: {a: b}\n", "child.yaml:1:1 extends: must be a list"),
            ("extends: [1]\n", "must be a list of"),
            ("extend: [r.yaml]\nmodel: {id: tiny:ddpm}\n", "child.yaml:1:1 extend: unknown setting. Did you mean 'extends'?"),
        ],
    )
    def test_refused(self, recipe: Path, text: str, message: str) -> None:
        (recipe.parent / "grandchild.yaml").write_text("extends: [r.yaml]\n")
        child = recipe.parent / "child.yaml"
        child.write_text(text)
        assert message in refusal(child)[0]

    def test_problems_stand_where_they_were_written(self, recipe: Path) -> None:
        recipe.write_text(BASE.replace("eta", "etta"))
        child = recipe.parent / "child.yaml"
        child.write_text("extends: [r.yaml]\nsampler: {stebs: 5}\n")
        assert refusal(child, "seed=-1") == [
            f"{recipe}:3:22 sampler.etta: unknown setting. Did you mean 'eta'?",
            f"{child}:2:11 sampler.stebs: unknown setting. Did you mean 'steps'?",
            "override 1 seed=-1: must be a whole number, at least 0 (got -1)",
        ]


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            ("sampler.steps=7", "sampler.steps", 7),
            ("sampler.eta=1e-1", "sampler.eta", 0.1),
            ("quantize.rules.1.bits=4", "quantize.rules.1.bits", 4),
            ("quantize.rules=[]", "quantize.rules", ()),
            ("quantize.rules+={match: x, bits: 2}", "quantize.rules.2.bits", 2),
            ("evaluate.suites+=distribution", "evaluate.suites.2.method", "distribution"),
            ("evaluate={suites: [cost]}", "evaluate.suites.0.batch", 1),
            ("~finetune", "finetune", None),
            ("finetune=null", "finetune", None),
            ("~quantize.rules.0", "quantize.rules.0.match", "conv_out"),
            ("~finetune.lr.weight_scale", "finetune.lr.weight_scale", 1e-6),
            ("~sampler.guidance", "sampler.guidance", None),
            ("quantize.activations=null", "quantize.activations", None),
            ("device.max_cpu=2KiB", "device.max_cpu", 2048),
            ("model.revision=a=b", "model.revision", "a=b"),
            ("model.revision=", "model.revision", None),
            ("calibrate.method=mse", "calibrate.data.samples", 64),
        ],
    )
    def test_applied(self, recipe: Path, override: str, path: str, value: object) -> None:
        found: object = load_recipe(recipe, [override]).recipe
        for key in path.split("."):
            found = found[int(key)] if key.isdecimal() else getattr(found, key)  # type: ignore[index]
        assert found == value

    def test_in_order(self, recipe: Path) -> None:
        found = load_recipe(
            recipe, ["evaluate.suites=[cost]", "evaluate.suites.0.batch=3", "quantize.rules+={match: y}", "quantize.rules.2.bits=2"]
        )
        assert found.recipe.evaluate is not None
        assert found.recipe.evaluate.suites[0].batch == 3  # type: ignore[union-attr]
        assert found.recipe.quantize.rules[2].bits == 2

    def test_origins_follow_a_removed_entry(self, recipe: Path) -> None:
        found = load_recipe(recipe, ["~quantize.rules.0"])
        assert found.where("quantize.rules.0.bits") == f"{recipe}:7:25"

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("sampler.stebs=7", "sampler.stebs=7: unknown setting. Did you mean 'steps'?"),
            ("finetune={method: efficientdm, rnk: 3}", "finetune.rnk: unknown setting. Did you mean 'rank'?"),
            ("quantize.rulez.0.bits=4", "quantize.rulez: unknown setting. Did you mean 'rules'?"),
            ("quantize.rules.2.bits=4", "quantize.rules has 2 entries, from 0; quantize.rules+=VALUE appends"),
            ("evaluate.suites.0.batch=4", "evaluate.suites has no entries in this recipe"),
            ("quantize.rules.x=4", "quantize.rules has 2 entries"),
            ("sampler.steps.x=4", "sampler.steps is 10 and has no settings"),
            ("sampler.steps+=4", "sampler.steps is not a list"),
            ("~finetune.rnk", "~finetune.rnk: unknown setting. Did you mean 'rank'?"),
            ("steps", "an override is KEY=VALUE, KEY+=VALUE or ~KEY"),
            ("=4", "an override is KEY=VALUE"),
            ("sampler.steps=[1", "'[1' is not YAML"),
            ("extends+=x", "extends is read before overrides"),
            ("sampler.steps=true", "sampler.steps=true: must be a whole number, at least 1, at most 1000 (got true)"),
            ("steps=5", "steps=5: unknown setting. Did you mean 'sampler.steps'?"),
            ("sampler.5=5", "sampler.5=5: unknown setting"),
        ],
    )
    def test_refused(self, recipe: Path, override: str, message: str) -> None:
        (found,) = refusal(recipe, "seed=1", override)
        assert found.startswith("override 2 ")
        assert message in found

    def test_all_at_once(self, recipe: Path) -> None:
        found = refusal(recipe, "seed=-1", "nonsense", "sampler.steps=0")
        assert [line.split(" ")[1] for line in found] == ["1", "2", "3"]


class TestInterpolation:
    def test_values_and_environment(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QDM_TEST_BITS", "8")
        found = load_recipe(
            recipe, ["seed=${sampler.steps}", "quantize.weights.bits=${env:QDM_TEST_BITS}", "name=s${sampler.steps}-${env:QDM_TEST_BITS}"]
        )
        assert (found.recipe.seed, found.recipe.quantize.weights.bits, found.name) == (10, 8, "s10-8")

    def test_sections_and_entries(self, recipe: Path) -> None:
        found = load_recipe(recipe, ["quantize.rules.1.match=${quantize.rules.0.match}", "finetune.sampler=${sampler}"])
        assert found.recipe.quantize.rules[1].match == "conv_in"
        assert found.recipe.finetune.sampler.steps == 10

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed=${env:QDM_TEST_ABSENT}", "the environment variable QDM_TEST_ABSENT is not set"),
            ("seed=${nothing.here}", "names no setting that is written"),
            ("seed=${seed}", "leads back to itself"),
            ("model.id=${oc.env:HOME}", "only ${env:NAME} and ${section.setting}"),
            ("model.id=${env:HOME,x}", "only ${env:NAME}"),
            ("model.id=${", "only ${env:NAME}"),
        ],
    )
    def test_refused(self, recipe: Path, override: str, message: str) -> None:
        (found,) = refusal(recipe, override)
        assert message in found

    def test_a_value_from_the_environment_is_not_filled_in_again(self, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("QDM_TEST_ID", "'${seed}'")
        found = refusal(recipe, "model.id=a-${env:QDM_TEST_ID}")
        assert "model.id" in found[0]


def test_resolved_text_reads_back(recipe: Path) -> None:
    found = load_recipe(
        recipe, ["evaluate={fail_if: ['psnr<3']}", "export={}", "calibrate.method=percentile", "quantize.rules+={match: {role: [input]}}"]
    )
    text = dump_resolved(found.recipe)
    again = load_recipe("-", stdin=io.StringIO(text))
    assert again.recipe == found.recipe
    assert "checkpoint_every: 200" in text
    assert text.index("method: percentile") < text.index("shard_size")


def test_digest_is_of_the_meaning(recipe: Path) -> None:
    first = recipe_digest(load_recipe(recipe).recipe)
    recipe.write_text("# c\n" + BASE.replace("steps: 10", "steps: 0o12"))
    assert recipe_digest(load_recipe(recipe).recipe) == first
    assert recipe_digest(load_recipe(recipe, ["seed=1"]).recipe) != first
