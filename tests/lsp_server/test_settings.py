"""Settings come in layers; a bad value is named and the rest applies."""

from pathlib import Path

import pytest

from lsp_server.settings import Layer, Settings, environment_layer, file_layer, merge, table_layer, workspace_layer


def test_without_anything_the_defaults_hold():
    assert merge([]) == (Settings(), [])


def test_a_higher_layer_wins_field_by_field():
    low, high = Layer("file", {"threads": 2, "inline": {"max_lines": 3, "deadline_s": 1}}), Layer("editor", {"inline": {"max_lines": 5}})
    settings, problems = merge([low, high])
    assert (settings.threads, settings.inline.max_lines, settings.inline.deadline_s, problems) == (2, 5, 1.0, [])


def test_a_bad_value_is_named_with_its_place_and_the_lower_layer_still_counts():
    settings, problems = merge(
        [Layer("file", {"inline": {"max_lines": 3}}), Layer("editor", {"inline": {"max_lines": -1}, "colour": 1, "threads": 4})]
    )
    assert settings.inline.max_lines == 3 and settings.threads == 4
    assert len(problems) == 2
    assert any(p.startswith("inline.max_lines in editor is left out") for p in problems) and any(
        p.startswith("colour in editor") for p in problems
    )


@pytest.mark.parametrize(("dtype", "instead"), [("fp4", "int4"), ("fp8", "int8")])
def test_a_format_of_other_engines_is_refused_with_the_one_to_choose(dtype: str, instead: str):
    settings, (problem,) = merge([Layer("config.toml", {"dtype": dtype, "threads": 2})])
    assert settings.dtype == "auto" and settings.threads == 2
    assert problem.startswith("dtype in config.toml is left out: ") and f"not held as {dtype} here: choose {instead}" in problem


@pytest.mark.parametrize("values", [{"inline": 5}, {"inline": {"max_lines": {"a": 1}}}, {"inline": None, "model": []}])
def test_values_of_a_wrong_shape_are_left_out(values: dict):
    settings, problems = merge([Layer("editor", values)])
    assert settings == Settings() and problems


def test_the_environment_reaches_nested_settings():
    layer = environment_layer({"DEEPSEEK_LSP_INLINE__MAX_LINES": "4", "DEEPSEEK_LSP_MODEL": "/m", "HOME": "/"})
    settings, problems = merge([layer])
    assert (settings.inline.max_lines, settings.model, problems) == (4, "/m", [])


@pytest.mark.parametrize("names", [("INLINE", "INLINE__MAX_LINES"), ("INLINE__MAX_LINES", "INLINE")])
def test_a_table_that_the_environment_gives_a_plain_value_is_a_problem_and_no_crash(names: tuple[str, str]):
    values = {"INLINE": "on", "INLINE__MAX_LINES": "4"}
    settings, problems = merge([environment_layer({f"DEEPSEEK_LSP_{name}": values[name] for name in names})])
    assert (settings.inline.max_lines, len(problems)) in ((4, 0), (12, 1))


def test_a_file_that_is_not_toml_is_named_and_left_out(tmp_path: Path):
    file = tmp_path / "config.toml"
    assert file_layer(file)[1] == []
    file.write_text("model = ")
    layer, (problem,) = file_layer(file)
    assert layer.values == {} and str(file) in problem


def test_a_workspace_cannot_choose_the_model_or_the_device():
    layer, problems = workspace_layer({"model": "/evil", "device": "cpu", "inline": {"max_lines": 2}})
    assert dict(layer.values) == {"inline": {"max_lines": 2}} and len(problems) == 2


def test_a_client_that_sends_no_table_is_told():
    assert table_layer("the client", None) == (Layer("the client", {}), [])
    assert "a table of settings" in table_layer("the client", [1])[1][0]


def test_a_workspace_cannot_send_the_code_elsewhere():
    layer, problems = workspace_layer({"engine": "openai", "remote": {"url": "https://evil.example/v1"}})
    assert layer.values == {} and len(problems) == 2
    settings, wrong = merge([layer])
    assert settings.engine == "local" and settings.remote.url == "" and wrong == []
