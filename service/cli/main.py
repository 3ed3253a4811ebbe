"""The console script ``lastcall``: serve, print the settings in force, and run commands for the store."""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import service
from service import __version__
from service.cli import exit_codes
from service.cli.certificates import add_certificates_command, run_certificates_command
from service.cli.client_commands import CLIENT_COMMANDS, add_client_commands, run_client_command
from service.cli.store_commands import add_commands, run_store_command
from service.errors import StartupError
from service.setting_sources import OPTIONS, SECRETS, Sources, read_sources
from service.setting_types import shown_store_url, shown_url
from service.settings import NamedKey, Settings, Upstream, check_stand_in

_BIND_HELP = "host:port or, with api_keys, unix:path, in place of the setting; port 0 takes a free one"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit code."""
    encoding = sys.stdout.encoding
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # JSON and TOML are always UTF-8
    arguments = _parser().parse_args(argv)
    if arguments.command in CLIENT_COMMANDS:
        return run_client_command(arguments, encoding=encoding)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    """Run a command that is no client of a server."""
    overrides = {name: value for name in OPTIONS if (value := getattr(arguments, OPTIONS[name], None))}
    try:
        if arguments.command == "certificates":  # needs no settings
            return run_certificates_command(arguments)
        sources = read_sources(**overrides)
        settings = sources.settings()
        if arguments.command in ("serve", "config"):
            check_stand_in(settings, binds=[settings.bind])
            _check_scripts(settings, sources)
        if arguments.command == "config":
            sys.stdout.write(_shadowed_by_folder() + effective(settings, sources))
            return 0
        if arguments.command != "serve":
            return run_store_command(settings, arguments)
        # Imported this late because the import takes a moment, and wrong settings should be reported at once.
        if arguments.reload:
            from service.hosting.reload import serve_and_reload  # noqa: PLC0415

            arguments_of_each = [f"--{OPTIONS[name]}={value}" for name, value in overrides.items()]
            if arguments.workers:
                arguments_of_each.append(f"--workers={arguments.workers}")
            return serve_and_reload(settings, config_file=sources.file, arguments=arguments_of_each)
        from service.hosting.serve import serve  # noqa: PLC0415

        return serve(settings, workers=arguments.workers, overrides=overrides)
    except StartupError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"lastcall: {line}\n")
        return exit_codes.REFUSED
    except UnicodeEncodeError as error:  # an argument, or the working directory
        sys.stderr.write(f"lastcall: {error.object!r} should be UTF-8\n")
        return exit_codes.REFUSED
    except KeyboardInterrupt:  # a command for the store
        return exit_codes.INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lastcall",
        description="An HTTP server for AI chats: it stores conversations and streams replies.",
        epilog="Settings come from LASTCALL_* variables and lastcall.toml: lastcall config prints them.",
    )
    parser.add_argument("--version", action="version", version=f"lastcall {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="serve until a signal stops the server")
    serve.add_argument("--bind", metavar="ADDRESS", help=_BIND_HELP)
    serve.add_argument(
        "--workers",
        metavar="N",
        type=_count,
        default=0,
        help="serve with N processes; SIGHUP then starts new ones first",
    )
    serve.add_argument("--reload", action="store_true", help="start anew when the code or lastcall.toml changes")
    commands.add_parser("config", help="print the settings in force, as TOML, and where each comes from")
    add_commands(commands)
    add_certificates_command(commands)
    add_client_commands(commands)
    return parser


def _count(text: str) -> int:
    """Raises: ArgumentTypeError: This is not a number from 1 on."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number from 1 on")
    return int(text)


def _shadowed_by_folder() -> str:
    """Return a warning if hypercorn's command would import another ``service`` from the working directory; else "".

    hypercorn's command searches the working directory first, and with workers it returns 0 after such a failure.
    """
    for found in (Path("service/__init__.py"), Path("service.py")):
        if found.is_file() and not found.samefile(service.__file__):
            return f"# caution: hypercorn would find {found} of this folder in Lastcall's place; start lastcall serve\n"
    return ""


def _check_scripts(settings: Settings, sources: Sources) -> None:
    """Raises: SettingsError: A ``scripted:`` URL has a parameter that is unknown or wrong."""
    places = [sources.place("upstreams", number, "url") for number, _ in enumerate(settings.upstreams)]
    for number, upstream in enumerate(settings.all_upstreams):
        if upstream.url.startswith("scripted:") and upstream.url != "scripted:":
            from service.supervisor import check_script  # noqa: PLC0415  takes a moment to import

            check_script(upstream.url, setting=places[number] if places else sources.place("model_url"))


def effective(settings: Settings, sources: Sources) -> str:
    """Return the settings as an equal ``lastcall.toml``, without the secrets.

    A value that is not a default has a comment that tells its source.
    """
    return "\n".join([*_top_level(settings, sources), *_upstream_tables(settings.upstreams)]) + "\n"


def _top_level(settings: Settings, sources: Sources) -> Iterator[str]:
    replaced = {"model_url", "model_api_key", "model_continuation"} if settings.upstreams else set()
    for name in Settings.model_fields:
        if name == "upstreams" or name in replaced:
            continue
        if name == "api_keys":
            yield from _named_keys(settings)
        value = settings.default_model if name == "model" else getattr(settings, name)
        origin = sources.origins.get(name)
        yield _assignment(name, value) + (f"  # {origin}" if origin else "")


def _named_keys(settings: Settings) -> Iterator[str]:
    """Comments, because a table without its key would be refused."""
    for key in settings.api_keys:
        if isinstance(key, NamedKey):
            yield f"# a key of {key.name!r}, which may {' and '.join(key.may)}:"


def _upstream_tables(upstreams: Sequence[Upstream]) -> Iterator[str]:
    for upstream in upstreams:
        yield "\n[[upstreams]]"
        yield from (_assignment(name, getattr(upstream, name)) for name in Upstream.model_fields)


def _assignment(name: str, value: object) -> str:
    if value is None or (name in SECRETS and not value):
        return f"# {name} is not set"
    if name in SECRETS:
        return f"# {name} is set, and hidden"
    if name in ("url", "model_url"):
        value = shown_url(str(value))
    if name == "store_url":
        value = shown_store_url(str(value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return f"{name} = {{{', '.join(f'{_toml(key)} = {_toml(part)}' for key, part in value.items())}}}"
    return f"{name} = {_toml(value)}"


def _toml(value: object) -> str:
    """A string, a number or a list of them as TOML: their JSON is TOML, too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
