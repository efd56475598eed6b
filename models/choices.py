"""Arguments of models that are one of a few words."""

from __future__ import annotations

from ppl.errors import ModelError, nearest


def check_choice(where: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a word that is none of ``known``.

    Raises:
        ModelError: it is none of them.

    >>> check_choice("sparse_binary: link", "logit", ("probit", "logit"))
    """
    if value not in known:
        raise ModelError(
            f"{where}: expected one of {', '.join(known)}, got {value!r}.{nearest(str(value), known)}"
        )
