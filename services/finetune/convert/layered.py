"""Answers of a model that need not fit in memory: each part's weights are read when its turn comes, and dropped after it.

A part is a decoder layer (a member of a ModuleList), a module that PEFT has put an adapter on, or what owns weights outside
of these: embeddings, norms, the head. transformers builds the model without memory and turns stored tensors into its own as
`from_pretrained` does; PEFT adds the adapter. All is computed in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from services.finetune.convert.shards import Stored
from services.finetune.modules import auto_class

Read = Callable[[Stored], Tensor]
Source = tuple[Iterable[Stored], Read]
"""The tensors of a model, and what reads one."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place of a weight: an attribute of a module. Of an adapter's, `stored` says where its numbers are; of the base's,
    `name` is that in the model's state_dict."""

    owner: nn.Module
    key: str
    name: str = ""
    stored: Stored | None = None

    def fill(self, value: Tensor) -> None:
        if self.key in self.owner._parameters:
            self.owner._parameters[self.key] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.key] = value

    def drop(self) -> None:
        if (held := self.owner._parameters.get(self.key)) is not None:
            self.owner._parameters[self.key] = nn.Parameter(held.to("meta"), requires_grad=False)


class Layered:
    """A model by its config.json and its tensors, perhaps with a LoRA adapter (adapter_config.json, tensors) on.

    `tell` is called before each part is read, with how many were. ValueError if a tensor has no place or is missing; and
    whatever transformers or PEFT raise for a model that they do not know.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        base: Source,
        adapter: tuple[Mapping[str, Any], *Source] | None = None,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._loader = _Loader(_empty(config), base)
        self._model, self._tell, self._count = _empty(config), tell, 0
        slots = {(id(owner), key): _Slot(owner, key, name) for name, owner, key in _places(self._model)}
        self._read = base[1]
        if adapter is not None:
            about, tensors, self._read = adapter
            self._model, own = _with_adapter(self._model, about, tensors)
            slots |= {(id(s.owner), s.key): s for s in own}
        self._parts = list(_parts(self._model, slots))
        for module, held in self._parts:
            module.register_forward_pre_hook(self._filler(held))
            module.register_forward_hook(self._dropper(held), always_call=True)

    @property
    def largest_bytes(self) -> int:
        """What the largest part takes in float32."""
        sizes = (4 * sum(getattr(s.owner, s.key).numel() for s in held) for _, held in self._parts)
        return max(sizes, default=0)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]], **more: Tensor) -> Tensor:
        """float32 [tokens of all rows, vocabulary], each row read by itself. `more` goes to the model as it is.

        Rows are one batch, filled up at their ends: no token sees what comes after it, so it needs no mask.
        """
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        found: Tensor = self._model(input_ids=ids, use_cache=False, **more).logits
        return torch.cat([found[n, : len(row)].float() for n, row in enumerate(rows)])

    def _filler(self, held: Sequence[_Slot]) -> Callable[..., None]:
        def fill(*_: Any) -> None:
            self._tell(self._count)
            self._count += 1
            values = self._loader.load({s.name for s in held if s.stored is None})
            for slot in held:
                if slot.stored is not None:
                    slot.fill(self._read(slot.stored).float())
                elif slot.name in values:
                    slot.fill(values[slot.name])

        return fill

    def _dropper(self, held: Sequence[_Slot]) -> Callable[..., None]:
        def drop(*_: Any) -> None:
            for slot in held:
                slot.drop()

        return drop


class _Loader:
    """Tensors as transformers' class has them, which may be other ones than are stored: experts as one, fused matrices."""

    def __init__(self, shelf: Any, source: Source) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would be one a part
        self._shelf, self._read = shelf, source[1]
        self._mapping: Any = get_model_conversion_mapping(shelf)
        known = shelf.state_dict()
        renamed = [m for m in self._mapping if isinstance(m, WeightRenaming)]
        converted = [m for m in self._mapping if isinstance(m, WeightConverter)]
        # What several tensors become is found under the first of its names, beside which the others are.
        self._stored = defaultdict[str, list[Stored]](list)
        for tensor in source[0]:
            name, _ = rename_source_key(tensor.name, renamed, converted, shelf.base_model_prefix, known)
            self._stored[tensor.name if name not in known and tensor.name in known else name].append(tensor)

    def load(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The parameters, and those buffers that are stored, of these names. ValueError if one is missing."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tied = self._shelf.all_tied_weights_keys
        sought = {n: n if n in self._stored else tied.get(n, n) for n in names}
        state = {t.name: _Lazy(self._read, t) for n in sought.values() for t in self._stored.get(n, ())}
        wanted = LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._mapping)
        told, _ = convert_and_load_state_dict_in_model(self._shelf, state, wanted)
        if odd := [*told.conversion_errors, *(name for name, *_ in told.mismatched_keys)]:
            raise ValueError(f"{sorted(odd)[0]} does not fit the model")
        found = {n: getattr(*_place(self._shelf, s)) for n, s in sought.items()}
        for place in {_place(self._shelf, s) for s in sought.values()}:
            _Slot(*place).drop()
        if gone := sorted(n for n, value in found.items() if value.is_meta):
            raise ValueError(f"{gone[0]} is missing")
        return found


