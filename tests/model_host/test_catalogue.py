"""The catalogue: its figures are the published ones, its entries are recognised in folders, and what it knows is told to the user."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_host import catalogue
from model_host.catalogue import CATALOGUE, LARGE, LITE, RECOMMENDED, Entry, Infilling, Precision, described, find, names_of, of_shape
from model_host.checkpoints import STARTER
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.generation import Fim
from model_host.inspection import fitting, free_bytes, inspect
from model_host.tokenizer import Tokenizer
from tests.model_host import twins

BY_NAME = {entry.name.partition("/")[2]: entry for entry in CATALOGUE}
RELEASED = {
    "V2", "V2-Chat", "V2-Chat-0628", "V2-Lite", "V2-Lite-Chat", "Coder-V2-Base", "Coder-V2-Instruct", "Coder-V2-Instruct-0724",
    "Coder-V2-Lite-Base", "Coder-V2-Lite-Instruct", "V2.5", "V2.5-1210",
}  # fmt: skip


def published(entry: Entry, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    """The release's own config.json, with its full dimensions."""
    fields = entry.shape.model_dump(exclude={"yarn"})
    return twins.AS_ON_THE_HUB | fields | {"rope_scaling": rope or twins.yarn(1.0, 1.0) | {"original_max_position_embeddings": 4096}}


