"""The images of a chat: brought into memory within bounds, and given their places among the token ids."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Sequence

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import InvalidArgument, NotFound, blamed
from services.finetune.prepare.images import check_image
from services.finetune.store import Store
from services.finetune.store.artifacts import get_ref, load, read_file
from services.finetune.vision import ImageForm, expand
from services.inference.engines.port import Picture

MAX_IMAGES = 16
MAX_BYTES = 20_000_000

DECODING = threading.Lock()
"""One image is decoded at a time in an engine server, to be checked or looked at: each may need a hundred megabytes."""


class Images:
    """The images that an endpoint is asked about; `form` is how its model takes them in, None if it sees none."""

    def __init__(self, form: ImageForm | None, store: Store, endpoint: str) -> None:
        self.form = form
        self._store, self._workspace = store, "/".join(endpoint.split("/")[:2])

    def read(self, messages: Sequence[pb.Message]) -> list[Picture]:
        """The images of a chat in their order, each found to decode.

        InvalidArgument (IMAGES_UNSUPPORTED, IMAGES_TOO_MANY, IMAGE_TOO_LARGE, IMAGE_TOO_THIN, IMAGE_INVALID), NotFound
        (REVISION_NOT_FOUND, FILE_NOT_FOUND).
        """
        given = [
            (f"messages[{n}].content[{k}].image", part.image)
            for n, message in enumerate(messages)
            for k, part in enumerate(message.content)
            if part.HasField("image")
        ]
        if given and self.form is None:
            raise InvalidArgument("this model sees no images: ask one that was assembled of a language model and a vision "
                                  "tower, or leave them out", reason="IMAGES_UNSUPPORTED")  # fmt: skip
        if len(given) > MAX_IMAGES:
            raise InvalidArgument(
                f"{len(given)} images are more than {MAX_IMAGES}; ask with fewer", reason="IMAGES_TOO_MANY"
            )
        return [self._picture(*one) for one in given]

    def expand(self, ids: Sequence[int]) -> list[int]:
        """`ids` with the tokens of an image in place of each IMAGE_ID."""
        return expand(ids, self.form) if self.form else list(ids)

    def _picture(self, field: str, image: pb.Image) -> Picture:
        data = image.data if image.WhichOneof("source") == "data" else self._from_dataset(field, image.file)
        _check_size(field, len(data))
        with DECODING:
            fault = check_image(io.BytesIO(data))
        if fault is not None:
            raise blamed(field, fault[1], fault[0])
        return Picture(hashlib.sha256(data).hexdigest(), data)

    def _from_dataset(self, field: str, wanted: pb.DatasetFile) -> bytes:
        # A name elsewhere is told from none by nobody.
        ref = get_ref(self._store, wanted.revision) if self._is_ours(wanted.revision) else None
        if ref is None:
            raise NotFound(
                f"{field}: there is no dataset revision {wanted.revision[:200]!r} in {self._workspace}",
                reason="REVISION_NOT_FOUND",
            )
        manifest = load(self._store, ref.body["digest"])
        _check_size(field, manifest.file(wanted.path).size)
        return read_file(self._store, manifest, wanted.path)

    def _is_ours(self, revision: str) -> bool:
        parts = revision.split("/")
        shape = len(parts) == 6 and (parts[2], parts[4]) == ("datasets", "revisions") and "" not in parts
        return shape and "/".join(parts[:2]) == self._workspace and ".." not in parts


def _check_size(field: str, size: int) -> None:
    if size > MAX_BYTES:
        raise blamed(field, f"{size} bytes are more than {MAX_BYTES}; scale it down", "IMAGE_TOO_LARGE")
