"""The pages of the latent cache: which are free, which hold what, who shares them, which go first. Integers only, no tensors.

Owns: page numbers, their reference counts, the tree of cached prefixes, eviction. Knows nothing of requests or memory.

A page is free, or private to one sequence that is filling it, or cached: it hangs in a tree under the page of the ids before
it, and any number of sequences read it. Cached pages are never written again. Whoever holds a page holds all pages before it, and
gives the last one back first, so that the longest unused leaf is always at the head of `_idle` and eviction never cuts a branch.

A page is exact when its latents were computed after these very ids, and approximate when any before it were taken over from another
place. What hangs below an approximate page is approximate. Exact lookups do not see approximate pages.
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
    is_exact: bool = True
    exact: dict[Ids, "Node"] = field(default_factory=dict)
    approximate: dict[Ids, "Node"] = field(default_factory=dict)

    @property
    def is_leaf(self) -> bool:
        return not self.exact and not self.approximate

    def siblings(self) -> dict[Ids, "Node"]:
        """Where its parent keeps it."""
        assert self.parent
        return self.parent.exact if self.is_exact else self.parent.approximate


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What is cached of a prompt: `pages` in full, then the first `tail_tokens` tokens of page `tail`, to be copied.

    All of them are held for the caller: give `tail` back after the copy, the rest with the sequence.
    """

    pages: list[int]
    tail: int = -1
    tail_tokens: int = 0
    exact_tokens: int
    """How many of the tokens, from the first on, are exact."""

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

    def match(self, ids: Ids, *, approximate: bool = False) -> Match:
        """The longest cached beginning of `ids`, without their last one, whose logits have to be computed anyway. With `approximate`
        pages count as well, where there is no exact one."""
        limit = len(ids) - 1
        node, pages, exact_tokens = self._root, list[int](), 0
        while len(pages) < limit // PAGE_TOKENS:
            start = len(pages) * PAGE_TOKENS
            part = ids[start : start + PAGE_TOKENS]
            child = node.exact.get(part) or (node.approximate.get(part) if approximate else None)
            if child is None:
                break
            node = child
            pages.append(child.page)
            exact_tokens += PAGE_TOKENS * child.is_exact
        rest = ids[len(pages) * PAGE_TOKENS : limit]
        below = [*node.exact.values(), *(node.approximate.values() if approximate else ())]
        nearest = max(below, key=lambda child: shared(child.ids, rest), default=None)
        tail_tokens = shared(nearest.ids, rest) if nearest else 0
        tail = nearest.page if nearest and tail_tokens else -1
        if nearest and nearest.is_exact:
            exact_tokens += tail_tokens
        for page in pages if tail < 0 else [*pages, tail]:
            self._hold(page)
        return Match(pages=pages, tail=tail, tail_tokens=tail_tokens, exact_tokens=exact_tokens)

    def exact_pages(self, ids: Ids) -> list[int]:
        """The exact full pages of the leading ids; holds nothing and does not count as use."""
        node, pages = self._root, list[int]()
        for start in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
            child = node.exact.get(ids[start : start + PAGE_TOKENS])
            if child is None:
                break
            node = child
            pages.append(child.page)
        return pages

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

    def publish(self, pages: Sequence[int], ids: Ids, *, exact_tokens: int | None = None, ended: bool = False) -> list[int]:
        """Lets others find what a sequence has computed for `ids`: its full pages, and the last part of one when it has `ended`. Those
        behind the first `exact_tokens` tokens (None: all are exact) are found as approximate ones.

        Returns the sequence's pages: where an exact one of the same ids was cached before, or one as good as its own, that one instead
        of its own.
        """
        node, kept = self._root, list(pages)
        for number in range(pages_for(len(ids)) if ended else len(ids) // PAGE_TOKENS):
            part = ids[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
            is_exact = exact_tokens is None or number * PAGE_TOKENS + len(part) <= exact_tokens
            page = kept[number]
            child = self._cached.get(page) or node.exact.get(part) or (None if is_exact else node.approximate.get(part))
            if child is None:
                child = Node(page, part, node, is_exact)
                child.siblings()[part] = self._cached[page] = child
                if is_exact:
                    self._take_the_place_of(node.approximate.get(part), child)
            elif child.page != page:
                self._hold(child.page)
                self.release([page])
                kept[number] = child.page
            node = child
        return kept

    def _take_the_place_of(self, old: Node | None, new: Node) -> None:
        """Hangs what is below an approximate page below the exact one of the same ids, and frees the approximate page. Nothing is
        done while a sequence still holds it."""
        if old is None or self._holders[old.page]:
            return
        new.approximate |= old.approximate
        for child in old.approximate.values():
            child.parent = new
        old.approximate = {}
        self._evict(old.page)

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
        assert node.is_leaf
        del node.siblings()[node.ids]
        self._free.append(page)


def shared(a: Ids, b: Ids) -> int:
    """How many leading ids are equal."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
