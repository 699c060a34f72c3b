"""KVAdapter: the nested bases of one model, small enough to share, from which caches of every budget are made.

On disk it is two files beside a card: ``adapter_config.json`` (format version, the model's fingerprint) and
``adapter_model.safetensors`` with, for each layer l, ``layers.l.{key,value}.encode`` ``[Hkv, D, D]``, ``.mean`` and
``.energy`` ``[Hkv, D]``, all fp32. ``decode`` is not stored: it is the inverse of ``encode``.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestling.basis import NestedBasis
from nestling.kv import allocate, attention
from nestling.kv.allocate import CONTEXT, RankTable
from nestling.kv.cache import CHUNK, NestedCache, make_cache
from nestling.kv.exact import capacity

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1
SIDES = ("key", "value")
SINKS, WINDOW = 4, 64  # exact tokens by default: no other choice buys as much quality for its bytes


class AdapterError(ValueError):
    """An adapter that cannot be read, or does not fit the model; the message says what differs."""


@dataclass
class KVAdapter:
    """Nested bases and energies for the full-attention layers of one model.

    Attributes:
        fingerprint: what the model must agree on, see `nestling.kv.attention.fingerprint`.
        encode: ``{"key": ..., "value": ...}``, fp32 ``[L, Hkv, D, D]``.
        mean: likewise, fp32 ``[L, Hkv, D]``: what coordinates that are not stored are taken to be at.
        energy: likewise, fp32 ``[L, Hkv, D]``: KL to the full model in nats per token expected from dropping each
            coordinate.
        info: how it was made (basis, tokens, base model name): plain JSON values.
        card: the text of its README.md, if it has one.
    """

    fingerprint: dict
    encode: dict[str, Tensor]
    mean: dict[str, Tensor]
    energy: dict[str, Tensor]
    info: dict = field(default_factory=dict)
    card: str = ""

    def __post_init__(self):
        layers, heads, width = self.shape
        for side in SIDES:
            for name, tensor, shape in (
                ("encode", self.encode[side], (layers, heads, width, width)),
                ("mean", self.mean[side], (layers, heads, width)),
                ("energy", self.energy[side], (layers, heads, width)),
            ):
                if tuple(tensor.shape) != shape:
                    raise AdapterError(f"{side} {name}: shape {list(tensor.shape)}, expected {list(shape)}")
                if not torch.isfinite(tensor).all():
                    raise AdapterError(f"{side} {name}: holds NaN or infinity")
        inverses = {side: torch.linalg.inv_ex(self.encode[side].double()) for side in SIDES}
        for side, (inverse, info) in inverses.items():
            if info.any() or not torch.isfinite(inverse).all():
                raise AdapterError(f"{side} encode: a basis is singular, it has no inverse")
        self.decode = {side: inverse.float() for side, (inverse, _) in inverses.items()}

    @classmethod
    def from_bases(
        cls, config, bases: Mapping[int, tuple[NestedBasis, NestedBasis]], means: Mapping, energy: Mapping, info: dict
    ) -> "KVAdapter":
        """From (key, value) bases, means and energies by layer index."""

        def stacked(by_layer: Mapping) -> dict[str, Tensor]:
            return {
                side: torch.stack([by_layer[i][s] for i in sorted(by_layer)]).float() for s, side in enumerate(SIDES)
            }

        encode = stacked({i: tuple(basis.encode for basis in pair) for i, pair in bases.items()})
        return cls(attention.fingerprint(config), encode, stacked(means), stacked(energy), info)

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

    def ranks(self, elements: float, allocation: str | RankTable | Mapping = "energy") -> RankTable:
        """The rank table of an allocation for a number of elements per token.

        Raises:
            BudgetError: for budgets out of reach, tables of the wrong shape, unknown allocations.
        """
        layers, heads, width = self.shape
        if isinstance(allocation, Mapping):
            allocation = RankTable.from_dict(dict(allocation))
        if isinstance(allocation, RankTable):
            allocation.check(layers, heads, width)
            return allocation
        if allocation == "uniform":
            return allocate.uniform(layers, heads, width, elements)
        if allocation == "energy":
            return allocate.by_energy(self.energy["key"], self.energy["value"], elements)
        raise allocate.BudgetError(f"allocation must be 'energy', 'uniform' or a rank table, got {allocation!r}")

    def cache(
        self,
        model,
        budget: float | None = None,
        *,
        bytes_per_token: float | None = None,
        allocation: str | RankTable | Mapping = "energy",
        sinks: int = SINKS,
        window: int = WINDOW,
        exact_prompt: bool = True,
        paper: bool = False,
        context: int = CONTEXT,
        dtype: torch.dtype | None = None,
        chunk: int = CHUNK,
        offloading: bool = False,
    ) -> NestedCache:
        """An empty cache for ``model.generate(past_key_values=...)``, and the model switched to read it.

        Args:
            model: the causal LM that the adapter was made for.
            budget: share of the full cache of the compressed layers, in (0, 1], at equal precision: of its bf16 bytes
                for a model (or ``dtype``) of 16 bits. Not needed with a rank table.
            bytes_per_token: the same as a number of bytes per token, at the precision in use.
            allocation: ``"energy"`` (least predicted loss), ``"uniform"``, or a rank table
                ``{"keys": [L][Hkv], "values": [L][Hkv]}``.
            sinks, window: leading and most recent tokens that are kept exact: of the latter at least ``window``, and
                up to 15 more, since they are encoded 16 at a time. Room for all is counted: the ranks are lowered
                so that the total meets the budget at ``context`` tokens.
            exact_prompt: the first prompt attends to exact keys and values; only later reads see the compression.
            paper: compress everything from token 0, as the paper does: no sinks, no window, no exact prompt.
            dtype: of the stored coordinates; None means that of the model's keys and values.
            chunk: tokens by which storage grows.
            offloading: keep layers in host memory between their turns, as transformers' offloaded caches do.

        Raises:
            AdapterError: if the model is not the one the adapter was made for.
            BudgetError: if the budget or table cannot be met.
        """
        self.check(model)
        if paper:
            sinks, window, exact_prompt = 0, 0, False
        if sinks < 0 or window < 0 or chunk < 1:
            raise allocate.BudgetError(
                f"sinks={sinks} and window={window} must not be negative, chunk={chunk} at least 1"
            )
        elements = 0.0
        if not isinstance(allocation, RankTable | Mapping):
            itemsize = (dtype or model.dtype).itemsize
            elements = allocate.elements_per_token(
                self.full_elements,
                budget,
                bytes_per_token,
                itemsize=itemsize,
                exact_tokens=capacity(sinks, window),
                context=context,
            )
        elif budget is not None or bytes_per_token is not None:
            raise allocate.BudgetError("a rank table is a budget by itself: leave out budget and bytes_per_token")
        ranks = self.ranks(elements, allocation)
        attention.attach(model)
        return make_cache(
            {layer: self._layer_bases(row) for row, layer in enumerate(self.fingerprint["layers"])},
            ranks,
            attention.text_config(model),
            device=model.device,
            dtype=dtype,
            sinks=sinks,
            window=window,
            exact_prompt=exact_prompt,
            chunk=chunk,
            offloading=offloading,
        )

    def _layer_bases(self, row: int) -> dict[str, Tensor]:
        tensors = {"encode": self.encode, "decode": self.decode, "mean": self.mean}
        return {f"{side}_{name}": tensors[name][side][row] for side in SIDES for name in tensors}

    def check(self, model) -> None:
        """Raise `AdapterError` unless ``model`` has the adapter's fingerprint; the message lists what differs."""
        ours, theirs = self.fingerprint, attention.fingerprint(attention.text_config(model))
        wrong = [f"{k}: adapter {ours.get(k)}, model {theirs[k]}" for k in theirs if ours.get(k) != theirs[k]]
        if wrong:
            raise AdapterError(f"the adapter was made for another model ({'; '.join(wrong)})")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config, weights and card, atomically: an existing adapter is replaced whole or not at all."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{layer}.{side}.{name}": values[side][row].contiguous()
            for row, layer in enumerate(self.fingerprint["layers"])
            for side in SIDES
            for name, values in (("encode", self.encode), ("mean", self.mean), ("energy", self.energy))
        }
        head = {"format": FORMAT, "kind": "nestling-kv", "nestling": _library_version()}
        config = {**head, "model": self.fingerprint, **self.info}
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        new, old = work / "new", work.with_name(f"{work.name}.old")
        try:
            new.mkdir()  # with the permissions of any folder; those of a temporary one are private
            save_file(tensors, new / WEIGHTS_FILE)
            (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / "README.md").write_text(self.card or _default_card(config), encoding="utf-8")
            if folder.exists():
                if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file()):
                    raise AdapterError(f"{folder} exists and is not an adapter: choose another folder")
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "KVAdapter":
        """Read an adapter from a folder, or from a hub id.

        Raises:
            AdapterError: for missing, truncated, foreign or inconsistent files, naming the file and what is wrong.
        """
        path = Path(folder)
        if not path.is_dir():
            path = _download(str(folder))
        config = _read_config(path / CONFIG_FILE)
        fingerprint = config.pop("model")
        weights = path / WEIGHTS_FILE
        try:
            tensors = load_file(weights)
        except FileNotFoundError:
            raise AdapterError(f"{weights} is missing") from None
        except SafetensorError as error:
            raise AdapterError(f"{weights} is truncated or not a safetensors file ({error})") from error
        names = [
            f"layers.{i}.{side}.{name}"
            for i in fingerprint["layers"]
            for side in SIDES
            for name in ("encode", "mean", "energy")
        ]
        if missing := sorted(set(names) - set(tensors)):
            raise AdapterError(
                f"{weights} lacks {len(missing)} tensors, first {missing[0]}: not an adapter of this model"
            )
        if foreign := sorted(set(tensors) - set(names)):
            raise AdapterError(f"{weights} holds {len(foreign)} unknown tensors, first {foreign[0]}: not an adapter")
        heads, width = fingerprint["num_key_value_heads"], fingerprint["head_dim"]
        for name in names:
            shape = [heads, width, width] if name.endswith("encode") else [heads, width]
            if list(tensors[name].shape) != shape:
                raise AdapterError(f"{weights}: {name} has shape {list(tensors[name].shape)}, expected {shape}")

        def stack(name: str) -> dict[str, Tensor]:
            return {
                s: torch.stack([tensors[f"layers.{i}.{s}.{name}"] for i in fingerprint["layers"]]).float()
                for s in SIDES
            }

        card = path / "README.md"
        info = {k: v for k, v in config.items() if k not in ("format", "kind", "nestling")}
        return cls(
            fingerprint,
            stack("encode"),
            stack("mean"),
            stack("energy"),
            info,
            card.read_text("utf-8") if card.is_file() else "",
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the adapter to the hub and return its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            self.save_pretrained(Path(work) / "adapter")
            api.upload_folder(
                repo_id=repo_id, folder_path=Path(work) / "adapter", commit_message="nestling KV adapter"
            )
        return str(address)


def _library_version() -> str | None:
    try:
        return version("nestling")
    except PackageNotFoundError:  # run from a checkout
        return None


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path} is missing: not an adapter folder") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("kind") != "nestling-kv":
        raise AdapterError(f"{path} is not a nestling KV adapter's (kind is not 'nestling-kv')")
    if not isinstance(config.get("format"), int) or config["format"] > FORMAT:
        raise AdapterError(
            f"{path} has format {config.get('format')}, this version reads up to {FORMAT}: upgrade nestling"
        )
    model = config.get("model")
    sizes = ("num_key_value_heads", "head_dim")
    if (
        not isinstance(model, dict)
        or not all(isinstance(model.get(k), int) and 0 < model[k] <= 65536 for k in sizes)
        or not isinstance(model.get("layers"), list)
        or not model["layers"]
        or not all(isinstance(i, int) and i >= 0 for i in model["layers"])
    ):
        raise AdapterError(f"{path}: 'model' must hold layers, num_key_value_heads and head_dim")
    return config


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, "README.md"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise AdapterError(
            f"{repo_id} is neither an adapter folder nor a hub id that can be reached ({type(error).__name__})"
        ) from error


def _default_card(config: dict) -> str:
    model = config["model"]
    return (
        "---\nlibrary_name: nestling\ntags: [kv-cache, nestling]\n"
        + (f"base_model: {config['base_model']}\n" if config.get("base_model") else "")
        + "---\n\n# Nested KV-cache bases\n\n"
        f"For a `{model['model_type']}` model with {len(model['layers'])} compressed layers, "
        f"{model['num_key_value_heads']} KV heads of width {model['head_dim']}. "
        f"Basis: {config.get('basis', 'unknown')}, calibrated on {config.get('tokens', 'unknown')} tokens.\n\n"
        '```python\nfrom nestling import kv\n\nadapter = kv.KVAdapter.from_pretrained("this folder")\n'
        "cache = adapter.cache(model, budget=0.5)\nmodel.generate(**inputs, past_key_values=cache)\n```\n"
    )
