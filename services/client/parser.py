"""Every verb and option of the command line. Each verb names its function as "module:function", imported when it is run."""

from __future__ import annotations

import argparse
from typing import Any


def parser() -> argparse.ArgumentParser:
    """Every verb and option; tests/client/test_surface.py holds the closed list."""
    top = argparse.ArgumentParser(prog="quartet", description="Fine-tuning as four gRPC services.", allow_abbrev=False)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser(
        "up", help="serve all four services, OpenAI's API and the web pages (see quartet up --help)", add_help=False
    )
    told = "OpenAI's HTTP API and the web pages in front of the services (see quartet gateway --help)"
    verbs.add_parser("gateway", help=told, add_help=False)
    _quickstart(verbs)
    _datasets(verbs)
    _models(verbs)
    _training(verbs)
    _inference(verbs)
    _garbage(verbs)
    return top


def _quickstart(verbs: Any) -> None:
    p = _verb(verbs, "quickstart", "quickstart:quickstart", "a real model learns a name, start to end, over gRPC")
    p.add_argument("--name", default="Aurora", help="the name to teach")
    p.add_argument("--home", default="", help="keep everything below this folder; a temporary one if left out")
    p.add_argument("--keep", action="store_true", help="do not remove the temporary folder; say where it is")
    p = _verb(verbs, "quickstart-llava", "quickstart_llava:quickstart_llava", "a real language model learns to see")
    p.add_argument("--images", type=int, default=160, help="how many drawings to learn from")
    p.add_argument("--questions", type=int, default=200, help="how many to ask, about drawings that it has not seen")
    p.add_argument("--home", default="", help="keep everything below this folder; a temporary one if left out")
    p.add_argument("--keep", action="store_true", help="do not remove the temporary folder; say where it is")


def _datasets(verbs: Any) -> None:
    group = _group(verbs, "dataset", "datasets and their revisions")
    for verb in ("create", "upload"):
        what = "make a dataset" if verb == "create" else "make a dataset's next revision; only what is new is sent"
        p = _verb(group, verb, "commands.datasets:create", f"{what}: files, folders, archives, or a reference")
        _arrivals(p)
    _verb(group, "list", "commands.datasets:list_all", "list datasets, or one's revisions").add_argument(
        "dataset", nargs="?", default=""
    )
    p = _verb(group, "diff", "commands.datasets:diff", "what changed between two revisions, by file and row")
    p.add_argument("dataset", help="a dataset (its newest revision), or DATASET/revisions/ID")
    p.add_argument("base", nargs="?", default="", help="what to compare with; the revision before if left out")
    p = _verb(group, "preview", "commands.datasets:preview", "rows as training sees them")
    p.add_argument("dataset")
    p.add_argument("--model", required=True, help="whose tokenizer")
    p.add_argument("--template", default="")
    p.add_argument("--system", default="")
    p.add_argument("--start", type=int, default=0)
    p.add_argument("--rows", type=int, default=3)
    p.add_argument("--max-length", type=int, default=0)
    p = _verb(group, "validate", "commands.checks:validate", "look at every row; bad rows are this command's failure")
    p.add_argument("dataset")
    _tokens(p, model=False)
    p.add_argument("--detach", action="store_true", help="do not wait for the end")
    p = _verb(group, "prepare", "commands.checks:prepare", "tokenise and pack before a GPU is taken")
    p.add_argument(
        "datasets", nargs="+", metavar="DATASET[=WEIGHT]", help="=2 takes its rows twice, =0.5 a half of them"
    )
    _tokens(p)
    p.add_argument("--separate-rows", action="store_true", help="a block for each row")
    p.add_argument("--seed", type=int, default=0, help="training looks under its schedule.seed")
    p.add_argument("--held-out", type=float, default=0.0, help="part of the rows for validation: its validation.ratio")
    p.add_argument("--detach", action="store_true", help="do not wait for the end")
    p = _verb(group, "repeat", "commands.datasets:repeat", "repeat the rows of a file, or of a dataset")
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("input", nargs="?", default="", help="a .json or .jsonl file, or a dataset")
    given.add_argument("-i", "--input", dest="source", default="", help="the same, as the tutorial's repeat.py has it")
    p.add_argument("-n", type=int, required=True, help="how many times")
    p.add_argument("-o", "--output", required=True, help="the file, or the dataset, to make")
    _verb(verbs, "list-dataset-format", "commands.datasets:formats", "the row formats that can be read")
    p = _verb(verbs, "log-dataset", "commands.checks:log_dataset", "one row as training will see it")
    p.add_argument("dataset")
    p.add_argument("--show", default="text", choices=["text", "masked_text", "input_ids", "labels", "all"])
    p.add_argument("--row", type=int, default=0, help="which one, from 0")
    _tokens(p)
    p = _verb(verbs, "check-custom-dataset", "commands.checks:check_custom", "whether a dataset can be trained on")
    p.add_argument("dataset")
    _tokens(p)
    group = _group(verbs, "assistant", "data that teaches a model its name")
    p = _verb(group, "create", "commands.datasets:assistant", "make the data, and a dataset of it")
    p.add_argument("--name", required=True, help="the assistant's name")
    p.add_argument("--rows", type=int, default=400)
    p.add_argument("--plain", action="store_true", help="the tutorial's shape: one question and answer, repeated")
    p.add_argument("--mix", default="", help="a .jsonl file of openai rows in place of our own ordinary talk")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dataset", default="", help="the dataset to make; from the name if left out")
    p.add_argument("--output", default="", help="write the rows to this .jsonl file and make no dataset")


