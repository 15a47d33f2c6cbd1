"""Who has which page. Sequences that begin alike share the pages of what they have in common.

Only full pages are shared, and nobody writes into a full page, so none is ever copied. A page is known by its tokens
and by the page before it, exactly: no hash stands for them. Pages that nobody holds keep what they have until their
memory is needed, the longest unused first.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = 0


class BlockManager:
    """Pages 1 to ``pages - 1``; page 0 takes what belongs to nobody.

    Args:
        pages: of each layer, page 0 included.
        page_size: tokens in a page.
        lookahead: tokens behind a page that what lies in it depends on as well: 1 where an MTP module has a layer in
            the cache, which reads the token after its own.
        sharing: whether pages are found again by their tokens.
    """

    def __init__(self, pages: int, page_size: int, *, lookahead: int = 0, sharing: bool = True):
        self.page_size, self.lookahead, self.sharing = page_size, lookahead, sharing
        self._empty = list(range(pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * pages
        # What a full page holds has a number of its own, never used again. The key is the number of what stands before
        # it and its tokens.
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._content = [_ROOT] * pages
        self._numbers = itertools.count(_ROOT + 1)

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._empty) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return len(self._holders) - 1 - self.free

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.page_size)

    def share(self, tokens: Sequence[int]) -> list[int]:
        """The pages that already hold the beginning of ``tokens``, now held once more.

        At least the last token is left out, for whose logits it has to be computed anyway.
        """
        found: list[int] = []
        parent = _ROOT
        while self.sharing and (key := self._key(parent, tokens, len(found), len(tokens) - 1)) is not None:
            page = self._page_of.get(key)
            if page is None:
                break
            self._hold(page)
            found.append(page)
            parent = self._content[page]
        return found

    def extend(self, pages: list[int], count: int) -> bool:
        """Take pages until the sequence that has ``pages`` has ``count``; False, and nothing taken, if they run out."""
        wanted = count - len(pages)
        if wanted > self.free:
            return False
        for _ in range(wanted):
            page = self._empty.pop() if self._empty else self._evict()
            self._hold(page)
            pages.append(page)
        return True

    def publish(
        self, pages: Sequence[int], tokens: Sequence[int], computed: int, start: tuple[int, int] = (0, _ROOT)
    ) -> tuple[int, int]:
        """Make the full pages among the first ``computed`` tokens known, for others to share.

        Where two sequences computed the same, the first one's page stays the known one. Returned is where to go on with
        these pages, as ``start`` of the next call.
        """
        index, parent = start
        while self.sharing and (key := self._key(parent, tokens, index, computed)) is not None:
            page = pages[index]
            known = self._page_of.setdefault(key, page)
            if known == page and page not in self._key_of:
                self._key_of[page] = key
                self._content[page] = next(self._numbers)
            parent = self._content[known]
            index += 1
        return index, parent

    def release(self, pages: list[int]) -> None:
        """Give all pages of a sequence back; the last of it is the first to be overwritten."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if not self._holders[page]:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._empty.append(page)
        pages.clear()

    def _key(self, parent: int, tokens: Sequence[int], index: int, limit: int) -> tuple[int, tuple[int, ...]] | None:
        start, stop = index * self.page_size, (index + 1) * self.page_size
        if stop > limit or stop + self.lookahead > len(tokens):
            return None
        return parent, tuple(tokens[start : stop + self.lookahead])

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        self._content[page] = _ROOT
        return page
