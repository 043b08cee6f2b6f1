"""`python -m services.gateway.new_key NAME`: an API key, and the lines of the access file that let it in.

The key is printed once and is nowhere else: the access file has its SHA-256 only. That a plain hash is enough is for
its 256 random bits; a password that somebody thought of must not be used as a key.
"""

import argparse
import hashlib
import secrets

from pydantic import ValidationError

from services.gateway.access_file import ApiKey


def make(name: str) -> tuple[str, ApiKey]:
    """A new key and what the access file has of it. Raises ValueError for a name that is none."""
    key = f"ik_{secrets.token_urlsafe(32)}"
    try:
        return key, ApiKey(name=name, sha256=hashlib.sha256(key.encode()).hexdigest())
    except ValidationError:
        raise ValueError(f"{name!r} is not a name; accepted: up to 63 of a-z, 0-9 and -") from None


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(prog="python -m services.gateway.new_key", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="who will have it; the caller is then key/NAME")
    arguments = parser.parse_args()
    try:
        key, entry = make(arguments.name)
    except ValueError as error:
        parser.error(str(error))
    print(f"The key, for {entry.name}:\n\n    {key}\n")
    print(f"In the access file:\n\nkeys:\n  - name: {entry.name}\n    sha256: {entry.sha256}")


if __name__ == "__main__":
    main()