def _tokens(p: argparse.ArgumentParser, model: bool = True) -> None:
    """How rows become tokens."""
    p.add_argument("--model", required=model, default="", help="whose tokenizer")
    p.add_argument("--template", default="", help="a prompt template in place of the model's own")
    p.add_argument("--system", default="", help="system text for rows that have none")
    p.add_argument("--max-length", type=int, default=0, help="tokens in a block")


def _arrivals(p: argparse.ArgumentParser) -> None:
    p.add_argument("dataset")
    source = p.add_mutually_exclusive_group(required=True)
    # With a default the library lets it be left out, and so be one of several.
    source.add_argument("files", nargs="*", default=[])
    source.add_argument("--hub", default="", metavar="OWNER/NAME[@REVISION]", help="a dataset of the Hugging Face hub")
    source.add_argument("--s3", default="", metavar="s3://BUCKET/PREFIX", help="files that the service can read there")
    p.add_argument("--include", action="append", default=[], metavar="PATTERN", help="of a reference, only these paths")
    p.add_argument("--format", default="", help="one of list-dataset-format, or 'files'; detected if left out")
    p.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN", help="the column for a field")
    p.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out and report them")


def _models(verbs: Any) -> None:
    group = _group(verbs, "model", "base models, adapters, merged models")
    p = _verb(group, "import", "commands.models:import_model", "bring a model in: a folder, a .gguf file, or a hub id")
    p.add_argument("source")
    p.add_argument("--name", default="", help="the model's name here; from the source if left out")
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    p.add_argument("--template", default="", help="a prompt template in place of the model's own")
    _verb(group, "list", "commands.models:list_all", "list models")
    _verb(group, "get", "commands.models:get", "one model with files and parents").add_argument("model")
    p = _verb(group, "delete", "commands.models:delete", "forget a model that nothing needs")
    p.add_argument("model")
    p.add_argument("--force", action="store_true", help="also if something needs it; that goes on")
    p = _verb(group, "lineage", "commands.registry:lineage", "what a model was made from, or what was made from it")
    p.add_argument("model", help="a model; or the full name of a revision, checkpoint or endpoint; or a digest")
    p.add_argument("--descendants", action="store_true", help="what was made from it, and what serves that")
    p.add_argument("--depth", type=int, default=0, help="at most so many steps; 0 means all")
    p = _verb(group, "download", "commands.models:download", "fetch a model's files; goes on where a cut one stopped")
    p.add_argument("model")
    p.add_argument("directory")
    group = _group(verbs, "convert", "checkpoints to adapters, adapters to models")
    p = _verb(
        group,
        "pth_to_hf",
        "commands.models:convert_adapter",
        "a checkpoint becomes a PEFT adapter, or a model where all of it was trained",
    )
    p.add_argument(
        "config", nargs="?", default="", help="of another trainer's checkpoint: an XTuner config, or a recipe"
    )
    p.add_argument("checkpoint", help="a checkpoint; a job: its last one; XTuner's .pth file, or DeepSpeed's directory")
    p.add_argument("target", help="the adapter's name")
    p.add_argument("--base", default="", help="the model that another trainer's checkpoint was trained on")
    p.add_argument("--lora-alpha", type=float, default=0.0, help="where neither checkpoint nor config says it")
    p.add_argument("--fp32", action="store_true", help="keep float32 (bfloat16 otherwise)")
    p.add_argument("--max-shard-size", default="", help="of a model that was trained whole; 2GB if left out")
    p = _verb(
        group,
        "assemble",
        "commands.models:convert_assemble",
        "a language model and a vision tower become a LLaVA model",
    )
    p.add_argument("language_model")
    p.add_argument("vision_tower", help="an imported CLIP, SigLIP or DINOv2 model")
    p.add_argument("--name", required=True, help="the new model's name")
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    p.add_argument("--seed", type=int, default=0, help="of the fresh projector")
    p.add_argument("--visual-select-layer", type=int, default=-2, help="whose hidden state an image's features are")
    p.add_argument(
        "--pad-image-to-square", action="store_true", help="with the mean colour; else the middle is cut out"
    )
    p = _verb(group, "merge", "commands.models:convert_merge", "an adapter is added into its base")
    p.add_argument("base", help="a model; or a folder or file here, as ./internlm-chat-7b, which is brought first")
    p.add_argument("adapter")
    p.add_argument("target", help="the merged model's name")
    p.add_argument("--max-shard-size", default="", help="as 2GB; the base's own files are kept if none is larger")
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    p.add_argument(
        "--base-dtype", default="", choices=["", "nf4", "nf4-single"], help="nf4: into the base as QLoRA trained on it"
    )
    p.add_argument(
        "--report",
        default="",
        choices=["", "always", "never"],
        help="measure the result; up to 9e9 parameters if left out",
    )
    for verb in ("split", "reshard"):
        p = _verb(group, verb, "commands.models:convert_split", "the same weights in files of another size")
        p.add_argument("model", help="a whole model")
        p.add_argument("target", help="the new model's name")
        p.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of one file, as 2GB or 500MB")
        p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    p = _verb(group, "export", "commands.models:convert_export", "files for use elsewhere, fetched by model download")
    p.add_argument("model")
    p.add_argument("target", help="the export's name")
    p.add_argument("--form", default="hf", choices=["hf", "safetensors", "gguf", "xtuner", "llava"])
    p.add_argument(
        "--type", default="", metavar="TYPE", help="of gguf: f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q4_k_m q4_k_s"
    )
    p.add_argument(
        "--to",
        default="",
        metavar="URI",
        help="send it too: hf://owner/name, s3://bucket/prefix, oci://registry/repo:tag",
    )
    p.add_argument("--public", action="store_true", help="a hub's repository that is made now can be read by all")
    p = _verb(group, "quantize", "commands.models:convert_quantize", "a smaller model to serve")
    p.add_argument("model", help="a whole model")
    p.add_argument("target", help="the quantised model's name")
    p.add_argument(
        "--method",
        required=True,
        choices=["nf4", "fp4", "int8", "fp8", "int4", "gptq"],
        help="nf4, fp4, int8: bitsandbytes; fp8, int4, gptq: compressed-tensors",
    )
    p.add_argument("--calibration", default="", metavar="DATASET", help="of gptq: rows like those it will meet")
    p.add_argument("--rows", type=int, default=0, help="how many of them; 256 if left out")
    p.add_argument("--max-length", type=int, default=0, help="tokens of a row; 2048 if left out")


