"""How XTuner trains, to ours: optimizer, pace, hooks, and what surrounds a run."""

from __future__ import annotations

from services.finetune.recipes.python_text import Symbol
from services.finetune.recipes.tables import filled, steps, systems
from services.finetune.recipes.xtuner_model import read_dtype, read_template
from services.finetune.recipes.xtuner_parts import Part, Reading
from services.finetune.recipes.xtuner_vision import read_shown


def read_optimizer(optim: Part) -> int:
    kind = optim.one_of("AmpOptimWrapper", "OptimWrapper")
    inner = optim.part("optimizer")
    if inner is not None:
        _optimizer(inner)
    clip = optim.part("clip_grad")
    optim.set("optim.clip_norm", clip.number("max_norm", 0) if clip is not None else 0)
    if clip is not None:
        clip.only("norm_type", 2)
        clip.idle("error_if_nonfinite")  # a loss that is no number always ends a run here
        clip.close()
    accumulate = optim.whole("accumulative_counts", 1)
    optim.set("schedule.accumulate", accumulate)
    optim.idle("loss_scale")
    if kind == "AmpOptimWrapper" and read_dtype(optim, "dtype") == "float16":
        text = "float16 with loss scaling becomes model.dtype auto: bfloat16 where the processor has it, else float32"
        optim.note("dtype", text)
        optim.set("model.dtype", "auto")  # whatever the weights were loaded in
    optim.close()
    return max(1, accumulate)


_OPTIMIZERS = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "Lion32bit": "lion",
    "Lion8bit": "lion_8bit",
    "PagedLion8bit": "paged_lion_8bit",
    "SGD": "sgd",
}
"""Of torch and bitsandbytes."""


def _optimizer(part: Part) -> None:
    name = _OPTIMIZERS.get(part.one_of(*_OPTIMIZERS), "adamw")
    part.set("optim.name", name)
    part.set("optim.lr", part.number("lr", 1e-4 if "lion" in name else 1e-3))
    part.set("optim.weight_decay", part.number("weight_decay", 0.01 if "adamw" in name else 0))
    if name == "sgd":
        part.set("optim.momentum", part.number("momentum", 0))
    else:
        _betas(part, (0.9, 0.99) if "lion" in name else (0.9, 0.999))
    if "adamw" in name:
        part.set("optim.eps", part.number("eps", 1e-8))
    part.close()


def _betas(part: Part, default: tuple[float, float]) -> None:
    betas = part.take("betas", default)
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(isinstance(b, float) for b in betas):
        part.blame("betas", "must be two numbers below 1")
        return
    part.set("optim.beta1", betas[0])
    part.set("optim.beta2", betas[1])


def read_pace(top: Part) -> None:
    """Length and learning rate: epochs, warm-up, and how it falls."""
    train = top.part("train_cfg")
    epochs = 0
    if train is not None:
        if train.kind() not in ("TrainLoop", "EpochBasedTrainLoop", ""):
            train.blame("type", "can only be TrainLoop")
        train.only("by_epoch", True)
        epochs = train.whole("max_epochs", 0)
        train.idle("val_interval", "val_begin")
        train.close()
    if epochs < 1:
        top.blame("train_cfg", "must say max_epochs, 1 or more")
        return
    top.set("schedule.epochs", epochs)
    top.set("schedule.warmup_ratio", 0.0)
    falls = ""
    for rule in top.parts("param_scheduler"):
        kind = rule.one_of("LinearLR", *_FALLS)
        rule.only("by_epoch", True)
        rule.only("convert_to_iter_based", True)
        rule.idle("begin", "end", "T_max", "total_iters", "start_factor")
        if kind == "LinearLR":
            rule.set("schedule.warmup_ratio", round(rule.number("end", 0) / epochs, 12))
            rule.only("begin", 0)
        elif rule.take("T_max", epochs) != epochs or rule.take("end", epochs) != epochs:
            rule.blame("T_max", "the rate must fall over all epochs")
        else:
            falls = _fall(rule, kind)
        rule.close()
    if not falls:
        top.blame("param_scheduler", f"must be {', '.join(_FALLS)}, after LinearLR or alone")


_FALLS = {"CosineAnnealingLR": "cosine", "PolyLR": "polynomial", "ConstantLR": "constant_with_warmup"}


