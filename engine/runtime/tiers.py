"""What moves between the host tier and the disk, beside the step loop, which never waits for it.

Upwards: a request whose blocks are on disk is held outside the scheduler, for a bounded time, until
they were read. Downwards: blocks that left the pool are written behind, and at a clean close those
that are still in memory, so that a restart finds them.

All but `DiskTier`'s own threads' part runs on the step loop's thread.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import (
    Architecture,
    Backend,
    Config,
    ConfigError,
    MatmulBackend,
    resolve_disk_path,
)
from engine.core.admission import check_request
from engine.core.costs import compute_ns, restoring_pays
from engine.core.limits import Limits
from engine.core.restoring import KeptBlock, kept_blocks, missing_blocks, restore
from engine.core.scheduler import SchedulerState
from engine.memory_plan import format_bytes
from engine.model.attention import kv_pool_dtype, kv_pool_shape
from engine.runtime.block_file import NEVER, PUBLIC_TAG, TAG_BYTES, Block, BlockLayout
from engine.runtime.block_folder import FolderRefused
from engine.runtime.disk_tier import DiskTier
from engine.runtime.host_pool import Contents, HostPool
from engine.runtime.runner import Launched
from engine.sampling import InvalidRequest
from engine.types import Domain, QueueFull, Request

log = logging.getLogger(__name__)

MAX_HELD_SECONDS = 5.0  # longest that a request waits for its blocks
SAVE_SECONDS = 10.0  # longest that a close writes blocks
_MAX_FLUSHED = 1024  # domains between two steps that are told apart
_SAVED_AT_A_TIME = 32  # blocks that a close brings to the host at once
_ASSUMED_BYTES_PER_SECOND = 10**9  # of reading, until it was measured


class Arrival(NamedTuple):
    """A request that waits no longer, and the blocks of its prompt, from `first` on, that came;
    it was held for so many seconds."""

    request: Request
    first: int = 0
    blocks: Sequence[Contents] = ()
    seconds: float = 0.0


class _Held:
    """A request that waits for blocks."""

    def __init__(self, request: Request, first: int, keys: tuple[bytes, ...], until: float):
        self.request = request
        self.names = set(request.names)
        self.first = first
        self.keys = keys
        self.until = until  # time.monotonic() seconds
        self.since = time.monotonic()
        self.future: Future[list[np.ndarray]] | None = None
        self.blocks: list[Contents] | None = None  # once they were read,
        self.seconds = 0.0  # which took so long


class Tiers:
    """The traffic with a disk tier; without one, nothing is ever held or written.

    Args:
      disk: the tier, or None.
      host: the slots above it.
      limits: of the scheduler.
      wake: called on any thread when a held request has its blocks.
      clock: the scheduler's, in seconds.
    """

    def __init__(
        self,
        disk: DiskTier | None,
        host: HostPool | None,
        limits: Limits,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ):
        assert disk is None or host is not None, "blocks on disk come back through the host tier"
        self.disk = disk
        self.num_restored = 0  # blocks that were read and given a slot
        self._retired: DiskTier | None = None  # of old weights; it may still write what waits
        self._host = host
        self._limits = limits
        self._wake = wake
        self._clock = clock
        self._flushed: dict[Domain | None, int] = {}  # the first plan after the last flush of each
        self._held: dict[str, _Held] = {}  # by each name of the request, in order of arrival
        self._most_blocks = limits.host_blocks // 2  # that may be on their way at once
        block_bytes = disk.layout.num_bytes if disk else 0
        self._read_ns = block_bytes * 10**9 // _ASSUMED_BYTES_PER_SECOND

    @property
    def num_held(self) -> int:
        """Sequences that wait for blocks."""
        return len(self._held)

    @property
    def timeout(self) -> float | None:
        """Seconds until a held request waits no longer; None if there is none."""
        if not self._held:
            return None
        return max(0.0, min(held.until for held in self._held.values()) - time.monotonic())

    def exchange(self, limits: Limits, disk: DiskTier | None) -> None:
        """Go on with the blocks of other weights. Nothing may be held."""
        assert not self._held, "requests wait for blocks of the old weights"
        self.disk, self._retired = disk, self.disk
        self._limits = limits

    def hold(self, state: SchedulerState, request: Request) -> bool:
        """Start to read a request's blocks, if that is quicker than computing them.

        Returns:
          Whether it waits from now on, until `arrivals` or `release` gives it back.
        """
        limits = self._limits
        if self.disk is None or len(self._held) + len(request.names) > limits.max_num_seqs:
            return False
        try:
            check_request(state.core, limits, request)
        except (InvalidRequest, QueueFull):
            return False  # it is refused at once
        first, keys, num_public = missing_blocks(state, limits, request)
        num_blocks = sum(len(held.keys) for held in self._requests())
        most = min(len(keys), self._most_blocks - num_blocks)
        public, own = keys[:num_public], keys[num_public:]
        tag = tag_of(request.domain)
        keys = (*(key + PUBLIC_TAG for key in public), *(key + tag for key in own))
        keys = tuple(itertools.takewhile(self.disk.__contains__, keys[: max(0, most)]))
        if not keys or not restoring_pays(limits, first, len(keys), self._read_ns):
            return False
        seconds = MAX_HELD_SECONDS
        if limits.compute_ns:  # after that, it would have been computed
            seconds = min(seconds, compute_ns(limits, first, len(keys)) / 1e9)
        until = time.monotonic() + seconds
        if request.deadline is not None:
            until = min(until, request.deadline)
        held = _Held(request, first, keys, until)
        self._held.update(dict.fromkeys(request.names, held))
        held.future = self.disk.fetch(keys)
        held.future.add_done_callback(lambda future: self._take(held, future))
        return True

    def arrivals(self) -> list[Arrival]:
        """Requests that have their blocks, or waited long enough; in order of arrival."""
        now = time.monotonic()
        ended = [held for held in self._requests() if held.blocks is not None or held.until <= now]
        return [self._give_back(held) for held in ended]

    def release(self, *names: str) -> list[Arrival]:
        """Requests that shall wait no longer, by any of their names, those left out that don't
        wait; without names, all."""
        found = [held for held in self._requests() if not names or held.names & set(names)]
        return [self._give_back(held) for held in found]

    def release_domain(self, domain: Domain | None) -> list[Arrival]:
        """The same for all requests of a domain, or with None all."""
        found = [held for held in self._requests() if domain in (None, held.request.domain)]
        return [self._give_back(held) for held in found]

    def restore(self, state: SchedulerState, arrival: Arrival) -> SchedulerState:
        """Put an admitted request's blocks where the planner looks for them."""
        assert self._host is not None
        name, first, blocks = arrival.request.request_id, arrival.first, arrival.blocks
        state, erased, slots = restore(state, self._limits, name, first, len(blocks))
        self._host.erase(erased)
        for slot, block in zip(slots, blocks, strict=True):
            if slot is not None:
                self._host.write(slot, block)
                self.num_restored += 1
        return state

    def flush(self, domain: Domain | None, next_step: int) -> Future[None]:
        """Forget what a domain left on disk, or with None all but what is public; what is on its
        way there too, before the plan of that step. None of its requests may be held.

        Nobody finds it any more. The future is done when nobody will after a restart either, or
        has the error why not; see `DiskTier.forget_tagged`.
        """
        assert not any(domain in (None, held.request.domain) for held in self._held.values())
        if len(self._flushed) >= _MAX_FLUSHED:
            self._flushed = {None: next_step}  # then nobody's blocks on their way are written
        self._flushed[domain] = next_step
        tag = None if domain is None else tag_of(domain)
        removals: list[Future[None]] = []
        if self._retired is not None:
            try:
                removals.append(self._retired.forget_tagged(tag))
            except RuntimeError:  # it is closed by now, and writes nothing any more
                self._retired = None
        if self.disk is not None:
            removals.append(self.disk.forget_tagged(tag))
        return _all_of(removals)

    def keep(self, launched: Launched) -> None:
        """Have the blocks that went out with a step written behind; the step is done."""
        if self.disk is None:
            return
        assert self._host is not None
        step = launched.plan.step
        self._flushed = {domain: first for domain, first in self._flushed.items() if first > step}
        for swap, contents in launched.outgoing.finish() if launched.outgoing else ():
            if swap.domain is None or self._flushed.keys().isdisjoint((None, swap.domain)):
                block = self._host.as_read_later(contents)
                self._put(swap.key, swap.domain, swap.expires, block)

    def save(self, state: SchedulerState, kv_pool: Callable[[], jax.Array]) -> None:
        """Write what is still in memory, what is worth most first, until the disk tier is full or
        `SAVE_SECONDS` are over. No request may be left, nor a step on its way."""
        if self.disk is None:
            return
        end = time.monotonic() + SAVE_SECONDS
        room = self.disk.max_bytes // self.disk.layout.file_bytes
        kept = kept_blocks(state)
        blocks = self._unwritten(kept.blocks)
        slots = self._unwritten(kept.slots)
        for key in blocks:
            slots.pop(key, None)
        saved = 0
        for one, contents in itertools.islice(self._in_memory(blocks, slots, kv_pool()), room):
            if time.monotonic() >= end:
                break
            given = (one.key, one.domain, one.expires, contents)
            if not (put := self._put(*given)):  # a full queue drains
                self.disk.flush(max(0.0, end - time.monotonic()))
                put = self._put(*given)  # nothing helps if a flush of that domain failed
            if not self.disk.writable:
                break
            saved += put
        self.disk.flush(max(0.0, end - time.monotonic()))
        left = len(blocks) + len(slots) - saved
        log.info("disk tier: %d blocks written at the end, %d left out", saved, left)

    def _put(self, key: bytes, domain: Domain | None, expires: int, contents: Block) -> bool:
        """Have a block written. Returns whether it needs no second try."""
        assert self.disk is not None
        wall_time = time.time() + expires / 1000 - self._clock() if expires else NEVER
        return self.disk.put(key + tag_of(domain), contents, wall_time)

    def _unwritten(self, kept: Sequence[KeptBlock]) -> dict[bytes, KeptBlock]:
        """Those that the disk lacks, by key."""
        assert self.disk is not None
        return {one.key: one for one in kept if one.key + tag_of(one.domain) not in self.disk}

    def _in_memory(
        self, blocks: dict[bytes, KeptBlock], slots: dict[bytes, KeptBlock], kv_pool: jax.Array
    ) -> Iterator[tuple[KeptBlock, Block]]:
        """Blocks and then slots, with their contents, brought to the host when asked for."""
        assert self._host is not None
        for some in itertools.batched(blocks.values(), _SAVED_AT_A_TIME):
            contents = self._host.fetch(kv_pool, [one.place for one in some])
            yield from zip(some, contents, strict=True)
        for one in slots.values():
            (content,) = self._host.read([one.place])
            yield one, self._host.as_read_later(content)

    def _requests(self) -> Iterator[_Held]:
        """What is held, each once, in order of arrival."""
        return iter({id(held): held for held in self._held.values()}.values())

    def _give_back(self, held: _Held) -> Arrival:
        assert held.future is not None
        for name in held.request.names:
            del self._held[name]
        held.future.cancel()  # does nothing to one that is done
        blocks = held.blocks or []
        if blocks:
            nanoseconds = int(held.seconds * 1e9) // len(blocks)
            self._read_ns += (nanoseconds - self._read_ns) // 4
        return Arrival(held.request, held.first, blocks, time.monotonic() - held.since)

    def _take(self, held: _Held, future: Future[list[np.ndarray]]) -> None:
        """On a reader's thread, or on whose cancelled it."""
        assert self._host is not None
        blocks: list[Contents] = []
        try:
            if not future.cancelled():
                blocks = [self._host.stage(block) for block in future.result()]
        except Exception:
            log.exception("blocks could not be read from the disk tier; they are computed")
        held.seconds = time.monotonic() - held.since
        held.blocks = blocks
        self._wake()


