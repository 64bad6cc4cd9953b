"""`python -m anarchobot` is the same program as `anarchobot`."""

from anarchobot.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
