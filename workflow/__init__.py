"""What the three programs share, in six packages: data, model, evaluation, tracking, orchestration and serving.

Importing anything from here first sets what the libraries read from the environment when they are imported.
"""

from workflow import settings as settings
