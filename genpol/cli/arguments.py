"""Command lines that are not Hydra's."""

from __future__ import annotations

import argparse

from genpol.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaint is one line that names the help."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise what the command line prints.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; see `{self.prog} --help`")
