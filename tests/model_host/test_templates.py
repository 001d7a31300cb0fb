"""Conversations in the words of each of the family's templates, and templates that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_host import templates
from model_host.checkpoints import STARTER
from model_host.errors import CheckpointError
from model_host.generation import Chat, Message
from model_host.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
PLAIN_WORDS = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Of V2-Chat and of Coder-V2-Instruct."""
TURN_TOKENS = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
"""Of V2.5."""
CONTROL = [BOS, EOS, USER, ASSISTANT, FIM_BEGIN, FIM_HOLE, FIM_END]


def checkpoint(folder: Path, template: str | None) -> Path:
    """A tokenizer like that of V2.5, whose turn and FIM tokens are not called special in its own files, with a template."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(STARTER / name, folder / name)
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = json.loads(file.read_text()), json.loads(settings.read_text())
    for token in content["added_tokens"]:
        token["special"] = "sentence" in token["content"]
    first = max(token["id"] for token in content["added_tokens"]) + 1
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": first + number, "content": name} | shape for number, name in enumerate((USER, ASSISTANT))]
    config["chat_template"] = template
    file.write_text(json.dumps(content))
    settings.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("checkpoints")
    named = {"V2-Chat": PLAIN_WORDS, "Coder-V2-Instruct": PLAIN_WORDS, "V2.5": TURN_TOKENS}
    return {name: Tokenizer(checkpoint(folder / name, template)) for name, template in named.items()}


def chat(*contents: str, system: str | None = None) -> Chat:
    turns = [Message(role="assistant" if number % 2 else "user", content=content) for number, content in enumerate(contents)]
    return Chat(messages=(*([Message(role="system", content=system)] if system else []), *turns))


def ids(tokenizer: Tokenizer, *parts: str) -> tuple[int, ...]:
    """The ids of parts that are a control token each, or plain text."""
    of_control = tokenizer._special
    return tuple(id for part in parts for id in ([of_control[part]] if part in of_control else tokenizer.encode(part)))


PLAIN_FORM = (
    [BOS, "User: Hello.\n\nAssistant:"],
    [BOS, "Be brief.\n\nUser: Hello.\n\nAssistant: Hi!", EOS, "User: And?\n\nAssistant:"],
)
TOKEN_FORM = (
    [BOS, USER, "Hello.", ASSISTANT],
    [BOS, "Be brief.", USER, "Hello.", ASSISTANT, "Hi!", EOS, USER, "And?", ASSISTANT],
)


@pytest.mark.parametrize(("name", "first", "later"), [("V2-Chat", *PLAIN_FORM), ("Coder-V2-Instruct", *PLAIN_FORM), ("V2.5", *TOKEN_FORM)])
def test_each_checkpoint_is_spoken_to_in_its_own_form(tokenizers: dict[str, Tokenizer], name: str, first: list[str], later: list[str]):
    tokenizer = tokenizers[name]
    assert tokenizer.without_chat is None
    assert tokenizer.encode_chat(chat("Hello.")).ids == ids(tokenizer, *first)
    assert tokenizer.encode_chat(chat("Hello.", "Hi!", "And?", system="Be brief.")).ids == ids(tokenizer, *later)


@pytest.mark.parametrize("name", ["V2-Chat", "Coder-V2-Instruct"])
def test_nothing_not_even_a_blank_follows_the_last_assistant(tokenizers: dict[str, Tokenizer], name: str):
    tokenizer = tokenizers[name]
    said = b"".join(map(tokenizer.token_bytes, tokenizer.encode_chat(chat("Hello.", "Hi!", "And?")).ids))
    assert said.endswith(b"User: And?\n\nAssistant:")


TEXT = st.lists(
    st.sampled_from([*CONTROL, "x", "\n\n", "User: ", "Assistant:", "｜>", "<｜", "<｜User", "\ue0000\ue001"]) | st.text(max_size=5)
)


@pytest.mark.parametrize("name", ["V2-Chat", "V2.5"])
@given(pieces=TEXT)
def test_no_text_of_the_users_becomes_a_token_that_controls(tokenizers: dict[str, Tokenizer], name: str, pieces: list[str]):
    tokenizer, text = tokenizers[name], "".join(pieces)
    found = tokenizer.encode_chat(chat(text, text, text)).ids
    harmless = tokenizer.encode_chat(chat("x", "x", "x")).ids
    assert [id for id in found if tokenizer.is_special(id)] == [id for id in harmless if tokenizer.is_special(id)]
    assert b"".join(map(tokenizer.token_bytes, found)).decode().count(text) >= (3 if text else 0)
    assert not any(map(tokenizer.is_special, tokenizer.encode(text)))


def test_a_turn_token_ends_an_answer(tokenizers: dict[str, Tokenizer]):
    tokenizer = tokenizers["V2.5"]
    for control in CONTROL:
        (id,) = ids(tokenizer, control)
        assert tokenizer.is_special(id) and tokenizer.token_bytes(id) == b""


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "never learned to converse"),
        ("{% for message in messages %}", "cannot be used: Unexpected end of template"),
        ("{{ nothing.here.at.all }}", "cannot be used"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% for a in range(10 ** 9) %}x{% endfor %}", "cannot be used: Range too big"),
        ("{{ bos_token }}Assistant:", "loses what is said"),
        ("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}", "loses what is said"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_and_done_without(tmp_path: Path, template: str | None, said: str):
    tokenizer = Tokenizer(checkpoint(tmp_path / "checkpoint", template))
    assert tokenizer.without_chat is not None and said in tokenizer.without_chat
    assert tokenizer.without_chat.endswith((".", "them.")) and "\n" not in tokenizer.without_chat


def test_a_template_that_never_ends_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(templates, "LIMIT_S", 0.2)
    slow = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}"
    assert "did not end within 0.2 s" in (Tokenizer(checkpoint(tmp_path / "checkpoint", slow)).without_chat or "")


def test_a_template_that_fails_later_fails_with_a_sentence(tmp_path: Path):
    template = TURN_TOKENS + "{% if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}"
    tokenizer = Tokenizer(checkpoint(tmp_path / "checkpoint", template))
    assert tokenizer.without_chat is None
    with pytest.raises(CheckpointError, match=r"cannot be used: too many turns\.$"):
        tokenizer.encode_chat(chat("a", "b", "c", "d", "e"))
