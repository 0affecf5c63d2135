"""`panda train`: composes model, data, objective and engine, and runs the loop. Killed, the same command goes on."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pandallm import config, files, log, prompt, ranks
from pandallm import tokenizer as tokenizers
from pandallm.config import UserError, parse_json, read_text
from pandallm.data.loader import Loader
from pandallm.data.shards import Shards
from pandallm.model import attention, checkpoint, load
from pandallm.train import faults, heldout, loop, selftest, trackers
from pandallm.train.between import BY_SIGNAL, Between
from pandallm.train.engine import DTYPES, ENGINES, Engine, start
from pandallm.train.heldout import Measure
from pandallm.train.objectives import OBJECTIVES
from pandallm.train.progress import Progress, batch_flops, loss_curve, peak_flops
from pandallm.train.settings import FREE_TO_CHANGE, TrainConfig


def run(path: str, overrides: list[str]) -> dict[str, Any]:
    """Trains as a config says; returns the run's record (run.json). SystemExit after a signal, once all is saved."""
    ranks.environment()
    conf = config.load(TrainConfig, path, overrides)
    out, shards = Path(conf.out), Shards(conf.data)
    base = load.resolve(conf.model) if conf.model else None
    settings = _settings(conf, shards)
    record = _record(out, settings)
    if record and record.get("finished"):
        log.say(f"{out}: trained already: {record['steps']} steps, loss {record['loss']:.4f}")
        return record
    if log.rank() == 0:
        files.check_writable(out)
    device = ranks.device()
    ranks.check_precision(conf.precision, device)
    start(conf.engine, device)
    resumed = checkpoint.newest(out)
    model, tokenizer = _model(conf, shards, base, resumed)
    with faults.out_of_memory(model, conf, shards.seq_len):
        engine = ENGINES[conf.engine](OBJECTIVES[conf.objective](model), conf, device)
        selftest.check(engine.module, shards, engine.device)
        first_step = 1
        if resumed:
            trained = files.read_json(resumed / checkpoint.COMPLETE)
            engine.restore(checkpoint.Pieces(resumed), trained["state"])
            first_step = int(trained["step"]) + 1
            log.say(f"{out}: goes on from step {first_step - 1}")
        record = _train(conf, settings, shards, engine, tokenizer, first_step)
    engine.barrier()
    engine.close()
    if record["stopped"] == BY_SIGNAL:
        sys.exit(143)
    return record


def _train(
    conf: TrainConfig,
    settings: dict[str, Any],
    shards: Shards,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    first_step: int,
) -> dict[str, Any]:
    """The run itself, from `first_step` on; returns its record, which is on disk as run.json."""
    out = Path(conf.out)
    loader = Loader(shards, conf.seed, conf.global_batch_size, conf.micro_batch_size, log.rank(), engine.world)
    plan = loop.plan(conf, loader)
    record = {
        "finished": False,
        "stopped": None,
        "settings": settings,
        "command": sys.argv[1:],
        "versions": log.versions(),
        "commit": log.commit(),
        "data_rows": len(shards),
        "steps": plan.total_steps,
        "ranks": engine.world,
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "attention": attention.backend(engine.device),
        "peak_flops": peak_flops(engine.device) * engine.world,
    }
    measure = Measure(conf.heldout, engine, tokenizer, shards.seq_len) if conf.heldout else None
    kept = []
    if log.rank() == 0:
        kept = trackers.start(list(conf.trackers), conf.project, out.name, settings, out / "trackers")
        files.write_json(out / "run.json", record)
    progress = Progress(out, first_step, record, kept)
    between = Between(out, conf, engine, tokenizer, progress, measure, plan.total_steps)
    try:
        if measure and first_step == 1 and not progress.heldout:
            between.measured(0)
        flops = partial(batch_flops, engine.module.model)
        # Killed after the measurement that ended it, the run has ended all the same.
        if measure and progress.heldout:
            record["stopped"] = heldout.why_stop(measure.conf, progress.heldout)
        if not record["stopped"]:
            record["stopped"] = loop.train(engine, loader, conf, plan, first_step, flops, progress, between)
        between.finish()
        if record["stopped"] != BY_SIGNAL:
            _finish(out, between, record, progress)
    except loop.NonFinite as e:
        faults.keep_for_replay(out, e, shards, engine, between)
        record["stopped"] = str(e)
        raise UserError(f"{e}; {out / faults.REPORT} says more, and the same command replays the step") from None
    except BaseException as e:
        record["stopped"] = f"{type(e).__name__}: {e}"
        raise
    finally:
        between.stop.close()
        if log.rank() == 0 and not record["finished"]:
            with suppress(OSError):  # a full disk: the page says it too
                files.write_json(out / "run.json", record)
        progress.page()
        progress.close(failed=not record["finished"])
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
    record = parse_json(read_text(out / "run.json"), out / "run.json")
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise UserError(f"{out / 'run.json'}: is no run's record; choose another out or remove the folder")
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
        for parameter in model.parameters():  # not the buffers: positions' frequencies stay fp32, as in a loaded model
            parameter.data = parameter.data.to(dtype)
    window = int(model.config.max_position_embeddings)
    if shards.seq_len > window:
        raise UserError(
            f"data: {conf.data} has rows of {shards.seq_len} tokens and the model reads {window}; prepare shorter"
        )
    if added := load.fit_vocabulary(model, tokenizer):
        log.say(f"vocabulary grown by {added} to {len(tokenizer)}")
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # Nothing is padded here. Where pad is a token that texts hold too (often eos), its embedding is trained like any.
    cast(torch.nn.Embedding, model.get_input_embeddings()).padding_idx = None
    _prepare(model, conf)
    return model.train(), tokenizer


def _prepare(model: PreTrainedModel, conf: TrainConfig) -> None:
    """What the config changes of how the model computes. UserError where it can't be done."""
    for beginning in conf.freeze:
        found = [p for name, p in model.named_parameters() if name.startswith(beginning)]
        if not found:
            names = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise UserError(f"freeze: no weight's name begins with '{beginning}'; they are called {names}, …")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("freeze: leaves nothing to train")
    if conf.liger:
        load.use_liger(model)
    if every := conf.recompute_every:
        model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
        if conf.freeze:
            model.enable_input_require_grads()  # blocks behind a frozen one need a gradient's way through
    if conf.compile:
        for layer in model.model.layers:
            layer.compile()


def _finish(out: Path, between: Between, record: dict[str, Any], progress: Progress) -> None:
    if not between.publish_model():
        raise UserError(f"out: {out / 'model'} could not be written; make room, and run the same command again")
    if log.rank():
        return
    metrics = progress.lines
    loss_curve(metrics, out / "loss.png", out.name)
    seconds = round(sum(line["seconds"] for line in metrics), 1)
    record |= {"finished": True, "steps": metrics[-1]["step"], "loss": metrics[-1]["loss"], "seconds": seconds}
    files.write_json(out / "run.json", record)
    why = f"; stopped: {record['stopped']}" if record["stopped"] else ""
    log.say(f"{out / 'model'}: {record['steps']} steps, loss {record['loss']:.4f}{why}")