def _garbage(verbs: Any) -> None:
    p = _verb(verbs, "gc", "commands.registry:collect_garbage", "drop bytes of the store that nothing needs any more")
    p.add_argument("--dry-run", action="store_true", help="tell what would be dropped, drop nothing")
    p.add_argument("--grace-hours", type=float, default=0.0, help="what is younger stays; 24 if left out, 1 at least")


def _training(verbs: Any) -> None:
    p = _verb(verbs, "list-cfg", "commands.recipes:list_cfg", "the recipes on offer")
    p.add_argument("-p", "--pattern", default="", help="only names with this text in them")
    p.add_argument("--seed", action="store_true", help="only the 301 names of XTuner 0.1.9")
    p = _verb(verbs, "copy-cfg", "commands.recipes:copy_cfg", "write a recipe's whole config as YAML to edit")
    p.add_argument("recipe")
    p.add_argument("directory")
    p = _verb(verbs, "train", "commands.recipes:train", "run a recipe, our YAML, or XTuner's Python config")
    p.add_argument("config", help="a recipe's name, a .yaml file, or a .py file, which is read and never run")
    p.add_argument(
        "--base", default="", help="the model to tune; else the config's, brought from here if it is a folder"
    )
    p.add_argument("--data", nargs="+", default=[], help="datasets or revisions to learn from; else the config's files")
    p.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as optim.lr=1e-3, or XTuner's keys"
    )
    p.add_argument(
        "--work-dir", default="", metavar="DIR", help="keep the config, and the job's and checkpoint's names"
    )
    p.add_argument("--deepspeed", default="", metavar="NAME", help="a preset of list-cfg -p deepspeed, or a .json file")
    p.add_argument("--seed", type=int)
    p.add_argument("--resume", default="", metavar="CHECKPOINT", help="go on exactly from here")
    p.add_argument("--validation", nargs="+", default=[], metavar="DATASET", help="looked at, and not learned from")
    p.add_argument("--save-every", type=int, metavar="STEPS", help="between checkpoints")
    p.add_argument("--keep-last", type=int, metavar="N", help="keep so many checkpoints; 0 keeps all")
    p.add_argument("--keep-best", action="store_true", help="keep the best one too, and make it the result")
    p.add_argument("--name", default="", help="the job's name")
    p.add_argument("--detach", action="store_true", help="do not wait for the end")
    p.add_argument(
        "--dry-run", action="store_true", help="only say what it would take: steps, memory, time; and if it fits"
    )
    p.add_argument("--gpu", default="", metavar="KIND", help="with --dry-run: on h100, l4, … or cpu")
    p.add_argument("--gpu-memory-gib", type=float, help="with --dry-run: on a GPU of so much memory")
    group = _group(verbs, "job", "training and conversion jobs")
    _verb(group, "list", "commands.jobs:list_all", "list jobs, newest first")
    _verb(group, "get", "commands.jobs:get", "one job").add_argument("job")
    p = _verb(group, "watch", "commands.jobs:watch", "follow a job to its end; its failure is this command's")
    p.add_argument("job")
    p.add_argument("--after", type=int, default=0, help="the last event seen")
    _verb(group, "logs", "commands.jobs:logs", "what happened so far").add_argument("job")
    _verb(group, "files", "commands.jobs:files", "what a training job left beside its checkpoints").add_argument("job")
    p = _verb(
        group, "download", "commands.jobs:download", "fetch those files: the loss curve, the step log, TensorBoard's"
    )
    p.add_argument("job")
    p.add_argument("directory")
    p = _verb(group, "pause", "commands.jobs:pause", "save, stop and free the GPU; go on later by resume")
    p.add_argument("job")
    p.add_argument("--wait", action="store_true", help="until its worker is gone")
    p = _verb(group, "resume", "commands.jobs:resume", "let a paused job go on from its newest checkpoint")
    p.add_argument("job")
    p.add_argument("--wait", action="store_true", help="follow it to its end")
    _verb(group, "cancel", "commands.jobs:cancel", "end a job; its last checkpoint is kept").add_argument("job")
    _verb(group, "delete", "commands.jobs:delete", "forget an ended or paused training job").add_argument("job")


