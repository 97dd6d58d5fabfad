"""Sleep of a model: its storages go, everything that points to them stays.

Each tensor, and each view of it, keeps its place in the model while its storage shrinks to nothing, and grows again when the model
is woken up. New storage lies elsewhere, so who holds addresses (CUDA graphs) has to ask for them again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch

from altiplano.engine.errors import EngineError


class Asleep:
    """Memory of a model that sleeps, from the construction on; nothing may use it until `wake_up` returns.

    `weights`: the model's; at level 1 their bytes are kept in host memory, at level 2 they are made again. `kept`: what else keeps
    its bytes, at both levels. `cleared`: tensors that are zeros afterwards. All of them have storages of their own.
    """

    def __init__(self, weights: object, kept: object, cleared: Sequence[torch.Tensor], level: int) -> None:
        self._weights = list(tensors_of(weights)) if level == 2 else []
        self._cleared = [(tensor, tensor.untyped_storage().nbytes()) for tensor in cleared]
        held = _storages([*tensors_of(kept), *([] if level == 2 else tensors_of(weights))])
        self._kept = [(storage, _on_host(storage)) for storage in held]
        #: bytes that waking up takes
        self.nbytes = sum(storage.nbytes() for storage in {*held, *_storages(self._weights), *_storages(cleared)})
        self._shrink()

    def wake_up(self, make_weights: Callable[[], object], free: Callable[[], int]) -> None:
        """Take the memory again. `make_weights` finds the weights as they were, for level 2; `free`: bytes that the device has left.

        Raises:
            EngineError: the device has too little memory, or what `make_weights` raises. It sleeps on.
        """
        if self.nbytes > free():
            raise self._too_little(free())
        try:
            self._grow(make_weights)
        except BaseException as error:
            self._shrink()
            if isinstance(error, torch.OutOfMemoryError):
                raise self._too_little(free()) from error
            raise

    @torch.inference_mode()  # some of the tensors may have been made in it
    def _grow(self, make_weights: Callable[[], object]) -> None:
        if self._weights:
            for tensor, fresh in zip(self._weights, tensors_of(make_weights()), strict=True):
                assert (tensor.shape, tensor.dtype) == (fresh.shape, fresh.dtype), "weights are made as they were"
                tensor.set_(fresh)  # type: ignore[call-overload]  # torch's own stub lacks the form with one argument
        for storage, host in self._kept:
            storage.resize_(host.nbytes())
            storage.copy_(host)
        for tensor, size in self._cleared:
            tensor.untyped_storage().resize_(size)
            tensor.zero_()

    def _shrink(self) -> None:
        for tensor in (*self._weights, *(tensor for tensor, _ in self._cleared)):
            tensor.untyped_storage().resize_(0)
        for storage, _ in self._kept:
            storage.resize_(0)

    def _too_little(self, free: int) -> EngineError:
        return EngineError(
            f"waking up needs {self.nbytes / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} GiB free: free it, and wake the "
            "engine up again"
        )


def tensors_of(tree: object) -> Iterator[torch.Tensor]:
    """All tensors in dataclasses, mappings, lists and tuples, always in the same order; one that is there twice comes twice."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
    elif isinstance(tree, Mapping):
        yield from tensors_of(list(tree.values()))
    elif is_dataclass(tree):
        yield from tensors_of([getattr(tree, field.name) for field in fields(tree)])


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each once: torch gives one object for a storage, whoever asks."""
    return list(dict.fromkeys(tensor.untyped_storage() for tensor in tensors))


def _on_host(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    # Pageable: pinned memory would come from a pool of powers of two, and never go back to the system.
    return torch.UntypedStorage(storage.nbytes()).copy_(storage)
