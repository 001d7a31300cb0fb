"""The pages of the latent cache: which are free, which hold what, who shares them, which go first. Integers only, no tensors.

Owns: page numbers, their reference counts, the tree of cached prefixes, eviction. Knows nothing of requests or memory.

A page is free, or private to one sequence that is filling it, or cached: it hangs in a tree under the page of the ids before
it, and any number of sequences read it. Cached pages are never written again. Whoever holds a page holds all pages before it, and
gives the last one back first, so that the longest unused leaf is always at the head of `_idle` and eviction never cuts a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

PAGE_TOKENS = 16
"""Tokens of one page. Token t of a sequence lies in slot `pages[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS`."""

Ids = tuple[int, ...]


def pages_for(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


class OutOfPages(Exception):
    """Every page is in use by a running sequence. The scheduler's business; no user sees it."""


@dataclass(slots=True)
class Node:
    """A cached page: the ids it was computed for (a full page, or fewer at the end of a sequence) and what hangs below."""

    page: int
    ids: Ids
    parent: "Node | None"
    children: dict[Ids, "Node"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What is cached of a prompt: `pages` in full, then the first `tail_tokens` tokens of page `tail`, to be copied.

    All of them are held for the caller: give `tail` back after the copy, the rest with the sequence.
    """

    pages: list[int]
    tail: int = -1
    tail_tokens: int = 0

    @property
    def tokens(self) -> int:
        return len(self.pages) * PAGE_TOKENS + self.tail_tokens


class PagePool:
    """All pages of one engine. Used by its owner thread only."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._root = Node(-1, (), None)
        self._cached: dict[int, Node] = {}
        self._idle: dict[int, None] = {}
        """Cached pages that nobody holds, longest unused first."""

    @property
    def available(self) -> int:
        """Pages that can be had: the free and the idle."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.pages - self.available

    def match(self, ids: Ids) -> Match:
        """The longest cached beginning of `ids`, without their last one, whose logits have to be computed anyway."""
        limit = len(ids) - 1
        node, pages = self._root, list[int]()
        while len(pages) < limit // PAGE_TOKENS:
            start = len(pages) * PAGE_TOKENS
            child = node.children.get(ids[start : start + PAGE_TOKENS])
            if child is None:
                break
            node = child
            pages.append(child.page)
        rest = ids[len(pages) * PAGE_TOKENS : limit]
        nearest = max(node.children.values(), key=lambda child: shared(child.ids, rest), default=None)
        tail_tokens = shared(nearest.ids, rest) if nearest else 0
        tail = nearest.page if nearest and tail_tokens else -1
        for page in pages if tail < 0 else [*pages, tail]:
            self._hold(page)
        return Match(pages=pages, tail=tail, tail_tokens=tail_tokens)

    def allocate(self, count: int) -> list[int]:
        """`count` private pages, evicting idle ones where none is free. Raises OutOfPages, and then has done nothing."""
        if count > self.available:
            raise OutOfPages
        while len(self._free) < count:
            self._evict(next(iter(self._idle)))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def publish(self, pages: Sequence[int], ids: Ids, *, ended: bool = False) -> list[int]:
        """Lets others find what a sequence has computed for `ids`: its full pages, and the last part of one when it has `ended`.

        Returns the sequence's pages: where another one had cached the same ids before, that one's page instead of its own.
        """
        node, kept = self._root, list(pages)
        for number in range(pages_for(len(ids)) if ended else len(ids) // PAGE_TOKENS):
            part = ids[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
            page, child = kept[number], node.children.get(part)
            if child is None:
                child = Node(page, part, node)
                node.children[part] = self._cached[page] = child
            elif child.page != page:
                self._hold(child.page)
                self._holders[page] = 0
                self._free.append(page)
                kept[number] = child.page
            node = child
        return kept

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one hold of each; private pages become free, cached ones stay findable until they are evicted."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0
            if self._holders[page] == 0:
                if page in self._cached:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)

    def _evict(self, page: int) -> None:
        del self._idle[page]
        node = self._cached.pop(page)
        assert node.parent and not node.children
        del node.parent.children[node.ids]
        self._free.append(page)


def shared(a: Ids, b: Ids) -> int:
    """How many leading ids are equal."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