def _fall(rule: Part, kind: str) -> str:
    name = _FALLS.get(kind, "")
    rule.set("schedule.kind", name)
    if name == "constant_with_warmup":
        rule.only("factor", 1, 1.0)
        return name
    rate = float(rule.reading.changes.get("optim.lr", 0)) or 1.0
    rule.set("schedule.min_lr_ratio", rule.number("eta_min", 0.0) / rate)
    if name == "polynomial":
        rule.set("schedule.power", rule.number("power", 1.0))
    return name


def read_hooks(top: Part, accumulate: int) -> None:
    for hook in top.parts("custom_hooks"):
        kind = hook.one_of("DatasetInfoHook", "EvaluateChatHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook")
        hook.idle("tokenizer", "is_intern_repo_dataset")
        if kind == "EvaluateChatHook":
            _samples(hook, accumulate)
        hook.close()
    default = top.part("default_hooks")
    if default is None:
        return
    default.idle("timer", "param_scheduler", "sampler_seed")
    logger, saver = default.part("logger"), default.part("checkpoint")
    if logger is not None:
        logger.idle("type", "log_metric_by_epoch", "by_epoch", "ignore_last")
        logger.set("report.log_every", steps(logger.whole("interval", 10), accumulate))
        logger.close()
    if saver is not None:
        _saving(saver, accumulate)
    default.close()


def _samples(hook: Part, accumulate: int) -> None:
    prompts = hook.take("evaluation_inputs", [])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(prompts, list | tuple) or not all(isinstance(p, str) for p in prompts):
        hook.blame("evaluation_inputs", "must be a list of texts")
        return
    hook.set("report.prompts", list(prompts))
    every = hook.take("every_n_iters")
    hook.set("report.sample_every", steps(hook.whole("every_n_iters", 0), accumulate) if every else 0)
    hook.set("report.system", _system(hook))
    if hook.take("max_new_tokens") is not None:
        hook.set("report.sample_tokens", hook.whole("max_new_tokens", 64))
    read_shown(hook)
    for key in ("stop_word", "stop_words", "generation_kwargs"):
        if hook.take(key):
            hook.note(key, "an answer ends where the template ends it; it is drawn greedily")
    template = read_template(hook, "prompt_template")
    # MOSS rows bring no template of their own: the hook's is theirs.
    if template and _named_template(hook.reading) not in ("", template):
        hook.blame("prompt_template", "must be the train_dataset's template")


def _named_template(reading: Reading) -> str:
    """The template that the dataset named."""
    found: str = reading.changes.get("data.template", "")
    return "" if found == "none" else found


def _system(part: Part) -> str:
    value = part.take("system", "")
    if isinstance(value, Symbol) and ".SYSTEM_TEMPLATE." in f".{value.path}":
        texts = systems()
        if value.name not in texts:
            part.blame("system", f"unknown system template {value.name}")
        return filled(texts.get(value.name, ""), part.reading.bot)
    return filled(part.text("system"), part.reading.bot)


def _saving(saver: Part, accumulate: int) -> None:
    saver.idle("type", "save_optimizer", "save_last")
    every = saver.whole("interval", 1)
    if saver.flag("by_epoch", True):
        saver.set("report.checkpoint_epochs", max(0, every))
    elif every > 0:
        saver.set("report.checkpoint_every", steps(every, accumulate))
    if (most := saver.whole("max_keep_ckpts", -1)) > 0:
        saver.set("report.keep_last", most)
    saver.close()


def read_runtime(top: Part) -> None:
    top.idle("env_cfg", "log_level", "log_processor", "default_scope", "launcher", "visualizer", "test_dataloader")
    if top.take("visualizer") is not None:
        top.note("visualizer", "numbers come as events: quartet job watch")
    if top.take("load_from") is not None:
        top.blame("load_from", "cannot be read; go on from a checkpoint with --resume")
    if top.take("resume"):
        top.blame("resume", "is given by --resume CHECKPOINT")
    dice = top.part("randomness")
    if dice is not None:
        dice.idle("diff_rank_seed")
        if dice.flag("deterministic", False):
            dice.set("schedule.deterministic", True)
        if dice.take("seed") is not None:
            dice.set("schedule.seed", dice.whole("seed", 0))
        dice.close()
    for key in ("val_evaluator", "test_evaluator"):
        measure = top.part(key)
        if measure is not None:
            measure.one_of("MMLUMetric")
            measure.set("report.measures", ["mmlu"])
            top.idle("val_cfg", "val_dataloader", "test_cfg", "test_dataloader")
