"""Code shared by the programs. Importing any of it first sets the libraries' environment variables (settings.py)."""

from workflow import settings as settings
