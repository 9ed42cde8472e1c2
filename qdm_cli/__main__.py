"""`python -m qdm_cli`."""

from qdm_cli.main import main

if __name__ == "__main__":
    main()
