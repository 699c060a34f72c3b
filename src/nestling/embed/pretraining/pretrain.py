"""Pre-training every size of an encoder (SMAE, arXiv 2410.13230) on transformers' Trainer, from text alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from nestling.embed.export.card import pretrained_card
from nestling.embed.model.dropout import without_dropout
from nestling.embed.model.fingerprint import checksum
from nestling.embed.model.modes import in_eval_mode, modes_kept
from nestling.embed.model.parts import Encoder
from nestling.embed.pretraining.autoencoder import MaskedAutoencoder
from nestling.embed.pretraining.collate import Collator, MaskedBatches
from nestling.embed.pretraining.config import PretrainConfig
from nestling.embed.pretraining.corpus import Corpus, Position, Texts
from nestling.embed.pretraining.families import check, declare_mask
from nestling.embed.pretraining.masking import Masking
from nestling.embed.training.arguments import check_changes, relevant, training_arguments, trains_unread
from nestling.embed.training.job import ladder_of
from nestling.embed.training.result import Trained, check_places, save
from nestling.embed.training.trainer import ProgressCallback, check_finite, without_bars
from nestling.errors import MissingExtraError, OptionError, TrainingError
from nestling.files.fields import Fields
from nestling.jobs.arguments import rehearsed, remove_printer, stopped
from nestling.jobs.callbacks import made, restore, stops_early
from nestling.jobs.checkpoints import attributes, begin, last_whole, run
from nestling.jobs.schedule import scheduled
from nestling.jobs.undo import Undo, withdrawn

LONGEST = 512  # tokens, where nobody says how many


def pretrain(
    model: SentenceTransformer,
    texts: str | os.PathLike[str] | Iterable[Any],
    sizes: Any = None,
    config: PretrainConfig | None = None,
) -> Trained:
    """Pre-train a sentence encoder as a masked autoencoder at every size, and save it.

    The losses are those of `nestling.embed.pretraining.autoencoder.MaskedAutoencoder`. The result is a start for
    `nestling.embed.training.train`, not yet an encoder whose vectors can be compared. The checkpoint's masked-language
    head is used if it has one, else a new one; neither it nor the decoder is part of the result.

    Under ``torchrun`` every process calls this, and all read the same text; the loss is the one of the global batch.

    Args:
        model: of a family in `nestling.embed.pretraining.families.FAMILIES`, with a pooling and nothing trained behind
            it. Trained in place, on its own device or the accelerator that there is.
        texts: a file or data set as `nestling.data.texts.read_texts` names them, `Texts` of several, or strings (or
            rows with a field ``text``) in anything that can be read again: it is read in its own order, pass after
            pass, never as a whole. Texts longer than a window are cut into windows, each of which is an example.
        sizes: the ladder, in any form that `Ladder.parse` takes; `Ladder.default` of the model if None.
        config: see `PretrainConfig`; it has to name an ``output_dir``.

    Returns:
        `Trained`; ``info`` has the settings, ``tokens`` (of all windows read), ``seconds`` (of all runs), ``head``
        (``"own"`` or ``"new"``), ``bad_lines``, ``texts_left_out`` (by the reason), ``left_out`` (windows with nothing
        to mask), and ``curve``: ``mlm_6x128`` and ``dec_6x128`` by step, means over masked tokens in nats.

    Raises:
        DataError: there are no texts, or one is not as expected; file and line are named.
        MaskingError: the tokenizer cannot mask words, there is nothing to mask, or the ratios cannot be.
        LadderError, UnsupportedEncoderError: the sizes do not fit the model, or it cannot be pre-trained.
        OptionError: an option is out of range or unknown, or two do not go together. Like all of the above it is
            raised before anything is written.
        TrainingError: the loss or a gradient is not finite (step and part are named), a checkpoint cannot be written,
            or the folders are another training's. The last whole checkpoint is kept.
    """
    if find_spec("accelerate") is None:
        raise MissingExtraError("training needs accelerate: pip install 'nestling[train,embed]'")
    config = PretrainConfig.of(config)
    callbacks, out = made(config.callbacks), config.output_dir
    if out is None:
        raise OptionError("output_dir=None: expected the folder of the result, PretrainConfig(output_dir=...)")
    if stops_early(callbacks):
        raise OptionError("EarlyStoppingCallback: a pre-training measures nothing that it could be stopped by")
    check_places(model, out, "pretraining", config.resume)
    check(model)
    declare_mask(model.tokenizer)
    ladder = ladder_of(Encoder.of(model), sizes)
    work = out.with_name(f"{out.name}-checkpoints")
    options = _arguments(work, config, Encoder.of(model))
    source = Texts([texts], config.skip_bad) if isinstance(texts, str | os.PathLike) else texts
    corpus = Corpus(source, model.tokenizer, _length(model, config), config.batch_size, config.seed)
    sampled = config.sizes_per_step if 0 < config.sizes_per_step < len(ladder) else None
    collator = Collator(_masking(model, config), model.tokenizer.pad_token_id or 0, len(ladder), sampled)
    smae = MaskedAutoencoder(model, ladder, config.decoder, config.seed)
    # What needs no disk is tried first, on a few windows.
    first = next(corpus.batches())
    _dry_run(smae, collator(first, config.batch_size)[:4])
    settings = {
        "head": "new" if smae.head.new else "own", **config.identity(), "length": corpus.length,
        "arguments": relevant(config.arguments or {}),
    }  # fmt: skip
    data = checksum([window.ids.tolist() for window in first.windows])
    watch = ProgressCallback(ladder, config.steps, config.progress)

    def batches(place: Place) -> MaskedBatches:
        parts = (options.process_index, options.world_size, options.gradient_accumulation_steps)
        return MaskedBatches(corpus, collator, config.steps, Position(**place.after), *parts)

    with rehearsed(options) as tried:
        trainer = MaskedTrainer(smae, tried, train_dataset=batches(Place()), callbacks=[Place()])
        trainer.create_optimizer_and_scheduler(config.steps)
    with withdrawn(work, unless=lambda: watch.started):
        identity = {"model": checksum(model), "cups": str(ladder), **settings, "data": data}
        checkpoint = begin(work, identity, config.resume, Place.of)
        restore(callbacks, checkpoint)
        place, undo = Place.of(checkpoint), Undo(smae)
        try:
            trainer = MaskedTrainer(smae, options, train_dataset=batches(place), callbacks=[watch, place, *callbacks])
            remove_printer(trainer)
            with modes_kept(model), without_bars(), without_dropout(smae, off=not config.dropout):
                seconds = run(trainer, work, checkpoint)
            info = settings | {
                "tokens": place.tokens, "passes": place.after["turn"], "left_out": corpus.left_out,
                "bad_lines": getattr(source, "bad", 0), "texts_left_out": dict(getattr(source, "left_out", {})),
                "seconds": round(seconds), "curve": watch.points, **stopped(trainer, config.steps),
            }  # fmt: skip
            trained = Trained(out, ladder, {}, info)
            if trainer.is_world_process_zero():
                save(model, trained, "pretraining", pretrained_card(model, ladder, info), config.resume)
        except BaseException:
            if not watch.ended or last_whole(work):  # else the weights would be lost if they cannot be saved
                undo.put_back()
            raise
        finally:
            watch.bar.stop()
    trainer.accelerator.wait_for_everyone()
    return trained


class Place(TrainerCallback, ExportableState):
    """Where the next batch starts, and how many tokens have been read; in each checkpoint's trainer_state.json."""

    def __init__(self, after: dict[str, int] | None = None, tokens: int = 0):
        self.after, self.tokens = after or Position().to_json(), tokens

    @classmethod
    def of(cls, checkpoint: Path | None) -> Place:
        """The place that a checkpoint was written at; the start if there is none.

        Raises:
            TrainingError: the checkpoint does not say.
        """
        if checkpoint is None:
            return cls()
        state, found = checkpoint / "trainer_state.json", attributes(checkpoint, cls)
        if not found:
            raise TrainingError(f"{state} does not say how far the corpus was read: start again")
        place = Fields(state, found, TrainingError)
        after = place.object("after")
        return cls({name: after.whole(name) for name in Position().to_json()}, place.whole("tokens"))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"after": self.after, "tokens": self.tokens}}


