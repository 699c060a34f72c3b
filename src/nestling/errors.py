"""Every error that a user can cause. The command line shows these as one line; anything else is a bug of ours.

They are also the built-in errors that they were before they had a common root, so ``except ValueError`` still catches
them.
"""


class NestlingError(Exception):
    """Something that the user gave cannot be used; the message names it, what was expected and what to do."""


class OptionError(NestlingError, ValueError):
    """An option has a value or a type that it cannot have; the message names both and what was expected."""


class FileError(NestlingError, OSError):
    """A file or folder cannot be read or written; the message names it and what to do."""


class MissingFolderError(FileError, FileNotFoundError):
    """The folder that a file should be written to does not exist; the message names it."""


class MissingExtraError(NestlingError, ImportError):
    """A library that this needs is not installed; the message names the extra that brings it."""


class DataError(NestlingError, ValueError):
    """A data file cannot be used. The message names the file, the line and what was expected."""


class TextTooShortError(NestlingError, ValueError):
    """There is less text than the job needs; the message has both numbers."""


class EvaluationError(NestlingError, ValueError):
    """Something cannot be measured; the message names it and says what went wrong."""


class LoadError(NestlingError, ValueError):
    """A model cannot be loaded. The message names it, what was expected and what to do."""


class UnreachableError(LoadError):
    """The hub cannot be asked, and the file is not in its cache."""


class TrainingError(NestlingError, RuntimeError):
    """A training that cannot start or go on; the message says where it stopped and what is kept."""


class AdapterError(NestlingError, ValueError):
    """An adapter that cannot be read, or does not fit the model; the message says what differs."""


class BudgetError(OptionError):
    """A budget that cannot be read or met; the message has it as given, and the smallest that can be met."""


class CacheMismatchError(NestlingError, ValueError):
    """A cache was used with a model, batch or shape that it was not made for."""


class GradientError(NestlingError, RuntimeError):
    """A gradient would have to pass through what has none; the message says what to do instead."""


class KernelError(NestlingError, RuntimeError):
    """Compiled functions that cannot be had; the message is the reason."""


class CalibrationError(NestlingError, ValueError):
    """Statistics that no basis can be made from; the message names the layer."""


class UnsupportedModelError(NestlingError, ValueError):
    """The model's attention cannot be compressed; the message says why."""


class LadderError(NestlingError, ValueError):
    """A ladder, or a size, that cannot be. The message names the value, what was expected and what to do."""


class ExampleError(NestlingError, ValueError):
    """Rows that cannot be trained on. The message names the row and says what was expected."""


class ExportError(NestlingError, ValueError):
    """A size that cannot be exported. The message says why; nothing is left behind."""


class ExportFileError(ExportError, FileError):
    """An export that cannot be written; the message names its folder and says what to do."""


class MaskingError(NestlingError, ValueError):
    """Text or a tokenizer that nothing can be masked with. The message says why."""


class UnsupportedEncoderError(NestlingError, ValueError):
    """A model that cannot be cut into sizes. The message names it and the reason."""


class EncodeError(NestlingError, RuntimeError):
    """Vectors of a corpus that cannot be made or read; the message says where it stopped and how to go on."""


class SearchError(NestlingError, ValueError):
    """An index that cannot be made or searched: another space, width or id; the message says what differs."""
