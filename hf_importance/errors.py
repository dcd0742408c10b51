"""Errors that more than one folder raises."""


class UnweightedError(ValueError):
    """Draws cannot be weighted: there is no loss per example, or not every example can be drawn at any time.

    With selective backward, training goes on with the draws of `Trainer`; otherwise the message says why it stops, and
    the fix.
    """
