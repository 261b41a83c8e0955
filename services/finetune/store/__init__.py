"""The object store: `open_store` gives the adapter that a URI asks for."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from services.finetune.errors import InvalidArgument
from services.finetune.store.port import Blob, Entry, Leftover, Link, Object, Store, Stored, Upload

__all__ = ["Blob", "Entry", "Leftover", "Link", "Object", "Store", "Stored", "Upload", "open_store"]


def open_store(uri: str) -> Store:
    """Open ``file:///absolute/folder`` or ``s3://bucket/prefix?endpoint=http://host:port&region=name``.

    S3 credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a local cache of what is fetched from there from
    QUARTET_CACHE_DIR. Raises InvalidArgument (STORE_URI_INVALID, SETTING_INVALID).
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.path.startswith("/") and not (parts.netloc or parts.query):
        from services.finetune.store.file import FileStore

        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from services.finetune.store.cache import Cache
        from services.finetune.store.s3 import S3Store

        return S3Store(uri, Cache.from_environment(os.environ))
    raise InvalidArgument(
        f"not a store URI: {uri!r}; write file:///absolute/folder or s3://bucket/prefix?endpoint=http://host:port",
        reason="STORE_URI_INVALID",
    )
