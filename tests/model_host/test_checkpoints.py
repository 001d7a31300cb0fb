"""Every way a checkpoint can be wrong is told in a sentence that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_host.checkpoints import STARTER, choose_device, load_model, locate
from model_host.config import ModelConfig
from model_host.errors import CheckpointError
from model_host.inspection import inspect
from model_host.shards import shards
from model_host.tokenizer import Tokenizer


def load(folder: Path) -> None:
    load_model(folder, device=torch.device("cpu"), dtype=torch.float32, progress=lambda what, share: None)


def test_a_name_that_is_nothing_says_what_a_name_can_be():
    with pytest.raises(CheckpointError, match="give a folder that exists, a hub name"):
        locate("/no/such/folder/anywhere")


def test_a_hub_name_that_was_not_downloaded_says_how_to_download_it_and_does_not():
    with pytest.raises(CheckpointError, match="deepseek-lsp download nobody/nothing-at-all"):
        locate("nobody/nothing-at-all")


def test_a_folder_that_is_no_deepseek_v2_checkpoint_is_named(tmp_path: Path, edited_config: Callable[..., Path]):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="a model of type 'llama'"):
        load(edited_config(model_type="llama"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not supported"),
        ({"n_routed_experts": None}, "n_routed_experts"),
        ({"topk_method": "group_limited_greedy"}, "needs n_group and topk_group"),
        ({"topk_method": "group_limited_greedy", "n_group": 5, "topk_group": 2}, "32 experts cannot be routed to 2 of 5 groups"),
        ({"topk_method": "group_limited_greedy", "n_group": 16, "topk_group": 2}, "num_experts_per_tok is 6, but a token has only 4"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok is 33, but a token has only 32 experts"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
    ],
)
def test_a_configuration_that_cannot_be_computed_is_refused_by_name(edited_config: Callable[..., Path], change: dict, said: str):
    with pytest.raises(CheckpointError, match=said):
        load(edited_config(**change))


def test_both_spellings_of_the_rope_settings_mean_the_same(edited_config: Callable[..., Path]):
    hub = ModelConfig.read(STARTER)
    rope = json.loads((STARTER / "config.json").read_text())["rope_scaling"]
    folder = edited_config(rope_scaling=None, rope_parameters={**rope, "rope_type": "yarn", "rope_theta": 10_000.0})
    assert ModelConfig.read(folder) == hub


def test_several_end_tokens_as_transformers_may_write_them_are_read(edited_config: Callable[..., Path]):
    assert ModelConfig.read(edited_config(eos_token_id=[8188, 8189])).eos_token_id == [8188, 8189]


def test_a_missing_shard_is_named(copied: Path):
    victim = sorted(copied.glob("*.safetensors"))[-1]
    victim.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of \d+ shards, first {victim.name}: download it again"):
        load(copied)


@pytest.mark.parametrize("kept", [0, 7, 3000, -1])
def test_a_truncated_shard_is_named_before_anything_is_loaded(copied: Path, kept: int):
    victim = sorted(copied.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{victim.name} is truncated or damaged"):
        shards(copied)


def test_tensors_that_do_not_fit_the_configuration_are_named(edited_config: Callable[..., Path]):
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors, first model\.layers"):
        load(edited_config(num_hidden_layers=40))
    with pytest.raises(CheckpointError, match="has shape"):
        load(edited_config(moe_intermediate_size=16))


def test_pickled_weights_are_refused(copied: Path):
    for file in copied.glob("*safetensors*"):
        file.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load(copied)


def test_a_device_that_is_not_there_says_what_to_set():
    with pytest.raises(CheckpointError, match="set device to 'auto' or 'cpu'"):
        choose_device("cuda:99")


def test_a_tokenizer_that_loses_blanks_is_refused(copied: Path):
    file = copied / "tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "  "}, "content": " "}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="loses text"):
        Tokenizer(copied)


def test_a_tokenizer_without_a_beginning_of_sentence_token_is_refused(copied: Path):
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="names no beginning-of-sentence token"):
        Tokenizer(copied)


def test_a_damaged_tokenizer_is_named(copied: Path):
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(copied)


def test_inspecting_tells_facts_and_what_is_wrong(copied: Path):
    assert inspect("starter", "cpu", "auto", "auto").problems == []
    sorted(copied.glob("*.safetensors"))[0].unlink()
    (problem,) = inspect(str(copied), "cpu", "auto", "auto").problems
    assert "shards" in problem
