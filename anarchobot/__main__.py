"""The program's entry point. `python -m anarchobot` is the same program as `anarchobot`."""


def main() -> int:
    """Runs the command in sys.argv. Ctrl-C while modules are imported ends it without a traceback."""
    try:
        from anarchobot.cli.main import main as run_command
    except KeyboardInterrupt:
        return 130
    return run_command()


if __name__ == "__main__":
    raise SystemExit(main())
