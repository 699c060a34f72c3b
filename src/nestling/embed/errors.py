"""Errors of the embedding wing's exports."""


class ExportError(ValueError):
    """A cup that cannot be exported. The message says why; nothing is left behind."""
