"""KVAdapter: the nested bases of one model, small enough to share, which serve caches of every budget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nestling.basis import NestedBasis
from nestling.errors import AdapterError
from nestling.kv.adapter_files import SIDES, path_names, read, write
from nestling.kv.adapter_hub import push
from nestling.kv.allocation.allocate import ENERGY, steps_of
from nestling.kv.allocation.budget import Budget, read_share
from nestling.kv.allocation.table import Allocation, block_sizes
from nestling.kv.integration.attach import fingerprint, text_config
from nestling.kv.integration.modes import in_default_mode
from nestling.kv.quantisation.quantiser import WIDTHS
from nestling.options import flag

# All that is given for each coordinate, and how many numbers of it, if there are several.
BY_COORDINATE: dict[str, list[int]] = {
    "mean": [], "drop_cost": [], "quantisation_cost": [1 + len(WIDTHS)], "step": []
}  # fmt: skip


@dataclass
class KVAdapter:
    """Nested bases and costs for the full-attention layers of one model.

    Attributes:
        fingerprint: what the model must agree on, see `nestling.kv.integration.attach.fingerprint`.
        encode: ``{"key": ..., "value": ...}``, fp32 ``[L, Hkv, D, D]``.
        mean: likewise, fp32 ``[L, Hkv, D]``: what coordinates that are not stored are taken to be at.
        drop_cost: likewise, fp32 ``[L, Hkv, D]``: KL to the full model in nats per token expected from dropping each
            coordinate where the others are kept or dropped whole: ranks follow from it.
        quantisation_cost: likewise, fp32 ``[L, Hkv, D, 1 + widths]``: KL in nats per token expected from storing each
            coordinate with no bits and with each of `nestling.kv.quantisation.quantiser.WIDTHS`. With it comes
            ``step``, ``[L, Hkv, D]``, of the quantisers; both are empty in adapters that were made without, whose
            caches are not quantised.
        drift: by how much the mean of keys differs in each span of positions, fp32 ``[L, Hkv, spans, D]``, see
            `nestling.kv.cache.drift`; None where it was not measured, or keys do not turn.
        paths: searched allocations by name, ``[2, L, Hkv, blocks]`` (keys, values): what each block is worth; the
            larger, the longer it is kept as the budget falls.
        info: how it was made (basis, tokens, base model name): plain JSON values.
        card: the text of its README.md, if it has one.
    """

    fingerprint: dict
    encode: dict[str, Tensor]
    mean: dict[str, Tensor]
    drop_cost: dict[str, Tensor]
    info: dict = field(default_factory=dict)
    card: str = ""
    paths: dict[str, Tensor] = field(default_factory=dict)
    quantisation_cost: dict[str, Tensor] = field(default_factory=dict)
    step: dict[str, Tensor] = field(default_factory=dict)
    drift: Tensor | None = None

    def __post_init__(self):
        layers, heads, width = self.shape
        for side in SIDES:
            for name, last in (("encode", [width]), *BY_COORDINATE.items()):
                if not (values := getattr(self, name)):
                    continue
                tensor, shape = values[side], [layers, heads, width, *last]
                if list(tensor.shape) != shape:
                    raise AdapterError(f"{side} {name}: shape {list(tensor.shape)}, expected {shape}")
                if not torch.isfinite(tensor).all():
                    raise AdapterError(f"{side} {name}: holds NaN or infinity")
        for name, path in self.paths.items():
            expected = [2, layers, heads, len(block_sizes(width))]
            if list(path.shape) != expected or not torch.isfinite(path).all():
                raise AdapterError(f"path {name}: shape {list(path.shape)}, expected finite {expected}")
        if (drift := self.drift) is not None:
            spans = drift.shape[2] if drift.dim() == 4 else 0
            if not spans or list(drift.shape) != [layers, heads, spans, width]:
                raise AdapterError(f"drift: shape {list(drift.shape)}, expected [{layers}, {heads}, spans, {width}]")
            if not torch.isfinite(drift).all():
                raise AdapterError("drift: holds NaN or infinity")
        if self.quantises and any((self.step[side] <= 0).any() for side in SIDES):
            raise AdapterError("step: holds values that are not positive")
        inverses = {side: torch.linalg.inv_ex(self.encode[side].double()) for side in SIDES}
        for side, (inverse, info) in inverses.items():
            if info.any() or not torch.isfinite(inverse).all():
                raise AdapterError(f"{side} encode: a basis is singular, it has no inverse")
        self.decode = {side: inverse.float() for side, (inverse, _) in inverses.items()}

    @classmethod
    def from_bases(
        cls, config, bases: Mapping[int, tuple[NestedBasis, NestedBasis]], means: Mapping, info: dict
    ) -> "KVAdapter":
        """From (key, value) bases and means by layer index; drop costs are the bases' own energies."""

        def stacked(by_layer: Mapping) -> dict[str, Tensor]:
            return {
                side: torch.stack([by_layer[i][s] for i in sorted(by_layer)]).float() for s, side in enumerate(SIDES)
            }

        encode, drop_cost = (
            stacked({i: tuple(getattr(basis, name) for basis in pair) for i, pair in bases.items()})
            for name in ("encode", "energy")
        )
        return cls(fingerprint(config), encode, stacked(means), drop_cost, info)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Compressed layers, KV heads, head dimension."""
        f = self.fingerprint
        return len(f["layers"]), f["num_key_value_heads"], f["head_dim"]

    @property
    def full_elements(self) -> int:
        """Elements per token of the compressed layers' full cache, 2 L Hkv D."""
        layers, heads, width = self.shape
        return 2 * layers * heads * width

    @property
    def allocation(self) -> str:
        """The allocation of ranks that is used if none is named: what was searched last, or else ``"energy"``."""
        searched = self.info.get("search", {}).get("method")
        return searched if searched in self.paths else ENERGY

    @property
    def quantises(self) -> bool:
        """Whether caches can be quantised: quantisation costs and steps were measured."""
        return bool(self.quantisation_cost and self.step)

    def allocate(
        self,
        budget: "float | str | Budget | Allocation | Mapping",
        method: str | None = None,
        *,
        quantise: bool = True,
    ) -> Allocation:
        """The bits of every block of coordinates at a budget, exact tokens not counted.

        Args:
            budget: a share of the full cache, see `nestling.kv.allocation.budget.read_share`. An allocation, or its
                dict, is checked and given back.
            method: ``"energy"``, ``"uniform"``, ``"layer"`` or the name of a searched one, see
                `nestling.kv.allocation.allocate`. Default: energy, or for ranks the last searched.
            quantise: at the widths that pay, where caches can be quantised and no method of ranks is named; else by
                ranks, which are blocks of 16 bits or none.

        Raises:
            BudgetError: for budgets that are no shares or out of reach, tables that do not fit, unknown methods.
        """
        if isinstance(budget, Mapping):
            budget = Allocation.of_dict(budget, self.shape[2])
        if isinstance(budget, Allocation):
            budget.check(*self.shape)
            return budget
        return steps_of(self, method, quantise=quantise).required(read_share(budget))

    def _layer_bases(self, row: int) -> dict[str, Tensor]:
        """Bases, means and steps of a compressed layer, by its row: ``{"key_encode": [Hkv, D, D], ...}``."""
        tensors = {"encode": self.encode, "decode": self.decode, "mean": self.mean, "step": self.step}
        of_row = {f"{side}_{name}": values[side][row] for side in SIDES for name, values in tensors.items() if values}
        return of_row if self.drift is None else {**of_row, "key_drift": self.drift[row]}

    def check(self, model) -> None:
        """Raise `AdapterError` unless ``model`` has the adapter's fingerprint; the message lists what differs."""
        ours, theirs = self.fingerprint, fingerprint(text_config(model))
        wrong = [f"{k}: adapter {ours.get(k)}, model {theirs[k]}" for k in theirs if ours.get(k) != theirs[k]]
        if wrong:
            raise AdapterError(f"the adapter was made for another model ({'; '.join(wrong)})")

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Write config, weights and card: an adapter in the folder is replaced whole or not at all, other files stay.

        Args:
            folder: made if it does not exist. The files are ``nestling_adapter.json``,
                ``nestling_adapter.safetensors`` and ``README.md``, or ``nestling_adapter.md`` where there is another
                ``README.md``.
            half: bases in fp16, in half the bytes. They move by 5e-4 of their entries, and full rank stays exact,
                since ``decode`` is the inverse of what is stored.

        Raises:
            OptionError: if ``half`` is no bool.
            FileError: the folder cannot be made or written to, or the disk is full. What was there is as it was.
            AdapterError: something else has the name of one of the files, or a basis does not fit into fp16.
        """
        half = flag("half", half)
        tensors = {
            f"layers.{layer}.{side}.{name}": values[side][row].contiguous()
            for row, layer in enumerate(self.fingerprint["layers"])
            for side in SIDES
            for name in ("encode", *BY_COORDINATE)
            if (values := getattr(self, name))
        }
        for name, path in self.paths.items():
            for row, layer in enumerate(self.fingerprint["layers"]):
                for side, gains in zip(SIDES, path[:, row].float(), strict=True):
                    tensors[f"layers.{layer}.{side}.path.{name}"] = gains.contiguous()
        if self.drift is not None:
            for row, layer in enumerate(self.fingerprint["layers"]):
                tensors[f"layers.{layer}.key.drift"] = self.drift[row].contiguous()
        if half:
            bases = [name for name in tensors if name.endswith((".encode", ".drift"))]
            tensors |= {name: tensors[name].half() for name in bases}
            if largest := [name for name in bases if not torch.isfinite(tensors[name]).all()]:
                raise AdapterError(f"{largest[0]} does not fit into fp16: save it with half=False")
        write(folder, {"model": self.fingerprint, **self.info}, tensors, self.card)

    @classmethod
    @in_default_mode
    def from_pretrained(cls, folder: str | Path) -> "KVAdapter":
        """Read an adapter from a folder, from a hub id, or the trained one that comes with nestling: ``"smollm2"``.

        Raises:
            AdapterError: for missing, truncated, foreign or inconsistent files, naming the file and what is wrong.
        """
        config, tensors, card = read(folder)
        fingerprint = config.pop("model")
        layers = fingerprint["layers"]

        def stack(name: str) -> dict[str, Tensor]:
            return {s: torch.stack([tensors[f"layers.{i}.{s}.{name}"] for i in layers]).float() for s in SIDES}

        paths = {name: torch.stack([*stack(f"path.{name}").values()]) for name in path_names(tensors)}
        without_bits = f"layers.{layers[0]}.key.step" not in tensors
        quantisation_cost, step = ({} if without_bits else stack(name) for name in ("quantisation_cost", "step"))
        tables = (stack("encode"), stack("mean"), stack("drop_cost"))
        turns = f"layers.{layers[0]}.key.drift" in tensors
        drift = torch.stack([tensors[f"layers.{i}.key.drift"] for i in layers]).float() if turns else None
        try:
            return cls(fingerprint, *tables, config, card, paths, quantisation_cost, step, drift)
        except AdapterError as error:  # of values that are not finite, or have no inverse
            raise AdapterError(f"{folder}: the adapter is damaged ({error}): copy it again") from error

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the adapter to the hub and return its address. Other files of the repository stay as they are.

        Raises:
            AdapterError: the repository cannot be made or written to.
        """
        private = flag("private", private)
        return push(self.save_pretrained, repo_id, private, token)
