"""One clear line instead of a traceback: errors that the user can mend."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave or keeps is wrong. The message says what, where, and what to do; the program ends with
    exit code 2.
    """


def exit_on_user_error(main: Callable) -> Callable:
    """Wrap a program's entry: a UserError prints `error: <message>` and exits with code 2, Ctrl-C exits with 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print(
                "interrupted. What was saved is whole: the same command goes on from there.",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(130)

    return wrapped
