"""Entry point of the `frostline` command."""

from __future__ import annotations

import sys

import typer

from frostline.cli.device import device
from frostline.cli.emulate import emulate
from frostline.cli.explain import explain
from frostline.cli.export import export
from frostline.cli.inspection import inspect
from frostline.cli.serve import serve
from frostline.cli.simulate import simulate
from frostline.cli.study import study
from frostline.protocol.errors import FrostlineError, RunError

app = typer.Typer(
    name="frostline",
    help="""Train a neural network across phones and boards that cannot hold its whole training state.

    A model is cut into blocks. One block at a time is trained on the devices, with a small output module standing in
    for the rest; once it has converged it is frozen and the next one begins.

    Try it: [bold]frostline emulate --config examples/quickstart.toml[/bold]
    """,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(emulate)
app.command()(export)
app.command()(inspect)
app.command()(serve)
app.command()(device)
app.command()(simulate)
app.command()(explain)
app.command()(study)


def main() -> None:
    """Run the command; errors meant for people are one line, with exit code 2 for usage and 1 for a failed run."""
    try:
        app()
    except* FrostlineError as group:
        raise SystemExit(_fail(_first(group))) from None
    except* ImportError as group:
        raise SystemExit(_fail(_missing_extra(_first(group)))) from None
    except* OSError as group:
        raise SystemExit(_fail(RunError(f"this machine: {_first(group)}"))) from None
    except* KeyboardInterrupt:
        raise SystemExit(130) from None


def _fail(error: BaseException) -> int:
    print(f"frostline: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
    return error.exit_code if isinstance(error, FrostlineError) else 1


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _missing_extra(error: BaseException) -> RunError:
    name = getattr(error, "name", None) or str(error)
    return RunError(f"package {name!r} is not installed: pip install 'frostline[export,server,emulate]'")


if __name__ == "__main__":
    main()
