"""Where latents go that outlive their place on the device: the computer's memory beside a GPU, and files, if the user asks for them.

Owns: what is kept of which prompt, the bounds on how much, and the files: one for each prompt, in the safetensors format, written whole or
not at all, readable by their owner only, found by weights, type and ids. What is torn, foreign or stale is passed over with a line in the
log. Knows nothing of pages; used by the engine's thread, but for the writing of files, which has a thread of its own.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model_host.pages import Ids, shared
from model_host.reuse.shifted import Source

log = logging.getLogger(__name__)

FORMAT = "1"
"""Changes whenever the same weights and ids would give other latents."""
NEWS_TOKENS = 256
"""A prompt is kept again once it has so many tokens that were not kept before."""
ABANDONED_S = 3600.0
"""A file whose writing was begun so long ago is not being written any more."""
SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True, slots=True)
class Latents:
    """Of the first tokens of a prompt, on the CPU: c_kv [L, T, R] and k_pe [L, T, P]."""

    c_kv: Tensor
    k_pe: Tensor

    @property
    def bytes(self) -> int:
        return self.c_kv.nbytes + self.k_pe.nbytes


class Tier(Protocol):
    """Keeps latents of prompts, as many as it has room for, those used last."""

    def longest(self, ids: Ids) -> tuple[Ids, int]:
        """The kept prompt that begins most like `ids`, and for how many tokens; nothing and 0 when there is none."""
        ...

    def get(self, ids: Ids) -> Latents | None:
        """What is kept of exactly this prompt, unless it has gone or is damaged."""
        ...

    def keep(self, ids: Ids, latents: Latents) -> None:
        """Keeps it, in the place of what was kept of the same text before."""
        ...

    def close(self) -> None:
        """Waits for what is still being kept."""
        ...


def is_news(tier: Tier, ids: Ids) -> bool:
    """Whether a good part of the prompt is not in the tier."""
    return len(ids) >= NEWS_TOKENS and tier.longest(ids)[1] + NEWS_TOKENS <= len(ids)


def _likest(kept: Iterator[Ids], ids: Ids) -> tuple[Ids, int]:
    found = ((other, shared(other, ids)) for other in kept)
    return max((one for one in found if one[1]), key=lambda one: one[1], default=((), 0))


class RamTier:
    """The computer's own memory, for engines whose latents lie elsewhere."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[Ids, Latents] = {}
        """Longest unused first."""

    def longest(self, ids: Ids) -> tuple[Ids, int]:
        return _likest(iter(self._kept), ids)

    def get(self, ids: Ids) -> Latents | None:
        latents = self._kept.pop(ids, None)
        if latents:
            self._kept[ids] = latents
        return latents

    def keep(self, ids: Ids, latents: Latents) -> None:
        for old in [old for old in self._kept if Source(old).is_same_text(ids)]:
            del self._kept[old]
        self._kept[ids] = latents
        while sum(one.bytes for one in self._kept.values()) > self._max_bytes:
            del self._kept[next(iter(self._kept))]

    def close(self) -> None:
        self._kept.clear()


