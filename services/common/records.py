"""The database: resources that change and are asked for by state, the events of jobs, and leases.

SQLite (WAL) by default, PostgreSQL by URL, through the same SQLAlchemy code. A resource's body is JSON; its version is
its etag, and every write says which version it read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from services.common import names
from services.finetune.errors import Aborted, AlreadyExists, InvalidArgument, Unavailable

_tables = sa.MetaData()

_resources = sa.Table(
    "resources",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    sa.Column("state", sa.Text, nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("request_id", sa.Text, nullable=True),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("create_time", sa.Text, nullable=False),
    sa.UniqueConstraint("kind", "request_id"),
)

_events = sa.Table(
    "events",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    # As wide as the contract's, or PostgreSQL would refuse to compare with a large `after_sequence`.
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
)

_leases = sa.Table(
    "leases",
    _tables,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Record:
    """One resource as read. `body` is the caller's own."""

    name: str
    kind: str
    state: str
    body: dict[str, Any]
    version: int = 1
    create_time: str = field(default_factory=names.now)

    @property
    def etag(self) -> str:
        return str(self.version)


class Records:
    """Resources and events in one database. Every method raises Unavailable (DATABASE_UNAVAILABLE) when it is away."""

    def __init__(self, url: str) -> None:
        try:
            self._engine = sa.create_engine(url, pool_pre_ping=True)
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError) as error:
            raise InvalidArgument(
                f"not a database URL: {error}; write sqlite:////file or postgresql+psycopg://…",
                reason="SETTING_INVALID",
            ) from error
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _tune_sqlite)
        with self._begin() as db:
            # Services that start at once on one database would all try to create the tables.
            lock = {"postgresql": "SELECT pg_advisory_xact_lock(7283311)", "sqlite": "BEGIN IMMEDIATE"}
            db.execute(sa.text(lock[self._engine.dialect.name]))
            _tables.create_all(db)

    def create(
        self, record: Record, request_id: str = "", request: str = "", new_events: Sequence[dict[str, Any]] = ()
    ) -> Record:
        """Keep a new resource with its first events, or return the one that this request made before.

        AlreadyExists (NAME_TAKEN); InvalidArgument (REQUEST_ID_REUSED) if the same id came with another request.
        """
        try:
            with self._begin() as db:
                row = {
                    **_row(record),
                    "create_time": record.create_time,
                    "request_id": request_id or None,
                    "request": request,
                }
                db.execute(_resources.insert().values(row))
                _append(db, record.name, new_events)
            return record
        except sa.exc.IntegrityError as error:
            made = self._by_request(record.kind, request_id) if request_id else None
            if made is None:
                raise AlreadyExists(f"{record.name} exists already; choose another id", reason="NAME_TAKEN") from error
            if made[1] != request:
                raise InvalidArgument(
                    f"request_id {request_id} was used for another request", reason="REQUEST_ID_REUSED"
                ) from error
            return made[0]

    def requested(self, kind: str, request_id: str, request: str) -> Record | None:
        """What this request made before, if it did. InvalidArgument (REQUEST_ID_REUSED)."""
        made = self._by_request(kind, request_id) if request_id else None
        if made is not None and made[1] != request:
            raise InvalidArgument(f"request_id {request_id} was used for another request", reason="REQUEST_ID_REUSED")
        return made[0] if made else None

    def get(self, name: str) -> Record | None:
        with self._begin() as db:
            row = db.execute(sa.select(_resources).where(_resources.c.name == name)).one_or_none()
        return _record(row) if row else None

    def find(self, kind: str, prefix: str = "", states: Sequence[str] = ()) -> list[Record]:
        """Resources of a kind whose names begin with `prefix`, oldest first."""
        query = sa.select(_resources).where(_resources.c.kind == kind)
        query = query.order_by(_resources.c.create_time, _resources.c.name)
        if prefix:
            query = query.where(_resources.c.name.startswith(prefix, autoescape=True))
        if states:
            query = query.where(_resources.c.state.in_(states))
        with self._begin() as db:
            return [_record(row) for row in db.execute(query)]

    def counts(self, *kinds: str) -> dict[tuple[str, str], int]:
        """How many resources of these kinds there are, by (kind, state)."""
        query = sa.select(_resources.c.kind, _resources.c.state, sa.func.count())
        query = query.where(_resources.c.kind.in_(kinds)).group_by(_resources.c.kind, _resources.c.state)
        with self._begin() as db:
            return {(kind, state): number for kind, state, number in db.execute(query)}

    def update(self, record: Record, new_events: Sequence[dict[str, Any]] = ()) -> Record:
        """Write a resource that was read at `record.version`, and append events, in one transaction.

        Events get the next sequence numbers of the name. Aborted (ETAG_MISMATCH) if somebody else wrote meanwhile.
        """
        with self._begin() as db:
            changed = db.execute(
                _resources.update()
                .where(_resources.c.name == record.name, _resources.c.version == record.version)
                .values(**{**_row(record), "version": record.version + 1})
            )
            if changed.rowcount != 1:
                raise Aborted(f"{record.name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
            _append(db, record.name, new_events)
        return replace(record, version=record.version + 1)

    def delete(self, name: str, etag: str = "") -> bool:
        """Remove a resource and its events; False if it is not there. Aborted (ETAG_MISMATCH)."""
        with self._begin() as db:
            # Deleting takes the lock before the version is looked at.
            gone = _resources.delete().where(_resources.c.name == name).returning(_resources.c.version)
            found = db.execute(gone).scalar()
            if found is None:
                return False
            if etag and etag != str(found):
                # Leaving the block by an error takes the deletion back.
                raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
            db.execute(_events.delete().where(_events.c.name == name))
        return True

    def events(self, name: str, after: int, limit: int = 500) -> list[tuple[int, dict[str, Any]]]:
        """(sequence, event) after a sequence number, in order."""
        query = (
            sa.select(_events.c.sequence, _events.c.body)
            .where(_events.c.name == name, _events.c.sequence > after)
            .order_by(_events.c.sequence)
            .limit(limit)
        )
        with self._begin() as db:
            return [(row.sequence, json.loads(row.body)) for row in db.execute(query)]

    def hold(self, lease: str, holder: str, for_s: float) -> bool:
        """Take or keep a lease, by the database's own clock; False while somebody else has it.

        A SQLite file belongs to one service, which has every lease: after a kill it need not wait for itself.
        """
        if self._engine.dialect.name == "sqlite":
            return True
        now = sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
        free = sa.or_(_leases.c.holder == holder, _leases.c.until < now)
        take = _leases.update().where(_leases.c.name == lease, free).values(holder=holder, until=now + for_s)
        try:
            with self._begin() as db:
                if db.execute(take).rowcount:
                    return True
                if db.execute(sa.select(_leases.c.name).where(_leases.c.name == lease)).scalar() is not None:
                    return False
                db.execute(_leases.insert().values(name=lease, holder=holder, until=now + for_s))
                return True
        except sa.exc.IntegrityError:
            return False  # somebody else was first

    def release(self, lease: str, holder: str) -> None:
        """Give a lease back, if it is held."""
        with self._begin() as db:
            db.execute(_leases.delete().where(_leases.c.name == lease, _leases.c.holder == holder))

    def close(self) -> None:
        self._engine.dispose()

    def _by_request(self, kind: str, request_id: str) -> tuple[Record, str] | None:
        query = sa.select(_resources).where(_resources.c.kind == kind, _resources.c.request_id == request_id)
        with self._begin() as db:
            row = db.execute(query).one_or_none()
        return (_record(row), row.request) if row else None

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            why = str(getattr(error, "orig", error)).partition("\n")[0]
            raise Unavailable(f"the database does not answer: {why}", reason="DATABASE_UNAVAILABLE") from error


def _tune_sqlite(connection: Any, _: Any) -> None:
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _append(db: sa.Connection, name: str, new_events: Sequence[dict[str, Any]]) -> None:
    """Give events the next numbers of `name`; the caller's transaction holds the lock on its resource."""
    if not new_events:
        return
    last = db.execute(sa.select(sa.func.max(_events.c.sequence)).where(_events.c.name == name)).scalar()
    rows = [
        {"name": name, "sequence": n, "body": json.dumps(event)} for n, event in enumerate(new_events, (last or 0) + 1)
    ]
    db.execute(_events.insert(), rows)


def _row(record: Record) -> dict[str, Any]:
    body = json.dumps(record.body, sort_keys=True)
    return {"name": record.name, "kind": record.kind, "state": record.state, "body": body, "version": record.version}


def _record(row: Any) -> Record:
    return Record(row.name, row.kind, row.state, json.loads(row.body), row.version, row.create_time)
