"""The one exception that the command line turns into a sentence and exit code 2."""


class InputError(ValueError):
    """A mistake of the user's, told in one sentence: the rule, what came, what to do."""
