"""The one exception that means: the input is wrong, and here is what to do about it."""


class InputError(Exception):
    """Bad input from the user: a missing folder, a malformed line, a checkpoint of another network.

    The message is one line that names the thing and the remedy. The command-line programs print it as
    ``error: ...`` and exit with status 2, without a traceback.
    """


def one_line(error: Exception) -> str:
    """The message of an error, also when a data loading process passed it on inside its traceback."""
    passed_on = f"{InputError.__module__}.{InputError.__qualname__}: "
    return " ".join(str(error).rpartition(passed_on)[2].split())


def find_input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind an exception, if there is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