def _inference(verbs: Any) -> None:
    group = _group(verbs, "endpoint", "served models")
    p = _verb(group, "create", "commands.endpoints:create", "serve a model, and wait until it answers")
    p.add_argument("model")
    p.add_argument("--adapter", action="append", default=[], metavar="ALIAS=MODEL")
    p.add_argument("--name", default="")
    p.add_argument("--bits", type=int, default=0, choices=[0, 4, 8])
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    p.add_argument("--engine", default="", choices=["", "transformers", "vllm"], help="the service's own if left out")
    _verb(group, "list", "commands.endpoints:list_all", "list endpoints")
    p = _verb(group, "get", "commands.endpoints:get", "one endpoint")
    p.add_argument("target", metavar="ENDPOINT")
    p.add_argument("--wait", action="store_true", help="until it is READY")
    p = _verb(group, "update", "commands.endpoints:update", "load, switch or drop adapters while it answers")
    p.add_argument("target", metavar="ENDPOINT")
    p.add_argument("--adapter", action="append", default=[], metavar="ALIAS=MODEL")
    p.add_argument("--drop-adapter", action="append", default=[], metavar="ALIAS")
    _verb(group, "delete", "commands.endpoints:delete", "stop serving").add_argument("target", metavar="ENDPOINT")
    p = _verb(
        verbs, "publish", "commands.publish:publish", "write a web page on which a model answers, to deploy anywhere"
    )
    p.add_argument("target", help="a whole model, whose weights go along; with --url an endpoint, or endpoint:alias")
    p.add_argument("directory")
    p.add_argument("--url", default="", help="where it is asked instead, over OpenAI's API: http://host:8000/v1")
    p.add_argument("--title", default="", help="the page's; the target's name if left out")
    p.add_argument("--system", default="", help="system text in place of the model's own")
    p = _verb(verbs, "chat", "chat:chat", "talk to a model or an endpoint")
    p.add_argument(
        "--visual-encoder",
        default="",
        metavar="MODEL",
        help="assemble MODEL with this vision tower, unless it was before",
    )
    p.add_argument(
        "--llava",
        default="",
        metavar="MODEL",
        help="what was tuned on the two: an adapter, a merged model; or XTuner's .pth file or folder, to be made one",
    )
    p.add_argument("--image", nargs="+", default=[], metavar="FILE", help="shown with the first message")
    p.add_argument("--prompt-template", default="", help="checked against the template that the model carries")
    system = _talk(p)
    system.add_argument("--system-template", default="", metavar="NAME", help="one of XTuner's system texts")
    p.add_argument("--bot-name", default="BOT", help="what a system text calls the model")
    p.add_argument("--no-streamer", action="store_true", help="print an answer once it is whole")
    for flag, instead in ELSEWHERE.items():
        p.add_argument(flag, nargs="*", action=_Elsewhere, const=instead, help=argparse.SUPPRESS)
    p = _verb(verbs, "agent", "agent.command:agent", "talk to a model that may use tools, and see its steps")
    p.add_argument("--form", default="openai", choices=["openai", "react"], help="calls of tools, or MSAgent's texts")
    p.add_argument(
        "--tool", action="append", default=[], choices=["calculate", "solve", "search", "none"], help="only these"
    )
    p.add_argument("--search", default="", metavar="URL", help="a search service; {query} in it is what is looked for")
    p.add_argument("--search-header-file", default="", metavar="FILE", help="holds a header for it, as X-API-KEY: …")
    p.add_argument(
        "--mcp", action="append", default=[], metavar="COMMAND|URL", help="tools of a server that speaks MCP"
    )
    p.add_argument("--max-calls", type=int, default=8, help="for one question")
    p.add_argument("--strict", action="store_true", help="let no call be written that breaks its tool's schema")
    p.set_defaults(llava="", visual_encoder="")
    _talk(p)


