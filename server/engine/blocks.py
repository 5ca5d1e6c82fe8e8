"""Paged KV bookkeeping: which blocks are free, who holds them, and which content they can be found by again.

Invariants (checked by `check`): every block is in exactly one of three states - free, held (count > 0), or
cached and evictable (count 0, findable by its hash). A hash names at most one block.
"""

import hashlib
import struct
from collections import OrderedDict, deque

from loramux.server.engine.sequence import Sequence


class BlockManager:
    """Hands out the blocks of the KV cache and remembers full ones by content.

    The hash of a block chains its predecessor's hash with the block's tokens and the adapter sets that computed them,
    starting from the request's salt: equal hashes mean keys and values of the same computation (up to the rounding
    of products whose shape depends on the batch).
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._free: deque[int] = deque(range(num_blocks))
        self._count = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._tokens = struct.Struct(f"<{block_size}q")
        self._by_hash: dict[bytes, int] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._fresh: list[int] = []
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had now: never used, freed, or cached without a holder."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.num_free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that this many tokens occupy."""
        return -(-tokens // self.block_size)

    def match_prefix(self, seq: Sequence) -> int:
        """Takes hold of the longest cached prefix and returns its tokens; at least one token is left to compute."""
        if seq.blocks:
            raise ValueError("the sequence holds blocks already")
        for i in range(self.cached_prefix(seq)):
            block = self._by_hash[self._block_hash(seq, i)]
            self._hold(block)
            seq.blocks.append(block)
        seq.num_registered = len(seq.blocks)
        seq.num_computed = len(seq.blocks) * self.block_size
        return seq.num_computed

    def count_query(self, seq: Sequence) -> None:
        """Counts one look-up of a prompt to be answered, with the tokens that `match_prefix` found.

        Prompts that are only pooled, as the router's looks at them are, would be counted twice with their answers.
        """
        if seq.pools:
            return
        self.queried_tokens += len(seq.tokens)
        self.hit_tokens += seq.num_computed

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Extends the sequence's blocks to hold `tokens` tokens; False (and nothing taken) when they cannot be had."""
        missing = self.blocks_for(tokens) - len(seq.blocks)
        if missing > self.num_free:
            return False
        seq.blocks.extend(self.take(missing))
        return True

    def take(self, count: int) -> list[int]:
        """So many blocks, of which there must be enough, for sequences that record them; each is held once."""
        return [self._take() for _ in range(count)]

    def register(self, seq: Sequence, tokens: int) -> None:
        """Makes the blocks findable that the sequence's first `tokens` tokens have filled; called when those are known
        and their keys and values are written (or will be, before whatever reads them)."""
        if not self.prefix_caching:
            return
        full = min(tokens, seq.num_computed) // self.block_size
        for index in range(seq.num_registered, full):
            digest, block = self._block_hash(seq, index), seq.blocks[index]
            seq.num_registered = index + 1
            if digest not in self._by_hash and self._hash_of[block] is None:
                self._by_hash[digest] = block
                self._hash_of[block] = digest

    def free(self, seq: Sequence) -> None:
        """Gives back the sequence's blocks, last first, so that prefixes outlive their continuations."""
        for block in reversed(seq.blocks):
            self._count[block] -= 1
            if self._count[block] == 0:
                if self._hash_of[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None
        del seq.blocks[:]
        seq.num_registered = 0
        seq.num_computed = 0

    def take_fresh(self) -> list[int]:
        """Blocks handed out since the last call. They hold another request's numbers, which may not even be finite:
        the caller clears them, because masked attention still multiplies what lies behind a sequence's end."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def cached_prefix(self, seq: Sequence) -> int:
        """Blocks that `match_prefix` would take hold of now; changes nothing."""
        if not self.prefix_caching:
            return 0
        count = 0
        for i in range(seq.reusable // self.block_size):
            if self._block_hash(seq, i) not in self._by_hash:
                break
            count += 1
        return count

    def check(self) -> None:
        """Raises RuntimeError when the invariants do not hold."""
        free, evictable = set(self._free), set(self._evictable)
        held = {b for b in range(self.num_blocks) if self._count[b] > 0}
        if free & evictable or free & held or evictable & held or len(free | evictable | held) != self.num_blocks:
            raise RuntimeError("a KV block is in two states or in none")
        if any(self._hash_of[b] != h for h, b in self._by_hash.items()) or any(self._hash_of[b] for b in free):
            raise RuntimeError("the prefix index and the blocks disagree")

    def _hold(self, block: int) -> None:
        if self._count[block] == 0:
            del self._evictable[block]
        self._count[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._evictable.popitem(last=False)
            digest = self._hash_of[block]
            if digest is not None:
                del self._by_hash[digest]
                self._hash_of[block] = None
        self._count[block] = 1
        self._fresh.append(block)
        return block

    def _block_hash(self, seq: Sequence, index: int) -> bytes:
        """The chained hash of a full block; kept on the sequence, whose past tokens and spans never change."""
        hashes = seq.block_hashes
        for i in range(len(hashes), index + 1):
            start, end = i * self.block_size, (i + 1) * self.block_size
            before = hashes[-1] if i else hashlib.blake2b(seq.request.salt.encode(), digest_size=24).digest()
            marks = b"".join([span.mark_at(low - start) for low, _, span in seq.spans_between(start, end)])
            content = before + self._tokens.pack(*seq.tokens[start:end]) + marks
            hashes.append(hashlib.blake2b(content, digest_size=24).digest())
        return hashes[index]
