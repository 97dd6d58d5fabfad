"""The prefix cache: which full pages already hold the keys and values of a token sequence.

A tree whose edges are page-sized chunks of tokens; a namespace (adapter, tenant) has its own root, so nobody hits another's
pages. A chunk is found by hash and confirmed by its ids. Leaves that no request holds are evicted, the least recently used
first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from altiplano.engine.pages import PagePool

Chunk = tuple[int, ...]


class _Node:
    __slots__ = ("children", "chunk", "page", "parent")

    def __init__(self, parent: "_Node | None", chunk: Chunk, page: int) -> None:
        self.parent, self.chunk, self.page = parent, chunk, page
        self.children: dict[Chunk, _Node] = {}


class _Root(_Node):
    __slots__ = ("namespace",)

    def __init__(self, namespace: str) -> None:
        super().__init__(None, (), -1)
        self.namespace = namespace


class RadixIndex:
    """Maps token prefixes to pages; holds each indexed page once in the pool."""

    def __init__(self, pool: PagePool, block_size: int) -> None:
        self._pool, self._size = pool, block_size
        self._roots: dict[str, _Root] = {}
        self._leaves: OrderedDict[_Node, None] = OrderedDict()  # least recently used first
        self._num_pages = 0

    def __len__(self) -> int:
        """Number of indexed pages."""
        return self._num_pages

    def match(self, namespace: str, tokens: Sequence[int]) -> list[int]:
        """Pages of the longest indexed prefix of `tokens`, not held for the caller yet."""
        node: _Node | None = self._roots.get(namespace)
        pages = list[int]()
        while node is not None:
            start = len(pages) * self._size
            child = node.children.get(tuple(tokens[start : start + self._size]))
            if child is None:
                break
            pages.append(child.page)
            node = child
        if node is not None and node in self._leaves:
            self._leaves.move_to_end(node)
        return pages

    def insert(self, namespace: str, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Index the full chunks of `tokens`, whose keys and values are in `pages`. Chunks that are known keep their page."""
        count = min(len(tokens) // self._size, len(pages))
        if not count:
            return
        node: _Node = self._roots.setdefault(namespace, _Root(namespace))
        for index in range(count):
            chunk = tuple(tokens[index * self._size : (index + 1) * self._size])
            child = node.children.get(chunk)
            if child is None:
                self._pool.index(pages[index])
                child = node.children[chunk] = _Node(node, chunk, pages[index])
                self._num_pages += 1
                self._leaves.pop(node, None)
                self._leaves[child] = None
            node = child
        if node in self._leaves:
            self._leaves.move_to_end(node)

    def evict(self, n: int) -> int:
        """Give up to `n` pages back to the pool, from the least recently used leaves that no request holds; returns how many."""
        before = self._num_pages
        for _ in range(len(self._leaves)):
            if before - self._num_pages == n:
                break
            node, _ = self._leaves.popitem(last=False)
            # A parent becomes a leaf when its last child goes, and is then as old as that child.
            while before - self._num_pages < n and self._is_leaf(node) and self._pool.holders(node.page) == 1:
                node = self._remove(node)
            if self._is_leaf(node):
                # One that a request holds is in use now: at the other end, the next call does not look at it first.
                self._leaves[node] = None
                if self._pool.holders(node.page) == 1:
                    self._leaves.move_to_end(node, last=False)
        return before - self._num_pages

    def drop(self, namespace: str) -> None:
        """Forget a namespace: after an adapter was unloaded or changed."""
        root = self._roots.pop(namespace, None)
        stack = list(root.children.values()) if root else []
        while stack:
            node = stack.pop()
            stack += node.children.values()
            self._leaves.pop(node, None)
            self._pool.unindex(node.page)
            self._num_pages -= 1

    def namespaces(self) -> list[str]:
        """Those that have pages."""
        return list(self._roots)

    @staticmethod
    def _is_leaf(node: _Node) -> bool:
        return node.parent is not None and not node.children

    def _remove(self, leaf: _Node) -> _Node:
        """Give a leaf's page back, and forget a namespace with its last; returns its parent."""
        parent = leaf.parent
        assert parent is not None
        self._pool.unindex(leaf.page)
        self._num_pages -= 1
        del parent.children[leaf.chunk]
        if isinstance(parent, _Root) and not parent.children:
            del self._roots[parent.namespace]
        return parent
