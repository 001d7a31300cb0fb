"""The command as a user runs it: real processes, the real starter model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model_host.catalogue import CATALOGUE
from tests.model_host.misbehaving import Misbehaving, event, says

EXAMPLE = Path(__file__).parents[2] / "examples" / "inventory.py"


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lsp_server", *arguments]
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "COLUMNS": "100", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_complete_shows_the_hole_filled_what_it_cost_and_what_one_more_character_costs(tmp_path: Path):
    before = EXAMPLE.read_bytes()
    done = run("complete", f"{EXAMPLE}:24", "--type", "s", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "def get(self, name: str) -> Item:\n   24 ▌         " in done.stdout
    assert "\x1b" not in done.stdout
    first, second = [line for line in done.stdout.splitlines() if line.startswith("cost")]
    assert ", 0 reused" in first and "tokens/s" in first and "loaded in" in done.stdout
    assert "; 1 token of the prompt computed" in second
    assert EXAMPLE.read_bytes() == before


def test_complete_colours_on_a_terminal(tmp_path: Path):
    done = run("complete", f"{EXAMPLE}:24:9", home=tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[1;32m" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["complete", "nowhere.py:3"], "cannot be read"),
        (["complete", "README.md"], "names no line"),
        (["complete", f"{EXAMPLE}:24", "--model", "/no/model"], "give a folder that exists"),
        (["complete", f"{EXAMPLE}:999"], "outside the document"),
    ],
)
def test_complete_says_what_is_wrong_and_fails(arguments: list[str], said: str, tmp_path: Path):
    done = run(*arguments, home=tmp_path)
    assert done.returncode != 0
    assert said in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_doctor_says_what_would_be_loaded_and_that_nothing_is_wrong(tmp_path: Path):
    done = run("doctor", home=tmp_path)
    assert done.returncode == 0, done.stdout
    for word in ("torch", "devices", "would load", "M parameters as", "fill-in-the-middle", "nothing is wrong"):
        assert word in done.stdout


def test_doctor_says_when_torch_runs_the_model_and_why(tmp_path: Path):
    done = run("doctor", home=tmp_path, DEEPSEEK_LSP_KERNELS="torch")
    assert done.returncode == 0, done.stdout
    assert "plain torch. The setting kernels is 'torch'." in done.stdout and "as float32 on cpu" in done.stdout


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_fewer_bits_work_without_the_compiled_kernels_too(dtype: str, tmp_path: Path):
    done = run("complete", f"{EXAMPLE}:24", home=tmp_path, DEEPSEEK_LSP_KERNELS="torch", DEEPSEEK_LSP_DTYPE=dtype)
    assert done.returncode == 0, done.stderr
    assert f"{dtype} on cpu" in done.stdout


def test_doctor_lists_the_models_there_are_and_which_to_choose(tmp_path: Path):
    done = run("doctor", "--models", home=tmp_path, COLUMNS="60")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("deepseek-ai/")]
    assert len(rows) == len(CATALOGUE)
    assert rows[0][:5] == ["deepseek-ai/DeepSeek-Coder-V2-Lite-Base", "16", "B", "31", "GB"]
    assert "To fill in code choose deepseek-ai/DeepSeek-Coder-V2-Lite-Base" in done.stdout


def test_doctor_names_what_is_wrong_and_what_to_do(tmp_path: Path):
    folder = tmp_path / ".config" / "deepseek-lsp"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('model = "nobody/nothing"\nthread = 3\n')
    done = run("doctor", home=tmp_path, XDG_CONFIG_HOME=str(tmp_path / ".config"))
    assert done.returncode == 1
    assert "deepseek-lsp download nobody/nothing" in done.stdout and "thread in " in done.stdout


def test_version_and_help_read_well(tmp_path: Path):
    assert run("--version", home=tmp_path).stdout.startswith("deepseek-lsp 0.")
    shown = run("--help", home=tmp_path).stdout
    for verb in ("serve", "complete", "doctor", "download"):
        assert verb in shown


def test_doctor_plans_a_model_that_is_not_here_on_a_machine_that_is_not_either(tmp_path: Path):
    done = run("doctor", "--model", "coder-v2-lite-base", "--devices", "2x24GB", home=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "fits as bfloat16: 31.4 GB of weights" in said and "gpu 1 (24.0 GB free): layers 16 to 26 of 27, with their context" in said
    refused = run("doctor", "--model", "deepseek-ai/DeepSeek-V2.5", "--devices", "24GB", home=tmp_path)
    said = " ".join(refused.stdout.split())
    assert refused.returncode == 1 and "does not fit" in said and "It would fit with 128 GB of RAM" in said


def test_doctor_plans_on_this_machine_and_refuses_what_it_does_not_know(tmp_path: Path):
    done = run("doctor", "--model", "starter", home=tmp_path)
    assert done.returncode == 0 and "cpu with" in done.stdout and "starter fits as bfloat16" in " ".join(done.stdout.split())
    for arguments, said in (
        (["--model", "v2", "--context", "200000"], "takes 163,840 tokens of context at most, not 200,000"),
        (["--model", "nobody/nothing"], "deepseek-lsp download nobody/nothing"),
        (["--model", "v2", "--devices", "many"], "describes no device"),
        (["--model", "v2", "--dtype", "int3"], "'int3' is none of"),
        (["--model", "v2", "--dtype", "fp4"], "int4 comes nearest to it"),
    ):
        done = run("doctor", *arguments, home=tmp_path)
        assert done.returncode != 0 and said in " ".join((done.stdout + done.stderr).replace("│", " ").split())


def test_doctor_plans_for_the_context_and_the_sequences_that_are_asked_for(tmp_path: Path):
    done = run("doctor", "--model", "v2-lite", "--devices", "24GB", "--context", "32768", "--batch", "4", home=tmp_path)
    said = " ".join(done.stdout.split())
    assert "131,072 were asked for" in said and "a step of 4 sequences, each at 32,768 tokens of context" in said


def test_an_engine_elsewhere_completes_and_is_told_by_doctor(tmp_path: Path):
    with Misbehaving([says(event("return a"), event(" - b\n", "stop"))]) as server:
        url = server.url
        environment = {"DEEPSEEK_LSP_ENGINE": "openai", "DEEPSEEK_LSP_REMOTE__URL": url, "DEEPSEEK_ENGINE_TOKEN": "t"}
        done = run("complete", f"{EXAMPLE}:24", home=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert "return a - b" in done.stdout and "served at 127.0.0.1" in done.stdout
        assert server.asked[0].headers["authorization"] == "Bearer t"
        doctor = run("doctor", home=tmp_path, **environment)
        assert doctor.returncode == 0 and "asked for with tokens" in doctor.stdout
    done = run("complete", f"{EXAMPLE}:24", home=tmp_path, **environment)
    assert done.returncode == 1 and f"Nothing answers at {url}" in done.stderr
    doctor = run("doctor", home=tmp_path, **environment)
    assert doctor.returncode == 1 and "Nothing answers" in doctor.stdout
    done = run("complete", f"{EXAMPLE}:24", home=tmp_path, DEEPSEEK_LSP_ENGINE="openai")
    assert done.returncode == 1 and "remote.url is ''" in done.stderr
