"""Prepared data by what it was made from: looked up before anything is computed, and computed by one worker at a time.

``prepared/<key>.json`` in the store is {"digest"} once the artifact is there; before that it is the claim of whoever makes
it, {"digest": null, "owner", "beat"}, written anew every BEAT_S. A claim that stays as it is belongs to the dead.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from services.finetune.errors import Aborted, Cancelled, NotFound, QuartetError
from services.finetune.orders import PrepareRun
from services.finetune.prepare.certificate import Certificate
from services.finetune.progress import dump
from services.finetune.store.artifacts import load
from services.finetune.store.port import Object, Store
from services.finetune.vision import ImageForm

VERSION = 1
"""To be raised when equal inputs come to give other blocks."""
BEAT_S = 3.0
STALE_S = 15.0
LOOK_S = 0.2


def shelf_key(run: PrepareRun, certificate: Certificate, form: ImageForm | None = None) -> str:
    """64 hex digits that are equal for equal blocks: of revisions, weights, template, tokenizer, what an image becomes, and
    how to pack."""
    data = run.data
    parts = {
        "version": VERSION,
        "datasets": [d.digest for d in run.datasets],
        "weights": list(data.weights) or [1.0] * len(run.datasets),
        "certificate": certificate["digest"],
        "system": data.system,
        "max_length": data.max_length,
        "pack": data.pack,
        "max_rows": data.max_rows,
        "seed": run.seed,
    }
    if run.held_out:
        parts["held_out"] = run.held_out
    if form is not None:
        parts["image"] = {"token": form.token_id, "tokens": form.tokens}
    return hashlib.sha256(dump(parts)).hexdigest()


def find(store: Store, key: str) -> str | None:
    """The digest of the artifact under `key`, if it is there."""
    return _made(store, store.get(_name(key)))


def obtain(
    store: Store,
    key: str,
    owner: str,
    make: Callable[[], str],
    stop: threading.Event,
    waiting: Callable[[], None] = lambda: None,
) -> str:
    """The digest under `key`: found, waited for while another makes it (`waiting` is called once), or made here.

    `owner` is a job: its next attempt need not wait for the last one to be found dead. Cancelled (STOPPED).
    """
    seen, since, told = "", time.monotonic(), False
    while True:
        found = store.get(_name(key))
        digest = _made(store, found)
        if digest is not None:
            return digest
        if found is None or found.etag != seen:
            seen, since = found.etag if found else "", time.monotonic()
        body: dict[str, Any] = json.loads(found.data) if found else {}
        if found is None or body.get("owner", owner) == owner or time.monotonic() - since > STALE_S:
            with contextlib.suppress(Aborted):  # another took it: wait for that one
                etag = store.put(
                    _name(key), _claim(owner, 0), if_match=found.etag if found else None, if_absent=found is None
                )
                return _make(store, key, owner, etag, make)
            continue
        if not told:
            told = True
            waiting()
        if stop.wait(LOOK_S):
            raise Cancelled("stopped while another job prepared the data", reason="STOPPED")


def _make(store: Store, key: str, owner: str, etag: str, make: Callable[[], str]) -> str:
    with _beating(store, key, owner, etag):
        digest = make()
    # Without a condition: whoever took over meanwhile comes to the same.
    store.put(_name(key), dump({"digest": digest}))
    return digest


@contextlib.contextmanager
def _beating(store: Store, key: str, owner: str, etag: str) -> Iterator[None]:
    """Renew a claim for as long as the block runs; give it up if the block fails."""
    done = threading.Event()
    held = [etag]

    def beat() -> None:
        count = 0
        while not done.wait(BEAT_S):
            count += 1
            try:
                held[0] = store.put(_name(key), _claim(owner, count), if_match=held[0])
            except Aborted:
                return  # taken over
            except QuartetError:
                continue  # the store is away; the next beat may reach it

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        done.set()
        thread.join()
        with contextlib.suppress(QuartetError):
            store.delete(_name(key), if_match=held[0])
        raise
    done.set()
    thread.join()


def _made(store: Store, found: Object | None) -> str | None:
    digest: str | None = json.loads(found.data)["digest"] if found else None
    if digest is None:
        return None
    try:
        load(store, digest)
    except NotFound:
        return None
    return digest


def _claim(owner: str, beat: int) -> bytes:
    return dump({"digest": None, "owner": owner, "beat": beat})


def _name(key: str) -> str:
    return f"prepared/{key}.json"