class MaskedTrainer(Trainer):
    """The stock trainer; batches are taken as they come, and parts of the loss are checked and logged."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts: dict[str, list[Tensor]] = {}
        self.place = next(found for found in self.callback_handler.callbacks if isinstance(found, Place))

    def get_train_dataloader(self) -> DataLoader:
        # A generator of its own: a loader that starts takes a random number, which a resumed training must not lose.
        workers, own = min(1, self.args.dataloader_num_workers), torch.Generator()
        return DataLoader(self.train_dataset, batch_size=None, num_workers=workers, generator=own)  # type: ignore[arg-type]

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.place.after, tokens = inputs.pop("after"), inputs.pop("tokens")
        self.place.tokens += tokens
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = model(inputs)
        loss = parts.pop("loss")
        check_finite(parts)
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value.detach())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.parts:
            means = torch.stack([torch.stack(values).mean() for values in self.parts.values()])
            means = self.accelerator.reduce(means, "mean")
            logs = logs | dict(zip(self.parts, means.tolist(), strict=True))
            self.parts = {}
        super().log(logs, start_time)


def _length(model: SentenceTransformer, config: PretrainConfig) -> int:
    """Tokens of a window."""
    parts: Any = Encoder.of(model)
    limits = (model.max_seq_length, parts.anatomy.positions, parts.backbone.config.max_position_embeddings)
    longest = min(limit for limit in limits if limit is not None)
    if config.length is not None and config.length > longest:
        raise OptionError(f"length={config.length} is more than the {longest} tokens that the model reads")
    return config.length or min(longest, LONGEST)


def _masking(model: SentenceTransformer, config: PretrainConfig) -> Masking:
    backbone: Any = Encoder.of(model).backbone
    special = set(model.tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(backbone.config.vocab_size) if i not in special])
    return Masking(model.tokenizer.mask_token_id, ordinary, config.encoder_ratio, config.decoder_ratio)


def _dry_run(smae: MaskedAutoencoder, rows: list[dict[str, Tensor]]) -> None:
    """Compute the loss of a few windows, so that broken weights are found before anything is written."""
    device = smae.encoder.device
    try:
        for row in rows:
            with in_eval_mode(smae), torch.no_grad():
                parts = smae({name: tensor.to(device) for name, tensor in row.items()})
            check_finite(parts)
    except TrainingError as error:
        raise TrainingError(f"before the first step {error}: the weights are broken") from error


def _arguments(work: Path, config: PretrainConfig, encoder: Encoder) -> SentenceTransformerTrainingArguments:
    """The trainer's arguments: those of fine-tunings, but for the paper's schedule and decay."""
    changes = dict(config.arguments or {})
    if wrong := [name for name in changes if name.startswith(("gradient_checkpointing", "activation_checkpointing"))]:
        raise OptionError(f"{wrong[0]} is no option of a pre-training: turn it on in the model's backbone beforehand")
    check_changes(changes)
    defaults = {
        "lr_scheduler_type": "cosine",
        "weight_decay": 1e-3,
        "ignore_data_skip": True,  # the corpus starts where it was left
        "remove_unused_columns": False,
        "bf16": config.bf16,
        "ddp_find_unused_parameters": trains_unread(encoder),
        "save_steps": config.save_steps,
    }
    changes = scheduled(defaults | changes, config.steps, None, measured=False)
    return training_arguments(
        work, config.steps, config.batch_size, config.learning_rate, config.warmup, config.seed, {}, changes
    )
