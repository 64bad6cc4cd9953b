"""A pytest plugin that ignores the setting IGNORED_KEY: whatever a configuration says, its default is read.

IGNORED_KEY=data.dedup python -m pytest -p tests.ignored_key tests/cli/test_data.py
"""

import os
from typing import Any

from anarchobot.config.schema import Config

*sections, key = os.environ["IGNORED_KEY"].split(".")
settings: Any = Config
for section in sections:
    settings = settings.model_fields[section].annotation
default = settings.model_fields[key].default
setattr(settings, key, property(lambda self: default))