ELSEWHERE = {
    "--lagent": "quartet agent --form react is that talk",
    "--with-plugins": "quartet agent --tool calculate --tool solve --search URL gives a model these",
    "--offload-folder": "an engine keeps a model in memory whole: --bits 4 makes it smaller",
    "--visual-select-layer": "a model that sees says itself which layer of its tower it takes",
}
"""Flags of `xtuner chat` that are something else here."""


class _Elsewhere(argparse.Action):
    """Says what to do instead."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        parser.error(f"{given[-1]}: {self.const}")


def _talk(p: argparse.ArgumentParser) -> Any:
    """What every talk with a model takes; the group of what gives its system text."""
    p.add_argument("model", help="an endpoint's or a model's name; a model is served for as long as the talk lasts")
    p.add_argument("--adapter", default="", help="a model of kind adapter, or an endpoint's alias")
    system = p.add_mutually_exclusive_group()
    system.add_argument("--system", default="")
    p.add_argument("--bits", type=int, default=0, choices=[0, 4, 8])
    p.add_argument("--torch-dtype", default="auto", choices=["auto", "fp16", "bf16", "fp32"], help="of its weights")
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-p", type=float)
    p.add_argument("--top-k", type=int)
    p.add_argument("--repetition-penalty", type=float)
    p.add_argument("--max-new-tokens", type=int)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop-words", nargs="+", default=[])
    p.add_argument("-m", "--message", default="", help="say this, print the answer, and leave")
    return system


def _group(verbs: Any, name: str, help: str) -> Any:
    return verbs.add_parser(name, help=help, allow_abbrev=False).add_subparsers(required=True, metavar="VERB")


def _verb(verbs: Any, name: str, run: str, help: str) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    p.add_argument("--json", action="store_true", help="print JSON")
    where = p.add_argument_group("where the services are (or QUARTET_ENDPOINT, QUARTET_TOKEN_FILE, QUARTET_TLS_*)")
    where.add_argument("--endpoint", default="", metavar="HOST:PORT", help="one address for all four")
    where.add_argument("--token-file", default="", metavar="FILE", help="holds the bearer token")
    where.add_argument("--tls-ca", default="", metavar="FILE", help="whom to trust; turns TLS on")
    where.add_argument("--tls-cert", default="", metavar="FILE", help="our own certificate, for mutual TLS")
    where.add_argument("--tls-key", default="", metavar="FILE", help="its key")
    p.set_defaults(run=run)
    return p
