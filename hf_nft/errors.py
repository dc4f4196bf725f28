"""Everything hf-nft raises on purpose.

    HFNFTError                        exit code 1
    ├── ConfigError(ValueError)       2   a setting is wrong, alone or beside another one
    ├── UnknownNameError(LookupError) 2   no attack, task, defense, module ... of that name
    ├── DataError(ValueError)         3   a data set, column, label or image is not usable
    ├── SuspectError(ValueError)      3   the model cannot be loaded, or has nothing to mask
    ├── UnsafeModelError              4   loading would run foreign code (pickle, remote code)
    ├── DivergedError(RuntimeError)   5   training met a non-finite loss
    ├── OutputError(OSError)          6   the output folder exists, is unfinished or cannot be written
    ├── NetworkError(ConnectionError) 7   the Hub could not be reached or refused
    └── MismatchError(ValueError)     8   a published model is not what its record claims

Every message says what was expected, what was found and how to mend it, in one or two lines.
"""

import difflib
from collections.abc import Iterable


class HFNFTError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class ConfigError(HFNFTError, ValueError):
    """A setting is out of range or contradicts another one."""

    exit_code = 2


class UnknownNameError(HFNFTError, LookupError):
    """A name matches nothing known; the message lists the nearest ones.

    Attributes:
        kind: What was looked for, such as `attack`.
        name: The name that was not found.
        known: All names that would have been found.
    """

    exit_code = 2

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        """Build the message from what was looked for and what there is.

        Args:
            kind: What was looked for, such as `attack`.
            name: The name that was not found.
            known: All names that would have been found.
            hint: How to list them; appended to the message.
        """
        self.kind, self.name, self.known = kind, name, list(known)
        close = difflib.get_close_matches(name, self.known, n=3, cutoff=0.4) or self.known[:8]
        message = f"{kind} '{name}' is not known ({len(self.known)} candidates). Closest: {', '.join(close) or 'none'}."
        super().__init__(f"{message} {hint}".strip())


class DataError(HFNFTError, ValueError):
    """A data set, column, label or example cannot be used."""

    exit_code = 3


class SuspectError(HFNFTError, ValueError):
    """The suspect model cannot be loaded or has nothing to mask."""

    exit_code = 3


class UnsafeModelError(HFNFTError):
    """Loading the model would run code that came with it."""

    exit_code = 4


class DivergedError(HFNFTError, RuntimeError):
    """Training met a non-finite loss; the last good state was kept."""

    exit_code = 5


class OutputError(HFNFTError, OSError):
    """The output folder exists, holds an unfinished run, or cannot be written."""

    exit_code = 6


class NetworkError(HFNFTError, ConnectionError):
    """The Hub could not be reached, or refused."""

    exit_code = 7


class MismatchError(HFNFTError, ValueError):
    """A published model is not what its record claims."""

    exit_code = 8
