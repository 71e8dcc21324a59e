"""What the three programs share, in five folders: images, model, judging, delivery and running.

Importing anything from here first sets what the libraries read from the environment when they are imported.
"""

from workflow import settings as settings
