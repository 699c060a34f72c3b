"""Writers that are killed: old or new is at the path at every moment, and the next run leaves nothing behind."""

import json
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nestling import kv, models
from nestling.embed.export.export import export
from nestling.embed.ladder import Ladder
from nestling.embed.model.folder import load_ladder, load_projections, read_projections, write_projections
from nestling.embed.model.loading import load_encoder
from nestling.embed.model.projection import fit_projections
from nestling.embed.training.result import Trained, save
from nestling.embed.training.teacher import write_table
from nestling.jobs.results import ResultStore
from nestling.kv.adapter_files import _default_card
from nestling.kv.quantisation import cpu as kernels
from nestling.report.page import write_html
from nestling.report.results import write_json

from ..embed.families import save_backbone, sentence_model, some_texts
from ..kv.families import BASE, tiny_fit, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs fork and /proc"),
]

MINE = {"notes.txt": "mine", "checkpoint-100/optimizer.pt": "state"}
LORA = {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "weights", "README.md": "a LoRA"}


class Kind:
    """A writer of versions 0 and 1 to a place, and what tells which is there."""

    fresh = False  # whether nothing may be at the place before it writes
    mine: dict[str, str] = {}  # files of a user in a place that is a folder
    kills = 0

    def write(self, place: Path, version: int) -> None:
        raise NotImplementedError

    def read(self, place: Path) -> int | None:
        """Which version is at the place, whole; None if there is nothing. Raises if there is something else."""
        raise NotImplementedError

    def prepare(self, place: Path) -> None:
        if self.fresh:
            shutil.rmtree(place, ignore_errors=True)
        else:
            self.write(place, 0)