class _Lazy:
    """A stored tensor that is read where transformers' loader asks for it, in one of its threads."""

    def __init__(self, read: Read, tensor: Stored) -> None:
        self._read, self._tensor = read, tensor

    def __getitem__(self, _: Any) -> Tensor:
        return self._read(self._tensor)


def _empty(config: Mapping[str, Any]) -> Any:
    """The model with no weights, whose buffers are computed."""
    import transformers
    from accelerate import init_empty_weights

    known = transformers.AutoConfig.for_model(**config)
    with init_empty_weights(include_buffers=False):
        kind: Any = getattr(transformers, auto_class(config))
        model = kind.from_config(known, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


def _with_adapter(model: Any, about: Mapping[str, Any], tensors: Iterable[Stored]) -> tuple[Any, list[_Slot]]:
    """PEFT's model, and the slots of the adapter's tensors in it. ValueError if one has no place, or a place none."""
    import peft

    known = {k: v for k, v in about.items() if k in peft.LoraConfig.__dataclass_fields__}
    config = peft.LoraConfig(**{**known, "inference_mode": True, "init_lora_weights": True})
    before = {id(value) for _, value in model.named_parameters()}
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    # Stand-ins go where PEFT puts them, which tells where the numbers belong.
    stands = {t.name: nn.Parameter(torch.empty(t.shape, device="meta"), requires_grad=False) for t in tensors}
    told: Any = peft.set_peft_model_state_dict(wrapped, dict(stands), low_cpu_mem_usage=True)
    if told.unexpected_keys:
        raise ValueError(f"{told.unexpected_keys[0]} has no place")
    stored = {id(stands[t.name]): t for t in tensors}
    slots = []
    for name, owner, key in _places(wrapped):
        value = getattr(owner, key)
        if (found := stored.get(id(value))) is not None:
            slots.append(_Slot(owner, key, stored=found))
        elif isinstance(value, nn.Parameter) and id(value) not in before:
            raise ValueError(f"the adapter has nothing for {name}")
    return wrapped.eval(), slots


def _parts(model: nn.Module, slots: Mapping[tuple[int, str], _Slot]) -> Iterator[tuple[nn.Module, Sequence[_Slot]]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    def walk(module: nn.Module, whole: bool) -> Iterator[tuple[nn.Module, Sequence[_Slot]]]:
        inside = list(module.modules()) if whole else [module]
        keys = ((id(m), key) for m in inside for key in (*m._parameters, *m._buffers))
        if held := [slots[k] for k in keys if k in slots]:
            yield module, held
        if not whole:
            for child in module.children():
                yield from walk(child, isinstance(module, nn.ModuleList) or isinstance(child, BaseTunerLayer))

    yield from walk(model, False)


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of all that a model's state_dict holds."""
    for name in model.state_dict():
        yield name, *_place(model, name)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, key = name.rpartition(".")
    return model.get_submodule(owner), key
