"""The one exception a user's mistake raises: the CLI prints it as one line and exits with 2."""


class InputError(ValueError):
    """Bad input; the message names the thing, what was expected and what came."""
