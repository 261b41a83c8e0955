"""A row of a dataset, drawn."""

from __future__ import annotations

from quartet.datasets.v1 import datasets_pb2 as pb

from services.gateway.pages.rows import drawn


def test_what_is_learned_is_marked_and_text_stays_text() -> None:
    pieces = [pb.Piece(text="<|user|>\nhi"), pb.Piece(text="<script>", trained=True)]
    row = pb.PreviewRow(file="a&b.jsonl", row=3, pieces=pieces, token_ids=[1, 2, 3], loss_mask=[False, True, True])
    row.truncated_tokens = 4
    told = drawn(row)
    assert "a&amp;b.jsonl row 3: 3 tokens, 2 learned, 4 cut off" in told
    assert "<span>&lt;|user|&gt;\nhi</span><mark>&lt;script&gt;</mark>" in told
