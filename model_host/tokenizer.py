"""Text to ids and back: fill-in-the-middle and chat prompts, incremental decoding, and the checks a tokenizer must pass at load.

Owns: which ids a prompt is made of. User text never becomes special tokens: a file that contains `<｜fim▁end｜>` is just text.
transformers reads the files and fills in the chat template; `PreTrainedTokenizerFast` is named on purpose, since AutoTokenizer
rewrites the family's tokenizer and loses blanks.
"""

import codecs
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast

from model_host import catalogue, templates
from model_host.catalogue import Infilling
from model_host.errors import CheckpointError
from model_host.generation import Chat, Fim, Message
from model_host.stops import StopStrings

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
CONTROL = re.compile(r"<[｜|][^<>]+[｜|]>")
"""Tokens that are no text: what begins, ends and parts prompts, whether a tokenizer calls them special or not."""
ROUND_TRIP = "def f(a,  b):\n\tif a:\n        return 'é 你 🙂'  # 12\r\n\n"

LINE = re.compile(r"[^\n]*\n|[^\n]+")
LINES = 1 << 16
"""So many lines' ids are kept."""
REPOSITORY_STEP = 256
"""Cut to whole steps, what stands in front of a prompt does not depend on how many tokens are wanted behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A prompt as ids, and the bytes the answer has to begin with (the word being typed)."""

    ids: tuple[int, ...]
    must_begin: bytes = b""
    hole: int | None = None
    """Where the hole is among the ids; what stands next to it matters most."""


