"""`anarchobot verify`, as a script: scripts/setup_verification.py CONFIG [KEY=VALUE...] [--json] [--no-calibration]"""

import sys

from anarchobot.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
