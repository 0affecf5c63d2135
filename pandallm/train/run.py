"""`panda train`: composes model, data, objective and engine, and runs the loop. Killed, the same command goes on."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import config, files, log, prompt
from pandallm import tokenizer as tokenizers
from pandallm.config import UserError
from pandallm.data.loader import Loader
from pandallm.data.shards import Shards
from pandallm.model import attention, checkpoint, load
from pandallm.train import loop
from pandallm.train.engine import DTYPES, ENGINES, Engine, start
from pandallm.train.objectives import OBJECTIVES
from pandallm.train.progress import Progress, batch_flops, loss_curve, peak_flops
from pandallm.train.settings import FREE_TO_CHANGE, TrainConfig


def run(path: str, overrides: list[str]) -> dict[str, Any]:
    """Trains as a config says; returns the run's record (run.json)."""
    conf = config.load(TrainConfig, path, overrides)
    out, shards = Path(conf.out), Shards(conf.data)
    base = load.resolve(conf.model) if conf.model else None
    settings = _settings(conf, shards)
    record = _record(out, settings)
    if record and record.get("finished"):
        log.say(f"{out}: trained already: {record['steps']} steps, loss {record['loss']:.4f}")
        return record
    device = start(conf.engine)
    resumed = checkpoint.newest(out)
    model, tokenizer = _model(conf, shards, base, resumed)
    objective = OBJECTIVES[conf.objective](model)
    engine = ENGINES[conf.engine](objective, conf, device)
    loader = Loader(
        shards, conf.seed, conf.global_batch_size, conf.micro_batch_size, rank=log.rank(), world=engine.world
    )
    plan = loop.plan(conf, loader)
    first_step = 1
    if resumed:
        engine.load(resumed)
        first_step = int(files.read_json(resumed / checkpoint.COMPLETE)["step"]) + 1
        log.say(f"{out}: goes on from step {first_step - 1}")
    peak = peak_flops(device) * engine.world
    record = {
        "finished": False,
        "settings": settings,
        "command": sys.argv[1:],
        "versions": log.versions(),
        "commit": log.commit(),
        "data_rows": len(shards),
        "steps": plan.total_steps,
        "ranks": engine.world,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "peak_flops": peak,
    }
    if log.rank() == 0:
        files.write_json(out / "run.json", record)
    progress = Progress(out, first_step, plan.total_steps, peak)
    save = partial(_save, out, conf, engine, model, tokenizer, progress)
    try:
        loop.train(engine, loader, conf, plan, first_step, partial(batch_flops, model), progress, save)
    finally:
        progress.close()
    if log.rank() == 0:
        _finish(out, model, tokenizer, record)
    engine.barrier()
    engine.close()
    return record


def _settings(conf: TrainConfig, shards: Shards) -> dict[str, Any]:
    """What decides the result: the config and the data's content."""
    return {**conf.model_dump(mode="json"), "data_hash": shards.hash}


def _record(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of the run that `out` holds, if any. UserError if that run had other settings."""
    if not (out / "run.json").exists():
        if out.is_file() or (out.is_dir() and any(p.suffix != files.TEMPORARY for p in out.iterdir())):
            raise UserError(f"out: {out} holds something that isn't a run; choose another folder")
        return None
    record: dict[str, Any] = files.read_json(out / "run.json")
    for key in sorted(settings.keys() | record["settings"].keys()):
        before, now = record["settings"].get(key), settings.get(key)
        if before != now and key not in FREE_TO_CHANGE:
            raise UserError(
                f"out: {out} holds a run with {key} {before!r}, not {now!r}; choose another out or remove it"
            )
    return record


def _model(
    conf: TrainConfig, shards: Shards, base: Path | None, resumed: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train (from the base, from scratch, or the checkpoint's), and its tokenizer with the chat format."""
    attention.register()
    dtype = DTYPES[conf.precision]
    if resumed:
        tokenizer = tokenizers.load(resumed / "model")
        model = load.load(resumed / "model", dtype, attention.PACKED)
    elif base:
        tokenizer = tokenizers.load(base)
        model = load.load(base, dtype, attention.PACKED)
    else:
        assert conf.init
        tokenizer = tokenizers.load(load.resolve(conf.init.tokenizer))
    if conf.pad_token:
        tokenizers.add_pad(tokenizer, conf.pad_token)
    prompt.set_format(tokenizer, shards.manifest["chat_format"])
    if tokenizers.fingerprint(tokenizer) != shards.manifest["tokenizer_hash"]:
        raise UserError(
            f"data: {conf.data} was prepared with another tokenizer ({shards.manifest['config']['tokenizer']}) than"
            f" {conf.model or (conf.init and conf.init.tokenizer)} has; prepare it with this one"
        )
    if not resumed and conf.init:
        model = load.from_scratch(conf.init.config, len(tokenizer), conf.seed, attention.PACKED)
        torch.nn.Module.to(model, dtype)
    window = int(model.config.max_position_embeddings)
    if shards.seq_len > window:
        raise UserError(
            f"data: {conf.data} has rows of {shards.seq_len} tokens and the model reads {window}; prepare shorter"
        )
    if added := load.fit_vocabulary(model, tokenizer):
        log.say(f"vocabulary grown by {added} to {len(tokenizer)}")
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    _checkpoint_activations(model, conf.activation_checkpointing)
    return model.train(), tokenizer


def _checkpoint_activations(model: PreTrainedModel, how: str) -> None:
    """Recomputes blocks in the backward pass: all of them, every n-th, or none."""
    if how == "none":
        return
    every = 1 if how == "full" else int(how.removeprefix("every-"))
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)


def _save(
    out: Path,
    conf: TrainConfig,
    engine: Engine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    step: int,
) -> None:
    """A checkpoint: the model in the HF layout, the engine's own state beside it."""
    chief = log.rank() == 0

    def write(folder: Path) -> None:
        engine.save(folder)
        if chief:
            checkpoint.save_model(model, tokenizer, folder / "model")

    progress.sync()
    checkpoint.save(out, step, {"ranks": engine.world}, write, chief, engine.barrier)
    if chief:
        checkpoint.prune(out, conf.keep_last)


def _finish(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    metrics = log.read_metrics(out / "metrics.jsonl")
    loss_curve(metrics, out / "loss.png", out.name)
    with files.atomic_dir(out / "model") as tmp:
        checkpoint.save_model(model, tokenizer, tmp)
    record |= {"finished": True, "loss": metrics[-1]["loss"], "seconds": round(sum(m["seconds"] for m in metrics), 1)}
    files.write_json(out / "run.json", record)
    log.say(f"{out / 'model'}: {record['steps']} steps, loss {record['loss']:.4f}")
