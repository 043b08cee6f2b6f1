"""The `inkwell` command.

Results go to stdout and nothing else does; progress and errors go to stderr. Exit codes: `inkwell.cli.report.Exit`.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process when None); answers its exit code, raises nothing."""
    from inkwell.cli import report
    from inkwell.errors import InkwellError

    try:
        from inkwell.cli.app import app

        report.prepare_streams()
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="inkwell")
    except SystemExit as exit_request:  # how typer ends, well or with a usage error
        return exit_request.code if isinstance(exit_request.code, int) else report.Exit.FAILED
    except KeyboardInterrupt:
        return report.Exit.INTERRUPTED
    except report.PipeClosed:
        return report.Exit.PIPE_CLOSED
    except InkwellError as error:
        report.explain(error)
        return report.exit_code(error)
    except OSError as error:
        report.note(str(error))
        return report.Exit.FAILED
    return report.Exit.OK
