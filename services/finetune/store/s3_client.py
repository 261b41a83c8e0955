"""The SDK's client for a store URI: how long it waits, and how often it tries again."""

from __future__ import annotations

import os
from urllib.parse import SplitResult, parse_qs, urlsplit

import urllib3
from minio import Minio
from minio.helpers import check_bucket_name

from services.finetune.errors import InvalidArgument


def connect(parts: SplitResult, read_s: float, reads: int) -> Minio:
    """A client for a store URI. InvalidArgument (STORE_URI_INVALID)."""
    query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
    endpoint = urlsplit(query.get("endpoint", "https://s3.amazonaws.com"))
    if set(query) - {"endpoint", "region"} or endpoint.scheme not in ("http", "https") or not endpoint.netloc:
        raise _bad_uri(parts, "write s3://bucket/prefix?endpoint=http://host:port&region=name")
    # A refused or silent address is given up after 3 tries of 2 s. Retry-After is not heeded: it may say hours.
    retries = urllib3.Retry(
        total=4,
        connect=2,
        read=reads,
        status=3,
        backoff_factor=0.2,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=None,
        respect_retry_after_header=False,
    )
    timeout = urllib3.Timeout(connect=2, read=read_s)
    try:
        check_bucket_name(parts.netloc)
        return Minio(
            endpoint.netloc,
            access_key=os.environ.get("AWS_ACCESS_KEY_ID"),
            secret_key=os.environ.get("AWS_SECRET_ACCESS_KEY"),
            secure=endpoint.scheme == "https",
            region=query.get("region", "us-east-1"),
            http_client=urllib3.PoolManager(timeout=timeout, retries=retries, maxsize=16),
        )
    except ValueError as error:
        raise _bad_uri(parts, str(error)) from error


def _bad_uri(parts: SplitResult, why: str) -> InvalidArgument:
    return InvalidArgument(f"not a store URI: {parts.geturl()!r}; {why}", reason="STORE_URI_INVALID")
