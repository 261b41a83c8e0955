"""What a service is told at its start: flags, or QUARTET_* variables in their place."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from services.finetune.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Each field is a flag (--token-file) and a variable (QUARTET_TOKEN_FILE)."""

    host: str = "127.0.0.1"
    """Where to listen; a loopback address, or any with a token file or mutual TLS; or unix:/path."""
    port: int = 50050
    """0 takes a free one."""
    home: str = ""
    """Folder for embedded defaults; ~/.quartet if empty."""
    store_uri: str = ""
    """file:///folder or s3://bucket/prefix?endpoint=…; HOME/store if empty."""
    database_url: str = ""
    """A SQLAlchemy URL; HOME/quartet.db (SQLite) if empty."""
    token_file: str = ""
    """A file with the bearer token that clients must show."""
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    """With these three, mutual TLS; with the first two, TLS."""
    address_file: str = ""
    """Write the address to this file once the server answers."""
    metrics_port: int = 0
    """Where Prometheus finds /metrics, without a token; none if 0."""
    reflection: str = "auto"
    """on, off, or auto: on for loopback only."""
    import_roots: str = ""
    """Folders, joined by ':', from which models and datasets may be imported by path; none if empty, but / for `quartet
    up`."""
    import_prefixes: str = ""
    """s3://bucket/prefix?endpoint=…, joined by ',', from which datasets may be imported; none if empty."""
    export_prefixes: str = ""
    """Places, joined by ',', to which models may be exported; none if empty: hf://owner or hf://owner/name,
    s3://bucket/prefix?endpoint=…, oci://registry/repository."""
    hub_datasets: str = "off"
    """on lets datasets be imported from the Hugging Face hub."""
    direct_uploads: str = "on"
    """off keeps clients from sending large files to an S3 store themselves, as where they cannot reach it."""
    direct_downloads: str = "on"
    """off keeps clients from fetching large files from an S3 store themselves."""
    max_workers: int = 1
    """Workers of one service at a time."""
    worker_grace_s: float = 30.0
    """Seconds that a cancelled worker has to save and leave."""
    engine: str = "transformers"
    """What serves endpoints that name no engine: transformers or vllm."""
    workspace_streams: int = 256
    """Answers that one workspace's endpoints give at a time, through this service; more wait."""
    workspace_queue: int = 1024
    """Answers of one workspace that may wait; more are refused for now."""
    max_streams: int = 1024
    """Answers of all workspaces at a time; those that wait are let in by turns, a workspace each."""
    vllm_python: str = ""
    """The Python that has vLLM, where it is not the service's own; on a cluster the engine's image has it."""
    launcher: str = "local"
    """Where workers and engine servers run: local (processes of this machine) or kubernetes (Jobs of its cluster)."""
    namespace: str = ""
    """The cluster's namespace for Jobs; the service's own if empty."""
    blueprint: str = "quartet-worker"
    """The CronJob of that namespace whose jobTemplate is filled for each Job."""
    gpu_kind: str = ""
    """What workers compute on, for plans: h100, l4, … or cpu. Of a local launcher's machine it is looked up if empty."""
    gpu_memory_gib: float = 0.0
    """Memory of one GPU, for plans; the kind's own if 0."""

    @classmethod
    def from_args(cls, argv: Sequence[str], prog: str) -> Self:
        """Read flags and environment. InvalidArgument (SETTING_INVALID, ADDRESS_EXPOSED)."""
        parser = argparse.ArgumentParser(prog=prog, description=f"{prog}: serve over gRPC.", allow_abbrev=False)
        for f in fields(cls):
            kind = {"int": int, "float": float}.get(str(f.type), str)
            variable = "QUARTET_" + f.name.upper()
            try:
                default = kind(os.environ[variable]) if variable in os.environ else f.default
            except ValueError as error:
                raise InvalidArgument(f"{variable} must be a number", reason="SETTING_INVALID") from error
            parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=default, help=variable)
        return cls(**vars(parser.parse_args(argv))).completed()

    def completed(self) -> Self:
        """With the defaults that hang on HOME filled in, HOME made, and the address checked."""
        home = Path(self.home or Path.home() / ".quartet").expanduser().absolute()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.check_exposure()
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise InvalidArgument("--tls-cert and --tls-key go together", reason="SETTING_INVALID")
        if self.reflection not in ("on", "off", "auto"):
            raise InvalidArgument("--reflection is on, off or auto", reason="SETTING_INVALID")
        for name in ("hub_datasets", "direct_uploads", "direct_downloads"):
            if getattr(self, name) not in ("on", "off"):
                raise InvalidArgument(f"--{name.replace('_', '-')} is on or off", reason="SETTING_INVALID")
        for name in ("workspace_streams", "workspace_queue", "max_streams"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"--{name.replace('_', '-')} must be at least 1", reason="SETTING_INVALID")
        if self.engine not in ("transformers", "vllm"):
            raise InvalidArgument("--engine is transformers or vllm", reason="SETTING_INVALID")
        if self.launcher not in ("local", "kubernetes"):
            raise InvalidArgument("--launcher is local or kubernetes", reason="SETTING_INVALID")
        return replace(
            self,
            home=str(home),
            store_uri=self.store_uri or (home / "store").as_uri(),
            database_url=self.database_url or f"sqlite:///{home}/quartet.db",
        )

    def check_exposure(self) -> None:
        """InvalidArgument (ADDRESS_EXPOSED) if strangers could reach the address and need show nothing."""
        if not self.loopback and not self.token_file and not self.tls_client_ca:
            raise InvalidArgument(
                f"{self.host} is not a loopback address: give --token-file, or mutual TLS by --tls-cert --tls-key "
                "--tls-client-ca",
                reason="ADDRESS_EXPOSED",
            )

    @property
    def replicated(self) -> bool:
        """There may be other replicas of this service; not so on a SQLite file of its own."""
        return not self.database_url.startswith("sqlite:") and self.database_url != ""

    @property
    def loopback(self) -> bool:
        """Nobody outside this machine can reach the address."""
        if self.host.startswith("unix:") or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
