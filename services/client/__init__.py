"""The Python client of Quartet's four services.

from services.client import Client
quartet = Client()                      # QUARTET_ENDPOINT, or 127.0.0.1:50050
revision = quartet.upload_dataset("my-data", [Path("rows.jsonl")])
"""

from services.client.client import Client

__all__ = ["Client"]
