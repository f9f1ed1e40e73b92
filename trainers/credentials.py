"""Credentials in text: where a user wrote one, and how it is kept out of what we write and print.

A secret belongs into the environment or into a file that its client reads. What stands in sweep.yaml is copied
into the run's folder, its report and manifests; what a client puts into an error goes into logs.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

MASK = "***"
LEAST_CHARS = 12
"""Of a variable's value: a shorter one (true, local) stands in many texts."""
SECRET_NAME = re.compile(
    r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_STRING|API_?KEY|ACCESS_?KEY|ACCOUNT_KEY"
    r"|PRIVATE_KEY|_AUTH)"
)
"""Names of variables whose values are secrets. A path is none: it says where the secret is."""
IN_URL = re.compile(
    r"(?P<start>\b[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?P<secret>[^\s/?#@:'\"\[]*:(?!\d+(?:[/?#]|$))[^\s@'\"]*|[^\s/?#@:'\"]+)(?=@)"
)
"""user:password@ or token@ of a URL. A password may hold a slash; a number behind the colon is a port."""
USER_ALONE = ("ssh", "git+ssh", "sftp", "abfs", "abfss")
"""Protocols whose URLs name a user, or a container, before the @."""
IN_QUERY = re.compile(
    r"(?i)(?P<start>[?&;](?:[a-z0-9_.-]*(?:token|secret|password|passwd|api_?key|access_?key|signature|credential)"
    r"[a-z0-9_.-]*|sig|pwd|key|auth)=)(?P<secret>[^\s&;#'\"]+)"
)
URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+")
KNOWN = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}"
    r"|wandb_v1_[A-Za-z0-9_]{16,})"
)
"""Tokens that their issuers made to be recognised: Hugging Face, OpenAI, GitHub, GitLab, AWS, Slack, Google."""
INSTEAD = (
    ("hf_", "set HF_TOKEN in the environment, or run `hf auth login`"),
    ("wandb", "set WANDB_API_KEY in the environment"),
    ("s3", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials"),
    ("AKIA", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials"),
    ("gs", "set GOOGLE_APPLICATION_CREDENTIALS to a key file"),
    ("abfs", "set AZURE_STORAGE_CONNECTION_STRING in the environment"),
    ("ray", "set RAY_AUTH_TOKEN in the environment, or write ~/.ray/auth_token"),
)
OTHERWISE = "set it in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, WANDB_API_KEY, ...), or write ~/.netrc"


def credential_in(text: str) -> str | None:
    """What credential stands in a text and where it belongs, without the credential; None: there is none."""
    for found, what in _found(text):
        hints = (hint for start, hint in INSTEAD if found.startswith(start))
        return f"must hold no credentials, holds {what}; {next(hints, OTHERWISE)}"
    values = secret_values(os.environ)
    name = next((name for name, value in values.items() if value in text), None)
    return name and f"must hold no credentials, holds the value of {name}; the variable is enough"


def masked(text: str) -> str:
    """A text without the credentials in it: those of URLs, known kinds of token, and what this process's
    environment holds under a secret's name."""
    for value in sorted(secret_values(os.environ).values(), key=len, reverse=True):
        text = text.replace(value, MASK)
    text = IN_URL.sub(lambda found: _kept(found) or f"{found['start']}{MASK}", text)
    text = IN_QUERY.sub(lambda found: f"{found['start']}{MASK}", text)
    return KNOWN.sub(MASK, text)


def mask_logs() -> None:
    """Makes this process's log records hold no credentials: a client of the hub or of a store logs the URLs at
    which it tries again."""
    make = logging.getLogRecordFactory()
    if getattr(make, "masks", False):
        return

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        made.msg, made.args = masked(made.getMessage()), ()
        return made

    record.masks = True  # pyright: ignore[reportFunctionMemberAccess]
    logging.setLogRecordFactory(record)


def secret_values(environ: Mapping[str, str]) -> dict[str, str]:
    """Variable -> value, of those that hold a secret."""
    return _secret_values(tuple(environ.items()))


@lru_cache(maxsize=4)
def _secret_values(variables: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables
        if SECRET_NAME.search(name) and len(value) >= LEAST_CHARS and not _is_path(value)
    }


def _is_path(value: str) -> bool:
    """A secret of random characters may begin with a slash, too."""
    return value[0] in "/~." and os.path.exists(os.path.expanduser(value))


def _found(text: str) -> Iterator[tuple[str, str]]:
    """(What it begins with, what it is) of each credential that shows as one."""
    for found in KNOWN.finditer(text):
        yield found[0], f"a token ({found[0][:3]}...)"
    for found in IN_URL.finditer(text):
        if not _kept(found):
            yield found["start"], f"a user or token before the @ of a URL ({found['start']}...)"
    for url in URL.findall(text):  # a comment may have a question mark, too
        for found in (each for each in IN_QUERY.finditer(url) if each["secret"] != MASK):
            yield url, f"a secret in a URL ({found['start'][1:]}...)"


def _kept(found: re.Match[str]) -> str:
    """What is no secret although it stands before an @."""
    alone = found["start"].lower().removesuffix("://") in USER_ALONE and ":" not in found["secret"]
    return found[0] if alone or found["secret"] == MASK else ""
