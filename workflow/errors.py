"""The one exception by which the programs stop for a reason that is not a bug. This file imports nothing."""


class WorkflowError(Exception):
    """What stops a program and is not a bug: one line that says what is wrong, where, and what to do."""
