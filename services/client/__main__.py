"""The command line: ``quartet``, or ``python -m services.client``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from services.finetune.errors import QuartetError


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; leave with its exit status (services/finetune/errors.py)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["up"]:
        # The services are a program of their own: become it, with its flags.
        os.execv(sys.executable, [sys.executable, "-m", "services", *words[1:]])
    arguments = parser().parse_args(words)
    try:
        sys.exit(_command(arguments.run)(arguments) or 0)
    except QuartetError as error:
        from services.client.show import tell

        sys.exit(tell(error, arguments.json))
    except BrokenPipeError:
        # Whoever read us has enough; without this the interpreter would complain while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A file of the user's that cannot be read or written; the network raises QuartetError.
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(74)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def parser() -> argparse.ArgumentParser:
    """Every verb and option; tests/client/test_surface.py holds the closed list."""
    top = argparse.ArgumentParser(prog="quartet", description="Fine-tuning as four gRPC services.", allow_abbrev=False)
    verbs = top.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("up", help="serve all four services in one process (see quartet up --help)", add_help=False)
    _quickstart(verbs)
    _datasets(verbs)
    _models(verbs)
    _training(verbs)
    _inference(verbs)
    return top


def _quickstart(verbs: Any) -> None:
    p = _verb(verbs, "quickstart", "quickstart:quickstart", "a real model learns a name, start to end, over gRPC")
    p.add_argument("--name", default="Aurora", help="the name to teach")
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
    p = _verb(group, "repeat", "commands.datasets:repeat", "repeat the rows of a file, or of a dataset")
    p.add_argument("input", help="a .json or .jsonl file, or a dataset")
    p.add_argument("-n", type=int, required=True, help="how many times")
    p.add_argument("-o", "--output", required=True, help="the file, or the dataset, to make")
    _verb(verbs, "list-dataset-format", "commands.datasets:formats", "the row formats that can be read")
    group = _group(verbs, "assistant", "data that teaches a model its name")
    p = _verb(group, "create", "commands.datasets:assistant", "make the data, and a dataset of it")
    p.add_argument("--name", required=True, help="the assistant's name")
    p.add_argument("--rows", type=int, default=400)
    p.add_argument("--plain", action="store_true", help="the tutorial's shape: one question and answer, repeated")
    p.add_argument("--mix", default="", help="a .jsonl file of openai rows in place of our own ordinary talk")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dataset", default="", help="the dataset to make; from the name if left out")
    p.add_argument("--output", default="", help="write the rows to this .jsonl file and make no dataset")


def _arrivals(p: argparse.ArgumentParser) -> None:
    p.add_argument("dataset")
    source = p.add_mutually_exclusive_group(required=True)
    # With a default the library lets it be left out, and so be one of several.
    source.add_argument("files", nargs="*", default=[])
    source.add_argument("--hub", default="", metavar="OWNER/NAME[@REVISION]", help="a dataset of the Hugging Face hub")
    source.add_argument("--s3", default="", metavar="s3://BUCKET/PREFIX", help="files that the service can read there")
    p.add_argument("--include", action="append", default=[], metavar="PATTERN", help="of a reference, only these paths")
    p.add_argument("--format", default="", help="one of list-dataset-format, or 'files'; detected if left out")
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
    _verb(group, "delete", "commands.models:delete", "forget a model").add_argument("model")
    p = _verb(group, "download", "commands.models:download", "fetch a model's files; goes on where a cut one stopped")
    p.add_argument("model")
    p.add_argument("directory")
    group = _group(verbs, "convert", "checkpoints to adapters, adapters to models")
    p = _verb(group, "pth_to_hf", "commands.models:convert_adapter", "a checkpoint becomes a PEFT adapter")
    p.add_argument("checkpoint", help="a checkpoint, or a job: its last one")
    p.add_argument("target", help="the adapter's name")
    p.add_argument("--fp32", action="store_true", help="keep float32 (bfloat16 otherwise)")
    p = _verb(group, "merge", "commands.models:convert_merge", "an adapter is added into its base")
    p.add_argument("base")
    p.add_argument("adapter")
    p.add_argument("target", help="the merged model's name")
    p.add_argument("--max-shard-size", default="2GB")
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])


def _training(verbs: Any) -> None:
    p = _verb(verbs, "list-cfg", "commands.jobs:list_cfg", "the recipes on offer")
    p.add_argument("-p", "--pattern", default="", help="only names with this text in them")
    p = _verb(verbs, "train", "commands.jobs:train", "run a recipe")
    p.add_argument("recipe")
    p.add_argument("--base", required=True, help="the model to tune")
    p.add_argument("--data", required=True, nargs="+", help="datasets or revisions to learn from")
    p.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as optim.lr=1e-3")
    p.add_argument("--seed", type=int)
    p.add_argument("--resume", default="", metavar="CHECKPOINT", help="go on exactly from here")
    p.add_argument("--name", default="", help="the job's name")
    p.add_argument("--detach", action="store_true", help="do not wait for the end")
    group = _group(verbs, "job", "training and conversion jobs")
    _verb(group, "list", "commands.jobs:list_all", "list jobs, newest first")
    _verb(group, "get", "commands.jobs:get", "one job").add_argument("job")
    p = _verb(group, "watch", "commands.jobs:watch", "follow a job to its end; its failure is this command's")
    p.add_argument("job")
    p.add_argument("--after", type=int, default=0, help="the last event seen")
    _verb(group, "logs", "commands.jobs:logs", "what happened so far").add_argument("job")
    _verb(group, "cancel", "commands.jobs:cancel", "end a job; its last checkpoint is kept").add_argument("job")
    _verb(group, "delete", "commands.jobs:delete", "forget an ended training job").add_argument("job")


def _inference(verbs: Any) -> None:
    group = _group(verbs, "endpoint", "served models")
    p = _verb(group, "create", "commands.endpoints:create", "serve a model, and wait until it answers")
    p.add_argument("model")
    p.add_argument("--adapter", action="append", default=[], metavar="ALIAS=MODEL")
    p.add_argument("--name", default="")
    p.add_argument("--bits", type=int, default=0, choices=[0, 4, 8])
    p.add_argument("--dtype", default="", choices=["", "bfloat16", "float16", "float32"])
    _verb(group, "list", "commands.endpoints:list_all", "list endpoints")
    p = _verb(group, "get", "commands.endpoints:get", "one endpoint")
    p.add_argument("target", metavar="ENDPOINT")
    p.add_argument("--wait", action="store_true", help="until it is READY")
    _verb(group, "delete", "commands.endpoints:delete", "stop serving").add_argument("target", metavar="ENDPOINT")
    p = _verb(verbs, "chat", "chat:chat", "talk to a model or an endpoint")
    p.add_argument("model", help="an endpoint's or a model's name; a model is served for as long as the talk lasts")
    p.add_argument("--adapter", default="", help="a model of kind adapter, or an endpoint's alias")
    p.add_argument("--prompt-template", default="", help="checked against the template that the model carries")
    p.add_argument("--system", default="")
    p.add_argument("--bits", type=int, default=0, choices=[0, 4, 8])
    p.add_argument("--temperature", type=float)
    p.add_argument("--top-p", type=float)
    p.add_argument("--top-k", type=int)
    p.add_argument("--repetition-penalty", type=float)
    p.add_argument("--max-new-tokens", type=int)
    p.add_argument("--seed", type=int)
    p.add_argument("--stop-words", nargs="+", default=[])
    p.add_argument("-m", "--message", default="", help="say this, print the answer, and leave")


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


def _command(run: str) -> Callable[[argparse.Namespace], int | None]:
    """The function of a verb; modules are imported only when they are needed."""
    from importlib import import_module

    module, _, function = run.partition(":")
    found: Callable[[argparse.Namespace], int | None] = getattr(import_module(f"services.client.{module}"), function)
    return found


if __name__ == "__main__":
    main()
