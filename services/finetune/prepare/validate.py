"""VALIDATE: a look at every row of a revision, on a CPU. The report is a JSON blob, as the message ValidationReport.

Memory is bounded: what grows with the rows is 32 bytes a row, for finding the rows that come twice.
"""

from __future__ import annotations

import hashlib
import threading
import unicodedata
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.finetune import vision
from services.finetune.errors import InvalidArgument, QuartetError
from services.finetune.formats import Conversation, Problem, Row, read_rows
from services.finetune.orders import ValidateRun
from services.finetune.prepare import holds_rows, local_files, progress, row_files
from services.finetune.prepare.images import Images
from services.finetune.prepare.samples import EDGES
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import load, materialise, put_json_blob
from services.finetune.templates import IMAGE_ID, Template, encode, load_template
from services.finetune.tokenizer import FILES, Tokenizer
from services.finetune.vision import ImageForm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN_PROBLEMS = 100
SHOWN_EXAMPLES = 20
TOLD_ROWS = 100


def validate(run: ValidateRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> dict[str, Any]:
    """Do an order; {"report": digest of the report's blob}. Bad rows are in the report, no failure.

    Raises Cancelled (STOPPED) when `stop` is set, InvalidArgument (DATASET_EMPTY, TEMPLATE_UNKNOWN),
    FailedPrecondition (TOKENIZER_MISSING, TEMPLATE_MISSING, VISION_UNSUPPORTED, IMAGE_TOKEN_MISSING).
    """
    store, manifest = attempt.store, load(attempt.store, run.dataset.digest)
    if not holds_rows(manifest):
        raise InvalidArgument(f"{run.dataset.name} holds no rows", reason="DATASET_EMPTY")
    tokens = None
    if run.model is not None:
        folder = materialise(store, load(store, run.model.digest), workdir / "model", (*FILES, *vision.FILES))
        tokens = Tokens(Tokenizer.from_files(folder), vision.read_form(folder), run)
    files = local_files(store, manifest, workdir / "dataset")
    tell = progress(attempt, stop, int(manifest.meta["rows"]) + int(manifest.meta.get("skipped_rows", 0)))
    look, done = Look(tokens, Images(dict(files))), 0
    tell(0)
    meta = manifest.meta
    for done, row in enumerate(read_rows(row_files(files), meta["format"], meta.get("columns", {})), 1):
        look.take(row)
        if done % TOLD_ROWS == 0:
            tell(done)
    tell(done)
    report = look.report()
    attempt.emit("log", level="info", text=told(report))
    return {"report": put_json_blob(store, report).digest}


def told(report: dict[str, Any]) -> str:
    """A report in one line."""
    causes = ", ".join(f"{count} {reason}" for reason, count in report["causes"].items())
    text = f"{report['row_count']} rows read, {report['bad_row_count']} bad{f' ({causes})' if causes else ''}"
    text += f", {report['near_duplicate_count']} come twice"
    if tokens := report.get("tokens"):
        text += f"; {tokens['token_count']} tokens, {tokens['truncated_row_count']} rows would be cut"
    return text


class Look:
    """What has been seen so far."""

    def __init__(self, tokens: Tokens | None, images: Images) -> None:
        self._tokens, self._images, self._twins = tokens, images, Twins()
        self._good = self._bad = 0
        self._causes: Counter[str] = Counter()
        self._problems: list[Problem] = []

    def take(self, row: Row | Problem) -> None:
        """Look at one row."""
        problems = [row] if isinstance(row, Problem) else self._inside(row)
        self._good += isinstance(row, Row)
        self._bad += bool(problems)
        for problem in problems:
            self._causes[problem.reason] += 1
            if len(self._problems) < SHOWN_PROBLEMS:
                self._problems.append(problem)

    def _inside(self, row: Row) -> list[Problem]:
        self._twins.add(row)
        found = self._images.check(row)
        # Training leaves a row with a bad image out.
        problem = self._tokens.add(row) if self._tokens is not None and not found else None
        return found if problem is None else [problem]

    def report(self) -> dict[str, Any]:
        """As the message ValidationReport."""
        report: dict[str, Any] = {
            "row_count": self._good,
            "bad_row_count": self._bad,
            "causes": dict(self._causes.most_common()),
            "problems": [as_json(p) for p in self._problems],
            **self._twins.report(),
        }
        if self._tokens is not None:
            report["tokens"] = self._tokens.report()
        if self._images.rows:
            images = self._images
            report["images"] = {"row_count": images.rows, "image_count": images.named, "good_count": images.good}
            if self._tokens is not None:
                report["images"]["token_count"] = self._tokens.of_images
        return report


class Tokens:
    """Rows in tokens, by the code that preview, training and chat go through; images as the model of `form` takes them."""

    def __init__(self, tokenizer: Tokenizer, form: ImageForm | None, run: ValidateRun) -> None:
        if form is not None:
            vision.check_token(form, tokenizer)
        self._tokenizer, self._form, self._run = tokenizer, form, run
        self.of_images = 0
        self._template: Template = load_template(run.template, tokenizer)
        self._lengths = array("Q")
        self._learned = self._dropped = self._special = 0
        self._examples: list[Problem] = []

    def add(self, row: Row) -> Problem | None:
        """Count a row; a Problem if the template or the model has no place for it, as training would tell."""
        self._note_special(row)
        try:
            pieces = self._template.pieces(row.conversation, self._run.system)
            encoded = encode(pieces, self._tokenizer, IMAGE_ID if self._form is not None else None)
        except QuartetError as error:
            return Problem(row.file, row.row, "", error.reason, error.message)
        length, left = len(encoded.ids), encoded.mask[: self._run.max_length or None]
        if self._form is not None and (images := encoded.ids.count(IMAGE_ID)):
            self.of_images += images * self._form.tokens
            length += images * (self._form.tokens - 1)
            left = vision.spread(encoded, self._form, self._run.max_length).mask
        self._lengths.append(length)
        self._learned += sum(encoded.mask)
        # A row's first token is predicted by nothing of its own.
        self._dropped += not any(left[1:])
        return None

    def _note_special(self, row: Row) -> None:
        for n, message in enumerate(row.conversation.messages):
            if self._tokenizer.controls(message.content):
                self._special += 1
                if len(self._examples) < SHOWN_EXAMPLES:
                    texts = (s for s in self._tokenizer.special_texts if s in message.content)
                    what = f"the text of the special token {next(texts, '?')!r}; it is tokenised as text"
                    self._examples.append(Problem(row.file, row.row, f"turns[{n}]", "SPECIAL_TOKEN", what))
                return

    def report(self) -> dict[str, Any]:
        """As the message TokenReport."""
        import numpy as np

        lengths = np.frombuffer(self._lengths, np.uint64).astype(np.int64)
        ordered = np.sort(lengths) if len(lengths) else np.zeros(1, np.int64)
        limit = self._run.max_length
        return {
            "template": self._template.name,
            "token_count": int(lengths.sum()),
            "learned_count": self._learned,
            "lengths": [{"least": n, "row_count": c} for n, c in zip(EDGES, _bars(lengths), strict=True) if c],
            "max_length": int(ordered[-1]),
            "median_length": int(ordered[(len(ordered) - 1) // 2]),
            "p99_length": int(ordered[(len(ordered) * 99 - 1) // 100]),
            "truncated_row_count": int((lengths > limit).sum()) if limit else 0,
            "dropped_row_count": self._dropped,
            "special_row_count": self._special,
            "special_rows": [as_json(p) for p in self._examples],
        }


class Twins:
    """Rows that say what an earlier row says. 64 bits a row: of ten million different rows, two meet once in 400,000."""

    def __init__(self) -> None:
        self._exact, self._near, self._rows, self._files = array("Q"), array("Q"), array("Q"), array("Q")
        self._names: dict[str, int] = {}

    def add(self, row: Row) -> None:
        said = row.conversation
        near = replace(said, messages=tuple(replace(m, content=_plain(m.content)) for m in said.messages))
        self._exact.append(_hash(said))
        self._near.append(_hash(near))
        self._rows.append(row.row)
        self._files.append(self._names.setdefault(row.file, len(self._names)))

    def report(self) -> dict[str, Any]:
        """The part of the message ValidationReport about duplicates."""
        import numpy as np

        exact, near = (_firsts(np.frombuffer(a, np.uint64)) for a in (self._exact, self._near))
        places = np.arange(len(near))
        twins = np.flatnonzero(near != places)
        return {
            "exact_duplicate_count": int((exact != places).sum()),
            "near_duplicate_count": len(twins),
            "duplicates": [self._example(int(n), int(near[n]), bool(exact[n] != n)) for n in twins[:SHOWN_EXAMPLES]],
        }

    def _example(self, n: int, first: int, exact: bool) -> dict[str, Any]:
        names = list(self._names)
        return {
            "file": names[self._files[n]],
            "row": self._rows[n],
            "first_file": names[self._files[first]],
            "first_row": self._rows[first],
            "exact": exact,
        }


def as_json(problem: Problem) -> dict[str, Any]:
    """As the message RowProblem."""
    return {k: getattr(problem, k) for k in ("file", "row", "field", "reason", "message")}


def _bars(lengths: NDArray[np.int64]) -> list[int]:
    """How many lengths lie between each of EDGES and the next."""
    import numpy as np

    return [int(n) for n in np.bincount(np.searchsorted(EDGES, lengths, "right") - 1, minlength=len(EDGES))]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(said: Conversation) -> int:
    return int.from_bytes(hashlib.blake2b(repr(said).encode(errors="surrogatepass"), digest_size=8).digest())


def _firsts(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each place the first place that holds the same."""
    import numpy as np

    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.ones(len(hashes), bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = order[np.maximum.accumulate(np.where(starts, np.arange(len(hashes)), 0))]
    found = np.empty(len(hashes), np.int64)
    found[order] = first
    return found