def with_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def shaped_as_twins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The catalogue as if the releases were as small as their twins, so that twins are recognised."""
    small = [
        replace(entry, shape=ModelConfig.read(with_config(tmp_path / f"shape{number}", twins.hub_config(entry))))
        for number, entry in enumerate(CATALOGUE)
    ]
    monkeypatch.setattr(catalogue, "CATALOGUE", tuple(small))


def test_every_release_is_there_once():
    assert {entry.name for entry in CATALOGUE} == {f"deepseek-ai/DeepSeek-{name}" for name in RELEASED}
    assert len(CATALOGUE) == len(RELEASED)


def test_figures_that_follow_from_the_shapes_are_the_published_ones():
    lite, large = BY_NAME["DeepSeek-V2-Lite"], BY_NAME["DeepSeek-V2"]
    assert round(lite.parameters / 1e9, 1) == 15.7 and 2.4e9 <= lite.active_parameters < 2.5e9
    assert round(large.parameters / 1e9, 1) == 235.7 and round(large.active_parameters / 1e9) == 21
    assert (lite.kv_bytes_per_token(), large.kv_bytes_per_token()) == (31_104, 69_120)
    assert lite.kv_bytes_per_token(Precision.FLOAT32) == 2 * 31_104


def test_memory_follows_from_the_shape_at_every_precision():
    gigabytes = {(name, p): BY_NAME[f"DeepSeek-{name}"].weight_bytes(p) / 1e9 for name in ("V2-Lite", "V2.5") for p in Precision}
    assert gigabytes["V2-Lite", Precision.FLOAT32] == pytest.approx(62.8, abs=0.1)
    assert gigabytes["V2-Lite", Precision.BFLOAT16] == pytest.approx(31.4, abs=0.1)
    assert gigabytes["V2-Lite", Precision.INT8] == pytest.approx(16.1, abs=0.1)
    assert gigabytes["V2-Lite", Precision.INT4] == pytest.approx(9.0, abs=0.1)
    assert gigabytes["V2.5", Precision.BFLOAT16] == pytest.approx(471.5, abs=0.1)
    assert gigabytes["V2.5", Precision.INT4] == pytest.approx(126.8, abs=0.1)
    lite = BY_NAME["DeepSeek-V2-Lite"]
    assert lite.bytes_with(1000, Precision.INT8) == lite.weight_bytes(Precision.INT8) + 31_104_000


def test_what_no_file_tells_is_as_the_papers_and_cards_say():
    infills = {name for name, entry in BY_NAME.items() if entry.infilling is Infilling.TRAINED}
    assert infills == {"DeepSeek-Coder-V2-Lite-Base", "DeepSeek-Coder-V2-Instruct-0724", "DeepSeek-V2.5", "DeepSeek-V2.5-1210"}
    assert BY_NAME["DeepSeek-Coder-V2-Lite-Instruct"].infilling is Infilling.DOUBTFUL
    assert RECOMMENDED.name == "deepseek-ai/DeepSeek-Coder-V2-Lite-Base"
    for name, entry in BY_NAME.items():
        assert entry.chat == any(word in name for word in ("Chat", "Instruct", "V2.5"))
        assert entry.context_tokens == (32_768 if "DeepSeek-V2-Lite" in name else 131_072) <= entry.shape.max_position_embeddings
        assert entry.licence and entry.licence.name == "DeepSeek Model License"
        assert entry.good_for and not entry.good_for.endswith(".")


@pytest.mark.parametrize("entry", CATALOGUE, ids=BY_NAME)
def test_a_release_is_recognised_in_the_hubs_cache_and_in_a_folder_of_its_name(entry: Entry, tmp_path: Path):
    model = entry.name.partition("/")[2]
    cached = tmp_path / f"models--deepseek-ai--{model}" / "snapshots" / "c0ffee"
    for folder in (cached, tmp_path / model, tmp_path / model.lower(), tmp_path / "deepseek-ai" / model, tmp_path / f"deepseek-ai_{model}"):
        with_config(folder, published(entry))
        assert find(folder, ModelConfig.read(folder)) is entry
    link = tmp_path / "model"
    link.symlink_to(cached)
    assert catalogue.recognised(link) is entry


def test_a_folder_with_a_name_of_its_own_is_not_recognised_but_what_it_may_be_is_told(tmp_path: Path):
    folder = with_config(tmp_path / "my model", published(BY_NAME["DeepSeek-Coder-V2-Lite-Base"]))
    config = ModelConfig.read(folder)
    assert find(folder, config) is None
    assert {entry.name.removeprefix("deepseek-ai/DeepSeek-") for entry in of_shape(config)} == {
        "V2-Lite", "V2-Lite-Chat", "Coder-V2-Lite-Base", "Coder-V2-Lite-Instruct",
    }  # fmt: skip
    entry = described(folder, config)
    assert entry.infilling is Infilling.UNKNOWN and entry.chat is None and entry.licence is None
    assert (entry.name, entry.parameters, entry.context_tokens) == ("my model", LITE.parameters, 163_840)


def test_a_name_without_the_shape_is_not_believed(tmp_path: Path):
    small = with_config(tmp_path / "DeepSeek-V2.5", twins.hub_config(BY_NAME["DeepSeek-V2.5"]))
    assert find(small, ModelConfig.read(small)) is None
    other = with_config(tmp_path / "DeepSeek-V2", published(BY_NAME["DeepSeek-V2-Lite"]))
    assert find(other, ModelConfig.read(other)) is None


@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_spellings_of_the_rope_settings_and_routing_do_not_hide_a_release(mscale: float, tmp_path: Path):
    rope = twins.yarn(mscale, mscale) | {"original_max_position_embeddings": 4096}
    folder = with_config(tmp_path / "DeepSeek-V2-Chat", published(BY_NAME["DeepSeek-V2-Chat"], rope) | {"max_position_embeddings": 4096})
    assert catalogue.recognised(folder) is BY_NAME["DeepSeek-V2-Chat"]
    misspelt = with_config(tmp_path / "DeepSeek-V2-Lite", published(BY_NAME["DeepSeek-V2-Lite"], rope) | {"topk_method": "gready"})
    assert catalogue.recognised(misspelt) is BY_NAME["DeepSeek-V2-Lite"]


def test_names_similar_to_a_release_are_not_one(tmp_path: Path):
    for name in ("DeepSeek-V2-Chat-finetuned", "DeepSeek-V2-Chat.old", "DeepSeek", "chat"):
        folder = with_config(tmp_path / name, published(BY_NAME["DeepSeek-V2-Chat"]))
        assert catalogue.recognised(folder) is None, names_of(folder)
    assert catalogue.recognised(tmp_path / "nothing here") is None
    assert catalogue.recognised(STARTER) is None


def test_a_release_that_never_learned_to_infill_is_refused_though_its_tokenizer_has_the_tokens(shaped_as_twins: None, tmp_path: Path):
    for name, infills in (("DeepSeek-Coder-V2-Base", False), ("DeepSeek-V2.5", True), ("DeepSeek-Coder-V2-Lite-Instruct", True)):
        folder = twins.write(tmp_path / name, twins.hub_config(BY_NAME[name]))
        assert Tokenizer(folder).has_fim == infills
    untrained = Tokenizer(tmp_path / "DeepSeek-Coder-V2-Base")
    with pytest.raises(CheckpointError, match=r"Coder-V2-Base was not trained to fill in the middle .*: choose .*Coder-V2-Lite-Base"):
        untrained.encode_fim(Fim(prefix="", suffix=""), max_tokens=100)
    (tmp_path / "DeepSeek-Coder-V2-Base").rename(tmp_path / "unknown")
    assert Tokenizer(tmp_path / "unknown").has_fim, "where the checkpoint is not known, its tokens decide"


def test_inspecting_tells_what_the_catalogue_knows(shaped_as_twins: None, tmp_path: Path):
    def inspected(name: str, release: str) -> tuple[dict[str, str], list[str]]:
        folder = twins.write(tmp_path / name, twins.hub_config(BY_NAME[release]))
        report = inspect(str(folder), "cpu", "auto", "auto")
        return report.facts, report.problems

    facts, problems = inspected("DeepSeek-V2.5", "DeepSeek-V2.5")
    assert problems == [] and facts["fill-in-the-middle"] == "yes"
    assert facts["known as"].startswith("deepseek-ai/DeepSeek-V2.5, good for") and "LICENSE-MODEL" in facts["licence"]
    facts, problems = inspected("DeepSeek-Coder-V2-Lite-Instruct", "DeepSeek-Coder-V2-Lite-Instruct")
    assert problems == [] and "DeepSeek-Coder-V2-Lite-Base does it well" in facts["fill-in-the-middle"]
    facts, (problem,) = inspected("DeepSeek-Coder-V2-Instruct", "DeepSeek-Coder-V2-Instruct")
    assert facts["fill-in-the-middle"] == "no" and "was not trained" in problem
    facts, problems = inspected("mine", "DeepSeek-V2-Lite")
    assert problems == [] and facts["fill-in-the-middle"] == "yes, by its tokenizer"
    assert "one of DeepSeek-Coder-V2-Lite-Base, DeepSeek-Coder-V2-Lite-Instruct, DeepSeek-V2-Lite" in facts["known as"]


def test_inspecting_says_when_the_weights_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model_host.inspection.free_bytes", lambda device: 50_000_000)
    (problem,) = inspect("starter", "cpu", "float32", "auto").problems
    assert "needs 0.1 GB for its weights, cpu has 0.1 GB free: choose a smaller model" in problem
    assert inspect("starter", "cpu", "bfloat16", "auto").problems == []


def test_the_list_of_models_says_where_each_fits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("model_host.inspection.free_bytes", lambda device: 64 * 10**9)
    assert {entry.shape.num_hidden_layers for entry, places in fitting() if "cpu" in places} == {LITE.num_hidden_layers}
    monkeypatch.setattr("model_host.inspection.free_bytes", lambda device: 500 * 10**9)
    assert all("cpu" in places for _, places in fitting())
    monkeypatch.setattr("model_host.inspection.free_bytes", lambda device: None)
    assert not any(places for _, places in fitting())


def test_the_memory_of_this_machine_is_known():
    import torch

    free = free_bytes(torch.device("cpu"))
    assert free is not None and 10**8 < free < 10**14


def test_shapes_of_the_two_sizes_differ_where_the_paper_says():
    assert (LITE.q_lora_rank, LARGE.q_lora_rank) == (None, 1536)
    assert (LITE.topk_method, LARGE.topk_method) == ("greedy", "group_limited_greedy")
    assert (LARGE.n_group, LARGE.topk_group, LARGE.routed_scaling_factor) == (8, 3, 16.0)