def _all_of(futures: Sequence[Future[None]]) -> Future[None]:
    """Done when all are; with the error of one that has any."""
    done: Future[None] = Future()
    left = itertools.count(len(futures) - 1, -1)

    def note(_: Future[None]) -> None:
        if next(left) == 0:
            errors = [error for each in futures if (error := each.exception()) is not None]
            done.set_exception(errors[0]) if errors else done.set_result(None)

    for future in futures:
        future.add_done_callback(note)
    if not futures:
        done.set_result(None)
    return done


def open_disk_tier(
    config: Config, limits: Limits, arch: Architecture, backend: Backend, products: MatmulBackend
) -> DiskTier | None:
    """The disk tier that a config asks for, or None.

    A file says what decided its bytes: the shape of a block, its dtype, and what the keys don't
    tell apart but the bytes depend on: how the backend lays a block out, and how sums were made, by
    which kernels and over how many chips.

    Args:
      config: what is asked for.
      limits: settled, with the weights' fingerprint.
      arch: with copies of KV heads, if chips hold any.
      backend, products: the resolved ones, of attention and of matrix products.

    Raises:
      ConfigError: the folder can't be used, or the size holds no block.
    """
    folder = resolve_disk_path(config)
    if folder is None:
        return None
    assert backend != "auto"
    assert products != "auto"
    pool = kv_pool_shape(
        num_layers=1,
        num_blocks=1,
        num_kv_heads=arch.num_kv_heads,
        block_size=limits.block_size,
        head_dim=arch.head_dim,
        backend=backend,
    )
    layout = BlockLayout(
        (arch.num_layers, *pool[1:]),
        jnp.dtype(kv_pool_dtype(jnp.dtype(config.cache_dtype), backend)).name,
        f"{limits.fingerprint}:{backend}:{products}:{config.mesh.tensor}",
    )
    if config.cache.disk_size < layout.file_bytes:
        raise ConfigError(
            f"cache.disk_size is {config.cache.disk_size} bytes, but the file of one block takes "
            f"{layout.file_bytes}; raise it"
        )
    try:
        queue_bytes = max(2**28, 16 * layout.num_bytes)
        disk = DiskTier(folder, config.cache.disk_size, layout, queue_bytes=queue_bytes)
    except FolderRefused as error:
        raise ConfigError(f"cache.disk_path: {error}") from None
    counts = disk.counts()
    log.info(
        "disk tier: %s, %d files, at most %s",
        folder,
        counts.num_files,
        format_bytes(disk.max_bytes),
    )
    return disk


def tag_of(domain: Domain | None) -> bytes:
    """What says on disk whose a block is, 8 bytes; None: everybody's.

    Two domains with one tag would only be flushed together: what may be found says the key.
    """
    if domain is None:
        return PUBLIC_TAG
    digest = hashlib.sha256(b"octavo.disk_tag.v1")
    for part in (domain.tenant, domain.salt):
        encoded = part.encode("utf-8", "surrogatepass")  # any text must do: it is a client's
        digest.update(struct.pack("<Q", len(encoded)))
        digest.update(encoded)
    return digest.digest()[:TAG_BYTES]
