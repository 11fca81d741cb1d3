"""Long documents that every Python installation has: the manuals of its standard library.

Evaluation text only. Calibration uses `pydoc_data.topics`, which is not among them.
"""

from __future__ import annotations

import importlib
import pydoc

MODULES = (
    "argparse", "asyncio", "calendar", "collections", "concurrent.futures", "configparser",
    "contextlib", "csv", "ctypes", "datetime", "decimal", "difflib", "email.message", "enum",
    "fractions", "ftplib", "functools", "gettext", "heapq", "http.client", "imaplib", "inspect",
    "io", "ipaddress", "itertools", "json", "locale", "logging", "mailbox", "multiprocessing",
    "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "random",
    "re", "sched", "selectors", "shelve", "shutil", "smtplib", "socket", "sqlite3", "ssl",
    "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit",
    "tokenize", "traceback", "doctest", "typing", "unittest", "urllib.request", "uuid", "warnings",
    "weakref", "xml.dom.minidom", "xmlrpc.client", "zipfile",
)  # fmt: skip


def manual(name: str) -> str:
    """The manual of one module, as `help()` prints it.

    Raises
    ------
    ValueError
        This Python was built without the module.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"evaluation reads the manuals of Python's standard library, and {name} cannot be imported"
            f" here ({error}): use a Python that has all of it."
        ) from None
    return pydoc.plain(pydoc.render_doc(module))


def documents(count: int, min_chars: int) -> list[str]:
    """`count` different documents of at least `min_chars` characters, the same ones every time.

    Raises
    ------
    ValueError
        There is not that much text, or a module is missing.
    """
    found: list[str] = []
    text = ""
    for name in MODULES:
        text += manual(name) + "\n"
        if len(text) >= min_chars:
            found.append(text)
            text = ""
        if len(found) == count:
            return found
    raise ValueError(
        f"{count} documents of {min_chars} characters are more than the standard library's manuals "
        f"hold ({len(found)}): ask for fewer or shorter ones."
    )