@pytest.fixture(scope="module")
def adapters():
    model = tiny_model("llama-gqa")
    ids = torch.randint(3, BASE["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(0))
    made = tiny_fit(model, ids)
    mean = {side: 2 * tensor for side, tensor in made.mean.items()}
    return [made, replace(made, mean=mean, card="another card")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    save_backbone("bert", folder)
    return sentence_model(folder)


@pytest.fixture(scope="module")
def turns(encoder):
    texts = list(dict.fromkeys(some_texts(100, seed=3)))
    return [fit_projections(encoder, texts[::step], [1, 2]) for step in (1, 2)]


class Adapter(Kind):
    mine = MINE | LORA

    def __init__(self, adapters):
        self.adapters = adapters

    def write(self, place, version):
        self.adapters[version].save_pretrained(place)

    def read(self, place):
        if not place.exists():
            return None
        found = kv.KVAdapter.from_pretrained(place)
        return [torch.equal(adapter.mean["key"], found.mean["key"]) for adapter in self.adapters].index(True)


class NewAdapter(Adapter):
    fresh, mine = True, {}


class OldAdapter(Adapter):
    """Version 0 has the names that older releases gave."""

    mine = {}

    def prepare(self, place):
        shutil.rmtree(place)
        self.write(place, 0)
        config = json.loads((place / "nestling_adapter.json").read_text())
        old = {key: value for key, value in config.items() if key not in ("sha256", "card", "card_sha256")}
        (place / "nestling_adapter.json").unlink()
        (place / "adapter_config.json").write_text(json.dumps(old))
        (place / "nestling_adapter.safetensors").rename(place / "adapter_model.safetensors")
        (place / "README.md").write_text(_default_card(old))


class Aligned(Kind):
    fresh = True

    def __init__(self, encoder, turns):
        self.encoder, self.turns, self.ladder = encoder, turns, Ladder.parse("1x8,2x16,4x32")

    def write(self, place, version):
        save(self.encoder, Trained(place, self.ladder, self.turns[version], {}), "alignment", "card")

    def read(self, place):
        if not place.exists():
            return None
        load_encoder(place)
        found = load_projections(place)
        return [torch.equal(turns[1].encode, found[1].encode) for turns in self.turns].index(True)


class Resumed(Aligned):
    """A training that had ended and is resumed: the weights are the same, what is said of it is not."""

    fresh, mine = False, MINE

    def write(self, place, version):
        trained = Trained(place, self.ladder, self.turns[1], {"seconds": version})
        save(self.encoder, trained, "training", f"card {version}", resumed=True)

    def read(self, place):
        assert super().read(place) == 1
        return json.loads((place / "nestling.json").read_text())["training"]["seconds"]


class Export(Kind):
    fresh = True

    def __init__(self, encoder):
        self.encoder = encoder

    def write(self, place, version):
        export(self.encoder, "2x16", place)

    def read(self, place):
        if not place.exists():
            return None
        assert load_encoder(place).get_embedding_dimension() == 16 and (place / "README.md").is_file()
        return int(str(load_ladder(place)) == "2x16")


class Json(Kind):
    def write(self, place, version):
        write_json(place, [{"version": version, "text": "x" * 30_000}], {})

    def read(self, place):
        return json.loads(place.read_text())["rows"][0]["version"]


class Page(Kind):
    def write(self, place, version):
        write_html(place, f"version {version}", "x" * 30_000, [], {})

    def read(self, place):
        assert place.read_text().endswith("</html>\n")
        return int("version 1" in place.read_text())


class Measured(Kind):
    def write(self, place, version):
        partial = ResultStore(place, {})
        partial.done = {"version": version}
        partial.save()

    def read(self, place):
        return ResultStore(place, {}).done["version"]


class Turns(Kind):
    def __init__(self, turns):
        self.turns = turns

    def write(self, place, version):
        write_projections(place, self.turns[version])

    def read(self, place):
        found = read_projections(place)
        return [torch.equal(turns[1].encode, found[1].encode) for turns in self.turns].index(True)


class Table(Kind):
    """Of a teacher that says the same of every text."""

    def __init__(self, encoder, monkeypatch):
        self.encoder, self.version = encoder, 0
        monkeypatch.setattr(encoder, "encode", self.encode)

    def encode(self, texts, **options):
        return np.full((len(texts), 8), self.version, np.float32)

    def write(self, place, version):
        self.version = version
        write_table(place, self.encoder, [("", str(i)) for i in range(3000)])

    def read(self, place):
        return [set(np.load(place).flatten().tolist()) == {version} for version in (0, 1)].index(True)


class Push(Kind):
    """What is uploaded is in a temporary folder of the system."""

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return ""

        def upload_folder(self, repo_id, folder_path, commit_message):
            return [path.read_bytes() for path in Path(folder_path).iterdir()]

    def __init__(self, adapters, monkeypatch):
        self.adapter, self.monkeypatch = adapters[0], monkeypatch
        monkeypatch.setattr("huggingface_hub.HfApi", self.Api)

    def write(self, place, version):
        place.mkdir(exist_ok=True)
        self.monkeypatch.setattr("tempfile.tempdir", str(place))
        self.adapter.push_to_hub("me/mine")

    def read(self, place):
        return None


class Converted(Kind):
    """The conversion of a GGUF file, with a small model in its place."""

    fresh = True

    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("{}")

    def __init__(self, monkeypatch, source):
        source.write_bytes(b"")
        self.monkeypatch, model = monkeypatch, tiny_model("llama-gqa")
        monkeypatch.setattr(models, "_data_file", lambda alias: source)
        monkeypatch.setattr(models, "_check_gguf", lambda *args: None)
        monkeypatch.setattr(models, "_read", lambda *args: (model, self.Tokenizer()))

    def write(self, place, version):
        self.monkeypatch.setenv("NESTLING_MODELS", str(place.parent))
        models._converted(place.name)

    def read(self, place):
        if not place.exists():
            return None
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in place.iterdir()}
        return 1


class Kernels(Kind):
    """Of a compiler that copies a library, which takes a moment."""

    def __init__(self, monkeypatch, script):
        if kernels.compiled() is None:
            pytest.skip("there is no C compiler")
        library = shlex.quote(kernels.compiled()._name)
        script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nexec cp {library} "$2"\n')
        script.chmod(0o755)
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("CC", str(script))

    def prepare(self, place):
        for path in place.rglob("*.so"):
            path.unlink()

    def write(self, place, version):
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        kernels._loaded()

    def read(self, place):
        """What is there does not matter: it is looked at before it is loaded. A compiler outlives who began it."""
        time.sleep(0.1)
        return None


@pytest.fixture
def kind(request, adapters, encoder, turns, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    makers: dict[str, Callable[[], Kind]] = {
        "adapter": lambda: Adapter(adapters),
        "new adapter": lambda: NewAdapter(adapters),
        "old adapter": lambda: OldAdapter(adapters),
        "aligned": lambda: Aligned(encoder, turns),
        "resumed": lambda: Resumed(encoder, turns),
        "export": lambda: Export(encoder),
        "json": Json,
        "page": Page,
        "measured": Measured,
        "turns": lambda: Turns(turns),
        "table": lambda: Table(encoder, monkeypatch),
        "push": lambda: Push(adapters, monkeypatch),
        "converted": lambda: Converted(monkeypatch, tmp_path / "model.gguf"),
        "kernels": lambda: Kernels(monkeypatch, tmp_path / "cc"),
    }
    made = makers[request.param]()
    made.kills = KINDS[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others do not survive a fork
    yield made
    torch.set_num_threads(threads)


KINDS = {"adapter": 26, "new adapter": 8, "old adapter": 10, "aligned": 8, "resumed": 10, "export": 6, "json": 8}
KINDS |= {"page": 4, "measured": 6, "turns": 6, "table": 6, "push": 4, "converted": 4, "kernels": 4}


def child(kind: Kind, place: Path, until: Callable[[str], object] = lambda name: None) -> int:
    """The number of a process that writes version 1 and is told of each audit event on its way."""
    if (pid := os.fork()) == 0:
        try:
            signal.alarm(300)
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.addaudithook(lambda name, args: until(name))
            kind.write(place, 1)
        finally:
            os._exit(0)
    return pid


class Counter:
    """Counts what a writer does with files, and ends its process at one of them."""

    def __init__(self, last: int = 0, report: int | None = None):
        self.count, self.last, self.report = 0, last, report

    def __call__(self, name: str) -> None:
        self.count += name == "open" or name.startswith(("os.", "tempfile."))
        if self.report is not None:
            os.pwrite(self.report, b"%10d" % self.count, 0)
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def measured(kind: Kind, place: Path, scratch: Path) -> tuple[int, float]:
    """How many times a writer does something with files, and how long it takes."""
    kind.prepare(place)
    with open(scratch, "w+b") as file:
        os.waitpid(child(kind, place, Counter(report=file.fileno())), 0)
        number = int(file.read())
    kind.prepare(place)
    start = time.perf_counter()
    os.waitpid(child(kind, place), 0)
    return number, time.perf_counter() - start


def check_mine(kind: Kind, place: Path) -> None:
    assert {name: (place / name).read_text() for name in kind.mine} == kind.mine


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_killed_writers(kind: Kind, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    rng, place = random.Random(seed), tmp_path / "home" / "place"
    place.parent.mkdir()
    for name, text in kind.mine.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    kind.write(place, 1)
    whole = listing(place.parent)
    number, seconds = measured(kind, place, tmp_path / "count")
    kills = 0
    while kills < kind.kills:
        kind.prepare(place)
        before = kind.read(place)
        by_time = kills % 2
        pid = child(kind, place, Counter(0 if by_time else rng.randint(1, number)))
        if by_time:
            time.sleep(rng.uniform(0, 1.1 * seconds))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL)
        kills += status != 0
        assert kind.read(place) in (before, 1)
        check_mine(kind, place)
        if kind.fresh:  # whoever writes there again has taken away what there may be
            shutil.rmtree(place, ignore_errors=True)
        kind.write(place, 1)
        assert kind.read(place) in (1, None) and listing(place.parent) == whole
        check_mine(kind, place)


def test_there_are_a_hundred_kills():
    """So many as are promised, over all kinds of artefacts."""
    assert sum(KINDS.values()) >= 100