def byte_alphabet() -> dict[str, int]:
    """The characters byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


class Tokenizer:
    """A checkpoint's tokenizer. Raises CheckpointError when it fails one of the checks."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(f"{folder} holds no tokenizer.json: download the checkpoint again, with its tokenizer.")
        try:
            self._reader = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the parser of tokenizer.json raises plain Exception
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read ({error}): download the checkpoint again.") from error
        self._backend = self._reader.backend_tokenizer
        self._special = {
            token.content: id
            for id, token in self._reader.added_tokens_decoder.items()
            if token.special or CONTROL.fullmatch(token.content)
        }
        # the family's own files call most of them plain, and plain ones would be found in a user's text
        self._backend.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in self._special])
        self.bos_id = self._required(self._reader.bos_token, "beginning-of-sentence")
        self.eos_id = self._required(self._reader.eos_token, "end-of-sentence")
        self._fim = [self._single_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]
        self._folder, self._known = folder, catalogue.recognised(folder)
        self._ids_of_line = lru_cache(LINES)(lambda line: tuple(self.encode(line)))
        self._check_round_trip(folder)
        self.without_chat = templates.problem(self._reader, folder)
        """Why the checkpoint does not converse, a sentence for the user; None when it does."""
        self._lines_are_apart = self.encode(ROUND_TRIP * 2) == [id for line in LINE.findall(ROUND_TRIP * 2) for id in self.encode(line)]

    def _required(self, token: str | None, role: str) -> int:
        id = self._single_id(token) if token else None
        if id is None:
            raise CheckpointError(
                f"The tokenizer names no {role} token: its tokenizer_config.json is missing or damaged, download it again."
            )
        return id

    def _single_id(self, token: str) -> int | None:
        ids = self._with_special(token)
        return ids[0] if len(ids) == 1 and self._reader.convert_ids_to_tokens(ids) == [token] else None

    def _check_round_trip(self, folder: Path) -> None:
        back = b"".join(map(self.token_bytes, self.encode(ROUND_TRIP))).decode("utf-8", "replace")
        if back != ROUND_TRIP:
            raise CheckpointError(
                f"The tokenizer in {folder} loses text ({ROUND_TRIP!r} comes back as {back!r}): it is not the byte-level one of"
                " DeepSeek-V2. Download tokenizer.json from the model's own page."
            )

    @property
    def has_fim(self) -> bool:
        """Whether the checkpoint can fill in the middle: the three tokens are there, each a single id, and it is not known to be
        one that was never trained with them."""
        return None not in self._fim and (self._known is None or self._known.infilling is not Infilling.UNTRAINED)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added, and none is made of the text."""
        self._backend.encode_special_tokens = True
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_lines(self, text: str) -> list[int]:
        """What `encode` gives, but only lines that were not met lately are worked on: the family's tokenizer never joins what a line
        break parts."""
        if not self._lines_are_apart:
            return self.encode(text)
        return [id for line in LINE.findall(text) for id in self._ids_of_line(line)]

    def _with_special(self, text: str) -> list[int]:
        self._backend.encode_special_tokens = False
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_fim(self, prompt: Fim, max_tokens: int, *, heal: bool = True) -> Encoded:
        """<bos> <fim_begin> repository prefix <fim_hole> suffix <fim_end> middle: PSM, the order the 16B was trained on (arXiv 2406.11931).

        Healed, the answer begins anew with the word that is being typed. The repository has a quarter of `max_tokens` at most, however
        long the file is, so that it is always cut alike. A prompt of more than `max_tokens` loses the far end of the suffix, then the
        far start of the prefix.
        """
        if not self.has_fim:
            raise CheckpointError(catalogue.without_infilling(self._folder))
        kept, must_begin = self.healed(prompt.middle) if heal else (prompt.middle, b"")
        repository, prefix, suffix, middle = (self.encode_lines(text) for text in (prompt.repository, prompt.prefix, prompt.suffix, kept))
        begin, hole, end = (id for id in self._fim if id is not None)
        repository = repository[: max_tokens // 4 // REPOSITORY_STEP * REPOSITORY_STEP]
        room = max(max_tokens - len(repository) - len(middle) - 4, 0)
        suffix = suffix[: max(room // 4, room - len(prefix))]
        prefix = prefix[max(len(prefix) + len(suffix) - room, 0) :]
        ids = (self.bos_id, begin, *repository, *prefix, hole, *suffix, end, *middle)
        return Encoded(ids=ids, must_begin=must_begin, hole=2 + len(repository) + len(prefix))

    def healed(self, middle: str) -> tuple[str, bytes]:
        """Splits off the last pre-token (a word with its blank, or blanks alone): the model writes that one anew."""
        if not middle or middle.endswith("\n"):
            return middle, b""
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(middle)
        start = pieces[-1][1][0] if pieces else 0
        return middle[:start], middle[start:].encode()

    def encode_chat(self, prompt: Chat) -> Encoded:
        """The checkpoint's chat template around the messages, open for the assistant's answer. Raises CheckpointError.

        Special tokens stand only where the template put them: one that a message spells out is cut in two before encoding.
        """
        texts = [message.content for message in prompt.messages]
        if not prompt.in_template:
            return Encoded(ids=(self.bos_id, *self.encode("".join(texts))))
        cut = next(mark for n in itertools.count() if not any((mark := f"\ue000{n}\ue001") in text for text in texts))
        messages = [self._defused(message, cut) for message in prompt.messages]
        ids = tuple(id for part in templates.rendered(self._reader, messages).split(cut) for id in self._with_special(part))
        return Encoded(ids=ids if ids[:1] == (self.bos_id,) else (self.bos_id, *ids))

    def _defused(self, message: Message, cut: str) -> Message:
        content = message.content
        for special in self._special:
            content = content.replace(special, special[:1] + cut + special[1:])
        return replace(message, content=content)

    def is_special(self, id: int) -> bool:
        return id in self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._special.values())

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        """The bytes of every id; special tokens have none."""
        alphabet = byte_alphabet()
        table = [b""] * (max(self._reader.get_vocab().values()) + 1)
        added = {id: token.content for id, token in self._reader.added_tokens_decoder.items()}
        for token, id in self._reader.get_vocab().items():
            if id not in added and all(character in alphabet for character in token):
                table[id] = bytes(alphabet[character] for character in token)
            elif not self.is_special(id):
                table[id] = added.get(id, token).encode()
        return table

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self._bytes_of)

    def as_json(self) -> str:
        """The tokenizer as tokenizer.json has it, with the special tokens of tokenizer_config.json."""
        return str(self._backend.to_str())

    def token_bytes(self, id: int) -> bytes:
        return self._bytes_of[id] if id < len(self._bytes_of) else b""

    @cached_property
    def _beginning(self) -> dict[bytes, list[int]]:
        """For every start of one token's bytes, the ids that begin with it."""
        table: dict[bytes, list[int]] = {}
        for id, content in enumerate(self._bytes_of):
            for length in range(1, len(content) + 1):
                table.setdefault(content[:length], []).append(id)
        return table

    def compatible(self, must_begin: bytes) -> Sequence[int]:
        """Ids that can come next when the text still has to begin with `must_begin`: those that begin with it, and those it
        begins with. Never empty: every single byte is a token."""
        longer = self._beginning.get(must_begin, [])
        shorter = [
            id
            for length in range(1, len(must_begin))
            for id in self._beginning.get(must_begin[:length], [])
            if self._bytes_of[id] == must_begin[:length]
        ]
        return [*longer, *shorter]


class TextDecoder:
    """Turns the ids of a growing answer into text, holding back an unfinished UTF-8 character, the bytes already typed, and
    what may be the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, must_begin: bytes, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._known, self._stops = tokenizer, must_begin, StopStrings(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came; nothing follows then."""
        return self._stops.has_come

    @property
    def must_begin(self) -> bytes:
        """What is still to come of the bytes the answer has to begin with."""
        return self._known

    def add(self, id: int) -> str:
        content = self._tokenizer.token_bytes(id)
        if self._known:
            taken = min(len(content), len(self._known))
            assert content[:taken] == self._known[:taken]
            self._known, content = self._known[taken:], content[taken:]
        return self._stops.add(self._utf8.decode(content))

    def end(self) -> str:
        """What was held back as the beginning of a stop string that did not come."""
        return self._stops.end()