class DiskTier:
    """Files below `folder`, those of one checkpoint and precision in a folder named by `key`. Several hosts may share it."""

    def __init__(self, folder: Path, key: str, max_bytes: int) -> None:
        self._root, self._key, self._max_bytes = folder, key, max_bytes
        self._folder = folder / key
        self._known: dict[str, Ids] = {}
        """What the files hold, by their names; of those that cannot be used, nothing."""
        self._writer = ThreadPoolExecutor(1, "latents")
        self._pending: set[Ids] = set()
        """Prompts that wait for being written."""
        try:
            for one in (folder, self._folder):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.warning("Nothing is kept on disk, %s cannot be made: %s", self._folder, error)

    def longest(self, ids: Ids) -> tuple[Ids, int]:
        return _likest(iter([*self._index().values(), *tuple(self._pending)]), ids)

    def _index(self) -> dict[str, Ids]:
        """The prompts whose files are there now; only files not met before are opened."""
        try:
            names = {file.name for file in self._folder.iterdir() if file.suffix == ".latents"}
        except OSError:
            names = set()
        known = self._known  # another thread may be here too
        self._known = found = {name: known[name] if name in known else self._ids_in(self._folder / name) for name in names}
        return found

    def _ids_in(self, file: Path) -> Ids:
        """The prompt of a file; nothing when it is not one of ours."""
        try:
            with safe_open(file, "pt") as content:
                if content.metadata().get("key") == self._key:
                    return tuple(content.get_tensor("ids").tolist())
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            log.warning("%s is passed over, it cannot be read: %s", file, error)
            return ()
        log.warning("%s is passed over, it was made by another model or version.", file)
        return ()

    def get(self, ids: Ids) -> Latents | None:
        if ids in self._pending:
            return None
        file = self._folder / _name(ids)
        try:
            with safe_open(file, "pt") as content:
                latents = Latents(content.get_tensor("c_kv"), content.get_tensor("k_pe"))
                is_whole = content.metadata().get("checksum") == _checksum(ids, latents)
            os.utime(file)
        except (OSError, SafetensorError, ValueError, AttributeError) as error:
            log.warning("%s is passed over, it cannot be read: %s", file, error)
            return None
        if not is_whole:
            log.warning("%s is passed over, it is damaged.", file)
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        return latents

    def keep(self, ids: Ids, latents: Latents) -> None:
        """Returns at once, the file is written later."""
        self._pending.add(ids)
        self._writer.submit(self._write, ids, latents)

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _write(self, ids: Ids, latents: Latents) -> None:
        metadata = {"key": self._key, "checksum": _checksum(ids, latents)}
        tensors = {"ids": torch.tensor(ids, dtype=torch.int32), "c_kv": latents.c_kv, "k_pe": latents.k_pe}
        begun = self._folder / f".{secrets.token_hex(8)}.part"
        try:
            descriptor = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(save(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            begun.replace(self._folder / _name(ids))
            self._tidy(ids)
        except OSError as error:
            log.warning("A prompt's latents were not kept on disk: %s", error)
            with contextlib.suppress(OSError):
                begun.unlink()
        finally:
            self._pending.discard(ids)

    def _tidy(self, newest: Ids) -> None:
        """Removes earlier states of the text just written, what was left half written, and what is too much, longest unused first."""
        for name, ids in self._index().items():
            if ids and ids != newest and Source(ids).is_same_text(newest):
                (self._folder / name).unlink(missing_ok=True)
        files: list[tuple[float, int, Path]] = []
        for file in self._root.rglob("*"):
            with contextlib.suppress(OSError):  # another host may have removed it
                found = file.stat()
                if file.suffix == ".part" and time.time() - found.st_mtime > ABANDONED_S:
                    file.unlink()
                elif file.is_file():
                    files.append((found.st_mtime, found.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self._max_bytes:
                break
            if file.suffix == ".latents":
                file.unlink(missing_ok=True)
                total -= size


def _name(ids: Ids) -> str:
    return hashlib.blake2b(torch.tensor(ids, dtype=torch.int32).numpy().tobytes(), digest_size=16).hexdigest() + ".latents"


def _checksum(ids: Ids, latents: Latents) -> str:
    digest = hashlib.blake2b(_name(ids).encode(), digest_size=16)
    for tensor in (latents.c_kv, latents.k_pe):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def key_of(folder: Path, precision: str, latent_dtype: torch.dtype, form: str) -> str:
    """What latents depend on beside ids: the checkpoint's numbers, the precision they are read in, and the code that computes.

    Of the weights only samples are read, spread over every file, so that 31 GB do not delay a start; config.json is read whole.
    """
    digest = hashlib.blake2b(json.dumps([FORMAT, precision, str(latent_dtype), form]).encode(), digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for number in range(SAMPLES):
                content.seek(number * size // SAMPLES)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()
