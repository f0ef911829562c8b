"""`titans-export streams`: the streams in a server's store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .command import CONTEXT, Command, emit, json_option
from .options import PATH
from .table import size, table

if TYPE_CHECKING:
    from ..serve.operate import Shelf

_STORE = click.argument("store")
_STREAM = click.argument("stream", metavar="OWNER/NAME")
_KEY = click.option("--encryption-key", default="", metavar="FILE", help="Key of an encrypted store.")
_BUNDLE = click.option("--bundle", type=PATH, help="The bundle that the streams belong to.")


class _Group(click.Group):
    """The group. Its help shows an example of each command."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples."""
        with formatter.section("Examples"):
            for command in self.commands.values():
                formatter.write(f"  {getattr(command, 'examples', ('',))[0]}\n")


@click.group(cls=_Group, context_settings=CONTEXT)
def streams() -> None:
    """List, check and move the streams of a server's store.

    The commands also work while servers use the store. No command prints text or tokens of users.
    """


def _command(*examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    return streams.command(cls=Command, examples=examples)


def _shelf(store: str, key: str, create: bool = False) -> Shelf:
    from ..serve.operate import Shelf

    return Shelf(store, key, create)


@_command("titans-export streams list titans-streams")
@_STORE
@_KEY
@json_option
def list(store: str, encryption_key: str, as_json: bool) -> None:
    """List all streams: owner, name, position, size and the time of the last call."""
    from ..serve.journal import read_journal
    from ..serve.operate import describe

    shelf = _shelf(store, encryption_key)
    journals = [read_journal(place) for place in shelf.places()]
    found = [describe(journal) for journal in journals if journal is not None]
    if as_json:
        emit({"store": shelf.store.url, "streams": found})
        return
    rows = [
        (f"{one['owner']}/{one['name']}", f"{one['position']:,}", size(one["bytes"]), str(one["journalled_calls"]),
         one["updated"])
        for one in found
    ]  # fmt: skip
    if rows:
        click.echo(table(("stream", "position", "size", "calls since the snapshot", "last call"), rows))
    click.echo(f"{len(rows)} streams in {shelf.store.url}")


@_command("titans-export streams show titans-streams default/alice")
@_STORE
@_STREAM
@_KEY
@json_option
def show(store: str, stream: str, encryption_key: str, as_json: bool) -> None:
    """Show position, snapshot, journal, marks and sizes of a stream."""
    from ..serve.operate import describe, find

    found = describe(find(_shelf(store, encryption_key).place(stream)))
    if as_json:
        emit(found)
        return
    for name, value in found.items():
        click.echo(f"{name.replace('_', ' ') + ':':<20} {value}")


@_command(
    "titans-export streams verify titans-streams --bundle mac.titans",
    "titans-export streams verify titans-streams default/alice",
)
@_STORE
@click.argument("stream", metavar="[OWNER/NAME]", required=False)
@_BUNDLE
@_KEY
@json_option
def verify(store: str, stream: str | None, bundle: Path | None, encryption_key: str, as_json: bool) -> None:
    """Check every record and file; with --bundle also restore and replay each stream. Exit code 1 if one is damaged."""
    from ..errors import TitansError
    from ..serve.errors import ServeError
    from ..serve.journal import read_journal
    from ..serve.operate import check_bundle
    from ..serve.operate import verify as check

    check_bundle(bundle)
    shelf = _shelf(store, encryption_key)
    results, damaged = [], []
    for place in [shelf.place(stream)] if stream else shelf.places():
        try:
            if stream is None and read_journal(place) is None:
                continue
            results.append(check(place, bundle))
        except (TitansError, RuntimeError) as error:  # the runtime's errors are RuntimeError
            damaged.append({"owner": place.owner, "name": place.name, "error": str(error)})
    if as_json:
        emit({"store": shelf.store.url, "good": results, "damaged": damaged})
    else:
        for one in damaged:
            click.echo(f"{one['owner']}/{one['name']}: {one['error']}")
        click.echo(f"{len(results)} streams are good, {len(damaged)} damaged")
    if damaged:
        problem = f"{len(damaged)} of {len(results) + len(damaged)} streams are damaged"
        raise ServeError(500, "E1213", "streams", problem, "restore older copies of their folders")


@_command("titans-export streams compact titans-streams default/alice --bundle mac.titans")
@_STORE
@_STREAM
@click.option("--bundle", type=PATH, required=True, help="The bundle that the stream belongs to.")
@_KEY
@json_option
def compact(store: str, stream: str, bundle: Path, encryption_key: str, as_json: bool) -> None:
    """Write a snapshot, and remove older ones and the journal before it."""
    from ..serve.operate import check_bundle
    from ..serve.operate import compact as run

    check_bundle(bundle)
    found = run(_shelf(store, encryption_key).place(stream), bundle)
    if as_json:
        emit(found)
    else:
        click.echo(f"{found['owner']}/{found['name']}: {size(found['bytes_before'])} to {size(found['bytes'])}")


@_command("titans-export streams move titans-streams default/alice other-streams default/alice")
@_STORE
@_STREAM
@click.argument("target_store")
@click.argument("target_stream", metavar="OWNER/NAME")
@_KEY
@click.option("--target-encryption-key", default="", metavar="FILE", help="Key of the target store.")
@json_option
def move(
    store: str,
    stream: str,
    target_store: str,
    target_stream: str,
    encryption_key: str,
    target_encryption_key: str,
    as_json: bool,
) -> None:
    """Move a stream to another name, owner or store, with its marks and stored replies."""
    from ..serve.operate import move as run

    target = _shelf(target_store, target_encryption_key, create=True).place(target_stream)
    found = run(_shelf(store, encryption_key).place(stream), target)
    if as_json:
        emit(found)
    else:
        click.echo(f"{stream} is now {target_stream} in {target_store}, at position {found['position']:,}")
